"""The metrics port as `--metrics-cert-dir` and `--metrics-client-ca-file` make it, and `epp explain` before it: real handshakes."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import socket
import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from epp import cli
from epp.console.guard import Authorize
from epp.console.server import HttpServer
from epp.decisions import Decisions
from epp.errors import StartError
from epp.extproc import tls
from tests.builders import core

SERVICE = "my-epp.prod.svc"
WAIT_S = 10.0
TOKEN = "eyJhbGciOi.cGF5bG9hZA.c2ln"


class Authority:
    """Signs certificates for SERVICE; its own is `ca_file`."""

    def __init__(self, directory: Path, name: str) -> None:
        self._directory = directory
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
        self.ca_file = directory / f"{name}.pem"
        self.ca_file.write_bytes(self._sign(self._name, self._key, ca=True).public_bytes(serialization.Encoding.PEM))

    def pair(self, name: str = "server") -> tls.KeyPair:
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = self._sign(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)]), key, ca=False)
        return tls.KeyPair(
            certificate.public_bytes(serialization.Encoding.PEM),
            key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()),
        )

    def file(self, name: str) -> str:
        """A client's certificate and key in one file."""
        pair = self.pair(name)
        path = self._directory / f"{name}-pair.pem"
        path.write_bytes(pair.certificate + pair.key)
        return str(path)

    def _sign(self, subject: x509.Name, key: ec.EllipticCurvePrivateKey, *, ca: bool) -> x509.Certificate:
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
            .add_extension(x509.SubjectAlternativeName([x509.DNSName(SERVICE)]), critical=False)
            .sign(self._key, hashes.SHA256())
        )


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path, "authority")


def context_of(pair: tls.KeyPair, client_ca_file: Path | None = None) -> ssl.SSLContext:
    """As the app makes it."""
    ca_file = str(client_ca_file) if client_ca_file else ""
    return tls.server_context(pair, client_ca_file=ca_file, client_ca_flag="--metrics-client-ca-file", protocol="http/1.1")


@contextlib.asynccontextmanager
async def serving(context: ssl.SSLContext | None, authorize: Authorize | None = None) -> AsyncIterator[HttpServer]:
    world = core(2)
    server = HttpServer(
        world.metrics,
        world.director,
        Decisions(world.clock, 8),
        world.built.plugins.values,
        datastore=world.datastore,
        engine=lambda _endpoint: "vllm",
        debug=True,
        admin_token=str,
        listen_problem=lambda host, port, error: f"{host}:{port}: {error}",
        authorize=authorize,
        tls=context,
    )
    await server.start("127.0.0.1", 0)
    try:
        yield server
    finally:
        await server.stop()


def client_context(authority: Authority, certificate_file: str = "") -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=authority.ca_file)
    if certificate_file:
        context.load_cert_chain(certificate_file)
    return context


async def metrics(server: HttpServer, context: ssl.SSLContext) -> int:
    url = f"https://127.0.0.1:{server.port}/metrics"
    async with (
        aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(WAIT_S)) as client,
        client.get(url, ssl=context, server_hostname=SERVICE) as response,
    ):
        assert b"llm_d_epp_" in await response.read()
        return response.status


async def explain(server: HttpServer, *argv: str, scheme: str = "https") -> int:
    """`epp explain` as a person calls it; it blocks, so elsewhere."""
    return await asyncio.to_thread(cli.main, ["explain", "--url", f"{scheme}://127.0.0.1:{server.port}", *argv])


async def only_the_token(token: str, verb: str, path: str) -> tuple[int, str]:
    if not token:
        return 401, "needs a bearer token"
    return (200, "") if (token, path) == (TOKEN, "/debug/explain") else (403, f"may not {verb} {path}")


# The port


async def test_metrics_over_tls(authority: Authority) -> None:
    async with serving(context_of(authority.pair())) as server:
        assert await metrics(server, client_context(authority)) == 200


@pytest.mark.parametrize("version", ["TLSv1.2", "TLSv1.3"])
async def test_tls_is_1_2_or_newer_and_http_1(authority: Authority, version: str) -> None:
    async with serving(served := context_of(authority.pair())) as server:

        def shake() -> tuple[str | None, str | None]:
            context = client_context(authority)
            context.maximum_version = ssl.TLSVersion[version.replace(".", "_")]
            context.set_alpn_protocols(["h2", "http/1.1"])
            address = ("127.0.0.1", server.port)
            with (
                socket.create_connection(address, timeout=WAIT_S) as raw,
                context.wrap_socket(raw, server_hostname=SERVICE) as connection,
            ):
                return connection.version(), connection.selected_alpn_protocol()

        assert await asyncio.to_thread(shake) == (version, "http/1.1")
        assert served.minimum_version == ssl.TLSVersion.TLSv1_2


async def test_with_a_client_authority_its_certificate_is_the_way_in(authority: Authority, tmp_path: Path) -> None:
    stranger = Authority(tmp_path, "stranger")
    async with serving(context_of(authority.pair(), authority.ca_file)) as server:
        assert await metrics(server, client_context(authority, authority.file("prometheus"))) == 200
        for certificate in ("", stranger.file("prometheus")):
            with pytest.raises((aiohttp.ClientError, ConnectionError, ssl.SSLError)):
                await metrics(server, client_context(authority, certificate))


async def test_a_certificate_does_not_replace_a_token_where_both_are_asked_for(authority: Authority) -> None:
    async with serving(context_of(authority.pair(), authority.ca_file), only_the_token) as server, aiohttp.ClientSession() as client:
        url = f"https://127.0.0.1:{server.port}/debug/explain"
        context = client_context(authority, authority.file("prometheus"))
        for headers, status in (({}, 401), ({"Authorization": f"Bearer {TOKEN}"}, 200)):
            async with client.post(url, json={}, headers=headers, ssl=context, server_hostname=SERVICE) as response:
                assert response.status == status


async def test_a_renewed_certificate_is_presented_to_new_connections(authority: Authority, tmp_path: Path) -> None:
    old, new = authority.pair(), authority.pair()

    def put(pair: tls.KeyPair) -> None:
        (tmp_path / "tls.crt").write_bytes(pair.certificate)
        (tmp_path / "tls.key").write_bytes(pair.key)

    put(old)
    pair = tls.load(str(tmp_path), flag="--metrics-cert-dir")
    context = context_of(pair, authority.ca_file)
    reloader = tls.Reloader(str(tmp_path), pair, lambda renewed: tls.use(context, renewed), flag="--metrics-cert-dir")
    client = client_context(authority, authority.file("prometheus"))
    async with serving(context) as server:

        async def presented() -> bytes:
            async with asyncio.timeout(WAIT_S):
                _reader, writer = await asyncio.open_connection("127.0.0.1", server.port, ssl=client, server_hostname=SERVICE)
            found: bytes = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
            writer.close()
            await writer.wait_closed()
            return found

        reloader.once()
        assert await presented() == ssl.PEM_cert_to_DER_cert(old.certificate.decode())
        put(new)
        reloader.once()
        assert await presented() == ssl.PEM_cert_to_DER_cert(new.certificate.decode())
        with pytest.raises((aiohttp.ClientError, ConnectionError, ssl.SSLError)):
            await metrics(server, client_context(authority))


def test_faults_name_the_flag(authority: Authority, tmp_path: Path) -> None:
    with pytest.raises(StartError, match=r"--metrics-cert-dir .*: No such file"):
        tls.load(str(tmp_path / "nothing"), flag="--metrics-cert-dir")
    with pytest.raises(StartError, match=r"--metrics-client-ca-file .*: No such file"):
        context_of(authority.pair(), tmp_path / "nothing.pem")


# epp explain


async def test_explain_gets_through_a_guarded_port(authority: Authority, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    token = tmp_path / "token"
    token.write_text(TOKEN + "\n")
    key = tmp_path / "client.key"
    pair = authority.pair("someone")
    key.write_bytes(pair.key)
    certificate = tmp_path / "client.crt"
    certificate.write_bytes(pair.certificate)
    async with serving(context_of(authority.pair(), authority.ca_file), only_the_token) as server:
        access = ["--ca-file", str(authority.ca_file), "--tls-server-name", SERVICE, "--token-file", str(token)]
        for shown in (
            ["--client-cert-file", authority.file("someone")],
            ["--client-cert-file", str(certificate), "--client-key-file", str(key)],
        ):
            assert await explain(server, *access, *shown, "-d", '{"model":"m","prompt":"hi"}', "--path", "/v1/completions") == 0
            assert "-> pod-" in capsys.readouterr().out
        assert await explain(server, *access, "--client-cert-file", authority.file("someone"), "--last", "1") == 1
        said = capsys.readouterr().err
        assert "answered 403: may not get /debug/decisions; the token's owner needs the verbs get and post" in said
        assert TOKEN not in said


async def test_explain_says_what_to_give_it(authority: Authority, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ca, name = ["--ca-file", str(authority.ca_file)], ["--tls-server-name", SERVICE]
    stranger = Authority(tmp_path, "stranger")
    async with serving(context_of(authority.pair(), authority.ca_file)) as server:
        for scheme, argv, hint in (
            ("https", [*ca, *name], "give --client-cert-file"),
            ("https", [*ca], "--tls-server-name"),
            ("https", ["--ca-file", str(stranger.ca_file), *name], "give --ca-file"),
            ("http", [], "give --url https://"),
        ):
            assert await explain(server, *argv, "--last", "1", scheme=scheme) == 1
            said = capsys.readouterr().err
            assert "no picker answers at" in said
            assert hint in said, (argv, said)
    async with serving(None, only_the_token) as server:
        assert await explain(server, "--last", "1", scheme="http") == 1
        assert "answered 401: needs a bearer token; give --token-file" in capsys.readouterr().err
        assert await explain(server, *ca, *name, "--last", "1") == 1
        assert "give --url http://" in capsys.readouterr().err
        port = server.port
    assert await asyncio.to_thread(cli.main, ["explain", "--url", f"http://127.0.0.1:{port}"]) == 1
    assert "kubectl port-forward" in capsys.readouterr().err


async def test_explain_shows_its_token_to_nobody_it_is_sent_on_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked: list[str] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append((await reader.readuntil(b"\r\n\r\n")).decode())
        writer.write(
            f"HTTP/1.1 302 Found\r\nlocation: http://127.0.0.1:{port}/elsewhere\r\ncontent-length: 0\r\nconnection: close\r\n\r\n".encode()
        )
        writer.close()
        await writer.wait_closed()

    (tmp_path / "token").write_text(TOKEN)
    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        argv = ["explain", "--url", f"http://127.0.0.1:{port}", "--token-file", str(tmp_path / "token"), "--last", "1"]
        assert await asyncio.to_thread(cli.main, argv) == 1
    assert len(asked) == 1
    assert f"Bearer {TOKEN}" in asked[0]
    assert "answered 302" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "flag"),
    [
        (["--token-file", "{}/nothing"], "--token-file"),
        (["--token-file", "{}/empty"], "--token-file"),
        (["--token-file", "{}/noise"], "--token-file"),
        (["--ca-file", "{}/empty"], "--ca-file"),
        (["--ca-file", "{}/nothing"], "--ca-file"),
        (["--client-cert-file", "{}/empty"], "--client-cert-file"),
        (["--client-key-file", "{}/empty"], "--client-key-file"),
        (["--url", "http://127.0.0.1:1", "--ca-file", "{}/empty"], "--ca-file"),
        (["--url", "http://127.0.0.1:1", "--client-key-file", "{}/empty"], "--client-key-file"),
        (["--url", "ftp://127.0.0.1:1"], "--url"),
    ],
)
def test_what_can_not_be_used_is_exit_code_2(argv: list[str], flag: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "noise").write_bytes(b"a token\nand another\xff")
    assert cli.main(["explain", "--url", "https://127.0.0.1:1", "--last", "1", *(each.format(tmp_path) for each in argv)]) == 2
    assert f"{flag}: " in capsys.readouterr().err
