"""Certificates over their life, on both transports: renewed without a restart, half-written, and asked of clients."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import ipaddress
import logging
import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import grpc.aio
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from epp._pb import epp_health_pb2 as health_pb
from epp.errors import StartError
from epp.extproc import tls
from epp.extproc.grpc_aio import GrpcServer
from epp.extproc.h2_policy import H2Limits
from epp.extproc.health import Health
from epp.extproc.server import H2Server
from tests.builders import core

HOST = "127.0.0.1"
CHECK = "/grpc.health.v1.Health/Check"
WAIT_S = 10.0
TRANSPORTS = ["h2", "grpc"]
Server = H2Server | GrpcServer


class Authority:
    """Signs certificates; its own is `ca_file`."""

    def __init__(self, directory: Path, name: str) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
        self.ca_file = directory / f"{name}.pem"
        certificate = self._certificate(self._name, self._key, ca=True)
        self.ca_file.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))

    def pair(self, name: str) -> tls.KeyPair:
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = self._certificate(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)]), key, ca=False)
        return tls.KeyPair(
            certificate.public_bytes(serialization.Encoding.PEM),
            key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()),
        )

    def _certificate(self, subject: x509.Name, key: ec.EllipticCurvePrivateKey, *, ca: bool) -> x509.Certificate:
        now = dt.datetime.now(dt.UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - dt.timedelta(days=1))
            .not_valid_after(now + dt.timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
            .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(HOST))]), critical=False)
            .sign(self._key, hashes.SHA256())
        )


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path, "authority")


@contextlib.asynccontextmanager
async def serving(transport: str, pair: tls.KeyPair, *, client_ca_file: str = "") -> AsyncIterator[Server]:
    world, health = core(), Health()
    health.ready = True
    server: Server
    if transport == "grpc":
        server = GrpcServer(
            new_session=world.session,
            health=health,
            message_bytes_max=1 << 20,
            streams_max=100,
            clock=world.clock,
            tls=pair,
            client_ca_file=client_ca_file,
        )
    else:
        server = H2Server(
            health=health,
            session_limits=world.limits,
            limits=H2Limits(message_bytes_max=1 << 20),
            clock=world.clock,
            new_session=world.session,
            tls=tls.server_context(pair, client_ca_file=client_ca_file),
        )
    await server.start(HOST, 0)
    try:
        yield server
    finally:
        for _ in range(10):  # a refused client tries again by itself: its handshake, which no server object knows of yet, ends first
            await asyncio.sleep(0.01)
        await server.stop(0)


async def presented(server: Server) -> bytes:
    """The certificate a new handshake is shown, DER."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    async with asyncio.timeout(WAIT_S):
        _reader, writer = await asyncio.open_connection(HOST, server.port, ssl=context)
    found = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    writer.transport.abort()
    return found


def der(pair: tls.KeyPair) -> bytes:
    return ssl.PEM_cert_to_DER_cert(pair.certificate.decode())


def put(directory: Path, *, certificate: bytes | None = None, key: bytes | None = None) -> None:
    if certificate is not None:
        (directory / "tls.crt").write_bytes(certificate)
    if key is not None:
        (directory / "tls.key").write_bytes(key)


def channel_to(server: Server, authority: Authority, client: tls.KeyPair | None = None) -> grpc.aio.Channel:
    credentials = grpc.ssl_channel_credentials(
        authority.ca_file.read_bytes(), client.key if client else None, client.certificate if client else None
    )
    return grpc.aio.secure_channel(f"{HOST}:{server.port}", credentials)


async def check(channel: grpc.aio.Channel) -> int:
    answer = await channel.unary_unary(CHECK)(b"", timeout=WAIT_S)
    return health_pb.HealthCheckResponse.FromString(answer).status


# Renewal


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_a_renewed_certificate_is_presented_to_new_handshakes_and_open_connections_go_on(
    transport: str, authority: Authority, tmp_path: Path
) -> None:
    old, new = authority.pair("old"), authority.pair("new")
    put(tmp_path, certificate=old.certificate, key=old.key)
    async with serving(transport, tls.load(str(tmp_path))) as server, channel_to(server, authority) as channel:
        reloader = tls.Reloader(str(tmp_path), old, server.present)
        assert await check(channel) == health_pb.HealthCheckResponse.SERVING
        reloader.once()
        assert (await presented(server), reloader.reloads_total) == (der(old), 0)
        put(tmp_path, certificate=new.certificate, key=new.key)
        assert await presented(server) == der(old), "files are looked at, not watched"
        reloader.once()
        assert await presented(server) == der(new)
        reloader.once()
        assert reloader.reloads_total == 1
        assert await check(channel) == health_pb.HealthCheckResponse.SERVING
        async with channel_to(server, authority) as another:
            assert await check(another) == health_pb.HealthCheckResponse.SERVING


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_a_half_written_pair_keeps_the_old_one_with_one_warning(
    transport: str, authority: Authority, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    old, new = authority.pair("old"), authority.pair("new")
    put(tmp_path, certificate=old.certificate, key=old.key)
    async with serving(transport, old) as server:
        reloader = tls.Reloader(str(tmp_path), old, server.present)
        put(tmp_path, certificate=new.certificate)
        with caplog.at_level(logging.WARNING, "epp.tls"):
            for _ in range(3):
                reloader.once()
        assert len(caplog.records) == 1
        assert await presented(server) == der(old)
        put(tmp_path, key=new.key)
        reloader.once()
        assert await presented(server) == der(new)
        assert reloader.reloads_total == 1


@pytest.mark.parametrize("broken", ["missing", "empty", "noise"])
async def test_files_that_are_no_pair_keep_the_old_one_and_a_later_pair_is_taken(
    broken: str, authority: Authority, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    old, new = authority.pair("old"), authority.pair("new")
    async with serving("h2", old) as server:
        reloader = tls.Reloader(str(tmp_path), old, server.present)
        if broken != "missing":
            put(tmp_path, certificate=b"" if broken == "empty" else b"\0\xff" * 50, key=b"")
        with caplog.at_level(logging.WARNING, "epp.tls"):
            reloader.once()
            reloader.once()
        assert len(caplog.records) == 1
        assert await presented(server) == der(old)
        put(tmp_path, certificate=new.certificate, key=new.key)
        reloader.once()
        assert await presented(server) == der(new)


def test_a_second_fault_after_a_good_pair_is_warned_of_again(
    authority: Authority, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pairs = [authority.pair(name) for name in "abc"]
    context = tls.server_context(pairs[0])
    reloader = tls.Reloader(str(tmp_path), pairs[0], lambda pair: tls.use(context, pair))
    with caplog.at_level(logging.WARNING, "epp.tls"):
        for certificate, key in [(pairs[1], pairs[0]), (pairs[1], pairs[1]), (pairs[2], pairs[1])]:
            put(tmp_path, certificate=certificate.certificate, key=key.key)
            reloader.once()
            reloader.once()
    assert (len(caplog.records), reloader.reloads_total) == (2, 1)


# Clients' certificates


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_only_a_client_with_a_certificate_of_the_authority_is_served(transport: str, authority: Authority, tmp_path: Path) -> None:
    stranger = Authority(tmp_path, "stranger")
    async with serving(transport, authority.pair("server"), client_ca_file=str(authority.ca_file)) as server:
        for client in (None, stranger.pair("client")):
            async with channel_to(server, authority, client) as channel:
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await check(channel)
                assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        async with channel_to(server, authority, authority.pair("client")) as channel:
            assert await check(channel) == health_pb.HealthCheckResponse.SERVING


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_a_renewed_certificate_does_not_open_the_door_to_clients_without_one(transport: str, authority: Authority) -> None:
    async with serving(transport, authority.pair("server"), client_ca_file=str(authority.ca_file)) as server:
        server.present(authority.pair("renewed"))
        async with channel_to(server, authority) as channel:
            with pytest.raises(grpc.aio.AioRpcError):
                await check(channel)
        async with channel_to(server, authority, authority.pair("client")) as channel:
            assert await check(channel) == health_pb.HealthCheckResponse.SERVING


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("content", [None, b"", b"no certificate"], ids=["missing", "empty", "noise"])
def test_an_authority_that_can_not_be_read_is_one_line_at_start(transport: str, content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "ca.pem"
    if content is not None:
        path.write_bytes(content)

    async def start() -> None:
        async with serving(transport, tls.self_signed(), client_ca_file=str(path)):
            pass

    with pytest.raises(StartError, match="--client-ca-file"):
        asyncio.run(start())
