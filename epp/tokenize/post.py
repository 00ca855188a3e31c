"""HTTP POST of a JSON body to whoever tokenizes, bounded in time, bytes and connections.

A general client, unlike the one engines' metrics are read with: it is asked at most once a request, for more than it costs. No redirects,
cookies, proxies or compression. Not here: what is asked, what the answer means (remote).
"""

from __future__ import annotations

import asyncio

import aiohttp

from epp.engines.access import FetchOptions, Tls, Token

ANSWER_BYTES_MAX = 32 << 20
"""A longer answer is a failure."""
REASON_BYTES_MAX = 4 << 10
"""Read of an answer that says a thing was not found."""
_NO_MODEL = b"NotFoundError"
"""What vLLM calls it where it was asked for a model, or a LoRA, it does not have; of a path it does not have it says `Not Found`."""
KEPT_S = 30.0
"""A connection is kept open that long when it is not used."""


class PostError(Exception):
    """No usable answer."""


class NotThereError(PostError):
    """The server has no such path, or won't let us: another try is no use for a while."""


class RefusedError(PostError):
    """The server is well, and won't tokenize this one."""


class Poster:
    """One set of connections. Raises StartError for files it can't use."""

    def __init__(self, options: FetchOptions, connections_max: int) -> None:
        self._tls = Tls(options) if options.scheme == "https" else None
        self._token = Token(options.bearer_token_file)
        self._connections_max = connections_max
        self._session: aiohttp.ClientSession | None = None
        self._closed = False

    async def post(self, url: str, body: bytes, timeout_s: float) -> bytes:
        """The answer's body. Raises PostError."""
        if self._closed:  # a question that had not begun when another configuration came
            raise PostError("out of service")
        if self._session is None:  # made here: it belongs to the running loop
            connector = aiohttp.TCPConnector(limit=self._connections_max, keepalive_timeout=KEPT_S)
            self._session = aiohttp.ClientSession(
                connector=connector, cookie_jar=aiohttp.DummyCookieJar(), trust_env=False, auto_decompress=False
            )
        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        self._token.renewed(asyncio.get_running_loop().time())
        if self._token.line:
            headers["Authorization"] = self._token.line.partition(": ")[2].strip()
        tls = self._tls.context() if self._tls is not None else True
        try:
            async with (
                asyncio.timeout(timeout_s),
                self._session.post(url, data=body, headers=headers, allow_redirects=False, ssl=tls) as response,
            ):
                if response.status == 404 and _NO_MODEL in await response.content.read(REASON_BYTES_MAX):
                    raise RefusedError("no such model")
                if response.status != 200:
                    raise _status_error(response.status)
                return await _read(response.content)
        except TimeoutError:
            raise PostError("no answer in time") from None
        except aiohttp.ClientError as error:
            raise PostError(type(error).__name__) from None

    async def close(self) -> None:
        self._closed = True
        if self._session is not None:
            await self._session.close()


async def _read(content: aiohttp.StreamReader) -> bytes:
    parts: list[bytes] = []
    size = 0
    async for part in content.iter_any():
        parts.append(part)
        size += len(part)
        if size > ANSWER_BYTES_MAX:
            raise PostError(f"more than {ANSWER_BYTES_MAX} bytes")
    return b"".join(parts)


def _status_error(status: int) -> PostError:
    if status in (400, 413, 422):
        return RefusedError(f"HTTP {status}")
    if (status not in (408, 429) and 300 <= status < 500) or status == 501:
        return NotThereError(f"HTTP {status}")
    return PostError(f"HTTP {status}")
