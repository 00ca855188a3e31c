"""HTTP GET of `/metrics` over kept-alive connections, bounded in time and bytes.

No redirects, cookies, proxies or compression: a model server's answer comes from where it was asked or not at all. A thin asyncio
protocol around httptools (llhttp, the parser of Node.js), because a general HTTP client costs three times as much, 20 times a second
for every endpoint. Not here: when to ask and what the answer means (scraper).

Cost: about 55 µs of CPU a fetch of 60 KB.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable
from functools import lru_cache
from types import TracebackType
from typing import Protocol, Self
from urllib.parse import urlsplit

import httptools

FETCH_TIMEOUT_S = 1.0
"""From connecting to the last byte."""
RESPONSE_BYTES_MAX = 8 << 20
"""A longer answer is a failure, not a reading."""
NOBODY_LISTENS = frozenset({errno.ECONNREFUSED, errno.EHOSTUNREACH, errno.ENETUNREACH})
"""Said by the network of that address; other failures to connect may be our own (no file descriptors left)."""


class FetchError(Exception):
    """No usable answer; says why."""


class UnreachableError(FetchError):
    """Nobody listens there: certain at the first try, unlike a time-out."""


class Fetcher(Protocol):
    async def fetch(self, url: str) -> bytes:
        """The body. Raises FetchError."""
        ...


class _Connection(asyncio.Protocol):
    """One connection, one answer at a time. The `on_` methods are the parser's."""

    def __init__(self, bytes_max: int, closed: Callable[[_Connection], None]) -> None:
        self._bytes_max = bytes_max
        self._closed = closed
        self._transport: asyncio.Transport | None = None
        self._answer: asyncio.Future[bytes] | None = None
        self._begin()

    def _begin(self) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self._parts: list[bytes] = []
        self._size = 0
        self._to_the_end = True
        """The body has no length: it ends with the connection."""
        self._headers_done = False
        self.heard = False
        self.reusable = False

    async def ask(self, request: bytes) -> bytes:
        """Raises FetchError."""
        assert self._transport is not None
        self._begin()
        self._answer = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        return await self._answer

    @property
    def open(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    # asyncio's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]  # uvloop's is a Transport in all but its class

    def data_received(self, data: bytes) -> None:
        self.heard = True
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail(f"not HTTP: {error}")

    def connection_lost(self, exc: Exception | None) -> None:
        self.reusable = False
        self._closed(self)
        if exc is None and self._headers_done and self._to_the_end:
            self._succeed()
        else:
            self._fail(str(exc) if exc else "the connection was closed before the whole answer")

    # the parser's side

    def on_header(self, name: bytes, _value: bytes) -> None:
        if name.lower() in (b"content-length", b"transfer-encoding"):
            self._to_the_end = False

    def on_headers_complete(self) -> None:
        self._headers_done = True
        status = self._parser.get_status_code()
        if status != 200:
            self._fail(f"HTTP {status}")

    def on_body(self, body: bytes) -> None:
        self._size += len(body)
        if self._size > self._bytes_max:
            self._fail(f"more than {self._bytes_max} bytes")
        else:
            self._parts.append(body)

    def on_message_complete(self) -> None:
        self.reusable = self._parser.should_keep_alive()
        self._succeed()

    def _succeed(self) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_result(b"".join(self._parts))

    def _fail(self, reason: str) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(FetchError(reason))
            self.close()


class HttpFetcher:
    """A kept connection for every address asked; enter it before the first fetch. One fetch per address at a time."""

    def __init__(self, *, timeout_s: float = FETCH_TIMEOUT_S, response_bytes_max: int = RESPONSE_BYTES_MAX) -> None:
        self._timeout_s = timeout_s
        self._response_bytes_max = response_bytes_max
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
        address, request = _request(url)
        try:
            async with asyncio.timeout(self._timeout_s):
                return await self._fetch(self._kept, address, request)
        except TimeoutError:
            raise FetchError(f"no answer within {self._timeout_s:g} s") from None

    async def _fetch(self, kept: dict[tuple[str, int], _Connection], address: tuple[str, int], request: bytes) -> bytes:
        connection = kept.pop(address, None)
        if connection is not None and connection.open:
            try:
                return await self._ask(kept, address, connection, request)
            except FetchError:
                if connection.heard:
                    raise
                # the server closed it while it was idle: ask on a new one
        connection = await self._connect(address)
        return await self._ask(kept, address, connection, request)

    async def _ask(
        self, kept: dict[tuple[str, int], _Connection], address: tuple[str, int], connection: _Connection, request: bytes
    ) -> bytes:
        try:
            body = await connection.ask(request)
        except BaseException:  # also when it is given up on: what may still come is no answer to the next question
            connection.close()
            raise
        if connection.reusable:
            kept[address] = connection
        else:
            connection.close()
        return body

    async def _connect(self, address: tuple[str, int]) -> _Connection:
        def closed(connection: _Connection) -> None:  # an endpoint that is gone is never asked again: leave nothing of it here
            if self._kept and self._kept.get(address) is connection:
                del self._kept[address]

        loop = asyncio.get_running_loop()
        try:
            _, connection = await loop.create_connection(lambda: _Connection(self._response_bytes_max, closed), *address)
        except OSError as error:
            reason = error.strerror or str(error)
            raise (UnreachableError if error.errno in NOBODY_LISTENS else FetchError)(reason) from None
        return connection


@lru_cache(maxsize=20_000)
def _request(url: str) -> tuple[tuple[str, int], bytes]:
    parts = urlsplit(url)
    assert parts.hostname is not None
    head = f"GET {parts.path or '/'} HTTP/1.1\r\nHost: {parts.netloc}\r\nAccept: text/plain\r\nAccept-Encoding: identity\r\n\r\n"
    return (parts.hostname, parts.port or 80), head.encode()
