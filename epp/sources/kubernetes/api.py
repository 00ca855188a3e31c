"""Requests to the Kubernetes API server: bytes in, bytes out, every failure one of two exceptions.

lightkube's configuration (kubeconfig, the pod's service account with its token read again, client certificates, credential plugins) over
the HTTP client it brings; none of its own list, watch or retry. It is an optional extra, imported when a connection is made.

Not here: what objects mean (objects), trying again (reflector). Invariants: no request outlives its time limit, credential plugin
included; an answer larger than its limit is an error; no token, and nothing a plugin printed, is in a message. What an answer says may
be anything, down to bytes that are no text: who reads one catches `UNREADABLE`.

What lightkube lacks and is mended here: plugins that speak `client.authentication.k8s.io/v1`, a `tokenFile` beside the kubeconfig, a
context without a user. What stays as it is: a CA or client certificate that changes is read at the next start only; `proxy-url` in a
kubeconfig is ignored (HTTPS_PROXY and NO_PROXY count).
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, NoReturn

import msgspec
import yaml

from epp.errors import ConfigError, Problem, StartError

if TYPE_CHECKING:
    import httpx2
    from lightkube.config.kubeconfig import KubeConfig, SingleConfig

BODY_BYTES_MAX = 64 << 20
"""Limit on one answer: a page of 500 pods is about 5 MB."""
LINE_BYTES_MAX = 8 << 20
"""Limit on one event of a watch: etcd keeps no object larger than 1.5 MB."""
MESSAGE_CHARS_MAX = 500
"""Of what the server says about an error, that much is kept."""
ERROR_BYTES_MAX = 64 << 10
CONNECT_S = 10.0
SERVICE_ACCOUNT = "/var/run/secrets/kubernetes.io/serviceaccount"
"""Where a pod finds its token, its namespace and the server's authority."""
EXTRA = "pip install 'envoy-endpoint-picker[kubernetes]'"

UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""What msgspec raises for bytes it can't read: the last two, for what is no UTF-8 or nested too deep, are no DecodeError."""

_EXEC_V1, _EXEC_V1BETA1 = "client.authentication.k8s.io/v1", "client.authentication.k8s.io/v1beta1"


class ApiError(Exception):
    """The server answered with an error."""

    def __init__(self, status: int, reason: str, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(f"{status} {reason}: {message}")
        self.status = status
        self.reason = reason
        """As in Status.reason: `AlreadyExists`, `Conflict`, `Expired`."""
        self.message = message
        self.retry_after_s = retry_after_s


class ApiUnreachableError(Exception):
    """No answer: refused, reset, TLS, time-out."""


class _Details(msgspec.Struct):
    retry_after_s: float | None = msgspec.field(name="retryAfterSeconds", default=None)


class _Status(msgspec.Struct):
    """A Status object, as far as it matters here."""

    reason: str = ""
    message: str = ""
    code: int = 0
    details: _Details | None = None


_status = msgspec.json.Decoder(_Status)


def error_of(status: int, body: bytes, retry_after: str = "") -> ApiError:
    """What the server says in a Status object, or what there is where a proxy answered instead."""
    try:
        said = _status.decode(body)
    except UNREADABLE:
        said = _Status()
    code = status or said.code
    retry_after_s = float(retry_after) if retry_after.isascii() and retry_after.isdigit() else None
    if retry_after_s is None and said.details is not None:
        retry_after_s = said.details.retry_after_s
    try:
        phrase = HTTPStatus(code).phrase
    except ValueError:
        phrase = "error"
    message = "".join(c if c.isprintable() else " " for c in said.message[:MESSAGE_CHARS_MAX])
    return ApiError(code, said.reason or phrase.replace(" ", ""), message or phrase, retry_after_s)


class Api:
    """One API server. Made by `connect` or `at`; use it on one event loop."""

    def __init__(self, client: httpx2.AsyncClient, *, namespace: str, faults: tuple[type[Exception], ...]) -> None:
        """`faults`: what the client raises when no answer comes."""
        self.namespace = namespace
        """Of the service account, or of the kubeconfig's context."""
        self.server_date = ""
        """The `Date` of the last answer, for who compares clocks."""
        self._client = client
        self._faults = faults

    def __repr__(self) -> str:
        return f"<Api {self._client.base_url.copy_with(username=None, password=None)} namespace={self.namespace}>"

    @classmethod
    def connect(cls, kubeconfig: str = "", context: str = "", *, service_account: str = SERVICE_ACCOUNT) -> Api:
        """To the server of this kubeconfig; without one, of the pod's service account, else $KUBECONFIG, else ~/.kube/config.

        Raises StartError when lightkube is not installed, ConfigError for a configuration that can't be used. Sends nothing.
        """
        try:
            from lightkube.config.client_adapter import AsyncClient, ConnectionParams  # noqa: PLC0415 - optional
            from lightkube.core.exceptions import ConfigError as LightkubeConfigError  # noqa: PLC0415 - optional
        except ImportError:
            _not_installed()
        source = kubeconfig or "Kubernetes"
        try:
            config = _mended(_read(kubeconfig, service_account).get(context or None))
            client = AsyncClient(config, ConnectionParams(timeout=None))
        except (LightkubeConfigError, msgspec.ValidationError) as error:
            raise ConfigError(source, [Problem("", str(error) or type(error).__name__)]) from None
        except yaml.YAMLError:  # its text quotes the file, and the file has secrets in it
            raise ConfigError(source, [Problem("", "is not YAML")]) from None
        except KeyError as error:
            raise ConfigError(source, [Problem("", f"has no {error.args[0]!r}, which is asked for or needed")]) from None
        except (TypeError, AttributeError, ValueError, RecursionError) as error:
            raise ConfigError(source, [Problem("", f"is not a kubeconfig ({type(error).__name__})")]) from None
        except OSError as error:
            what = f"{error.filename}: " if error.filename else ""
            raise ConfigError(source, [Problem("", f"{what}{error.strerror or 'can not be read'}")]) from None
        if client.base_url.scheme not in ("http", "https") or not client.base_url.host:
            raise ConfigError(source, [Problem("clusters[].cluster.server", "must be a URL that starts with https:// or http://")])
        return cls(client, namespace=config.namespace, faults=_faults())

    @classmethod
    def at(cls, url: str, *, token: str = "", verify: bool | str | ssl.SSLContext = True, namespace: str = "default") -> Api:
        """To the server at this address. `verify`: a file with the authority's certificate, a context, or False to trust any."""
        try:
            import httpx2  # noqa: PLC0415 - optional
        except ImportError:
            _not_installed()
        context = ssl.create_default_context(cafile=verify) if isinstance(verify, str) else verify
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        client = httpx2.AsyncClient(base_url=url, headers=headers, verify=context, timeout=None)
        return cls(client, namespace=namespace, faults=_faults())

    async def get(self, path: str, params: Mapping[str, str] = {}, *, timeout_s: float = 30) -> bytes:
        return await self._request("GET", path, params=dict(params), timeout_s=timeout_s)

    async def post(self, path: str, body: bytes, *, timeout_s: float = 10) -> bytes:
        return await self._request("POST", path, content=body, headers={"Content-Type": "application/json"}, timeout_s=timeout_s)

    async def put(self, path: str, body: bytes, *, timeout_s: float = 10) -> bytes:
        return await self._request("PUT", path, content=body, headers={"Content-Type": "application/json"}, timeout_s=timeout_s)

    @contextlib.asynccontextmanager
    async def watch(self, path: str, params: Mapping[str, str], *, silence_s: float) -> AsyncIterator[AsyncIterator[bytes]]:
        """A stream of events, one JSON object a line. A stream that ends in the middle of one, or is silent that long, is a broken one."""
        async with contextlib.AsyncExitStack() as stack:
            try:
                async with asyncio.timeout(CONNECT_S + silence_s):
                    stream = self._client.stream("GET", path, params={**params, "watch": "1"}, timeout=self._timeout(silence_s))
                    response = await stack.enter_async_context(stream)
                    if response.status_code != HTTPStatus.OK:
                        raise error_of(
                            response.status_code, await _body(response, ERROR_BYTES_MAX), response.headers.get("retry-after", "")
                        )
            except TimeoutError:
                raise ApiUnreachableError("no answer in time") from None
            except self._faults as error:
                raise _unreachable(error) from None
            yield await stack.enter_async_context(contextlib.aclosing(self._lines(response)))

    async def close(self) -> None:
        await self._client.aclose()

    async def _request(self, method: str, path: str, *, timeout_s: float, **rest: Any) -> bytes:
        try:
            async with (
                asyncio.timeout(timeout_s),  # the client's own limits are for each step alone
                self._client.stream(method, path, timeout=self._timeout(timeout_s), **rest) as response,
            ):
                body = await _body(response, BODY_BYTES_MAX)
        except TimeoutError:
            raise ApiUnreachableError(f"no answer within {timeout_s:g} s") from None
        except self._faults as error:
            raise _unreachable(error) from None
        self.server_date = response.headers.get("date", "")
        if not response.is_success:
            raise error_of(response.status_code, body, response.headers.get("retry-after", ""))
        return body

    async def _lines(self, response: httpx2.Response) -> AsyncGenerator[bytes, None]:
        rest: list[bytes] = []
        rest_bytes = 0
        try:
            async for chunk in response.aiter_bytes():
                head, *lines = chunk.split(b"\n")
                rest.append(head)
                rest_bytes += len(head)
                for line in lines:
                    yield b"".join(rest)
                    rest, rest_bytes = [line], len(line)
                if rest_bytes > LINE_BYTES_MAX:
                    raise ApiError(
                        HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "LineTooLong", f"an event of a watch is larger than {LINE_BYTES_MAX} bytes"
                    )
        except self._faults as error:
            raise _unreachable(error) from None
        if rest_bytes:
            raise ApiUnreachableError("the stream ended in the middle of an event")

    @staticmethod
    def _timeout(seconds: float) -> Any:
        return (CONNECT_S, seconds, seconds, seconds)  # connect, read, write, a connection from the pool


async def _body(response: httpx2.Response, bytes_max: int) -> bytes:
    chunks, size_bytes = [], 0
    async for chunk in response.aiter_bytes():
        size_bytes += len(chunk)
        if size_bytes > bytes_max:
            raise ApiError(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "AnswerTooLarge", f"an answer of the API server is larger than {bytes_max} bytes"
            )
        chunks.append(chunk)
    return b"".join(chunks)


def _faults() -> tuple[type[Exception], ...]:
    import httpx2  # noqa: PLC0415 - optional

    # the last two: what a credential plugin printed is no JSON or no text, a token is no ASCII
    faults: tuple[type[Exception], ...] = (httpx2.HTTPError, httpx2.StreamError, httpx2.InvalidURL, OSError, ValueError, RecursionError)
    try:
        from lightkube.core.exceptions import ConfigError as LightkubeConfigError  # noqa: PLC0415 - optional
    except ImportError:
        return faults
    # a credential plugin failed or printed something else, or the token's file is gone
    return (*faults, LightkubeConfigError, KeyError, TypeError)


def _unreachable(error: Exception) -> ApiUnreachableError:
    kind = type(error).__name__
    if isinstance(error, OSError) and error.filename:
        return ApiUnreachableError(f"{error.filename}: {error.strerror}")
    unsigned = isinstance(error, KeyError | TypeError | ValueError | RecursionError) and not isinstance(error, OSError)
    if kind == "ConfigError" or unsigned:  # its text may hold what a credential plugin printed
        return ApiUnreachableError("no credentials: the token's file can't be read, or the kubeconfig's credential plugin failed")
    if kind == "LocalProtocolError":  # its text quotes the header that can't be sent
        return ApiUnreachableError(f"{kind}: the request can't be sent; is the token a single line?")
    return ApiUnreachableError(f"{kind}: {error}" if str(error) else kind)


def _not_installed() -> NoReturn:
    raise StartError(f"watching Kubernetes needs the extra 'kubernetes': {EXTRA}") from None


def _read(kubeconfig: str, service_account: str) -> KubeConfig:
    from lightkube.config.kubeconfig import KubeConfig  # noqa: PLC0415 - optional

    return KubeConfig.from_file(kubeconfig) if kubeconfig else KubeConfig.from_env(service_account=service_account)


def _mended(config: SingleConfig | None) -> SingleConfig:
    from lightkube.config.kubeconfig import PROXY_CONF  # noqa: PLC0415 - optional
    from lightkube.config.models import NameValue, User  # noqa: PLC0415 - optional

    config = config or PROXY_CONF
    user = config.user or User()
    for field, data in (
        ("certificate-authority-data", config.cluster.certificate_auth_data),
        ("client-certificate-data", user.client_cert_data),
        ("client-key-data", user.client_key_data),
    ):
        if data and not _is_pem(data):  # lightkube would leave a file behind, and not say which it is
            raise ConfigError(str(config.fname or "Kubernetes"), [Problem(field, "is not PEM in base64")])
    if user.token_file:
        user.token_file = str(config.abs_file(user.token_file))
    if user.exec is not None and user.exec.apiVersion == _EXEC_V1:
        # the answer looks the same in both; what the plugin is to speak it is told in its environment
        info = {"kind": "ExecCredential", "apiVersion": _EXEC_V1, "spec": {"interactive": False}}
        env = [each for each in user.exec.env or [] if each.name != "KUBERNETES_EXEC_INFO"]
        user.exec.env = [*env, NameValue("KUBERNETES_EXEC_INFO", json.dumps(info))]
        user.exec.apiVersion = _EXEC_V1BETA1
    if user.exec is not None and os.sep in user.exec.command:
        user.exec.command = str(config.abs_file(user.exec.command))
    return config._replace(user=user)


def _is_pem(data: str) -> bool:
    try:
        return b"-----BEGIN " in base64.b64decode(data)
    except ValueError:
        return False
