"""Requests to an API server over real sockets: every way to fail is one of two exceptions, every way to sign in works, and nothing secret is told."""

from __future__ import annotations

import asyncio
import base64
import datetime as dt
import ipaddress
import json
import socket
import ssl
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from aiohttp import web
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from epp.errors import ConfigError, StartError
from epp.sources.kubernetes import api as api_module
from epp.sources.kubernetes.api import MESSAGE_CHARS_MAX, Api, ApiError, ApiUnreachableError, error_of

PODS = "/api/v1/namespaces/llm/pods"
SECRET = "s3cr3t-token"
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Server:
    """Answers every request with `handler`."""

    def __init__(self) -> None:
        self.url = ""
        self.requests: list[tuple[str, str, dict[str, str], bytes]] = []
        self.headers: list[Any] = []
        self.handler: Handler = self._ok
        self.over = asyncio.Event()
        """A handler that says nothing until then is silent for as long as the test lasts."""
        self._runner: web.AppRunner | None = None

    async def start(self, context: ssl.SSLContext | None = None) -> None:
        app = web.Application()
        app.router.add_route("*", "/{tail:.*}", self._handle)
        self._runner = web.AppRunner(app, shutdown_timeout=0.01)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0, ssl_context=context)
        await site.start()
        self.url = f"{'https' if context else 'http'}://127.0.0.1:{self._runner.addresses[0][1]}"

    async def stop(self) -> None:
        self.over.set()
        if self._runner is not None:
            await self._runner.cleanup()

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        self.requests.append((request.method, request.path, dict(request.query), await request.read()))
        self.headers.append(request.headers)
        return await self.handler(request)

    async def silence(self, _: web.Request) -> web.StreamResponse:
        await self.over.wait()
        return web.Response()

    async def _ok(self, _: web.Request) -> web.StreamResponse:
        return web.json_response({"kind": "PodList"})

    def wants(self, *tokens: str) -> None:
        """Only these tokens are let in; what is answered else repeats what came, as a careless server might."""

        async def handler(request: web.Request) -> web.StreamResponse:
            if request.headers.get("Authorization") in [f"Bearer {token}" for token in tokens]:
                return web.json_response({})
            return web.json_response({"kind": "Status", "code": 401, "reason": "Unauthorized", "message": "Unauthorized"}, status=401)

        self.handler = handler


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    made = Server()
    await made.start()
    yield made
    await made.stop()


@pytest.fixture
async def api(server: Server) -> AsyncIterator[Api]:
    made = Api.at(server.url, token=SECRET, namespace="llm")
    yield made
    await made.close()


def answers(status: int, body: Any, **headers: str) -> Handler:
    async def handler(_: web.Request) -> web.StreamResponse:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        return web.Response(status=status, body=content, headers={name.replace("_", "-"): value for name, value in headers.items()})

    return handler


def streams(*parts: bytes, abort: bool = False, until: asyncio.Event | None = None) -> Handler:
    async def handler(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        for part in parts:
            await response.write(part)
        if until is not None:
            await until.wait()
        if abort and request.transport is not None:
            request.transport.abort()
        return response

    return handler


async def lines_of(api: Api, *, silence_s: float = 30, got: list[bytes] | None = None) -> list[bytes]:
    """`got`: where they are also when the watch fails."""
    found: list[bytes] = [] if got is None else got
    async with api.watch(PODS, {"resourceVersion": "5"}, silence_s=silence_s) as lines:
        async for line in lines:
            found.append(line)  # noqa: PERF401 - what came before a failure is wanted too
    return found


class TestRequests:
    async def test_get_post_and_put(self, server: Server, api: Api) -> None:
        assert json.loads(await api.get(PODS, {"limit": "5", "labelSelector": "a=b,c in (d)"})) == {"kind": "PodList"}
        await api.post(PODS, b'{"a":1}')
        await api.put(f"{PODS}/a", b'{"a":2}')
        assert server.requests == [
            ("GET", PODS, {"limit": "5", "labelSelector": "a=b,c in (d)"}, b""),
            ("POST", PODS, {}, b'{"a":1}'),
            ("PUT", f"{PODS}/a", {}, b'{"a":2}'),
        ]
        assert [headers.get("Content-Type") for headers in server.headers] == [None, "application/json", "application/json"]
        assert {headers["Authorization"] for headers in server.headers} == {f"Bearer {SECRET}"}
        assert api.namespace == "llm"
        assert SECRET not in repr(api)

    async def test_a_status_is_an_error_with_its_reason(self, server: Server, api: Api) -> None:
        server.handler = answers(409, {"kind": "Status", "code": 409, "reason": "AlreadyExists", "message": 'pods "a" already exists'})
        for request in (api.get(PODS), api.post(PODS, b"{}"), api.put(PODS, b"{}")):
            with pytest.raises(ApiError, match='409 AlreadyExists: pods "a" already exists') as raised:
                await request
            assert (raised.value.status, raised.value.reason, raised.value.retry_after_s) == (409, "AlreadyExists", None)

    async def test_what_a_proxy_answers_is_an_error_too(self, server: Server, api: Api) -> None:
        server.handler = answers(502, b"<html>bad gateway</html>")
        with pytest.raises(ApiError, match="502 BadGateway: Bad Gateway"):
            await api.get(PODS)
        server.handler = answers(302, b"", location="http://elsewhere/")
        with pytest.raises(ApiError, match="302 Found"):
            await api.get(PODS)

    async def test_when_to_come_back(self, server: Server, api: Api) -> None:
        server.handler = answers(429, {}, Retry_After="7")
        with pytest.raises(ApiError) as raised:
            await api.get(PODS)
        assert raised.value.retry_after_s == 7.0

    def test_when_to_come_back_is_read_of_both_places(self) -> None:
        body = json.dumps({"details": {"retryAfterSeconds": 3}}).encode()
        assert error_of(503, body).retry_after_s == 3.0
        assert error_of(503, body, "4").retry_after_s == 4.0
        assert error_of(503, b"", "Wed, 21 Oct 2026 07:28:00 GMT").retry_after_s is None

    def test_messages_are_short_and_one_line(self) -> None:
        error = error_of(500, json.dumps({"message": "a\nb\x00" + "x" * 10_000}).encode())
        assert len(error.message) == MESSAGE_CHARS_MAX
        assert error.message.startswith("a b x")
        assert error_of(799, b"").reason == "error"

    @pytest.mark.parametrize("body", [b'{"message": "\xff"}', b'{"x": ' + b"[" * 30_000], ids=["byte", "deep"])
    async def test_an_error_that_is_no_text_is_an_error_all_the_same(self, server: Server, api: Api, body: bytes) -> None:
        server.handler = answers(404, body)
        with pytest.raises(ApiError, match="404 NotFound: Not Found"):
            await api.get(PODS)
        with pytest.raises(ApiError, match="404 NotFound: Not Found"):
            await lines_of(api)

    async def test_an_answer_has_a_limit(self, server: Server, api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(api_module, "BODY_BYTES_MAX", 1000)
        server.handler = answers(200, b"x" * 1000)
        assert len(await api.get(PODS)) == 1000
        server.handler = answers(200, b"x" * 1001)
        with pytest.raises(ApiError, match="larger than 1000 bytes") as raised:
            await api.get(PODS)
        assert raised.value.reason == "AnswerTooLarge"

    async def test_no_server(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            api = Api.at(f"http://127.0.0.1:{free.getsockname()[1]}", token=SECRET)
        with pytest.raises(ApiUnreachableError, match="ConnectError") as raised:
            await api.get(PODS)
        assert SECRET not in str(raised.value)
        with pytest.raises(ApiUnreachableError, match="ConnectError"):
            await lines_of(api)
        await api.close()

    async def test_a_server_that_never_answers(self, server: Server, api: Api) -> None:
        server.handler = server.silence
        with pytest.raises(ApiUnreachableError):
            await api.get(PODS, timeout_s=0.05)

    async def test_a_server_that_answers_drop_by_drop(self, server: Server, api: Api) -> None:
        async def drops(request: web.Request) -> web.StreamResponse:
            response = web.StreamResponse()
            await response.prepare(request)
            while request.transport is not None and not request.transport.is_closing():
                await response.write(b"x")
                await asyncio.sleep(0)
            return response

        server.handler = drops
        with pytest.raises(ApiUnreachableError, match=r"no answer within 0\.1 s"):
            await api.get(PODS, timeout_s=0.1)


class TestWatch:
    async def test_whole_lines_however_they_are_cut(self, server: Server, api: Api) -> None:
        server.handler = streams(b'{"a":1}\n{"b"', b":2}", b"\n", b'{"c":3}\n\n{"d":4}\n')
        assert await lines_of(api) == [b'{"a":1}', b'{"b":2}', b'{"c":3}', b"", b'{"d":4}']
        assert server.requests[0][:3] == ("GET", PODS, {"resourceVersion": "5", "watch": "1"})

    async def test_none(self, server: Server, api: Api) -> None:
        server.handler = streams()
        assert await lines_of(api) == []

    async def test_an_answer_that_is_an_error(self, server: Server, api: Api) -> None:
        server.handler = answers(410, {"reason": "Expired", "message": "too old"}, Retry_After="2")
        with pytest.raises(ApiError, match="410 Expired: too old") as raised:
            await lines_of(api)
        assert raised.value.retry_after_s == 2.0

    @pytest.mark.parametrize("abort", [False, True])
    async def test_an_end_in_the_middle_of_a_line(self, server: Server, api: Api, abort: bool) -> None:
        server.handler = streams(b'{"a":1}\n{"b', abort=abort)
        got: list[bytes] = []
        with pytest.raises(ApiUnreachableError):
            await lines_of(api, got=got)
        assert got in ([b'{"a":1}'], [])  # a reset may overtake what was sent before it

    async def test_silence(self, server: Server, api: Api) -> None:
        server.handler = streams(b'{"a":1}\n', until=server.over)
        got: list[bytes] = []
        with pytest.raises(ApiUnreachableError):
            await lines_of(api, silence_s=0.05, got=got)
        assert got == [b'{"a":1}']

    async def test_a_line_has_a_limit(self, server: Server, api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(api_module, "LINE_BYTES_MAX", 100)
        server.handler = streams(b"x" * 60, b"\n", b"x" * 60, b"x" * 60, until=server.over)
        with pytest.raises(ApiError, match="larger than 100 bytes"):
            await lines_of(api)

    async def test_left_early_the_connection_is_closed(self, server: Server, api: Api) -> None:
        server.handler = streams(b'{"a":1}\n{"b":2}\n', until=server.over)
        async with api.watch(PODS, {}, silence_s=30) as lines:
            async for line in lines:
                assert line == b'{"a":1}'
                break
        server.handler = answers(200, {})
        assert await api.get(PODS) == b"{}"

    async def test_what_the_reader_raises_is_its_own(self, server: Server, api: Api) -> None:
        server.handler = streams(b'{"a":1}\n')

        class Reader(list[bytes]):
            def append(self, line: bytes) -> None:
                raise ConnectionError(line)

        with pytest.raises(ConnectionError):
            await lines_of(api, got=Reader())


def kubeconfig(
    path: Path, server: str, user: dict[str, Any] | None = None, *, cluster: dict[str, Any] | None = None, **context: Any
) -> str:
    document = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "here",
        "clusters": [{"name": "c", "cluster": {"server": server} | (cluster or {})}],
        "users": [{"name": "u", "user": user}] if user is not None else [],
        "contexts": [{"name": "here", "context": {"cluster": "c"} | ({"user": "u"} if user is not None else {}) | context}],
    }
    path.write_text(yaml.safe_dump(document))
    return str(path)


def edit(path: str, change: Callable[[Any], Any]) -> None:
    document = yaml.safe_load(Path(path).read_text())
    change(document)
    Path(path).write_text(yaml.safe_dump(document))


class TestSigningIn:
    async def test_a_token_in_the_kubeconfig(self, server: Server, tmp_path: Path) -> None:
        server.wants(SECRET)
        api = Api.connect(kubeconfig(tmp_path / "config", server.url, {"token": SECRET}, namespace="llm"))
        await api.get(PODS)
        assert api.namespace == "llm"
        await api.close()

    async def test_no_user_at_all(self, server: Server, tmp_path: Path) -> None:
        api = Api.connect(kubeconfig(tmp_path / "config", server.url))
        await api.get(PODS)
        assert "Authorization" not in server.headers[0]
        assert api.namespace == "default"
        await api.close()

    async def test_a_token_in_a_file_beside_it_that_is_renewed(self, server: Server, tmp_path: Path) -> None:
        (tmp_path / "token").write_text("first\n")
        server.wants("first")
        api = Api.connect(kubeconfig(tmp_path / "config", server.url, {"tokenFile": "token"}))
        await api.get(PODS)
        (tmp_path / "token").write_text("second\n")
        server.wants("second")
        await api.get(PODS)
        server.wants("third")
        with pytest.raises(ApiError, match="401 Unauthorized"):
            await api.get(PODS)
        (tmp_path / "token").unlink()
        with pytest.raises(ApiUnreachableError, match="no credentials"):
            await api.get(PODS)
        await api.close()

    async def test_the_service_account_of_a_pod(self, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        authority = Authority(tmp_path)
        secure = Server()
        await secure.start(authority.server_context())
        secure.wants(SECRET)
        account = tmp_path / "account"
        account.mkdir()
        (account / "token").write_text(SECRET)
        (account / "namespace").write_text("prod")
        (account / "ca.crt").write_bytes(authority.ca_file.read_bytes())
        host, port = secure.url.removeprefix("https://").split(":")
        monkeypatch.setenv("KUBERNETES_SERVICE_HOST", host)
        monkeypatch.setenv("KUBERNETES_SERVICE_PORT", port)
        api = Api.connect(service_account=str(account))
        await api.get(PODS)
        assert api.namespace == "prod"
        await api.close()
        await secure.stop()

    async def test_the_environment_and_another_context(self, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = kubeconfig(tmp_path / "config", "http://127.0.0.1:1", {"token": SECRET})
        edit(path, lambda d: d["clusters"].append({"name": "other", "cluster": {"server": server.url}}))
        edit(path, lambda d: d["contexts"].append({"name": "there", "context": {"cluster": "other", "user": "u", "namespace": "far"}}))
        monkeypatch.setenv("KUBECONFIG", path)
        api = Api.connect(context="there", service_account=str(tmp_path / "none"))
        await api.get(PODS)
        assert api.namespace == "far"
        await api.close()

    @pytest.mark.parametrize("version", ["v1", "v1beta1"])
    async def test_a_credential_plugin(self, server: Server, tmp_path: Path, version: str) -> None:
        plugin = tmp_path / "plugin.py"
        plugin.write_text(
            "import json, os, sys\n"
            "spoken = json.loads(os.environ.get('KUBERNETES_EXEC_INFO', '{}')).get('apiVersion', 'none')\n"
            "print(json.dumps({'status': {'token': sys.argv[1] + '-' + spoken.rpartition('/')[2]}}))\n"
        )
        server.wants("made-v1" if version == "v1" else "made-none")
        user = {"exec": {"apiVersion": f"client.authentication.k8s.io/{version}", "command": sys.executable, "args": [str(plugin), "made"]}}
        api = Api.connect(kubeconfig(tmp_path / "config", server.url, user))
        await api.get(PODS)
        await api.close()

    @pytest.mark.parametrize(
        "code",
        [
            f"import sys; print('{SECRET}', file=sys.stderr); sys.exit(1)",
            f"import sys; sys.stderr.buffer.write(b'{SECRET} identit\\xe9 inconnue'); sys.exit(1)",
            f"import sys; sys.stdout.buffer.write(b'{SECRET} identit\\xe9')",
            f"print('{SECRET}')",
            "print('{}')",
            "print('[]')",
            "print('[' * 30_000)",
            'print(\'{"status": {"token": "\\\\ud800"}}\')',
        ],
    )
    async def test_a_credential_plugin_that_fails_tells_nothing(self, server: Server, tmp_path: Path, code: str) -> None:
        user = {"exec": {"apiVersion": "client.authentication.k8s.io/v1", "command": sys.executable, "args": ["-c", code]}}
        api = Api.connect(kubeconfig(tmp_path / "config", server.url, user))
        with pytest.raises(ApiUnreachableError, match="no credentials") as raised:
            await api.get(PODS)
        assert SECRET not in str(raised.value)
        with pytest.raises(ApiUnreachableError, match="no credentials"):
            await lines_of(api)
        await api.close()

    @pytest.mark.parametrize("token", [f"{SECRET}\nmore", f"{SECRET}\0"])
    async def test_a_token_that_can_not_be_sent_is_not_told(self, server: Server, tmp_path: Path, token: str) -> None:
        (tmp_path / "token").write_text(token)
        api = Api.connect(kubeconfig(tmp_path / "config", server.url, {"tokenFile": "token"}))
        with pytest.raises(ApiUnreachableError, match="is the token a single line") as raised:
            await api.get(PODS)
        assert SECRET not in str(raised.value)
        await api.close()

    async def test_a_token_file_that_is_no_text(self, server: Server, tmp_path: Path) -> None:
        (tmp_path / "token").write_bytes(b"\xff\xfe")
        api = Api.connect(kubeconfig(tmp_path / "config", server.url, {"tokenFile": "token"}))
        with pytest.raises(ApiUnreachableError, match="no credentials"):
            await api.get(PODS)
        await api.close()

    async def test_a_credential_plugin_that_is_not_there(self, server: Server, tmp_path: Path) -> None:
        user = {"exec": {"apiVersion": "client.authentication.k8s.io/v1", "command": "./no-such-plugin"}}
        api = Api.connect(kubeconfig(tmp_path / "config", server.url, user))
        with pytest.raises(ApiUnreachableError, match=r"no-such-plugin: No such file"):
            await api.get(PODS)
        await api.close()

    async def test_certificates(self, tmp_path: Path) -> None:
        authority = Authority(tmp_path)
        secure = Server()
        await secure.start(authority.server_context(clients=True))
        (tmp_path / "client.pem").write_bytes(authority.certificate + authority.key)
        inline = {"client-certificate-data": _b64(authority.certificate), "client-key-data": _b64(authority.key)}
        (tmp_path / "client.key").write_bytes(authority.key)
        beside = {"client-certificate": "client.pem", "client-key": "client.key"}
        for user in (inline, beside):
            for cluster in (
                {"certificate-authority": authority.ca_file.name},
                {"certificate-authority-data": _b64(authority.ca_file.read_bytes())},
                {"insecure-skip-tls-verify": True},
            ):
                api = Api.connect(kubeconfig(tmp_path / "config", secure.url, user, cluster=cluster))
                await api.get(PODS)
                await api.close()
        stranger = Api.connect(kubeconfig(tmp_path / "config", secure.url, inline))
        with pytest.raises(ApiUnreachableError, match="CERTIFICATE_VERIFY_FAILED"):
            await stranger.get(PODS)
        await stranger.close()
        for verify in (str(authority.ca_file), False):
            api = Api.at(secure.url, verify=verify)
            with pytest.raises(ApiUnreachableError):  # without a certificate of its own
                await api.get(PODS)
            await api.close()
        await secure.stop()


class TestConfigurationsThatCantBeUsed:
    def refused(self, path: Path | str, **rest: Any) -> str:
        with pytest.raises(ConfigError) as raised:
            Api.connect(str(path), **rest)
        assert SECRET not in str(raised.value)
        assert raised.value.__cause__ is None
        return str(raised.value)

    def test_no_file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        assert "not found" in self.refused(tmp_path / "none")
        monkeypatch.setenv("KUBECONFIG", str(tmp_path / "nowhere"))
        assert "nowhere not found" in self.refused("", service_account=str(tmp_path))

    @pytest.mark.parametrize("text", [f"token: {SECRET}\n  x: [", f"- {SECRET}", SECRET, "", "clusters: 5\ncontexts: []"])
    def test_no_kubeconfig(self, tmp_path: Path, text: str) -> None:
        (tmp_path / "config").write_text(text)
        assert "is not" in self.refused(tmp_path / "config")

    @pytest.mark.parametrize(
        ("change", "says"),
        [
            (lambda d: d.pop("current-context"), "No current context"),
            (lambda d: d.pop("clusters"), "has no 'clusters'"),
            (lambda d: d["contexts"][0]["context"].update(cluster="other"), "has no 'other'"),
            (lambda d: d["contexts"][0]["context"].update(user="other"), "has no 'other'"),
            (lambda d: d["clusters"][0]["cluster"].update(server="ftp://x"), "must be a URL"),
            (lambda d: d["clusters"][0]["cluster"].update(server="x:80"), "must be a URL"),
            (lambda d: d["clusters"][0]["cluster"].update({"certificate-authority": "no-such-file"}), "No such file"),
            (
                lambda d: d["clusters"][0]["cluster"].update({"certificate-authority-data": "???"}),
                "certificate-authority-data: is not PEM in base64",
            ),
            (lambda d: d["users"][0]["user"].update({"token": 5}), "Expected `str | null`"),
            (
                lambda d: (d["users"][0]["user"].clear(), d["users"][0]["user"].update({"auth-provider": {"x": SECRET}})),
                "auth-provider not supported",
            ),
        ],
    )
    def test_what_is_wrong_in_it(self, tmp_path: Path, change: Callable[[Any], Any], says: str) -> None:
        path = kubeconfig(tmp_path / "config", "https://127.0.0.1:1", {"token": SECRET})
        edit(path, change)
        assert says in self.refused(path)

    def test_a_context_it_does_not_have(self, tmp_path: Path) -> None:
        assert "Context 'other' not found" in self.refused(kubeconfig(tmp_path / "config", "https://127.0.0.1:1"), context="other")

    def test_without_the_extra_it_says_which(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("lightkube", "lightkube.config.client_adapter", "httpx2"):
            monkeypatch.setitem(sys.modules, name, None)
        for connect in (Api.connect, lambda: Api.at("http://127.0.0.1:1")):
            with pytest.raises(StartError, match=r"pip install 'envoy-endpoint-picker\[kubernetes\]'"):
                connect()


def _b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


class Authority:
    """A certificate that signs itself, for server and client."""

    def __init__(self, directory: Path) -> None:
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "test")])
        now = dt.datetime.now(dt.UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
        )
        builder = builder.not_valid_before(now - dt.timedelta(days=1)).not_valid_after(now + dt.timedelta(days=1))
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        builder = builder.add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        self.certificate = builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
        self.key = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        self.ca_file = directory / "ca.pem"
        self.ca_file.write_bytes(self.certificate)
        self._pair = directory / "pair.pem"
        self._pair.write_bytes(self.certificate + self.key)

    def server_context(self, *, clients: bool = False) -> ssl.SSLContext:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(self._pair)
        if clients:
            context.load_verify_locations(self.ca_file)
            context.verify_mode = ssl.CERT_REQUIRED
        return context
