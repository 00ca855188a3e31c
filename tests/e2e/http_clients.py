"""HTTP clients that do exactly what a test says, and hide nothing of what came back.

`Http1` is one kept-alive HTTP/1.1 connection, `Http2` one HTTP/2 connection without TLS, by prior knowledge (which the usual clients
don't speak). Both fast enough for ten thousand requests. Not general: what they don't understand raises.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from typing import Any, NamedTuple, Self

import h2.config
import h2.connection
import h2.events
from prometheus_client.parser import text_string_to_metric_families

from epp.types import Address

TIMEOUT_S = 30.0
"""For anything one exchange waits for: a gateway that hangs fails a test, it does not stop the suite."""
POLL_S = 0.02
MODEL = "sim/llama-8b"


class TruncatedError(Exception):
    """The connection ended, or was reset, in the middle of an answer."""


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def engine(self) -> str:
        """Who served it, where a simulated engine did."""
        return self.headers.get("x-inference-endpoint", "")


def chat(text: str, *, max_tokens: int = 4, model: str = MODEL, **more: Any) -> bytes:
    """The body of a chat request."""
    return json.dumps({"model": model, "messages": [{"role": "user", "content": text}], "max_tokens": max_tokens, **more}).encode()


class Http1:
    """One request at a time: `send`, `head`, then `pieces` (or `request` for all of it)."""

    def __init__(self, address: Address) -> None:
        self.address = address
        self._reader: asyncio.StreamReader
        self._writer: asyncio.StreamWriter
        self._headers: dict[str, str] = {}
        self._bodiless = False

    async def __aenter__(self) -> Self:
        self._reader, self._writer = await asyncio.open_connection(*self.address)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        self._writer.close()
        try:
            await self._writer.wait_closed()
        except OSError:
            return  # the other end reset it

    async def request(
        self, method: str, path: str, body: bytes | None = None, headers: Mapping[str, str] | None = None, *, chunks: Iterable[bytes] = ()
    ) -> Answer:
        async with asyncio.timeout(TIMEOUT_S):
            await self.send(method, path, body, headers, chunks=chunks)
            status = await self.head()
            return Answer(status, self._headers, await self.rest())

    async def send(
        self, method: str, path: str, body: bytes | None = None, headers: Mapping[str, str] | None = None, *, chunks: Iterable[bytes] = ()
    ) -> None:
        """`body` goes out with its length, `chunks` chunked."""
        lines = [f"{method} {path} HTTP/1.1", f"host: {self.address}"]
        lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
        chunks = list(chunks)
        if chunks:
            lines.append("transfer-encoding: chunked")
        elif body is not None:
            lines.append(f"content-length: {len(body)}")
        self._bodiless = method == "HEAD"
        self._writer.write(("\r\n".join(lines) + "\r\n\r\n").encode("latin-1") + (body or b""))
        for chunk in chunks:
            await self.send_chunk(chunk)
        if chunks:
            await self.send_raw(b"0\r\n\r\n")
        await self._drain()

    async def send_chunk(self, chunk: bytes) -> None:
        await self.send_raw(b"%x\r\n%b\r\n" % (len(chunk), chunk))

    async def send_raw(self, data: bytes) -> None:
        self._writer.write(data)
        await self._drain()

    async def _drain(self) -> None:
        try:
            await self._writer.drain()
        except OSError:
            return  # it closed while we were sending; what it said before that can still be read

    async def head(self) -> int:
        """The status of the answer, once its headers are here; a 100 Continue is not the answer."""
        status = 100
        while status == 100:
            try:
                raw = await self._reader.readuntil(b"\r\n\r\n")
            except (asyncio.IncompleteReadError, OSError) as error:
                raise TruncatedError("no answer") from error
            first, *lines = raw[:-4].decode("latin-1").split("\r\n")
            status = int(first.split(" ", 2)[1])
            self._headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        return status

    async def informational(self) -> int:
        """The next status line, whatever it is, where no other header is expected with it."""
        return int((await self._reader.readuntil(b"\r\n\r\n")).split(b" ", 2)[1])

    @property
    def headers(self) -> dict[str, str]:
        return self._headers

    async def pieces(self) -> AsyncIterator[bytes]:
        """The body as it comes. Raises TruncatedError if it does not end as HTTP says."""
        headers = self._headers
        try:
            if self._bodiless:
                return
            if headers.get("transfer-encoding") == "chunked":
                while size := int(await self._reader.readuntil(b"\r\n"), 16):
                    yield (await self._reader.readexactly(size + 2))[:-2]
                await self._reader.readexactly(2)
            elif "content-length" in headers:
                yield await self._reader.readexactly(int(headers["content-length"]))
        except (asyncio.IncompleteReadError, OSError) as error:
            raise TruncatedError("the body is not whole") from error

    async def rest(self) -> bytes:
        return b"".join([piece async for piece in self.pieces()])


class Http2:
    """Requests one after another, or at once by `start`; reading happens in `until_ended`."""

    def __init__(self, address: Address) -> None:
        self.address = address
        self._reader: asyncio.StreamReader
        self._writer: asyncio.StreamWriter
        self._h2 = h2.connection.H2Connection(h2.config.H2Configuration(header_encoding="latin-1"))
        self._heads: dict[int, dict[str, str]] = {}
        self._bodies: dict[int, list[bytes]] = {}
        self._ended: set[int] = set()
        self._reset: set[int] = set()

    async def __aenter__(self) -> Self:
        self._reader, self._writer = await asyncio.open_connection(*self.address)
        self._h2.initiate_connection()
        await self._flush()
        return self

    async def __aexit__(self, *_: object) -> None:
        self._writer.close()
        try:
            await self._writer.wait_closed()
        except OSError:
            return

    async def request(
        self, method: str, path: str, body: bytes | None = None, headers: Mapping[str, str] | None = None, *, trailers: bool = False
    ) -> Answer:
        stream = await self.start(method, path, body, headers, trailers=trailers)
        return await self.until_ended(stream)

    async def start(
        self, method: str, path: str, body: bytes | None = None, headers: Mapping[str, str] | None = None, *, trailers: bool = False
    ) -> int:
        stream: int = self._h2.get_next_available_stream_id()
        pseudo = {":method": method, ":scheme": "http", ":authority": str(self.address), ":path": path}
        self._heads[stream], self._bodies[stream] = {}, []
        self._h2.send_headers(stream, [*pseudo.items(), *(headers or {}).items()], end_stream=body is None)
        async with asyncio.timeout(TIMEOUT_S):
            if body is not None:
                await self._send_body(stream, body, ends=not trailers)
                if trailers:
                    self._h2.send_headers(stream, [("x-checksum", "1")], end_stream=True)
        await self._flush()
        return stream

    async def cancel(self, stream: int) -> None:
        self._h2.reset_stream(stream, 8)  # CANCEL
        await self._flush()

    async def until_ended(self, stream: int) -> Answer:
        async with asyncio.timeout(TIMEOUT_S):
            while stream not in self._ended:
                await self._read()
        return self._answer(stream)

    async def until_body(self, stream: int) -> None:
        """Until the first bytes of the body are here."""
        async with asyncio.timeout(TIMEOUT_S):
            while not self._bodies[stream] and stream not in self._ended:
                await self._read()

    def _answer(self, stream: int) -> Answer:
        if stream in self._reset:
            raise TruncatedError("the stream was reset")
        head = self._heads[stream]
        return Answer(int(head[":status"]), head, b"".join(self._bodies[stream]))

    async def _send_body(self, stream: int, body: bytes, *, ends: bool) -> None:
        view = memoryview(body)
        while view:
            room = min(self._h2.local_flow_control_window(stream), self._h2.max_outbound_frame_size)
            if not room:
                await self._flush()
                await self._read()
                continue
            self._h2.send_data(stream, bytes(view[:room]))
            view = view[room:]
        if ends:
            self._h2.end_stream(stream)

    async def _read(self) -> None:
        data = await self._reader.read(1 << 18)
        if not data:
            raise TruncatedError("the connection ended")
        for event in self._h2.receive_data(data):
            if isinstance(event, h2.events.ResponseReceived):
                self._heads[event.stream_id] = {name.lower(): value for name, value in event.headers}
            elif isinstance(event, h2.events.DataReceived):
                self._bodies[event.stream_id].append(event.data)
                self._h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
            elif isinstance(event, h2.events.StreamEnded):
                self._ended.add(event.stream_id)
            elif isinstance(event, h2.events.StreamReset):
                self._ended.add(event.stream_id)
                self._reset.add(event.stream_id)
        await self._flush()

    async def _flush(self) -> None:
        self._writer.write(self._h2.data_to_send())
        await self._writer.drain()


async def ask(
    address: Address, path: str, body: bytes | None = None, headers: Mapping[str, str] | None = None, *, method: str = ""
) -> Answer:
    """One request on a connection of its own."""
    async with Http1(address) as client:
        return await client.request(method or ("POST" if body is not None else "GET"), path, body, headers)


class Samples:
    """What a /metrics page says."""

    def __init__(self, text: str) -> None:
        self._samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]

    def sum(self, name: str, **labels: str) -> float:
        """Over every series of this name that has these labels."""
        return sum(
            sample.value
            for sample in self._samples
            if sample.name == name and all(sample.labels.get(label) == value for label, value in labels.items())
        )

    def has(self, name: str) -> bool:
        return any(sample.name == name for sample in self._samples)


async def scrape(address: Address) -> Samples:
    answer = await ask(address, "/metrics")
    assert answer.status == 200, answer
    return Samples(answer.body.decode())


async def eventually(reached: Callable[[], Awaitable[bool]], what: str) -> None:
    """Returns once `reached` says so: what another process does, there is no event to wait for."""
    try:
        async with asyncio.timeout(TIMEOUT_S):
            while True:
                if await reached():
                    return
                await asyncio.sleep(POLL_S)
    except TimeoutError:
        raise AssertionError(f"not within {TIMEOUT_S:g} s: {what}") from None


async def until_metrics(address: Address, reached: Callable[[Samples], bool], what: str) -> Samples:
    """What /metrics says there, once `reached` is true of it."""
    samples = await scrape(address)

    async def look() -> bool:
        nonlocal samples
        samples = await scrape(address)
        return reached(samples)

    await eventually(look, what)
    return samples


async def until_idle(metrics: Address) -> Samples:
    """The picker's metrics, once it counts no request in flight any more."""
    return await until_metrics(metrics, lambda now: now.sum("llm_d_epp_inflight_requests") == 0, "no request in flight")
