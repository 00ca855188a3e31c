"""Listening, keeping alive and draining: what the ext_proc and health ports have in common. The streams themselves: h2."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ssl
from collections.abc import Callable

from epp.clock import Clock
from epp.errors import StartError
from epp.extproc.h2 import H2Connection
from epp.extproc.h2_policy import CHECK_S, H2Limits, Shared
from epp.extproc.health import Health
from epp.extproc.limits import Limits
from epp.extproc.session import Session
from epp.extproc.tls import KeyPair, use

HEALTH_CHECK = b"/grpc.health.v1.Health/Check"
HEALTH_LIST = b"/grpc.health.v1.Health/List"
CLOSE_S = 1.0
"""For a peer to take the last bytes, and then to close."""
BACKLOG = 1_024
"""Connections the kernel holds until they are accepted."""


class H2Server:
    """One port. `new_session` None: health only."""

    def __init__(
        self,
        *,
        health: Health,
        session_limits: Limits,
        limits: H2Limits,
        clock: Clock,
        new_session: Callable[[bytes], Session] | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._shared = Shared(
            limits=limits,
            session_limits=session_limits,
            clock=clock,
            new_session=new_session,
            unary={HEALTH_CHECK: health.check, HEALTH_LIST: health.list},
        )
        self._tls = tls
        self._server: asyncio.Server | None = None
        self.port = 0

    async def start(self, host: str | None, port: int) -> None:
        """Listen on `host` (None: all interfaces, IPv4 and IPv6). Raises StartError."""
        loop = asyncio.get_running_loop()
        try:
            self._server = await loop.create_server(
                lambda: H2Connection(self._shared),
                host,
                port,
                ssl=self._tls,
                ssl_handshake_timeout=self._shared.limits.handshake_s if self._tls else None,
                backlog=BACKLOG,
            )
        except OSError as error:
            raise StartError(listen_problem(host, port, error)) from None
        self.port = self._server.sockets[0].getsockname()[1]

    def present(self, pair: KeyPair) -> None:
        """New connections get this certificate. Raises StartError if certificate and key do not fit together."""
        assert self._tls is not None
        use(self._tls, pair)

    def check_alive(self) -> None:
        """Look at every connection once."""
        now_s = self._shared.clock.now_s()
        for connection in list(self._shared.connections):
            connection.check_alive(now_s)

    async def run(self) -> None:
        while True:
            await asyncio.sleep(CHECK_S)
            self.check_alive()

    @property
    def open_streams(self) -> int:
        return self._shared.open_streams

    async def stop(self, grace_s: float) -> None:
        """No new connections or streams; those open get `grace_s` to end, then everything is closed."""
        if self._server is None:
            return
        self._server.close()
        shared = self._shared
        for connection in list(shared.connections):
            connection.announce_shutdown()
        shared.closing = True
        self.check_alive()  # who waits for a turn is refused now
        shared.stream_ended()  # in case none is open
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace_s):
                await shared.emptied.wait()
                async with asyncio.timeout(CLOSE_S):  # told to go, peers do; closing first can cost them answers they have not read
                    await shared.left.wait()
        for connection in list(shared.connections):
            connection.close()
        try:
            async with asyncio.timeout(CLOSE_S):
                await self._server.wait_closed()
        except TimeoutError:  # a peer that does not read
            for connection in list(shared.connections):
                connection.abort()


def listen_problem(host: str | None, port: int, error: OSError) -> str:
    """One clear line for a port that can't be had."""
    where = f"{host or '*'}:{port}"
    if error.errno == errno.EADDRINUSE:
        return f"port {port} is in use ({where}); choose another or stop what listens there"
    return f"can't listen on {where}: {error.strerror or error}"
