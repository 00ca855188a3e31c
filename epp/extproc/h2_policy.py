"""What our HTTP/2 servers allow their peers, and what all connections of one server share."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from epp.clock import Clock
from epp.extproc.limits import Limits
from epp.extproc.session import Session

CHECK_S = 5.0
"""How often calls and connections are looked at for silence."""


@dataclass(frozen=True, slots=True)
class H2Limits:
    """Server policy; every field is a limit with a name."""

    message_bytes_max: int
    """One gRPC message: a gateway may send a whole body as one (protocol rule 12)."""
    streams_max: int = 10_000
    """Concurrent streams a connection; Envoy opens another connection beyond."""
    connections_max: int = 4_096
    stream_window_bytes: int = 1 << 20
    connection_window_bytes: int = 1 << 30
    """Large: bytes that one stalled stream has sent count in it until that stream goes on."""
    frame_bytes_max: int = 1 << 18
    stream_queued_bytes_max: int = 1 << 20
    """Replies of one stream its peer has not read yet; beyond, that stream gets no more window to send in."""
    queued_bytes_max: int = 256 << 20
    """The same for a connection, all its streams together."""
    header_bytes_max: int = 1 << 16
    reset_burst: int = 200_000
    resets_per_s: int = 50_000
    """RST_STREAM frames taken from one peer before it counts as abuse. Envoy ends every ext_proc stream with one: nghttp2's default (1000,
    then 33 a second) would close the connection on it and fail every request in flight. This is more than one core can serve."""
    handshake_s: float = 10.0
    """From accept to the peer's first bytes."""
    stall_s: float = 60.0
    """A peer that leaves no window for our replies for so long, while some wait, is closed."""
    keepalive_s: float = 60.0
    """Silence after which a PING asks whether the peer lives; as long again without an answer closes the connection."""


class Connection(Protocol):
    """One peer, as its server sees it."""

    @property
    def open_streams(self) -> int: ...

    def check_alive(self, now_s: float) -> None: ...

    def announce_shutdown(self) -> None: ...

    def close(self) -> None: ...

    def abort(self) -> None: ...


@dataclass
class Shared:
    """What all connections of one server have in common."""

    limits: H2Limits
    session_limits: Limits
    clock: Clock
    new_session: Callable[[bytes], Session] | None
    """Given the call's `:authority`. None: this port serves no ext_proc."""
    unary: dict[bytes, Callable[[bytes], bytes]]
    """path -> handler of one message; it raises ValueError for one it can't read."""
    connections: set[Connection] = field(default_factory=set)
    closing: bool = False
    """New calls are refused; those open go on."""
    emptied: asyncio.Event = field(default_factory=asyncio.Event)
    """Set while closing, once no stream is open."""
    left: asyncio.Event = field(default_factory=asyncio.Event)
    """Set while closing, once no connection is."""

    @property
    def open_streams(self) -> int:
        return sum(connection.open_streams for connection in self.connections)

    def stream_ended(self) -> None:
        if self.closing and not self.open_streams:
            self.emptied.set()
            if not self.connections:
                self.left.set()
