"""A gRPC call on an HTTP/2 stream, and its framing inside DATA: a flag byte, four bytes of length, the message (gRPC over HTTP/2, Length-Prefixed-Message)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from epp.extproc.limits import Limits
from epp.extproc.messages import Reply
from epp.extproc.session import Session

Trailers = tuple[tuple[bytes, bytes], ...]

PREFIX_BYTES = 5
OK, INVALID_ARGUMENT, UNIMPLEMENTED, INTERNAL, UNAVAILABLE = 0, 3, 12, 13, 14
"""gRPC status codes."""


def framed(message: bytes) -> bytes:
    """An uncompressed message with its prefix."""
    return b"\0" + len(message).to_bytes(4, "big") + message


class Deframer:
    """Messages of one stream out of its DATA, however it is cut. What is held of an unfinished message counts in `limits`."""

    __slots__ = ("_bytes_max", "_held_bytes", "_limits", "_parts", "_wanted_bytes", "compressed", "too_large_bytes")

    def __init__(self, limits: Limits, message_bytes_max: int) -> None:
        self._limits = limits
        self._bytes_max = message_bytes_max
        self._parts: list[bytes] = []
        self._held_bytes = 0
        self._wanted_bytes = 0
        self.compressed = False
        """The peer compresses, which we do not offer: nothing more comes out."""
        self.too_large_bytes = 0
        """Length of a message over the limit: nothing more comes out."""

    def feed(self, data: bytes) -> Sequence[bytes]:
        """The messages that `data` completes. Look at `compressed` and `too_large_bytes` afterwards."""
        if self._parts:
            self._hold(data)
            if self._held_bytes < self._wanted_bytes:
                return ()
            data = b"".join(self._parts)
            self.drop()
        size = len(data)
        if size >= PREFIX_BYTES and data[0] == 0 and int.from_bytes(data[1:PREFIX_BYTES], "big") == size - PREFIX_BYTES <= self._bytes_max:
            return (data[PREFIX_BYTES:],)  # the usual case: one message, whole
        messages: list[bytes] = []
        at = 0
        while size - at >= PREFIX_BYTES:
            length = int.from_bytes(data[at + 1 : at + PREFIX_BYTES], "big")
            if data[at]:
                self.compressed = True
                return messages
            if length > self._bytes_max:
                self.too_large_bytes = length
                return messages
            end = at + PREFIX_BYTES + length
            if end > size:
                self._wanted_bytes = end - at
                break
            messages.append(data[at + PREFIX_BYTES : end])
            at = end
        else:
            self._wanted_bytes = PREFIX_BYTES
        if at < size:
            self._hold(data[at:] if at else data)
        return messages

    def drop(self) -> None:
        """Let go of an unfinished message."""
        if self._held_bytes:
            self._limits.buffered_bytes -= self._held_bytes
            self._held_bytes = 0
            self._parts = []

    def _hold(self, data: bytes) -> None:
        self._parts.append(data)
        self._held_bytes += len(data)
        self._limits.buffered_bytes += len(data)


class Call:
    """One call: what came in part, and what waits for the next write."""

    __slots__ = ("answer", "deframer", "ending", "half_closed", "headers_sent", "id", "replies", "session", "unary", "waiting")

    def __init__(self, stream_id: int, deframer: Deframer, session: Session | None, unary: Callable[[bytes], bytes] | None) -> None:
        self.id = stream_id
        self.deframer = deframer
        self.session = session
        self.unary = unary
        self.replies: list[Reply] = []
        self.answer = b""
        """Of a unary call."""
        self.ending: Trailers | None = None
        """Set once our side is to end: nothing more is taken in."""
        self.half_closed = False
        """The peer's side is over, our answer is still to come."""
        self.headers_sent = False
        self.waiting = False
        """It is among the connection's `_dirty` streams."""


def path_and_authority(headers: Iterable[tuple[bytes, bytes]]) -> tuple[bytes, bytes]:
    """Of a request's headers, the pseudo-headers being the first."""
    path = authority = b""
    for name, value in headers:
        if name == b":path":
            path = value
        elif name == b":authority":
            authority = value
        elif name[:1] != b":":
            break
    return path, authority
