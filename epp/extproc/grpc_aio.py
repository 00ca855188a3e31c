"""The same sessions on grpcio: `--transport grpc`, the conservative fallback and the reference in parity tests.

Ten times the CPU of h2.py, and the stock gRPC server: its HTTP/2 policy, its TLS. A thin shell: raw bytes in, codec, session, out.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from epp.clock import Clock
from epp.errors import StartError
from epp.extproc import codec
from epp.extproc.h2_policy import CHECK_S
from epp.extproc.health import EXT_PROC_SERVICE, Health
from epp.extproc.messages import Reply
from epp.extproc.server import listen_problem
from epp.extproc.session import Session
from epp.extproc.tls import KeyPair, server_context

TELL_S = 1.0
"""For a peer to take the answer of a call that is given up."""
SETTLE_S = 0.1
"""grpcio's own tasks hear of the end of their calls a moment after `stop`; cancelled with the loop they would print a stack."""


def _is_news(record: logging.LogRecord) -> bool:
    """grpcio logs a call cancelled before its handler began as an exception nobody handled; it is a client that left."""
    return not (record.exc_info and record.exc_info[0] is asyncio.CancelledError)


class GrpcServer:
    """One ext_proc port on grpc.aio; the same doors as server.H2Server."""

    def __init__(
        self,
        *,
        new_session: Callable[[bytes], Session],
        health: Health,
        message_bytes_max: int,
        streams_max: int,
        clock: Clock,
        tls: KeyPair | None = None,
        client_ca_file: str = "",
    ) -> None:
        self._new_session = new_session
        self._clock = clock
        self._tls = tls
        self._client_ca = _read_file(client_ca_file) if client_ca_file else None
        if tls is not None:
            server_context(tls, client_ca_file=client_ca_file)  # says what is wrong with them; grpcio would only log it
        self._server = grpc.aio.server(
            options=[
                ("grpc.max_receive_message_length", message_bytes_max),
                ("grpc.max_send_message_length", -1),
                ("grpc.max_concurrent_streams", streams_max),
                ("grpc.http2.max_ping_strikes", 0),
                ("grpc.so_reuseport", 0),
            ]
        )
        process = grpc.stream_stream_rpc_method_handler(self._process)
        check = grpc.unary_unary_rpc_method_handler(_unary(health.check))
        listing = grpc.unary_unary_rpc_method_handler(_unary(health.list))
        self._server.add_generic_rpc_handlers(
            (
                grpc.method_handlers_generic_handler(EXT_PROC_SERVICE, {"Process": process}),
                grpc.method_handlers_generic_handler("grpc.health.v1.Health", {"Check": check, "List": listing}),
            )
        )
        self.port = 0
        self._calls: dict[Session, Any] = {}

    @property
    def open_streams(self) -> int:
        return len(self._calls)

    async def start(self, host: str | None, port: int) -> None:
        """Listen on `host` (None: all interfaces). Raises StartError."""
        address = f"{f'[{host}]' if host and ':' in host else host or '[::]'}:{port}"
        _check_free(host, port)  # grpcio would print a line of its own
        logging.getLogger("grpc._cython.cygrpc").addFilter(_is_news)
        try:
            if self._tls is None:
                self.port = self._server.add_insecure_port(address)
            else:
                fetched = grpc.dynamic_ssl_server_credentials(
                    self._certificates(), self._certificates, require_client_authentication=self._client_ca is not None
                )
                self.port = self._server.add_secure_port(address, fetched)
        except RuntimeError:
            raise StartError(f"can't listen on {address}") from None
        await self._server.start()

    def present(self, pair: KeyPair) -> None:
        """New connections get this certificate. Raises StartError if certificate and key do not fit together."""
        server_context(pair)  # grpcio would find out at the next handshake
        self._tls = pair

    async def check_alive(self) -> None:
        """Give up calls that stopped; grpcio keeps its connections alive by itself."""
        now_s = self._clock.now_s()
        given_up = [(session, context, replies) for session, context in list(self._calls.items()) if (replies := session.expire(now_s))]
        if given_up:
            await asyncio.gather(*(_tell(session, context, replies) for session, context, replies in given_up))

    async def run(self) -> None:
        while True:
            await asyncio.sleep(CHECK_S)
            await self.check_alive()

    async def stop(self, grace_s: float) -> None:
        await self.check_alive()  # who waits for a turn is refused now
        await self._server.stop(grace_s)
        await asyncio.sleep(SETTLE_S)

    def _certificates(self) -> Any:
        assert self._tls is not None
        return grpc.ssl_server_certificate_configuration([(self._tls.key, self._tls.certificate)], root_certificates=self._client_ca)

    async def _process(self, _requests: Any, context: Any) -> None:
        session = self._new_session(b"")  # grpcio does not tell the authority
        self._calls[session] = context
        reading: asyncio.Future[Any] | None = None
        ended, woken = False, asyncio.Event()
        session.notify = woken.set
        try:
            while True:
                if session.unprompted:
                    if reading is None and not ended:
                        reading = asyncio.ensure_future(context.read())
                    if await _woken(woken, reading):
                        await _write(context, session.resumed())
                        if session.answered or (ended and not session.waiting):
                            return
                        continue
                    assert reading is not None
                message, reading = await (reading or context.read()), None
                ended = message is grpc.aio.EOF
                if ended:
                    replies = session.half_closed()
                else:
                    try:
                        event = codec.decode(message)
                    except codec.MalformedMessageError:
                        await context.abort(grpc.StatusCode.INTERNAL, "not a ProcessingRequest")
                    replies = session.receive(event)
                await _write(context, replies)
                if session.answered or (ended and not session.waiting):
                    return
        finally:  # also when the peer resets the stream: grpcio cancels this task
            if reading is not None:
                reading.cancel()
            del self._calls[session]
            session.closed()


async def _woken(woken: asyncio.Event, reading: asyncio.Future[Any] | None) -> bool:
    """Whether a session that waits may go on; if not, a message has come."""
    waiting = asyncio.ensure_future(woken.wait())
    try:
        await asyncio.wait([waiting] if reading is None else [waiting, reading], return_when=asyncio.FIRST_COMPLETED)
    finally:
        waiting.cancel()
    if not woken.is_set():
        return False
    woken.clear()
    return True


async def _write(context: Any, replies: list[Reply]) -> None:
    for reply in replies:
        await context.write(codec.encode(reply))


async def _tell(session: Session, context: Any, replies: list[Reply]) -> None:
    """A call that waits ends with this, any other when its peer reads it; one that is gone, or does not read, keeps nobody waiting."""
    with contextlib.suppress(grpc.aio.BaseError, TimeoutError):
        async with asyncio.timeout(TELL_S):
            await _write(context, replies)
    if session.notify is not None:
        session.notify()


def _check_free(host: str | None, port: int) -> None:
    family = socket.AF_INET6 if not host or ":" in host else socket.AF_INET
    try:
        socket.create_server((host or "::", port), family=family, dualstack_ipv6=not host).close()
    except OSError as error:
        raise StartError(listen_problem(host, port, error)) from None


def _read_file(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise StartError(f"--client-ca-file {path}: {error.strerror}") from None


def _unary(handle: Callable[[bytes], bytes]) -> Callable[[bytes, Any], Any]:
    async def call(request: bytes, context: Any) -> bytes:
        try:
            return handle(request)
        except ValueError:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "malformed request")
            raise

    return call
