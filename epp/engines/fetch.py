"""HTTP GET of small texts (`/metrics`, `/v1/models`) over kept-alive connections, bounded in time and bytes.

No redirects, cookies, proxies or compression: a model server's answer comes from where it was asked or not at all. A thin asyncio
protocol around httptools (llhttp, the parser of Node.js), because a general HTTP client costs three times as much, 20 times a second
for every endpoint. All connections read into one buffer, so that a body is copied once. Not here: TLS and tokens (access), when to ask
and what the answer means (scraper, models).

Cost: about 60 µs of CPU a fetch of 60 KB, twice that over TLS.
"""

from __future__ import annotations

import asyncio
import errno
import ssl
from collections.abc import Callable
from types import TracebackType
from typing import Protocol, Self
from urllib.parse import urlsplit

import httptools

from epp.engines.access import FetchOptions, Tls, Token

FETCH_TIMEOUT_S = 1.0
"""From connecting to the last byte."""
RESPONSE_BYTES_MAX = 8 << 20
"""A longer answer is a failure, not a reading. Its head counts too."""
READ_BYTES = 256 << 10
"""Taken from a socket at a time."""
REQUESTS_KEPT_MAX = 20_000
"""Distinct URLs whose request is kept made up."""
NOBODY_LISTENS = frozenset({errno.ECONNREFUSED, errno.EHOSTUNREACH, errno.ENETUNREACH})
"""Said by the network of that address; other failures to connect may be our own (no file descriptors left)."""


class FetchError(Exception):
    """No usable answer; says why."""


class UnreachableError(FetchError):
    """Nobody listens there: certain at the first try, unlike a time-out."""


class StatusError(FetchError):
    """An answer, with another status than 200."""

    def __init__(self, status: int) -> None:
        super().__init__(f"HTTP {status}")
        self.status = status

    @property
    def nothing_there(self) -> bool:
        """The server is well, but has nothing for us at that path: none such, moved, not permitted, not switched on."""
        return (300 <= self.status < 500 and self.status not in {408, 429}) or self.status == 501


class Fetcher(Protocol):
    async def fetch(self, url: str) -> bytes:
        """The body. Raises FetchError."""
        ...


class _Connection(asyncio.BufferedProtocol):
    """One connection, one answer at a time. The `on_` methods are the parser's."""

    def __init__(self, fetcher: HttpFetcher, closed: Callable[[_Connection], None]) -> None:
        self._fetcher = fetcher
        self._closed = closed
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._answer: asyncio.Future[bytes] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._parts: list[bytes] = []
        self._received_bytes = 0
        self._to_the_end = True
        """The body has no length: it ends with the connection."""
        self._headers_done = False
        self.heard = False
        self.reusable = False

    def ask(self, request: bytes, seconds: float) -> asyncio.Future[bytes]:
        """The body, or FetchError."""
        assert self._transport is not None
        self._parts = []
        self._received_bytes = 0
        self._to_the_end = True
        self._headers_done = self.heard = self.reusable = False
        self._answer = answer = self._loop.create_future()
        self._timer = self._loop.call_later(seconds, self._too_slow)
        self._transport.write(request)
        return answer

    @property
    def open(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    def close(self) -> None:
        self.reusable = False
        if self._timer is not None:
            self._timer.cancel()
        if self._transport is not None:
            self._transport.abort()

    # asyncio's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]  # uvloop's is a Transport in all but its class

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002 - asyncio's signature
        return self._fetcher.buffer

    def buffer_updated(self, nbytes: int) -> None:
        self.heard = True
        self._received_bytes += nbytes
        if self._answer is None or self._answer.done():  # nothing was asked: it would pass for the next answer
            self.close()
        elif self._received_bytes > self._fetcher.response_bytes_max:
            self._too_long()
        else:
            try:
                self._parser.feed_data(self._fetcher.buffer[:nbytes])
            except httptools.HttpParserError as error:
                self._fail(FetchError(f"not HTTP: {error}"))

    def connection_lost(self, exc: Exception | None) -> None:
        self.reusable = False
        self._closed(self)
        if exc is None and self._headers_done and self._to_the_end:
            self._succeed()
        else:
            self._fail(FetchError(str(exc) if exc else "the connection was closed before the whole answer"))

    def _too_slow(self) -> None:
        self._fetcher.limit_hit("scrape_time")
        self._fail(FetchError(f"no answer within {self._fetcher.timeout_s:g} s"))

    # the parser's side

    def on_message_begin(self) -> None:
        if self._headers_done:  # a second answer to one question
            self.close()

    def on_header(self, name: bytes, value: bytes) -> None:
        name = name.lower()
        if name == b"content-length":
            self._to_the_end = False
            if value.isdigit() and int(value[:20]) > self._fetcher.response_bytes_max:
                self._too_long()
        elif name == b"transfer-encoding":
            self._to_the_end = False

    def on_headers_complete(self) -> None:
        self._headers_done = True
        status = self._parser.get_status_code()
        if status != 200:
            self._fail(StatusError(status))

    def on_body(self, body: bytes) -> None:
        self._parts.append(body)

    def on_message_complete(self) -> None:
        self.reusable = self.open and self._parser.should_keep_alive()
        self._succeed()

    def _succeed(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._answer is not None and not self._answer.done():
            self._answer.set_result(b"".join(self._parts))
        self._parts = []

    def _too_long(self) -> None:
        self._fetcher.limit_hit("scrape_bytes")
        self._fail(FetchError(f"more than {self._fetcher.response_bytes_max} bytes"))

    def _fail(self, error: FetchError) -> None:
        self._parts = []
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(error)
        self.close()


class HttpFetcher:
    """A kept connection for every address asked; enter it before the first fetch. Raises StartError for files it can't use."""

    def __init__(
        self,
        options: FetchOptions | None = None,
        *,
        timeout_s: float = FETCH_TIMEOUT_S,
        response_bytes_max: int = RESPONSE_BYTES_MAX,
        limit_hit: Callable[[str], None] | None = None,
    ) -> None:
        """`limit_hit` is told `scrape_time` or `scrape_bytes` when an answer was too slow or too long."""
        self.timeout_s = timeout_s
        self.response_bytes_max = response_bytes_max
        self.buffer = memoryview(bytearray(READ_BYTES))
        """Where every connection reads to; what is in it is used up before the next read."""
        self.limit_hit = limit_hit or (lambda _name: None)
        options = options or FetchOptions()
        self._server_name = options.server_name
        self._tls = Tls(options) if options.scheme == "https" else None
        self._token = Token(options.bearer_token_file)
        self._requests: dict[str, tuple[tuple[str, int], bytes]] = {}
        self._kept: dict[tuple[str, int], _Connection] | None = None

    async def __aenter__(self) -> Self:
        self._kept = {}
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        kept, self._kept = self._kept or {}, None
        for connection in kept.values():
            connection.close()

    async def fetch(self, url: str) -> bytes:
        if self._kept is None:
            raise RuntimeError("enter the fetcher first")
        now_s = asyncio.get_running_loop().time()
        address, request = self._request(url, now_s)
        connection = self._kept.pop(address, None)
        if connection is not None and connection.open:
            try:
                return await self._ask(address, connection, request, self.timeout_s)
            except FetchError:
                if connection.heard or asyncio.get_running_loop().time() - now_s > self.timeout_s / 2:
                    raise
                # the server closed it while it was idle: ask on a new one
        return await self._ask_anew(address, request, now_s + self.timeout_s)

    async def _ask_anew(self, address: tuple[str, int], request: bytes, deadline_s: float) -> bytes:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout_at(deadline_s):
                connection = await self._connect(address)
        except TimeoutError:
            self.limit_hit("scrape_time")
            raise FetchError(f"no connection within {self.timeout_s:g} s") from None
        return await self._ask(address, connection, request, max(0.0, deadline_s - loop.time()))

    async def _ask(self, address: tuple[str, int], connection: _Connection, request: bytes, seconds: float) -> bytes:
        try:
            body = await connection.ask(request, seconds)
        except BaseException:  # also when it is given up on: what may still come is no answer to the next question
            connection.close()
            raise
        if connection.reusable and self._kept is not None and address not in self._kept:
            self._kept[address] = connection
        else:
            connection.close()
        return body

    async def _connect(self, address: tuple[str, int]) -> _Connection:
        def closed(connection: _Connection) -> None:  # an endpoint that is gone is never asked again: leave nothing of it here
            if self._kept and self._kept.get(address) is connection:
                del self._kept[address]

        tls = self._tls.context() if self._tls is not None else None
        name = (self._server_name or address[0]) if tls is not None else None
        try:
            _, connection = await asyncio.get_running_loop().create_connection(
                lambda: _Connection(self, closed), *address, ssl=tls, server_hostname=name
            )
        except ssl.SSLError as error:
            raise FetchError(f"TLS: {getattr(error, 'verify_message', '') or error.reason or error}") from None
        except OSError as error:
            reason = error.strerror or str(error)
            raise (UnreachableError if error.errno in NOBODY_LISTENS else FetchError)(reason) from None
        return connection

    def _request(self, url: str, now_s: float) -> tuple[tuple[str, int], bytes]:
        """Whom to ask, and the request. Made once for each URL and token."""
        if self._token.renewed(now_s) or len(self._requests) > REQUESTS_KEPT_MAX:
            self._requests.clear()
        made = self._requests.get(url)
        if made is None:
            parts = urlsplit(url)
            assert parts.hostname is not None
            lines = f"Host: {parts.netloc}\r\nAccept: text/plain, application/json\r\nAccept-Encoding: identity\r\n{self._token.line}"
            target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
            head = f"GET {target} HTTP/1.1\r\n{lines}\r\n"
            made = self._requests[url] = (parts.hostname, parts.port or (443 if parts.scheme == "https" else 80)), head.encode()
        return made
