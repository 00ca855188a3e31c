"""ZeroMQ connections on asyncio: made to a peer, or taken from one; messages are taken out when there is time for them.

Back-pressure instead of queues: what is not taken stays in one read's worth of buffer, then in the kernel, then with the publisher, which
drops by its own high-water mark. So the memory of a connection is bounded in bytes (a message and `INBOX_BYTES`) whatever the peer does,
and what is lost shows in the publisher's sequence numbers. Not here: when to connect again (its user), what messages mean.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable, Sequence
from typing import Any

from epp.zmtp.wire import GREETING, MESSAGE_BYTES_MAX, Wire, ZmtpError, message

INBOX_BYTES = 256 << 10
"""Buffered before reading pauses, unless a message is longer."""
OUTBOX_BYTES_MAX = 1 << 20
"""Unsent; a peer that asks but does not read is dropped. Publishers have a limit of their own."""
CONNECT_S = 5.0
"""From looking a name up to the peer's READY."""
KEEPALIVE_IDLE_S = 30
KEEPALIVE_INTERVAL_S = 10
KEEPALIVE_PROBES = 3


class Connection(asyncio.Protocol):
    """One connection. `news` is called whenever there may be something to `take`, and when it has closed."""

    def __init__(
        self,
        socket_type: bytes,
        *,
        news: Callable[[Connection], None],
        message_bytes_max: int = MESSAGE_BYTES_MAX,
        inbox_bytes: int = INBOX_BYTES,
        outbox_bytes_max: int = OUTBOX_BYTES_MAX,
    ) -> None:
        self.closed = False
        """Nothing more arrives; what did may still be taken."""
        self.reason = ""
        """Why it closed, if that is known."""
        self.failed = False
        """It closed because of what the peer sent."""
        self.peer: Any = None
        self.news = news
        self.ready = asyncio.get_running_loop().create_future()
        """Done when the peer has said who it is."""
        self._wire = Wire(socket_type, message_bytes_max=message_bytes_max)
        self._inbox_bytes = inbox_bytes
        self._outbox_bytes_max = outbox_bytes_max
        self._transport: asyncio.Transport | None = None
        self._paused = False

    def __repr__(self) -> str:
        return f"<Connection {self.peer} {'closed ' + self.reason if self.closed else 'open'}>"

    @property
    def unsent_bytes(self) -> int:
        return self._transport.get_write_buffer_size() if self._transport is not None else 0

    def take(self) -> Sequence[bytes] | None:
        """The next message; None if there is none now; without frames: ask again. Closes the connection on what can't be read."""
        try:
            taken = self._wire.next()
        except ZmtpError as error:
            self.failed = True
            self.close(str(error))
            return None
        if self._wire.out:
            self._write(bytes(self._wire.out))
            self._wire.out.clear()
        if self._paused and not self.closed and self._wire.buffered_bytes < max(self._inbox_bytes // 2, self._wire.needs_bytes):
            self._paused = False
            assert self._transport is not None
            self._transport.resume_reading()
        return taken

    def send(self, frames: Sequence[bytes]) -> None:
        self._write(message(frames))

    def close(self, reason: str = "") -> None:
        """At once; what was buffered is gone."""
        if not self.closed:
            self.closed = True
            self.reason = reason
        self._wire = Wire(b"")
        if self._transport is not None:
            self._transport.abort()
        self._end()

    # asyncio's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]  # uvloop's is a Transport in all but its class
        self.peer = transport.get_extra_info("peername")
        _keep_alive(transport.get_extra_info("socket"))
        if self.closed:
            transport.close()
            return
        self._write(GREETING)

    def data_received(self, data: bytes) -> None:
        if self.closed:
            return
        wire = self._wire
        wire.feed(data)
        if not wire.ready:
            while not wire.ready and self.take() is not None:
                pass
            if self.closed:
                return
            if not wire.ready:
                if wire.buffered_bytes > self._inbox_bytes:
                    self.failed = True
                    self.close("too much before READY")
                return
            if not self.ready.done():
                self.ready.set_result(None)
        if wire.buffered_bytes >= max(self._inbox_bytes, wire.needs_bytes) and not self._paused:
            self._paused = True
            assert self._transport is not None
            self._transport.pause_reading()
        self.news(self)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.closed:
            self.closed = True
            self.reason = str(exc) if exc else "closed by the peer"
        self._end()

    def _end(self) -> None:
        if not self.ready.done():
            self.ready.set_result(None)
        self.news(self)

    def _write(self, data: bytes) -> None:
        if self._transport is None or self._transport.is_closing():
            return
        if self._transport.get_write_buffer_size() + len(data) > self._outbox_bytes_max:
            self.failed = True
            self.close("the peer does not read")
            return
        self._transport.write(data)


async def connect(
    host: str, port: int, socket_type: bytes, *, news: Callable[[Connection], None], timeout_s: float = CONNECT_S, **limits: int
) -> Connection:
    """A connection whose peer is known. Raises OSError, TimeoutError or ZmtpError."""
    loop = asyncio.get_running_loop()
    connection = Connection(socket_type, news=news, **limits)
    try:
        async with asyncio.timeout(timeout_s):
            await loop.create_connection(lambda: connection, host, port)
            await connection.ready
    except BaseException as error:
        connection.close("not needed any more")
        if isinstance(error, UnicodeError):
            raise ConnectionError("the host can be no name") from None
        raise
    if connection.closed:
        raise ZmtpError(connection.reason) if connection.failed else ConnectionError(connection.reason)
    return connection


class Listener:
    """Takes connections on a port; `accept` is called with each once it is made, which `news` of it follow."""

    def __init__(
        self, socket_type: bytes, accept: Callable[[Connection], Callable[[Connection], None]], *, connections_max: int, **limits: int
    ) -> None:
        """`accept` returns who wants the news of that connection."""
        self.connections: set[Connection] = set()
        self.refused_total = 0
        self._type = socket_type
        self._accept = accept
        self._connections_max = connections_max
        self._limits = limits
        self._server: asyncio.Server | None = None

    @property
    def port(self) -> int:
        assert self._server is not None
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    async def start(self, host: str | None, port: int) -> None:
        """Raises OSError."""
        self._server = await asyncio.get_running_loop().create_server(self._made, host, port)

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()
        for connection in list(self.connections):
            connection.close("stopped")
        if self._server is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(1.0):
                    await self._server.wait_closed()
            self._server = None

    def _made(self) -> Connection:
        connection = Connection(self._type, news=self._known, **self._limits)
        if len(self.connections) >= self._connections_max:
            self.refused_total += 1
            connection.close("too many connections")
            return connection
        self.connections.add(connection)
        asyncio.get_running_loop().call_later(CONNECT_S, self._expect, connection)
        wanted = self._accept(connection)

        def news(each: Connection) -> None:
            if each.closed:
                self.connections.discard(each)
            wanted(each)

        connection.news = news
        return connection

    @staticmethod
    def _expect(connection: Connection) -> None:
        if not connection.ready.done():
            connection.failed = True
            connection.close(f"no READY within {CONNECT_S:g} s")

    def _known(self, connection: Connection) -> None:
        self.connections.discard(connection)


def _keep_alive(sock: Any) -> None:
    """So that a peer that vanished without a word is noticed in a minute."""
    if sock is None or sock.family not in {socket.AF_INET, socket.AF_INET6}:
        return
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", KEEPALIVE_IDLE_S), ("TCP_KEEPINTVL", KEEPALIVE_INTERVAL_S), ("TCP_KEEPCNT", KEEPALIVE_PROBES)):
        if hasattr(socket, name):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
