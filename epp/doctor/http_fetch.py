"""One HTTP GET with a limit on everything, for probes: metrics ports, engines, Envoy's admin page.

The certificate of an https address is verified only where it matters: when a CA is given or a token is sent. Messages name an address without
user and password.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable, Mapping
from email.utils import parsedate_to_datetime
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit, urlunsplit

import aiohttp
import msgspec

from epp.doctor.probing import ProbeError
from epp.sources.kubernetes.api import UNREADABLE

BODY_BYTES_MAX = 64 << 20
"""Envoy's /config_dump of a large mesh is tens of megabytes."""


T = TypeVar("T")


class Answer(NamedTuple):
    url: str
    status: int
    body: bytes
    skew_s: float | None
    """The server's clock less ours, by its Date header (whole seconds); None where there is none."""


def shown(url: str) -> str:
    """The address as it may be printed: without user, password and query."""
    try:
        parts = urlsplit(url)
    except ValueError:  # `[::1` without its end
        return "an address that is none"
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


class Http:
    def __init__(self, now_s: Callable[[], float], *, limit_s: float, token: str = "", ca_file: str = "") -> None:
        """`now_s`: the time of day. `token`: sent by `get(..., authorized=True)` only."""
        self._now_s = now_s
        self._limit_s = limit_s
        self._token = token
        self._ca_file = ca_file

    async def get(self, url: str, *, authorized: bool = False) -> Answer:
        """Raises ProbeError where there is no answer; one that is an error status is an answer."""
        headers: Mapping[str, str] = {"Authorization": f"Bearer {self._token}"} if authorized and self._token else {}
        timeout = aiohttp.ClientTimeout(total=self._limit_s)
        try:
            async with (
                aiohttp.ClientSession(timeout=timeout) as session,
                session.get(url, headers=headers, ssl=self._tls(bool(headers)), allow_redirects=False) as response,
            ):
                body = await response.content.read(BODY_BYTES_MAX + 1)
                while len(body) <= BODY_BYTES_MAX and (more := await response.content.read(BODY_BYTES_MAX + 1)):
                    body += more
                skew_s = self._skew_s(response.headers.get("Date", ""))
        except TimeoutError:
            raise ProbeError(f"{shown(url)} does not answer within {self._limit_s:g} s", fault=True) from None
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise ProbeError(f"{shown(url)} can't be read: {_reason(error)}", fault=True) from None
        if len(body) > BODY_BYTES_MAX:
            raise ProbeError(f"{shown(url)} answers with more than {BODY_BYTES_MAX} bytes", fault=True)
        return Answer(shown(url), response.status, body, skew_s)

    def _tls(self, sends_token: bool) -> ssl.SSLContext | bool:
        if self._ca_file:
            return ssl.create_default_context(cafile=self._ca_file)
        return sends_token

    def _skew_s(self, date: str) -> float | None:
        try:
            return parsedate_to_datetime(date).timestamp() - self._now_s()
        except (TypeError, ValueError):
            return None


def json_of(answer: Answer) -> dict[str, Any]:
    """Its JSON object. Raises ProbeError that says what to do."""
    return read_json(answer, dict[str, Any])


def read_json(answer: Answer, type_: type[T]) -> T:
    """Its JSON, if it is of this type. Raises ProbeError as `json_of` does."""
    if answer.status in (401, 403):
        raise ProbeError(f"{answer.url} answers {answer.status}: give --metrics-token-file FILE")
    if answer.status != 200:
        raise ProbeError(f"{answer.url} answers {answer.status}" + (": its debug paths are off" if "/debug/" in answer.url else ""))
    try:
        return msgspec.json.decode(answer.body, type=type_)
    except UNREADABLE:
        raise ProbeError(f"{answer.url} answers with something else than expected: this is no picker's metrics port") from None


def _reason(error: Exception) -> str:
    return str(getattr(error, "strerror", "") or error or type(error).__name__)
