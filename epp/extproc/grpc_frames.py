"""gRPC's framing inside HTTP/2 DATA: a flag byte, four bytes of length, the message (gRPC over HTTP/2, Length-Prefixed-Message)."""

from __future__ import annotations

from collections.abc import Sequence

from epp.extproc.limits import Limits

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
