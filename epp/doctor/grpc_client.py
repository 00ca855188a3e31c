"""A gRPC client as a gateway is one: HTTP/2 with or without TLS, the certificate looked at but not verified.

grpcio can't be told to accept any certificate, and the picker's own is self-signed; so this is libnghttp2 on an asyncio stream, one call at a
time, for a diagnosis and nothing else. Also here: finding out what a port speaks. Not here: what is said (exchange).
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import ngh2

from epp.extproc.grpc_frames import Deframer, framed
from epp.extproc.limits import Limits

READ_BYTES = 1 << 16
MESSAGE_BYTES_MAX = 16 << 20
WINDOW_BYTES = 16 << 20
STATUS_TEXT_CHARS_MAX = 300
HELLO_S = 2.0
"""How long the other side may take for its first bytes; a plaintext server waits for ever for the rest of a TLS hello it does not understand."""
CANCEL = 8
FRAME_HEAD_BYTES = 9
SETTINGS_FRAME = 4
CLOSE_S = 0.2
"""Some servers never answer the end of TLS."""
_OK = 0


class HostPort(NamedTuple):
    """Where to connect; unlike an endpoint's address the host may be a name."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @classmethod
    def parse(cls, text: str) -> HostPort:
        """Raises ValueError."""
        host, colon, port = text.strip().rpartition(":")
        bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
        if not colon or not bare or not (port.isascii() and port.isdigit() and 1 <= int(port) <= 65535) or (":" in host and bare == host):
            raise ValueError(f"{text!r} is not HOST:PORT")
        return cls(bare, int(port))


@dataclass(frozen=True, slots=True, kw_only=True)
class PortFacts:
    """What a port turned out to be."""

    address: HostPort
    error: str = ""
    """Why no connection came about; empty: it is open."""
    tls: bool = False
    tls_version: str = ""
    alpn: str = ""
    certificate_der: bytes = b""
    http2: bool = False
    """It answered as an HTTP/2 server does."""
    ends_at_once: bool = False
    """After a handshake that went well it hung up: in TLS 1.3 that is how a client certificate is missed."""


class GrpcError(Exception):
    """The call ended otherwise than with grpc-status 0."""


def client_context(client_cert_path: str = "") -> ssl.SSLContext:
    """Verifies nobody, offers h2. `client_cert_path`: a directory with tls.crt and tls.key. Raises OSError (ssl.SSLError is one)."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    if client_cert_path:
        context.load_cert_chain(Path(client_cert_path, "tls.crt"), Path(client_cert_path, "tls.key"))
    return context


async def look_at(address: HostPort, client_cert_path: str = "") -> PortFacts:
    """Tries TLS first, then plaintext: a port is one of both, or it is no HTTP/2 server."""
    try:
        reader, writer = await asyncio.open_connection(*address)
    except (OSError, UnicodeError) as error:  # the latter: a name that can't be one
        return PortFacts(address=address, error=_reason(error))
    await _close(writer)
    with contextlib.suppress(OSError, TimeoutError, EOFError):  # no TLS; what it is instead is asked next
        async with asyncio.timeout(HELLO_S):
            reader, writer = await asyncio.open_connection(*address, ssl=client_context(client_cert_path), server_hostname=address.host)
        return await _behind_tls(address, reader, writer)
    try:
        reader, writer = await asyncio.open_connection(*address)
    except OSError as error:
        return PortFacts(address=address, error=_reason(error))
    try:
        return PortFacts(address=address, http2=_is_settings(await _first_bytes(reader, writer)))
    except OSError:
        return PortFacts(address=address)
    finally:
        await _close(writer)


async def _behind_tls(address: HostPort, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> PortFacts:
    connection: ssl.SSLObject = writer.get_extra_info("ssl_object")
    alpn = connection.selected_alpn_protocol() or ""
    answer: bytes | None = b""
    with contextlib.suppress(OSError):
        answer = await _first_bytes(reader, writer)
    await _close(writer)
    return PortFacts(
        address=address,
        tls=True,
        tls_version=connection.version() or "",
        alpn=alpn,
        certificate_der=connection.getpeercert(binary_form=True) or b"",
        http2=_is_settings(answer),
        ends_at_once=alpn == "h2" and answer == b"",
    )


async def _first_bytes(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes | None:
    """What comes back for a client's first bytes: the head of a frame; empty if the other side hangs up, None if it says nothing."""
    h2 = ngh2.Connection(ngh2.Role.CLIENT)
    h2.initiate_connection({ngh2.Setting.ENABLE_PUSH: 0})
    if writer.is_closing():
        return b""
    writer.write(h2.data_to_send())
    try:
        async with asyncio.timeout(HELLO_S):
            return await reader.readexactly(FRAME_HEAD_BYTES)
    except asyncio.IncompleteReadError as error:
        return error.partial
    except TimeoutError:
        return None


def _is_settings(answer: bytes | None) -> bool:
    """An HTTP/2 server's first frame."""
    return answer is not None and len(answer) == FRAME_HEAD_BYTES and answer[3] == SETTINGS_FRAME


class Call:
    """One gRPC call. `send`, `receive` until None, or leave."""

    def __init__(self, connection: Connection, stream_id: int) -> None:
        self._connection = connection
        self._id = stream_id
        self.deframer = Deframer(Limits(MESSAGE_BYTES_MAX, MESSAGE_BYTES_MAX, lambda _limit: None), MESSAGE_BYTES_MAX)
        self.messages: list[bytes] = []
        self.status: int | None = None
        self.reason = ""

    async def send(self, message: bytes, *, last: bool = False) -> None:
        """Raises GrpcError."""
        with _loss():
            self._connection.h2.send_data(self._id, framed(message), end_stream=last)
        await self._connection.flush()

    async def receive(self) -> bytes | None:
        """The next message; None where the call ended well. Raises GrpcError."""
        while not self.messages and self.status is None:
            await self._connection.pump(self)
        if self.messages:
            return self.messages.pop(0)
        if self.status:
            raise GrpcError(f"gRPC status {self.status}{f': {self.reason}' if self.reason else ''}")
        return None

    async def leave(self) -> None:
        """Give it up, as a gateway does when its client has gone."""
        if self.status is None:
            with contextlib.suppress(GrpcError, ngh2.NGH2Error):
                self._connection.h2.reset_stream(self._id, CANCEL)
                await self._connection.flush()

    def heard(self, event: object) -> None:
        if isinstance(event, ngh2.DataReceived):
            self.messages += self.deframer.feed(event.data)
            if self.deframer.too_large_bytes or self.deframer.compressed:
                self.status, self.reason = 13, "a message that is compressed or too large"
        elif isinstance(event, ngh2.ResponseReceived | ngh2.TrailersReceived):
            headers = dict(event.headers)
            if headers.get(b":status", b"200") != b"200":
                self.status, self.reason = 2, f"HTTP status {headers[b':status'].decode(errors='replace')}: no gRPC server"
            elif b"grpc-status" in headers:
                text = headers[b"grpc-status"].decode(errors="replace")
                self.status = int(text) if text.isascii() and text.isdigit() else 2
                self.reason = headers.get(b"grpc-message", b"").decode(errors="replace")[:STATUS_TEXT_CHARS_MAX]
        elif isinstance(event, ngh2.StreamReset | ngh2.StreamClosed) and self.status is None:
            self.status, self.reason = (2, f"the stream was reset (HTTP/2 error {event.error_code})") if event.error_code else (_OK, "")


class Connection:
    """See the module."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, address: HostPort, *, tls: bool) -> None:
        self._reader = reader
        self._writer = writer
        self._address = address
        self._scheme = b"https" if tls else b"http"
        self.h2 = ngh2.Connection(ngh2.Role.CLIENT)
        self.h2.initiate_connection({ngh2.Setting.ENABLE_PUSH: 0, ngh2.Setting.INITIAL_WINDOW_SIZE: WINDOW_BYTES})
        self.h2.set_local_window_size(WINDOW_BYTES)

    async def call(self, path: str) -> Call:
        """Raises GrpcError: what answered before may have been no HTTP/2."""
        headers = (
            (b":method", b"POST"),
            (b":scheme", self._scheme),
            (b":path", path.encode()),
            (b":authority", str(self._address).encode()),
            (b"te", b"trailers"),
            (b"content-type", b"application/grpc"),
            (b"user-agent", b"epp-doctor"),
        )
        with _loss():
            return Call(self, self.h2.send_request(headers))

    async def unary(self, path: str, message: bytes) -> bytes:
        """Raises GrpcError."""
        call = await self.call(path)
        await call.send(message, last=True)
        answer = await call.receive()
        if answer is None:
            raise GrpcError("an empty answer")
        return answer

    async def flush(self) -> None:
        """Raises GrpcError."""
        with _loss():
            data = self.h2.data_to_send()
            if data:
                if self._writer.is_closing():  # where uvloop's raises RuntimeError
                    raise GrpcError("the connection was closed")
                self._writer.write(data)
                await self._writer.drain()

    async def pump(self, call: Call) -> None:
        """Read once and hand on what came. Raises GrpcError where the connection is over."""
        with _loss():
            data = await self._reader.read(READ_BYTES)
            if not data:
                raise GrpcError("the connection was closed")
            self.h2.receive_data(data)
            events = self.h2.events()
            await self.flush()
        for event in events:
            if isinstance(event, ngh2.GoAwayReceived) and event.error_code:
                raise GrpcError(f"the server sent GOAWAY (HTTP/2 error {event.error_code})")
            if getattr(event, "stream_id", None) == call._id:  # noqa: SLF001 - both are one thing in two parts
                call.heard(event)


@contextlib.asynccontextmanager
async def connected(port: PortFacts, client_cert_path: str = "") -> AsyncIterator[Connection]:
    """To a port that `look_at` found open. Raises GrpcError."""
    try:
        context = client_context(client_cert_path) if port.tls else None
        reader, writer = await asyncio.open_connection(*port.address, ssl=context, server_hostname=port.address.host if port.tls else None)
    except OSError as error:
        raise GrpcError(_reason(error)) from None
    try:
        yield Connection(reader, writer, port.address, tls=port.tls)
    finally:
        await _close(writer)


async def _close(writer: asyncio.StreamWriter) -> None:
    writer.close()
    try:
        async with asyncio.timeout(CLOSE_S):
            await writer.wait_closed()
    except (OSError, TimeoutError):
        writer.transport.abort()


@contextlib.contextmanager
def _loss() -> Iterator[None]:
    """Whatever ends a connection is one error, wherever it shows."""
    try:
        yield
    except (OSError, ngh2.NGH2Error) as error:
        raise GrpcError(f"the connection was lost: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error or type(error).__name__)
