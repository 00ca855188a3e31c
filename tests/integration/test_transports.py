"""Both transports as a gateway meets them: a real gRPC client, then a peer that speaks HTTP/2 frame by frame and misbehaves at will."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import ipaddress
import ssl
import struct
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Sequence

import grpc
import grpc.aio
import hpack
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from hyperframe import frame as frames

from epp._pb import epp_ext_proc_pb2 as pb
from epp._pb import epp_health_pb2 as health_pb
from epp.extproc import tls
from epp.extproc.grpc_aio import GrpcServer
from epp.extproc.h2 import H2Connection
from epp.extproc.h2_policy import H2Limits
from epp.extproc.health import SERVICES, Health
from epp.extproc.messages import BodyMode
from epp.extproc.server import H2Server
from tests.builders import (
    Core,
    chat,
    chat_of,
    core,
    echoed,
    ends,
    kinds,
    pieces,
    request_body,
    request_headers,
    request_trailers,
    response_body,
    response_headers,
    response_trailers,
)

HOST = "127.0.0.1"
PROCESS = "/envoy.service.ext_proc.v3.ExternalProcessor/Process"
CHECK = "/grpc.health.v1.Health/Check"
LIST = "/grpc.health.v1.Health/List"
MESSAGE_BYTES_MAX = 8 << 20
WAIT_S = 10.0
TRANSPORTS = ["h2", "grpc"]

Server = H2Server | GrpcServer


def limits(**changes: float) -> H2Limits:
    return H2Limits(message_bytes_max=MESSAGE_BYTES_MAX, **changes)  # type: ignore[arg-type]


@contextlib.asynccontextmanager
async def serving(
    transport: str, world: Core, *, pair: tls.KeyPair | None = None, health: Health | None = None, policy: H2Limits | None = None
) -> AsyncIterator[Server]:
    if health is None:
        health = Health()
        health.ready = True
    server: Server
    if transport == "grpc":
        server = GrpcServer(
            new_session=world.session,
            health=health,
            message_bytes_max=MESSAGE_BYTES_MAX,
            tls=pair,
            streams_max=100,
            clock=world.clock,
        )
    else:
        server = H2Server(
            health=health,
            session_limits=world.limits,
            limits=policy or limits(),
            clock=world.clock,
            new_session=world.session,
            tls=tls.server_context(pair) if pair else None,
        )
    await server.start(HOST, 0)
    try:
        yield server
    finally:
        await server.stop(0)


def named_pair() -> tls.KeyPair:
    """A certificate a verifying client accepts, for 127.0.0.1."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = dt.datetime.now(dt.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - dt.timedelta(days=1))
        .not_valid_after(now + dt.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(HOST))]), critical=False)
        .sign(key, hashes.SHA256())
    )
    return tls.KeyPair(
        certificate.public_bytes(serialization.Encoding.PEM),
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()),
    )


async def eventually(true: Callable[[], bool], what: str) -> None:
    """Bounded polling, for what another party does in its own time."""
    deadline = asyncio.get_running_loop().time() + WAIT_S
    while not true():
        assert asyncio.get_running_loop().time() < deadline, f"not within {WAIT_S} s: {what}"
        await asyncio.sleep(0.005)


# A real gRPC client


def channel_to(
    server: Server, pair: tls.KeyPair | None = None, compression: grpc.Compression = grpc.Compression.NoCompression
) -> grpc.aio.Channel:
    target = f"{HOST}:{server.port}"
    if pair is None:
        return grpc.aio.insecure_channel(target, compression=compression)
    return grpc.aio.secure_channel(target, grpc.ssl_channel_credentials(pair.certificate))


async def play(channel: grpc.aio.Channel, script: Sequence[pb.ProcessingRequest]) -> tuple[list[bytes], grpc.StatusCode]:
    """Send a whole script and half-close; everything that comes back."""
    call = channel.stream_stream(PROCESS)()
    for message in script:
        await call.write(message.SerializeToString())
    await call.done_writing()
    replies = []
    with contextlib.suppress(grpc.aio.AioRpcError):
        async with asyncio.timeout(WAIT_S):
            while (reply := await call.read()) is not grpc.aio.EOF:
                replies.append(reply)
    return replies, await call.code()


def upload(size: int, piece: int) -> list[pb.ProcessingRequest]:
    parts = [request_body(part) for part in pieces(chat_of(size), piece)]
    return [request_headers(), *parts, request_body(end_of_stream=True)]


def response(chunks: int, *, content_type: str = "text/event-stream") -> list[pb.ProcessingRequest]:
    body = [response_body(b'data: {"choices":[{"delta":{"content":"%d"}}]}\n\n' % number) for number in range(chunks)]
    return [response_headers(content_type=content_type), *body, response_body(end_of_stream=True)]


SCRIPTS: dict[str, list[pb.ProcessingRequest]] = {
    "1 KB chat": upload(1_000, 1_000),
    "300 KB chat": upload(300_000, 32_768),
    "5 MB chat": upload(5_000_000, 1 << 20),
    "5 MB chat in one message": [request_headers(), request_body(chat_of(5_000_000), end_of_stream=True)],
    "GET": [request_headers(path="/v1/models", end_of_stream=True, headers={":method": "GET"})],
    "trailers": [request_headers(), request_body(chat()), request_trailers()],
    "bad JSON": [request_headers(), request_body(b"{", end_of_stream=True)],
    "unknown path": [request_headers(path="/nowhere", end_of_stream=True)],
    "header that is not UTF-8": [request_headers(headers={"x-odd": b"\xff"})],
    "one response chunk": [*upload(1_000, 1_000), *response(1)],
    "100 response chunks": [*upload(1_000, 1_000), *response(100)],
    "a large response chunk": [*upload(100, 100), response_headers(), response_body(b"r" * 500_000, end_of_stream=True)],
    "response trailers": [*upload(100, 100), response_headers(), response_body(b"r"), response_trailers()],
    "half-close before the end": [request_headers(modes=None), request_body(chat())],
    "buffered": [
        request_headers(modes=(BodyMode.BUFFERED, BodyMode.BUFFERED)),
        request_body(chat(), end_of_stream=True),
        response_headers(),
        response_body(b"{}", end_of_stream=True),
    ],
    "streamed": [request_headers(modes=(BodyMode.STREAMED, BodyMode.STREAMED)), request_body(chat()), request_body(end_of_stream=True)],
    "after the end": [*upload(100, 100), request_body(b"again", end_of_stream=True)],
    "response alone": [response_headers(503), response_body(b"no", end_of_stream=True)],
    "nothing": [],
}


@pytest.mark.parametrize("secure", [False, True], ids=["plaintext", "tls"])
async def test_both_transports_answer_every_script_byte_for_byte_the_same(secure: bool) -> None:
    pair = named_pair() if secure else None
    answers: dict[str, dict[str, tuple[list[bytes], grpc.StatusCode]]] = defaultdict(dict)
    for transport in TRANSPORTS:
        world = core()
        async with serving(transport, world, pair=pair) as server, channel_to(server, pair) as channel:
            for name, script in SCRIPTS.items():
                answers[name][transport] = await play(channel, script)
            await eventually(lambda: world.inflight == (0, 0, 0, 0), f"{transport}: everything given back")  # noqa: B023 - awaited here
    for name, by_transport in answers.items():
        assert by_transport["h2"] == by_transport["grpc"], name
        assert by_transport["h2"][1] is grpc.StatusCode.OK, name
    replies = {name: [pb.ProcessingResponse.FromString(reply) for reply in by["h2"][0]] for name, by in answers.items()}
    assert echoed(replies["5 MB chat"]) == echoed(replies["5 MB chat in one message"]) == chat_of(5_000_000)
    assert ends(replies["5 MB chat"])[-1]
    assert kinds(replies["GET"]) == ["request_headers"]
    assert kinds(replies["trailers"]) == ["request_headers", "request_body", "request_trailers"]
    assert replies["bad JSON"][0].immediate_response.status.code == 400
    assert kinds(replies["100 response chunks"])[-101:] == ["response_body"] * 101
    assert kinds(replies["half-close before the end"]) == ["request_headers", "request_body"]
    assert replies["nothing"] == []


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_full_duplex_replies_come_while_the_stream_is_open(transport: str) -> None:
    world = core()
    async with serving(transport, world) as server, channel_to(server) as channel, asyncio.timeout(WAIT_S):
        call = channel.stream_stream(PROCESS)()
        for message in upload(1_000, 1_000):
            await call.write(message.SerializeToString())
        got = [pb.ProcessingResponse.FromString(await call.read()) for _ in range(2)]
        assert kinds(got) == ["request_headers", "request_body"]
        assert world.inflight[0] == 1
        for message in response(3):
            await call.write(message.SerializeToString())
            reply = pb.ProcessingResponse.FromString(await call.read())
            assert reply.WhichOneof("response") == message.WhichOneof("request")
        assert world.inflight == (0, 0, 0, 0), "the response is over, whatever becomes of the stream"
        assert server.open_streams == 1
        call.cancel()
        await eventually(lambda: server.open_streams == 0, "the stream is gone")


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("routed", [False, True], ids=["mid-upload", "routed"])
async def test_a_cancel_frees_what_the_stream_held(transport: str, routed: bool) -> None:
    world = core()
    async with serving(transport, world) as server, channel_to(server) as channel, asyncio.timeout(WAIT_S):
        call = channel.stream_stream(PROCESS)()
        for message in upload(100_000, 10_000)[: None if routed else -1]:
            await call.write(message.SerializeToString())
        await eventually(lambda: world.inflight[0] == 1 if routed else world.limits.buffered_bytes == 100_000, "it arrived")
        call.cancel()
        await eventually(lambda: world.inflight == (0, 0, 0, 0), "everything given back")
        await eventually(lambda: server.open_streams == 0, "the stream is gone")


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_the_health_services(transport: str) -> None:
    health = Health()
    async with serving(transport, core(), health=health) as server, channel_to(server) as channel:
        check, listing = channel.unary_unary(CHECK), channel.unary_unary(LIST)

        async def statuses() -> dict[str, int]:
            found = {}
            for service in (*SERVICES, "anything"):
                answer = await check(health_pb.HealthCheckRequest(service=service).SerializeToString(), timeout=WAIT_S)
                found[service] = health_pb.HealthCheckResponse.FromString(answer).status
            listed = health_pb.HealthListResponse.FromString(await listing(b"", timeout=WAIT_S)).statuses
            assert {name: status.status for name, status in listed.items()} == {name: found[name] for name in SERVICES}
            return found

        names = ("", "liveness", "readiness", "inference-extension", "envoy.service.ext_proc.v3.ExternalProcessor", "anything")
        assert await statuses() == dict.fromkeys(names, health_pb.HealthCheckResponse.NOT_SERVING)
        health.ready = True
        assert await statuses() == dict.fromkeys(names, health_pb.HealthCheckResponse.SERVING)
        health.draining = True
        assert await statuses() == dict.fromkeys(names, health_pb.HealthCheckResponse.NOT_SERVING), (
            "liveness too, as in the reference picker"
        )
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await check(b"\xff\xff", timeout=WAIT_S)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("method", ["/envoy.service.ext_proc.v3.ExternalProcessor/Nothing", "/grpc.health.v1.Health/Watch", "/a/b"])
async def test_an_unknown_method_is_unimplemented(transport: str, method: str) -> None:
    async with serving(transport, core()) as server, channel_to(server) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await channel.unary_unary(method)(b"", timeout=WAIT_S)
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_bytes_that_are_no_message_are_a_grpc_error_and_hold_nothing(transport: str) -> None:
    world = core()
    async with serving(transport, world) as server, channel_to(server) as channel:
        call = channel.stream_stream(PROCESS)()
        await call.write(request_headers().SerializeToString())
        await call.write(b"\xff\xff")
        assert await asyncio.wait_for(call.code(), WAIT_S) is grpc.StatusCode.INTERNAL
        await eventually(lambda: server.open_streams == 0, "the stream is gone")
        assert world.inflight == (0, 0, 0, 0)


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_a_body_over_the_limit_is_a_413_for_the_client(transport: str) -> None:
    world = core(body_bytes_max=1 << 20)
    async with serving(transport, world) as server, channel_to(server) as channel, asyncio.timeout(WAIT_S):
        call = channel.stream_stream(PROCESS)()
        await call.write(request_headers().SerializeToString())
        await call.write(request_body(b"x" * (2 << 20)).SerializeToString())
        answer = pb.ProcessingResponse.FromString(await call.read())
        assert answer.immediate_response.status.code == 413
        assert await call.read() is grpc.aio.EOF
        assert await call.code() is grpc.StatusCode.OK
        assert world.inflight == (0, 0, 0, 0)


async def test_a_message_over_the_limit_is_a_413_for_the_client() -> None:
    """Of h2 alone: grpcio refuses such a message before we see it, with RESOURCE_EXHAUSTED."""
    world = core()
    async with serving("h2", world) as server, channel_to(server) as channel, asyncio.timeout(WAIT_S):
        call = channel.stream_stream(PROCESS)()
        await call.write(request_headers().SerializeToString())
        await call.write(request_body(b"x" * (MESSAGE_BYTES_MAX + 1)).SerializeToString())
        answer = pb.ProcessingResponse.FromString(await call.read())
        assert answer.immediate_response.status.code == 413
        assert await call.code() is grpc.StatusCode.OK
        assert world.inflight == (0, 0, 0, 0)
        assert world.metrics.limit_hits["message_bytes_max"] == 1


async def test_a_compressed_message_is_unimplemented() -> None:
    async with serving("h2", core()) as server, channel_to(server, compression=grpc.Compression.Gzip) as channel:
        call = channel.stream_stream(PROCESS)()
        await call.write(request_headers(headers={"x-long": "a" * 5_000}).SerializeToString())
        assert await asyncio.wait_for(call.code(), WAIT_S) is grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_stopping_lets_the_open_stream_finish_and_refuses_new_ones(transport: str) -> None:
    world = core()
    async with serving(transport, world) as server, channel_to(server) as channel, asyncio.timeout(WAIT_S):
        call = channel.stream_stream(PROCESS)()
        for message in upload(1_000, 1_000):
            await call.write(message.SerializeToString())
        for _ in range(2):
            await call.read()
        stopping = asyncio.ensure_future(server.stop(WAIT_S))
        await asyncio.sleep(0.05)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await channel.unary_unary(PROCESS)(request_headers(end_of_stream=True).SerializeToString(), timeout=WAIT_S / 2)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert not stopping.done(), "a stream is still open"
        for message in response(5):
            await call.write(message.SerializeToString())
            reply = pb.ProcessingResponse.FromString(await call.read())
            assert reply.WhichOneof("response") == message.WhichOneof("request")
        call.cancel()
        await stopping
        assert world.inflight == (0, 0, 0, 0)


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_stopping_ends_what_does_not_end_by_itself(transport: str) -> None:
    world = core()
    async with serving(transport, world) as server, channel_to(server) as channel, asyncio.timeout(WAIT_S):
        call = channel.stream_stream(PROCESS)()
        for message in upload(1_000, 1_000):
            await call.write(message.SerializeToString())
        await eventually(lambda: world.inflight[0] == 1, "it is routed")
        await server.stop(0.05)
        await eventually(lambda: world.inflight == (0, 0, 0, 0), "everything given back")


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_alpn_negotiates_h2_with_the_self_signed_certificate(transport: str) -> None:
    async with serving(transport, core(), pair=tls.self_signed()) as server:
        _reader, writer = await asyncio.open_connection(HOST, server.port, ssl=client_tls())
        assert writer.get_extra_info("ssl_object").selected_alpn_protocol() == "h2"
        assert writer.get_extra_info("ssl_object").version() in {"TLSv1.2", "TLSv1.3"}
        writer.transport.abort()


# A peer that speaks frames


def client_tls() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["h2", "http/1.1"])
    return context


def grpc_message(message: pb.ProcessingRequest, *, flag: int = 0) -> bytes:
    data = message.SerializeToString()
    return struct.pack("!BI", flag, len(data)) + data


class Peer:
    """An HTTP/2 client that does only what it is told, but for acknowledging settings and pings."""

    WINDOW = 1 << 30

    def __init__(self, port: int) -> None:
        self.port = port
        self.answers_pings = True
        self.data: defaultdict[int, bytearray] = defaultdict(bytearray)
        self.headers: defaultdict[int, dict[str, str]] = defaultdict(dict)
        self.ended: set[int] = set()
        self.resets: dict[int, int] = {}
        self.goaways: list[frames.GoAwayFrame] = []
        self.pings = 0
        self.credit = 65_535
        """What the server lets us send on the connection."""
        self.heard = False
        self.closed = False
        self._encoder, self._decoder = hpack.Encoder(), hpack.Decoder()
        self._unread = b""
        self._next_id = 1

    async def connect(self, context: ssl.SSLContext | None = None) -> None:
        self._reader, self._writer = await asyncio.open_connection(HOST, self.port, ssl=context)

    async def speak(self, stream_window: int) -> None:
        settings = frames.SettingsFrame(0, settings={frames.SettingsFrame.INITIAL_WINDOW_SIZE: stream_window})
        window = frames.WindowUpdateFrame(0, window_increment=self.WINDOW)
        self.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + settings.serialize() + window.serialize())
        await self.until(lambda: self.heard and self.credit > 65_535, "the server's settings and window, and its word that it has ours")

    def write(self, data: bytes) -> None:
        self._writer.write(data)

    def open_bytes(self, path: str = PROCESS, *, end: bool = False) -> tuple[int, bytes]:
        stream_id, self._next_id = self._next_id, self._next_id + 2
        block = self._encoder.encode(
            [(":method", "POST"), (":scheme", "http"), (":path", path), (":authority", "x"), ("content-type", "application/grpc")]
        )
        headers = frames.HeadersFrame(stream_id, block, flags=["END_HEADERS", *(["END_STREAM"] if end else [])])
        return stream_id, headers.serialize()

    def open(self, path: str = PROCESS, *, end: bool = False) -> int:
        stream_id, data = self.open_bytes(path, end=end)
        self.write(data)
        return stream_id

    def data_bytes(self, stream_id: int, payload: bytes, *, end: bool = False) -> bytes:
        self.credit -= len(payload)
        parts = pieces(payload, 16_384) or [b""]
        return b"".join(
            frames.DataFrame(stream_id, part, flags=["END_STREAM"] if end and number == len(parts) - 1 else []).serialize()
            for number, part in enumerate(parts)
        )

    def send(self, stream_id: int, *messages: pb.ProcessingRequest, end: bool = False) -> None:
        self.write(self.data_bytes(stream_id, b"".join(map(grpc_message, messages)), end=end))

    @staticmethod
    def reset_bytes(stream_id: int) -> bytes:
        return frames.RstStreamFrame(stream_id, error_code=8).serialize()

    def widen(self, stream_id: int, size: int = WINDOW) -> None:
        self.write(frames.WindowUpdateFrame(stream_id, window_increment=size).serialize())

    async def until(self, true: Callable[[], bool], what: str, *, seconds: float = WAIT_S) -> None:
        try:
            async with asyncio.timeout(seconds):
                while not true():
                    assert not self.closed, f"closed while waiting for: {what}"
                    await self._read()
        except TimeoutError:
            raise AssertionError(f"not within {seconds} s: {what}") from None

    async def until_closed(self) -> None:
        async with asyncio.timeout(WAIT_S):
            while not self.closed:
                await self._read()

    def replies(self, stream_id: int) -> list[pb.ProcessingResponse]:
        data, at, found = bytes(self.data[stream_id]), 0, []
        while len(data) - at >= 5:
            end = at + 5 + int.from_bytes(data[at + 1 : at + 5], "big")
            if end > len(data):
                break
            found.append(pb.ProcessingResponse.FromString(data[at + 5 : end]))
            at = end
        return found

    def status(self, stream_id: int) -> int:
        return int(self.headers[stream_id]["grpc-status"])

    async def close(self) -> None:
        self._writer.transport.abort()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()

    async def _read(self) -> None:
        try:
            data = await self._reader.read(1 << 20)
        except ConnectionError:
            data = b""
        if not data:
            self.closed = True
            return
        self._unread += data
        while len(self._unread) >= 9:
            head, length = frames.Frame.parse_frame_header(memoryview(self._unread)[:9])
            if len(self._unread) < 9 + length:
                return
            head.parse_body(memoryview(self._unread)[9 : 9 + length])
            self._unread = self._unread[9 + length :]
            self._take(head)

    def _take(self, frame: frames.Frame) -> None:
        if isinstance(frame, frames.DataFrame):
            self.data[frame.stream_id] += frame.data
        elif isinstance(frame, frames.HeadersFrame):
            self.headers[frame.stream_id].update((str(k), str(v)) for k, v in self._decoder.decode(frame.data))
        elif isinstance(frame, frames.RstStreamFrame):
            self.resets[frame.stream_id] = frame.error_code
        elif isinstance(frame, frames.GoAwayFrame):
            self.goaways.append(frame)
        elif isinstance(frame, frames.SettingsFrame) and "ACK" in frame.flags:
            self.heard = True
        elif isinstance(frame, frames.SettingsFrame):
            self.write(frames.SettingsFrame(0, flags=["ACK"]).serialize())
        elif isinstance(frame, frames.PingFrame) and "ACK" not in frame.flags:
            self.pings += 1
            if self.answers_pings:
                self.write(frames.PingFrame(0, opaque_data=frame.opaque_data, flags=["ACK"]).serialize())
        elif isinstance(frame, frames.WindowUpdateFrame) and frame.stream_id == 0:
            self.credit += frame.window_increment
        if "END_STREAM" in frame.flags:
            self.ended.add(frame.stream_id)


@contextlib.asynccontextmanager
async def peer_of(
    server: Server, *, stream_window: int = Peer.WINDOW, context: ssl.SSLContext | None = None, silent: bool = False
) -> AsyncIterator[Peer]:
    peer = Peer(server.port)
    await peer.connect(context)
    try:
        if not silent:
            await peer.speak(stream_window)
        yield peer
    finally:
        await peer.close()


def connections(server: Server) -> set[H2Connection]:
    assert isinstance(server, H2Server)
    return server._shared.connections


REQUEST = [request_headers(), request_body(chat("x" * 900), end_of_stream=True)]
"""About 1 KB."""


async def test_thousands_of_streams_ended_by_a_reset_neither_close_nor_starve_the_connection() -> None:
    """Envoy ends every stream so. 3 MB in all, three times the connection's window: what came on dead streams is acknowledged too."""
    world = core()
    async with serving("h2", world, policy=limits(connection_window_bytes=1 << 20)) as server, peer_of(server) as peer:
        for _ in range(30):
            streams = [peer.open() for _ in range(100)]
            for stream_id in streams:
                peer.send(stream_id, *REQUEST)
            await peer.until(lambda: all(len(peer.replies(s)) == 2 for s in streams), "100 answers")  # noqa: B023 - awaited here
            peer.write(b"".join(map(peer.reset_bytes, streams)))
        await eventually(lambda: world.inflight == (0, 0, 0, 0), "everything given back")
        last = peer.open()
        peer.send(last, *REQUEST)
        await peer.until(lambda: len(peer.replies(last)) == 2, "one more answer")
        assert peer.goaways == []
        assert len(world.sessions) == 3_001


async def test_a_reset_in_the_same_read_as_the_request_disturbs_nobody() -> None:
    world = core()
    async with serving("h2", world) as server, peer_of(server) as peer:
        other = peer.open()
        peer.send(other, REQUEST[0])
        message = b"".join(map(grpc_message, REQUEST))
        for path, payload, end in [
            (PROCESS, message, False),
            (PROCESS, message, True),
            (PROCESS, b"", True),
            (PROCESS, b"\x01\0\0\0\0", False),
            (PROCESS, b"\0\0\0\0\2\xff\xff", False),
            (CHECK, b"\0\0\0\0\0", True),
            (CHECK, b"\0\0\0\0\2\xff\xff", True),
            (CHECK, b"", True),
            ("/no/method", b"", True),
        ]:
            stream_id, opening = peer.open_bytes(path)
            peer.write(opening + peer.data_bytes(stream_id, payload, end=end) + peer.reset_bytes(stream_id))
            probe = peer.open(CHECK)
            peer.write(peer.data_bytes(probe, b"\0\0\0\0\0", end=True))
            await peer.until(lambda: probe in peer.ended, f"the connection lives after {path} {payload[:8]!r} {end}")  # noqa: B023
        peer.send(other, REQUEST[1])
        await peer.until(lambda: len(peer.replies(other)) == 2, "the other stream goes on")
        assert world.inflight[0] == 1
        assert server.open_streams == 1


async def test_a_half_closed_stream_gives_back_what_it_held_though_the_peer_says_nothing_more() -> None:
    """NGINX Gateway Fabric half-closes after the body; nothing need come on that connection ever after."""
    world = core()
    async with serving("h2", world) as server, peer_of(server) as peer:
        stream_id = peer.open()
        peer.send(stream_id, *REQUEST, end=True)
        await peer.until(lambda: stream_id in peer.ended, "the stream ended")
        assert kinds(peer.replies(stream_id)) == ["request_headers", "request_body"]
        await eventually(lambda: world.inflight == (0, 0, 0, 0), "everything given back")
        await eventually(lambda: server.open_streams == 0, "the stream is gone")


async def test_stopping_does_not_wait_for_calls_that_are_over() -> None:
    async with serving("h2", core()) as server, peer_of(server) as peer:
        stream_id = peer.open(CHECK)
        peer.write(peer.data_bytes(stream_id, b"\0\0\0\0\0", end=True))
        await peer.until(lambda: stream_id in peer.ended, "the health check is answered")
        async with asyncio.timeout(2):
            await server.stop(WAIT_S)


async def test_stopping_says_goaway_and_refuses_streams_on_a_connection_that_stays() -> None:
    world = core()
    async with serving("h2", world) as server, peer_of(server) as peer:
        open_stream = peer.open()
        peer.send(open_stream, *REQUEST)
        await peer.until(lambda: len(peer.replies(open_stream)) == 2, "it is routed")
        stopping = asyncio.ensure_future(server.stop(WAIT_S))
        await peer.until(lambda: bool(peer.goaways), "GOAWAY")
        assert peer.goaways[0].error_code == 0
        assert peer.goaways[0].last_stream_id >= open_stream
        late = peer.open()
        await peer.until(lambda: late in peer.ended or late in peer.resets, "the late stream is refused")
        assert late in peer.resets or peer.status(late) == 14
        peer.write(peer.reset_bytes(late))  # as gRPC clients do with a call that was ended before they were done
        peer.send(open_stream, response_headers(), response_body(b"tail", end_of_stream=True))
        await peer.until(lambda: len(peer.replies(open_stream)) == 4, "the open stream goes on")
        assert not stopping.done()
        peer.write(peer.reset_bytes(open_stream))
        async with asyncio.timeout(WAIT_S):
            await stopping
        assert world.inflight == (0, 0, 0, 0)


async def test_a_peer_that_does_not_read_is_given_no_more_window_and_catches_up_later() -> None:
    queued_max, window = 256 << 10, 1 << 20
    world = core()
    policy = limits(queued_bytes_max=queued_max, connection_window_bytes=window, stream_window_bytes=window)
    async with serving("h2", world, policy=policy) as server, peer_of(server, stream_window=0) as peer:
        body = chat_of(100_000)
        streams = []
        while peer.credit > 110_000 and len(streams) < 60:
            stream_id = peer.open()
            streams.append(stream_id)
            peer.send(stream_id, request_headers(), request_body(body, end_of_stream=True))
            await eventually(lambda: len(world.sessions) == len(streams), "the server took the stream")
            with contextlib.suppress(AssertionError):
                await peer.until(lambda: peer.credit > 900_000, "more window", seconds=0.05)
        assert len(streams) < 20, "a peer that reads nothing may send about the queue and the window, no more"
        (connection,) = connections(server)
        await eventually(lambda: world.inflight[0] == len(streams), "all are routed")
        queued = connection._connection.queued_body_size()
        assert queued_max < queued < queued_max + window + 100_000

        async with peer_of(server) as other:  # another connection goes on
            stream_id = other.open()
            other.send(stream_id, request_headers(), request_body(body, end_of_stream=True))
            await other.until(lambda: len(other.replies(stream_id)) == 3, "an answer")

        for stream_id in streams:
            peer.widen(stream_id)
        await peer.until(lambda: all(len(peer.replies(s)) == 3 for s in streams), "all answers, late")
        assert all(echoed(peer.replies(s)) == body for s in streams)
        assert connection._connection.queued_body_size() == 0
        peer.send(peer.open(), *REQUEST)
        await peer.until(lambda: peer.credit > window // 2, "window again")


async def test_a_stream_nobody_reads_does_not_hold_up_the_others_on_its_connection() -> None:
    world = core()
    async with serving("h2", world) as server, peer_of(server, stream_window=0) as peer:
        stuck = peer.open()
        peer.send(stuck, request_headers(), request_body(chat_of(200_000), end_of_stream=True))
        for _ in range(5):
            stream_id = peer.open()
            peer.widen(stream_id)
            peer.send(stream_id, request_headers(), request_body(chat_of(300_000), end_of_stream=True))
            await peer.until(lambda: len(peer.replies(stream_id)) == 6, "an answer")  # noqa: B023 - awaited here
        assert peer.data[stuck] == b""
        peer.widen(stuck)
        await peer.until(lambda: echoed(peer.replies(stuck)) == chat_of(200_000), "the stuck one, once it is read")


@pytest.mark.parametrize(
    "garbage",
    [b"GET / HTTP/1.1\r\nhost: x\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00" * 9, bytes(range(256)) * 40],
    ids=["HTTP/1", "TLS", "noise"],
)
async def test_garbage_closes_its_own_connection_only(garbage: bytes) -> None:
    world = core()
    async with serving("h2", world) as server, peer_of(server) as bystander:
        stream_id = bystander.open()
        bystander.send(stream_id, REQUEST[0])
        for silent in (True, False):
            async with peer_of(server, silent=silent) as stranger:
                stranger.write(garbage)
                await stranger.until_closed()
        bystander.send(stream_id, REQUEST[1])
        await bystander.until(lambda: len(bystander.replies(stream_id)) == 2, "the bystander's answer")
        assert len(connections(server)) == 1


async def test_a_lost_connection_gives_back_what_its_streams_held() -> None:
    world = core()
    async with serving("h2", world) as server:
        async with peer_of(server) as peer:
            for _ in range(3):
                peer.send(peer.open(), *REQUEST)
            half = peer.open()
            peer.send(half, REQUEST[0])
            peer.write(peer.data_bytes(half, grpc_message(request_body(b"x" * 5_000))[:4_000]))
            await eventually(lambda: world.inflight[0] == 3 and world.limits.buffered_bytes == 4_000, "all of it arrived")
        await eventually(lambda: world.inflight == (0, 0, 0, 0), "everything given back")
        assert server.open_streams == 0


async def test_messages_may_be_cut_anywhere() -> None:
    world = core()
    async with serving("h2", world) as server, peer_of(server) as peer:
        wire = b"".join(map(grpc_message, [request_headers(), request_body(chat()), request_body(end_of_stream=True), *response(2)]))
        whole = peer.open()
        peer.write(peer.data_bytes(whole, wire))
        await peer.until(lambda: len(peer.replies(whole)) == 6, "the answer to the whole")
        expected = bytes(peer.data[whole])
        for size in (1, 2, 3, 4, 5, 6, 7, 100):
            stream_id = peer.open()
            for part in pieces(wire, size):
                peer.write(peer.data_bytes(stream_id, part))
                if size > 3:
                    await asyncio.sleep(0)
            await peer.until(lambda: len(peer.data[stream_id]) >= len(expected), f"in pieces of {size}")  # noqa: B023 - awaited here
            assert bytes(peer.data[stream_id]) == expected
        assert world.limits.buffered_bytes == 0


async def test_a_connection_that_never_speaks_is_closed_after_the_handshake_time() -> None:
    world = core()
    async with serving("h2", world, policy=limits(handshake_s=10)) as server, peer_of(server, silent=True) as silent:
        assert isinstance(server, H2Server)
        await eventually(lambda: len(connections(server)) == 1, "it is connected")
        world.clock.advance(10)
        server.check_alive()
        await asyncio.sleep(0.02)
        assert len(connections(server)) == 1
        world.clock.advance(0.1)
        server.check_alive()
        await silent.until_closed()
        assert not connections(server)


async def test_a_connection_that_never_finishes_its_tls_handshake_is_closed_too() -> None:
    async with (
        serving("h2", core(), pair=tls.self_signed(), policy=limits(handshake_s=0.2)) as server,
        peer_of(server, silent=True) as silent,
    ):
        async with asyncio.timeout(3):
            await silent.until_closed()


async def test_silence_is_asked_about_and_no_answer_closes_the_connection() -> None:
    world = core()
    async with serving("h2", world, policy=limits(keepalive_s=60)) as server, peer_of(server) as peer:
        assert isinstance(server, H2Server)
        world.clock.advance(59)
        server.check_alive()
        await asyncio.sleep(0.02)
        world.clock.advance(2)
        server.check_alive()
        await peer.until(lambda: peer.pings == 1, "a PING")
        (connection,) = connections(server)
        await eventually(lambda: connection._vigil._last_read_s == world.clock.now_s(), "its answer came")
        world.clock.advance(59)
        server.check_alive()
        assert len(connections(server)) == 1, "it answered, so it lives"

        peer.answers_pings = False
        world.clock.advance(2)
        server.check_alive()
        await peer.until(lambda: peer.pings == 2, "another PING")
        world.clock.advance(60)
        server.check_alive()
        await asyncio.sleep(0.02)
        assert len(connections(server)) == 1
        world.clock.advance(1)
        server.check_alive()
        await peer.until_closed()
        assert not connections(server)


async def test_more_connections_than_the_limit_are_not_served() -> None:
    world = core()
    async with serving("h2", world, policy=limits(connections_max=1)) as server, peer_of(server), peer_of(server, silent=True) as second:
        await second.until_closed()
        assert world.metrics.limit_hits == {"connections_max": 1}


async def test_frames_by_hand_over_tls() -> None:
    async with serving("h2", core(), pair=tls.self_signed()) as server, peer_of(server, context=client_tls()) as peer:
        stream_id = peer.open()
        peer.send(stream_id, request_headers(), request_body(chat_of(300_000), end_of_stream=True))
        await peer.until(lambda: len(peer.replies(stream_id)) == 6, "an answer")
        assert echoed(peer.replies(stream_id)) == chat_of(300_000)
