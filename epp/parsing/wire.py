"""The little of protobuf's and gRPC's wire format that parsers of gRPC APIs need.

No generated code: of a message with fields by the dozen two or three matter, and the deciding core imports no protobuf. Whatever the
bytes are, nothing is raised but BadRequestError, and the work is bounded by their number.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator

from epp.errors import BadRequestError

VARINT, FIXED64, LENGTH, FIXED32 = 0, 1, 2, 5
FIELDS_MAX = 1 << 16
"""In one message."""
TOKENS_MAX = 1 << 17
"""Token ids of one prompt that are read; what comes after them is only counted."""
FRAME_BYTES_MAX = 1 << 18
"""Of a response's message; a longer one is skipped."""
_VARINT_BYTES_MAX = 10
_ENDS = bytes(range(128, 256))


def fields(message: bytes | memoryview) -> Iterator[tuple[int, int, int, memoryview]]:
    """(number, wire type, value, bytes) of each field: the value of a varint, the bytes of anything else."""
    view = memoryview(message)
    at, end = 0, len(view)
    nothing = view[:0]
    for _ in range(FIELDS_MAX):
        if at >= end:
            return
        tag, at = _varint(view, at)
        number, wire = tag >> 3, tag & 7
        if wire == VARINT:
            value, at = _varint(view, at)
            yield number, wire, value, nothing
            continue
        if wire == LENGTH:
            size, at = _varint(view, at)
        elif wire == FIXED64:
            size = 8
        elif wire == FIXED32:
            size = 4
        else:
            raise BadRequestError("the gRPC message is malformed: unknown wire type")
        if size > end - at:
            raise BadRequestError("the gRPC message is malformed: a field is longer than the message")
        yield number, wire, 0, view[at : at + size]
        at += size
    if at < end:
        raise BadRequestError(f"the gRPC message has more than {FIELDS_MAX} fields")


def _varint(view: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    for byte in view[at : at + _VARINT_BYTES_MAX]:
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
    raise _endless()


def numbers(message: bytes | memoryview) -> dict[int, int]:
    """The varint fields of a message."""
    return {number: value for number, wire, value, _ in fields(message) if wire == VARINT}


def _endless() -> BadRequestError:
    return BadRequestError("the gRPC message is malformed: a number does not end")


def packed(data: bytes | memoryview, count_max: int = TOKENS_MAX) -> tuple[array[int], int]:
    """A packed list of 32-bit numbers: at most the first `count_max` of them, and how many there are."""
    data = bytes(data)
    if data and data[-1] >= 0x80:
        raise _endless()
    count = len(data.translate(None, _ENDS))
    found: list[int] = []
    value = shift = 0
    for byte in data[: count_max * _VARINT_BYTES_MAX]:
        if byte < 0x80:
            if len(found) == count_max:
                break
            found.append(value | byte << shift)
            value = shift = 0
        else:
            value |= (byte & 0x7F) << shift
            shift += 7
            if shift > 7 * _VARINT_BYTES_MAX:
                raise _endless()
    try:
        return array("I", found), count
    except OverflowError:  # of a longer number the lower bits count, as protobuf has it
        return array("I", [number & 0xFFFF_FFFF for number in found]), count


def unframed(body: bytes) -> memoryview:
    """The message of a gRPC request that has one."""
    if len(body) < 5:
        raise BadRequestError("the request body is no gRPC message")
    if body[0]:
        raise BadRequestError("compressed gRPC messages are not understood: have clients send them uncompressed")
    size = int.from_bytes(body[1:5], "big")
    if size > len(body) - 5:
        raise BadRequestError("the gRPC message is shorter than it says")
    return memoryview(body)[5 : 5 + size]


class Frames:
    """Splits a gRPC response, cut anywhere, into its messages. Compressed ones and those too long to keep are left out."""

    __slots__ = ("_held", "_skip")

    def __init__(self) -> None:
        self._held = b""
        self._skip = 0

    def feed(self, chunk: bytes) -> list[bytes]:
        found: list[bytes] = []
        data = self._held + chunk if self._held else chunk
        at = 0
        while True:
            if self._skip:
                skipped = min(self._skip, len(data) - at)
                at += skipped
                self._skip -= skipped
            if len(data) - at < 5:
                break
            size = int.from_bytes(data[at + 1 : at + 5], "big")
            if data[at] or size > FRAME_BYTES_MAX:
                at, self._skip = at + 5, size
            elif len(data) - at < 5 + size:
                break
            else:
                found.append(data[at + 5 : at + 5 + size])
                at += 5 + size
        self._held = data[at:]
        return found
