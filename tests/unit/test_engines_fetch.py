"""Fetching /metrics from real servers that behave and misbehave."""

from __future__ import annotations

import asyncio
import datetime as dt
import ipaddress
import re
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from aiohttp import web
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from epp.engines.access import FetchOptions
from epp.engines.fetch import RESPONSE_BYTES_MAX, FetchError, HttpFetcher, UnreachableError
from epp.errors import StartError
from epp.types import Address


@asynccontextmanager
async def server(handle: Callable[[web.Request], object]) -> AsyncIterator[str]:
    app = web.Application()
    app.router.add_get("/metrics", handle)  # type: ignore[arg-type]
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        host, port = runner.addresses[0][:2]
        yield f"http://{host}:{port}/metrics"
    finally:
        await runner.cleanup()


async def test_the_body_is_fetched_over_one_kept_connection() -> None:
    ports, headers = set(), []

    async def handle(request: web.Request) -> web.Response:
        assert request.transport is not None
        ports.add(request.transport.get_extra_info("peername")[1])
        headers.append((request.headers["Accept-Encoding"], request.headers.get("Cookie")))
        response = web.Response(text="up 1\n")
        response.set_cookie("a", "b")
        return response

    async with server(handle) as url, HttpFetcher() as fetcher:
        assert [await fetcher.fetch(url) for _ in range(3)] == [b"up 1\n"] * 3
    assert len(ports) == 1
    assert set(headers) == {("identity", None)}


@pytest.mark.parametrize("status", [302, 404, 500, 503])
async def test_any_status_but_200_is_a_failure(status: int) -> None:
    async def handle(_: web.Request) -> web.Response:
        return web.Response(status=status, headers={"Location": "/elsewhere"} if status == 302 else None)

    async with server(handle) as url, HttpFetcher() as fetcher:
        with pytest.raises(FetchError, match=f"^HTTP {status}$"):
            await fetcher.fetch(url)


async def test_too_much_is_a_failure() -> None:
    async def handle(_: web.Request) -> web.Response:
        return web.Response(body=b"x" * 1001)

    async with server(handle) as url, HttpFetcher(response_bytes_max=1000) as fetcher:
        with pytest.raises(FetchError, match="more than 1000 bytes"):
            await fetcher.fetch(url)


async def test_too_slow_is_a_failure() -> None:
    async def handle(_: web.Request) -> web.Response:
        await asyncio.Event().wait()
        raise AssertionError

    async with server(handle) as url, HttpFetcher(timeout_s=0.02) as fetcher:
        with pytest.raises(FetchError, match=r"no answer within 0\.02 s"):
            await fetcher.fetch(url)


async def test_nobody_there() -> None:
    async def handle(_: web.Request) -> web.Response:
        raise AssertionError

    async with server(handle) as url:
        pass
    async with HttpFetcher() as fetcher:
        with pytest.raises(UnreachableError):
            await fetcher.fetch(url)


async def test_a_server_that_speaks_no_http() -> None:
    async def handle(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"SSH-2.0-OpenSSH\r\n\r\n")
        writer.close()

    listener = await asyncio.start_server(handle, "127.0.0.1", 0)
    async with listener, HttpFetcher() as fetcher:
        with pytest.raises(FetchError):
            await fetcher.fetch(f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}/metrics")


async def test_an_answer_cut_short() -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nup 1\n")
        writer.close()

    listener = await asyncio.start_server(handle, "127.0.0.1", 0)
    async with listener, HttpFetcher() as fetcher:
        with pytest.raises(FetchError):
            await fetcher.fetch(f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}/metrics")


async def test_an_answer_without_a_length_ends_with_the_connection() -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.0 200 OK\r\n\r\nup 1\n")
        writer.close()

    listener = await asyncio.start_server(handle, "127.0.0.1", 0)
    async with listener, HttpFetcher() as fetcher:
        url = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}/metrics"
        assert [await fetcher.fetch(url) for _ in range(2)] == [b"up 1\n"] * 2


async def test_a_kept_connection_the_server_closed_is_replaced_and_not_kept() -> None:
    asked = 0

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal asked
        asked += 1
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nup 1\n\r\n0\r\n\r\n")
        if asked == 1:  # the second is asked on this connection, and gets no answer on it
            await reader.readuntil(b"\r\n\r\n")
        writer.close()

    listener = await asyncio.start_server(handle, "127.0.0.1", 0)
    async with listener, HttpFetcher() as fetcher:
        url = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}/metrics"
        assert [await fetcher.fetch(url) for _ in range(2)] == [b"up 1\n"] * 2
        assert asked == 2
        async with asyncio.timeout(5):
            while fetcher._kept:  # noqa: ASYNC110 - polled with a deadline
                await asyncio.sleep(0.001)


async def test_a_fetcher_is_entered_before_use() -> None:
    with pytest.raises(RuntimeError):
        await HttpFetcher().fetch("http://127.0.0.1:1/metrics")


# servers that say exactly these bytes


@asynccontextmanager
async def raw_server(
    *answers: bytes | Callable[[asyncio.StreamWriter], Awaitable[None]], tls: ssl.SSLContext | None = None
) -> AsyncIterator[Raw]:
    """One answer a question, the last one for ever. Questions are kept."""
    raw = Raw()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        raw.connections += 1
        try:
            while True:
                raw.heads.append(await reader.readuntil(b"\r\n\r\n"))
                answer = answers[min(len(raw.heads), len(answers)) - 1]
                if callable(answer):
                    await answer(writer)
                else:
                    writer.write(answer)
                await writer.drain()
        except (asyncio.IncompleteReadError, OSError):
            pass
        finally:
            raw.closed += 1
            writer.close()

    listener = await asyncio.start_server(handle, "127.0.0.1", 0, ssl=tls)
    async with listener:
        raw.url = f"{'https' if tls else 'http'}://127.0.0.1:{listener.sockets[0].getsockname()[1]}/metrics"
        yield raw


class Raw:
    def __init__(self) -> None:
        self.url = ""
        self.heads: list[bytes] = []
        self.connections = 0
        self.closed = 0

    async def until_closed(self) -> None:
        async with asyncio.timeout(5):
            while self.closed < self.connections:  # noqa: ASYNC110 - polled with a deadline
                await asyncio.sleep(0.001)


OK = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nup 1\n"


async def test_a_chunked_body_in_many_pieces() -> None:
    async def pieces(writer: asyncio.StreamWriter) -> None:
        for piece in (b"HTTP/1.1 200 OK\r\nTransfer-Enc", b"oding: chunked\r\n\r\n3\r", b"\nup \r\n", b"2\r\n1\n\r\n0\r\n", b"\r\n"):
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0)

    async with raw_server(pieces) as raw, HttpFetcher() as fetcher:
        assert [await fetcher.fetch(raw.url) for _ in range(3)] == [b"up 1\n"] * 3
        assert raw.connections == 1


async def test_what_is_asked() -> None:
    async with raw_server(OK) as raw, HttpFetcher() as fetcher:
        await fetcher.fetch(raw.url + "?name=x")
    lines = raw.heads[0].decode().split("\r\n")
    assert lines[0] == "GET /metrics?name=x HTTP/1.1"
    assert "Accept-Encoding: identity" in lines
    assert "openmetrics" not in raw.heads[0].decode()
    assert "Authorization" not in raw.heads[0].decode()


async def test_fifty_megabytes_are_not_taken() -> None:
    sent = 0

    async def flood(writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        while sent < 50 << 20:
            writer.write(b"x" * (1 << 16))
            sent += 1 << 16
            await writer.drain()

    hits: list[str] = []
    async with raw_server(flood) as raw, HttpFetcher(limit_hit=hits.append, timeout_s=30) as fetcher:
        with pytest.raises(FetchError, match="more than 8388608 bytes"):
            await fetcher.fetch(raw.url)
        await raw.until_closed()
    assert hits == ["scrape_bytes"]
    assert RESPONSE_BYTES_MAX < sent < 50 << 20


async def test_a_length_too_long_is_refused_unread() -> None:
    hits: list[str] = []
    async with (
        raw_server(b"HTTP/1.1 200 OK\r\nContent-Length: 52428800\r\n\r\n") as raw,
        HttpFetcher(limit_hit=hits.append, timeout_s=30) as fetcher,
    ):
        with pytest.raises(FetchError, match="more than 8388608 bytes"):
            await fetcher.fetch(raw.url)
        await raw.until_closed()
    assert hits == ["scrape_bytes"]


async def test_a_head_without_end_is_refused() -> None:
    async def flood(writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nX-Pad: ")
        while True:
            writer.write(b"x" * 65536)
            await writer.drain()

    async with raw_server(flood) as raw, HttpFetcher(response_bytes_max=1 << 20, timeout_s=30) as fetcher:
        with pytest.raises(FetchError, match=r"more than 1048576 bytes|not HTTP"):
            await fetcher.fetch(raw.url)
        await raw.until_closed()


async def test_a_trickle_ends_with_the_whole_time() -> None:
    async def trickle(writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        while True:
            writer.write(b"x")
            await writer.drain()
            await asyncio.sleep(0.005)

    hits: list[str] = []
    async with raw_server(trickle) as raw, HttpFetcher(timeout_s=0.1, limit_hit=hits.append) as fetcher:
        with pytest.raises(FetchError, match="no answer within"):
            await fetcher.fetch(raw.url)
        await raw.until_closed()
    assert hits == ["scrape_time"]


@pytest.mark.parametrize("extra", [OK, b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nlies 1", b"\x00garbage"])
async def test_what_was_not_asked_for_is_no_answer_to_the_next_question(extra: bytes) -> None:
    async with raw_server(OK + extra, OK) as raw, HttpFetcher() as fetcher:
        assert [await fetcher.fetch(raw.url) for _ in range(3)] == [b"up 1\n"] * 3
        assert raw.connections == 2


async def test_what_comes_late_is_no_answer_to_the_next_question() -> None:
    late = asyncio.Event()

    async def twice(writer: asyncio.StreamWriter) -> None:
        writer.write(OK)
        await late.wait()
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nlies 1")

    async with raw_server(twice, OK) as raw, HttpFetcher() as fetcher:
        assert await fetcher.fetch(raw.url) == b"up 1\n"
        late.set()
        await raw.until_closed()
        assert await fetcher.fetch(raw.url) == b"up 1\n"


async def test_two_at_a_time_leave_one_connection() -> None:
    async with raw_server(OK) as raw, HttpFetcher() as fetcher:
        assert await asyncio.gather(fetcher.fetch(raw.url), fetcher.fetch(raw.url)) == [b"up 1\n"] * 2
        async with asyncio.timeout(5):
            while raw.closed < 1:  # noqa: ASYNC110 - polled with a deadline
                await asyncio.sleep(0.001)
        assert (raw.connections, len(fetcher._kept or ())) == (2, 1)


async def test_given_up_on_is_closed() -> None:
    async def silent(_: asyncio.StreamWriter) -> None:
        await asyncio.Event().wait()

    async with raw_server(silent) as raw, HttpFetcher(timeout_s=30) as fetcher:
        task = asyncio.create_task(fetcher.fetch(raw.url))
        async with asyncio.timeout(5):
            while not raw.heads:  # noqa: ASYNC110 - polled with a deadline
                await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not fetcher._kept


# who we are and whom we trust


async def test_the_token_is_sent_and_read_again_when_it_changes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "token"
    file.write_text("first\n")
    async with raw_server(OK) as raw, HttpFetcher(FetchOptions(bearer_token_file=str(file))) as fetcher:

        async def sent() -> str:
            fetcher._token._checked_s = float("-inf")
            await fetcher.fetch(raw.url)
            found = re.search(rb"Authorization: (.*)\r\n", raw.heads[-1])
            assert found is not None
            return found[1].decode()

        assert [await sent(), await sent()] == ["Bearer first"] * 2
        (tmp_path / "new").write_text("second")
        (tmp_path / "new").replace(file)
        assert await sent() == "Bearer second"
        file.write_text("two words")
        assert await sent() == "Bearer second"
        file.unlink()
        assert await sent() == "Bearer second"
    assert "can't be read again" in caplog.text
    assert "two words" not in caplog.text


@pytest.mark.parametrize("content", [None, b"", b" \n", b"a\r\nX-Evil: 1", b"t\xc3\xb6ken", b"a b"])
def test_a_token_that_cannot_be_used_stops_the_start(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "token").write_bytes(content)
    with pytest.raises(StartError, match="bearer token"):
        HttpFetcher(FetchOptions(bearer_token_file=str(tmp_path / "token")))


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({"scheme": "ftp"}, "scheme"),
        ({"path": "metrics"}, "path"),
        ({"path": "/a b"}, "path"),
        ({"path": "/a\r\nHost: b"}, "path"),
        ({"port": -1}, "port"),
        ({"port": 65536}, "port"),
        ({"client_key_path": "k"}, "clientKeyPath"),
    ],
)
def test_senseless_options_are_refused_by_name(values: dict[str, object], name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}:"):
        FetchOptions(**values)  # type: ignore[arg-type]


def test_where_an_engine_is_asked() -> None:
    v4, v6 = Address("10.0.0.1", 8000), Address("2001:db8::1", 8000)
    assert FetchOptions().url(v4, "/metrics") == "http://10.0.0.1:8000/metrics"
    assert FetchOptions(scheme="https", port=9).url(v6, "/m") == "https://[2001:db8::1]:9/m"


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`ip.pem` for 127.0.0.1 and `name.pem` for engine.example, each its own authority; `.key` beside each."""
    directory = tmp_path_factory.mktemp("certificates")
    names: dict[str, x509.GeneralName] = {
        "ip": x509.IPAddress(ipaddress.ip_address("127.0.0.1")),
        "name": x509.DNSName("engine.example"),
        "client": x509.DNSName("picker.example"),
    }
    for name, subject in names.items():
        key = ec.generate_private_key(ec.SECP256R1())
        who = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        now = dt.datetime.now(dt.UTC)
        certificate = (
            x509.CertificateBuilder()
            .subject_name(who)
            .issuer_name(who)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - dt.timedelta(hours=1))
            .not_valid_after(now + dt.timedelta(days=1))
            .add_extension(x509.SubjectAlternativeName([subject]), critical=False)
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .sign(key, hashes.SHA256())
        )
        (directory / f"{name}.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        private = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        (directory / f"{name}.key").write_bytes(private)
    return directory


def server_side(certificates: Path, name: str, *, client: str = "") -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificates / f"{name}.pem", certificates / f"{name}.key")
    if client:
        context.load_verify_locations(certificates / f"{client}.pem")
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def https(certificates: Path, **options: str | bool) -> FetchOptions:
    paths = {"ca_path", "client_cert_path", "client_key_path"}
    return FetchOptions(
        scheme="https", **{name: str(certificates / str(value)) if name in paths else value for name, value in options.items()}
    )  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("presented", "options", "reason"),
    [
        ("ip", {"ca_path": "ip.pem"}, ""),
        ("name", {"ca_path": "name.pem", "server_name": "engine.example"}, ""),
        ("name", {"insecure_skip_verify": True}, ""),
        ("ip", {}, "self-signed certificate"),
        ("ip", {"ca_path": "name.pem"}, "self-signed certificate"),
        ("name", {"ca_path": "name.pem"}, "IP address mismatch"),
        ("ip", {"ca_path": "ip.pem", "server_name": "engine.example"}, "Hostname mismatch"),
    ],
)
async def test_https_is_verified_unless_told_not_to(
    certificates: Path, presented: str, options: dict[str, str | bool], reason: str
) -> None:
    async with (
        raw_server(OK, tls=server_side(certificates, presented)) as raw,
        HttpFetcher(https(certificates, **options), timeout_s=5) as fetcher,
    ):
        if reason:
            with pytest.raises(FetchError, match=f"TLS: .*{reason}"):
                await fetcher.fetch(raw.url)
            assert raw.heads == []
        else:
            assert [await fetcher.fetch(raw.url) for _ in range(2)] == [b"up 1\n"] * 2
            assert len(raw.heads) == 2
            assert raw.connections == 1


async def test_a_long_answer_over_https(certificates: Path) -> None:
    body = bytes(range(256)) * 4096
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    async with (
        raw_server(answer, tls=server_side(certificates, "ip")) as raw,
        HttpFetcher(https(certificates, ca_path="ip.pem"), timeout_s=30) as fetcher,
    ):
        assert await fetcher.fetch(raw.url) == body


async def test_a_client_certificate_is_shown(certificates: Path) -> None:
    tls = server_side(certificates, "ip", client="client")
    async with raw_server(OK, tls=tls) as raw:
        async with HttpFetcher(https(certificates, ca_path="ip.pem"), timeout_s=5) as fetcher:
            with pytest.raises(FetchError):
                await fetcher.fetch(raw.url)
        known = https(certificates, ca_path="ip.pem", client_cert_path="client.pem", client_key_path="client.key")
        async with HttpFetcher(known, timeout_s=5) as fetcher:
            assert await fetcher.fetch(raw.url) == b"up 1\n"


async def test_a_renewed_authority_is_trusted_from_the_next_connection_on(certificates: Path, tmp_path: Path) -> None:
    authority = tmp_path / "ca.pem"
    authority.write_bytes((certificates / "name.pem").read_bytes())
    async with (
        raw_server(OK, tls=server_side(certificates, "ip")) as raw,
        HttpFetcher(FetchOptions(scheme="https", ca_path=str(authority)), timeout_s=5) as fetcher,
    ):
        with pytest.raises(FetchError, match="TLS"):
            await fetcher.fetch(raw.url)
        authority.write_bytes((certificates / "ip.pem").read_bytes())
        assert await fetcher.fetch(raw.url) == b"up 1\n"


@pytest.mark.parametrize(
    "options", [{"ca_path": "none.pem"}, {"ca_path": "ip.key"}, {"client_cert_path": "none.pem"}, {"client_cert_path": "ip.pem"}]
)
def test_certificates_that_cannot_be_used_stop_the_start(certificates: Path, options: dict[str, str | bool]) -> None:
    with pytest.raises(StartError, match=r"for engines can't be used \(/.*\): "):
        HttpFetcher(https(certificates, **options))
