"""One side of one ZeroMQ connection, without the connection: bytes in, messages out (ZMTP 3.0, rfc.zeromq.org/spec/23, NULL mechanism).

Why not libzmq: it bounds a frame's size but neither a message's frames nor what they add up to, counts its queues in messages, so that what
it holds for a hostile or fast peer has no limit in bytes, and tells nothing of connections without a second socket for each. Here a
connection holds one message and one read at most, and messages are taken apart when somebody wants them, never in one go.

Not here: sockets (connection), what messages mean (events, sim). As a 3.0 peer it is understood by every libzmq since 4.0 (2013).
Invariant: `next` raises ZmtpError for whatever a peer can't be meant to send, and nothing else. Cost: 1.5 µs a message of three frames.
"""

from __future__ import annotations

from collections.abc import Sequence

from epp.errors import EppError

MESSAGE_BYTES_MAX = 8 << 20
"""All frames of one message."""
FRAMES_MAX = 8
"""Of one message."""
COMMAND_BYTES_MAX = 64 << 10
GREETING_BYTES = 64
_MECHANISM = b"NULL".ljust(20, b"\0")
GREETING = (b"\xff" + bytes(8) + b"\x7f\x03\x00" + _MECHANISM).ljust(GREETING_BYTES, b"\0")
_MORE, _LONG, _COMMAND = 1, 2, 4
PEERS = {
    b"SUB": frozenset({b"PUB", b"XPUB"}),
    b"PUB": frozenset({b"SUB", b"XSUB"}),
    b"DEALER": frozenset({b"ROUTER", b"DEALER", b"REP"}),
    b"ROUTER": frozenset({b"DEALER", b"ROUTER", b"REQ"}),
}
"""Socket type -> those it may talk to."""


class ZmtpError(EppError):
    """The peer does not speak the protocol, or more of it than is taken."""


def message(frames: Sequence[bytes]) -> bytes:
    """As it goes over the wire."""
    last = len(frames) - 1
    parts = []
    for number, frame in enumerate(frames):
        size = len(frame)
        flags = _MORE if number < last else 0
        parts.append(bytes((flags, size)) if size < 256 else bytes((flags | _LONG,)) + size.to_bytes(8, "big"))
        parts.append(frame)
    return b"".join(parts)


def _command(name: bytes, body: bytes) -> bytes:
    body = bytes((len(name),)) + name + body
    return bytes((_COMMAND, len(body))) + body if len(body) < 256 else bytes((_COMMAND | _LONG,)) + len(body).to_bytes(8, "big") + body


class Wire:
    """See the module. Send `GREETING` first, then what `out` collects; `feed` what arrives and ask for `next` until it is None."""

    def __init__(self, socket_type: bytes, *, message_bytes_max: int = MESSAGE_BYTES_MAX) -> None:
        self.out = bytearray()
        """To be sent; whoever sends clears it."""
        self.ready = False
        """Both sides know who they are: messages may go."""
        self.needs_bytes = 0
        """How many must be buffered before `next` can say anything new."""
        self._type = socket_type
        self._message_bytes_max = message_bytes_max
        self._buffer = bytearray()
        self._greeted = False
        self._frames: list[bytes] = []
        self._frames_bytes = 0

    @property
    def buffered_bytes(self) -> int:
        return len(self._buffer)

    def feed(self, data: bytes) -> None:
        self._buffer += data

    def next(self) -> Sequence[bytes] | None:
        """The next message's frames; none of them where it was a command or part of a message. None: not before more is fed."""
        buffer = self._buffer
        if not self._greeted:
            if (buffer and buffer[0] != 0xFF) or (len(buffer) > 9 and not buffer[9] & 1):
                raise ZmtpError("the peer does not speak ZMTP")
            if len(buffer) > 10 and buffer[10] < 3:
                raise ZmtpError("the peer speaks a ZMTP older than 3.0")
            if len(buffer) < GREETING_BYTES:
                self.needs_bytes = GREETING_BYTES
                return None
            self._greet(bytes(buffer[12:32]))
            del buffer[:GREETING_BYTES]
        have = len(buffer)
        if have < 2 or (buffer[0] & _LONG and have < 9):
            self.needs_bytes = 9
            return None
        flags = buffer[0]
        head, size = (9, int.from_bytes(buffer[1:9], "big")) if flags & _LONG else (2, buffer[1])
        self._check(flags, size)
        if have < head + size:
            self.needs_bytes = head + size
            return None
        with memoryview(buffer) as view:
            body = bytes(view[head : head + size])
        del buffer[: head + size]
        self.needs_bytes = 0
        if flags & _COMMAND:
            self._obey(body)
            return ()
        self._frames.append(body)
        self._frames_bytes += size
        if flags & _MORE:
            return ()
        frames, self._frames, self._frames_bytes = self._frames, [], 0
        return frames

    def _greet(self, mechanism: bytes) -> None:
        mechanism = mechanism.rstrip(b"\0")
        if mechanism != b"NULL":
            raise ZmtpError(f"the peer wants security mechanism {mechanism.decode('latin-1')!a}; only NULL is spoken")
        self._greeted = True
        self.out += _command(
            b"READY", _property(b"Socket-Type", self._type) + (_property(b"Identity", b"") if self._type == b"DEALER" else b"")
        )

    def _check(self, flags: int, size: int) -> None:
        if flags & ~(_MORE | _LONG | _COMMAND) or (flags & _COMMAND and flags & _MORE):
            raise ZmtpError(f"a frame with flags {flags:#04x}")
        if flags & _COMMAND:
            if size > COMMAND_BYTES_MAX:
                raise ZmtpError(f"a command of {size} bytes; at most {COMMAND_BYTES_MAX} are taken")
            return
        if not self.ready:
            raise ZmtpError("a message before READY")
        if self._frames_bytes + size > self._message_bytes_max:
            raise ZmtpError(f"a message of {self._frames_bytes + size} bytes or more; at most {self._message_bytes_max} are taken")
        if len(self._frames) >= FRAMES_MAX:
            raise ZmtpError(f"a message of more than {FRAMES_MAX} frames")

    def _obey(self, body: bytes) -> None:
        name, rest = body[1 : 1 + body[0]] if body else b"", body[1 + body[0] :] if body else b""
        if name == b"READY" and not self.ready:
            peer = _properties(rest).get(b"socket-type", b"")
            if peer not in PEERS[self._type]:
                raise ZmtpError(f"a {self._type.decode()} socket can't talk to a peer of type {peer[:32].decode('latin-1')!a}")
            self.ready = True
        elif name == b"ERROR":
            reason = rest[1 : 1 + rest[0]] if rest else b""
            raise ZmtpError(f"the peer says {reason.decode('latin-1')!a}")
        elif not self.ready:
            raise ZmtpError("the peer does not begin with READY")
        elif name == b"PING":
            self.out += _command(b"PONG", rest[2:18])
        # PONG, and what later versions add, asks for nothing


def _property(name: bytes, value: bytes) -> bytes:
    return bytes((len(name),)) + name + len(value).to_bytes(4, "big") + value


def _properties(data: bytes) -> dict[bytes, bytes]:
    """Names in lower case. What is cut short ends it."""
    found: dict[bytes, bytes] = {}
    at = 0
    while at < len(data):
        value_at = at + 1 + data[at] + 4
        size = int.from_bytes(data[value_at - 4 : value_at], "big")
        if value_at + size > len(data):
            raise ZmtpError("the peer's READY is cut short")
        found[data[at + 1 : value_at - 4].lower()] = data[value_at : value_at + size]
        at = value_at + size
    return found
