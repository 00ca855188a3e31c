"""Every body mode a gateway can be set to, with every kind of body: nothing is lost, changed or held up between client and engine.

One Envoy with a listener per way it can be set up, one picker behind them all. The cells of one listener run at once. What arrived at the
engine is judged by its length and SHA-256, what came back by being the same bytes.

Left out: bodies ended by trailers where the route has a retry policy, which Envoy 1.40 hands on twice (test_e2e_requests has the test).
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import h2.exceptions
import pytest
from echo_engine import EVENTS, blob
from gateways import BUFFERED, FULL_DUPLEX, NONE, PARTIAL, STREAMED, Envoy, FilePicker, Way, free_addresses, grpc_engine, upgrading_engine
from http_clients import TIMEOUT_S, Answer, Http1, Http2, Samples, chat, scrape, until_idle
from programs import EchoEngine, Picker

from epp.envoy import Destination
from epp.types import Address

pytestmark = pytest.mark.e2e

CHAT = "/v1/chat/completions"
UPLOAD = "/v1/audio/transcriptions"
"""Its body is not read by the decision."""
MEGABYTE = 1 << 20
BACK_BYTES = 300_000
BACK = blob(BACK_BYTES)
BACK_LARGE_BYTES = 5 * MEGABYTE
PIECE = b"0123456789abcdef" * 40
PIECES = 8
HANGS_S = 5.0
"""What is not answered by then is not going to be."""

WITHOUT_WAITING = "STREAMED, without waiting"
REQUEST_MODES = {
    FULL_DUPLEX: (FULL_DUPLEX, {}),
    BUFFERED: (BUFFERED, {}),
    PARTIAL: (PARTIAL, {}),
    STREAMED: (STREAMED, {}),
    WITHOUT_WAITING: (STREAMED, {"send_body_without_waiting_for_header_response": True}),
    NONE: (NONE, {}),
}
RESPONSE_WAYS = {
    "response FD": {"response": FULL_DUPLEX},
    "response NONE": {"response": NONE, "response_trailers": False},
    "response NONE but trailers": {"response": NONE},
    "response STREAMED": {"response": STREAMED},
    "response BUFFERED": {"request": BUFFERED, "response": BUFFERED},
    "response BUFFERED, override": {"request": BUFFERED, "response": BUFFERED, "processor": {"allow_mode_override": True}},
    "response PARTIAL, override": {"request": PARTIAL, "response": PARTIAL, "processor": {"allow_mode_override": True}},
    "all STREAMED": {"request": STREAMED, "response": STREAMED},
    "response FD, request NONE": {"request": NONE, "response": FULL_DUPLEX},
}
PREFERS = """
from typing import ClassVar
from epp.plugins.base import PointwiseScorer

class Prefers(PointwiseScorer):
    type: ClassVar[str] = "prefers"
    port: int

    def score_one(self, endpoint):
        return float(endpoint.spec.address.port == self.port)
"""
CONFIG = """
apiVersion: llm-d.ai/v1alpha1
kind: EndpointPickerConfig
plugins:
- {{type: "preference:Prefers", name: prefers, parameters: {{port: {port}}}}}
- {{type: queue-scorer}}
- {{type: max-score-picker, parameters: {{maxNumOfEndpoints: 2}}}}
schedulingProfiles:
- name: default
  plugins: [{{pluginRef: prefers, weight: 100}}, {{pluginRef: queue-scorer}}, {{pluginRef: max-score-picker}}]
"""


def text_of(length: int) -> str:
    """Without a short period."""
    return blob(length // 2).hex()


@dataclass(frozen=True)
class Cell:
    """One request, and how it is sent."""

    name: str
    client: type[Http1 | Http2]
    body: bytes | None = field(repr=False)
    method: str = "POST"
    path: str = CHAT
    trailers: bool = False
    chunked: bool = False

    @property
    def holds_trailers(self) -> bool:
        """The decision waits for the end of its body, which is trailers."""
        return self.trailers and self.path == CHAT

    async def check(self, gateway: Address) -> None:
        """That the engine got exactly this, and the client what the engine says to the next request on the same connection."""
        async with self.client(gateway) as client:
            answer = await self._sent(client)
            assert answer.status == 200, (self, answer)
            said = answer.json
            body = self.body or b""
            assert (said["method"], said["path"]) == (self.method, self.path), self
            assert (said["length"], said["sha256"]) == (len(body), hashlib.sha256(body).hexdigest()), self
            back = await client.request("POST", f"{CHAT}?say=bytes&count={BACK_BYTES}", chat("x"))
            assert (back.status, len(back.body)) == (200, BACK_BYTES), (self, back.status, len(back.body))
            assert back.body == BACK, self

    async def _sent(self, client: Http1 | Http2) -> Answer:
        if self.trailers:
            assert isinstance(client, Http2)
            return await client.request(self.method, self.path, self.body, {"trailer": "x-checksum"}, trailers=True)
        if not self.chunked:
            return await client.request(self.method, self.path, self.body)
        assert isinstance(client, Http1)
        async with asyncio.timeout(TIMEOUT_S):
            await client.send(self.method, self.path, headers={"transfer-encoding": "chunked"})
            for piece in cut(self.body or b""):
                await client.send_chunk(piece)
            await client.send_raw(b"0\r\n\r\n")
            status = await client.head()
            return Answer(status, client.headers, await client.rest())


def cut(body: bytes) -> list[bytes]:
    """In uneven pieces."""
    cuts = sorted({0, *(at for at in (1, 70_000, 70_001, 200_000) if at < len(body)), len(body)})
    return [body[start:end] for start, end in pairwise(cuts)]


@pytest.fixture(scope="module")
def cells() -> list[Cell]:
    small, large, huge = chat("Hello"), chat(text_of(MEGABYTE)), chat(text_of(10 * MEGABYTE))
    found = []
    for client in (Http1, Http2):
        found += [
            Cell("a GET", client, None, method="GET", path="/v1/models"),
            Cell("a small chat", client, small),
            Cell("a chat of 1 MB", client, large),
            Cell("a chat of 10 MB", client, huge),
            Cell("an empty POST", client, b"", path="/v1/audio/transcriptions"),
            Cell("1 MB nobody reads", client, bytes(reversed(large)), path=UPLOAD),
        ]
    return [
        *found,
        Cell("a small chat in chunks", Http1, small, chunked=True),
        Cell("a chat of 1 MB in chunks", Http1, large, chunked=True),
        Cell("an empty POST in chunks", Http1, b"", path="/v1/audio/transcriptions", chunked=True),
        Cell("1 MB nobody reads, in chunks", Http1, bytes(reversed(large)), path=UPLOAD, chunked=True),
        Cell("a small chat with trailers", Http2, small, trailers=True),
        Cell("a chat of 1 MB with trailers", Http2, large, trailers=True),
        Cell("an empty POST with trailers", Http2, b"", path="/v1/audio/transcriptions", trailers=True),
        Cell("1 MB nobody reads, with trailers", Http2, bytes(reversed(large)), path=UPLOAD, trailers=True),
    ]


@dataclass(frozen=True)
class Engines:
    """Where they are; those of a few lines are started by the tests that need them."""

    echo: Address
    dead: Address
    upgrading: Address
    grpc: Address


@pytest.fixture(scope="module")
def addresses(echo: EchoEngine) -> Engines:
    return Engines(echo.address, *free_addresses(3))


@pytest.fixture(scope="module")
def picker(addresses: Engines, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Picker]:
    """It thinks all of them well, and likes best the one that is dead: nobody tells it otherwise."""
    known = (addresses.echo, addresses.dead, addresses.upgrading, addresses.grpc)
    flags = ("--secure-serving=false", "--unknown-paths", "route", "--config-text", CONFIG.format(port=addresses.dead.port))
    directory = tmp_path_factory.mktemp("picker")
    with FilePicker(known, addresses.echo, *flags, directory=directory, plugins={"preference": PREFERS}) as program:
        yield program


@pytest.fixture(scope="module")
def second_picker(addresses: Engines) -> Iterator[Picker]:
    with Picker((addresses.echo,), "--secure-serving=false") as program:
        yield program


@pytest.fixture(scope="module")
def envoy(picker: Picker, second_picker: Picker, addresses: Engines) -> Iterator[Envoy]:
    here, echo = (picker.epp,), (addresses.echo,)
    fallback = (addresses.dead, addresses.echo)
    ways: dict[str, Way] = {}
    for name, (mode, processor) in REQUEST_MODES.items():
        ways[f"{name}, by header"] = Way(pickers=here, subset=echo, request=mode, processor=processor)
        ways[f"{name}, by list"] = Way(
            pickers=here,
            endpoints=fallback,
            subset=fallback,
            destination=Destination.OVERRIDE_HOST,
            request=mode,
            processor=processor,
            tells_served=False,
        )
    for name, fields in RESPONSE_WAYS.items():
        ways[name] = Way(pickers=here, subset=echo, **fields)
    ways["BUFFERED, 1 MiB"] = Way(pickers=here, subset=echo, request=BUFFERED, response=NONE, buffer_bytes=MEGABYTE)
    ways["PARTIAL, 64 KiB"] = Way(pickers=here, subset=echo, request=PARTIAL, buffer_bytes=64 << 10)
    ways["FD, 32 KiB"] = Way(pickers=here, subset=echo, buffer_bytes=32 << 10)
    ways["two pickers"] = Way(pickers=(picker.epp, second_picker.epp), subset=echo)
    ways["websocket"] = Way(pickers=here, subset=(addresses.upgrading,), upgrades=True)
    ways["grpc"] = Way(pickers=here, subset=(addresses.grpc,), http2_engines=True)
    with Envoy(ways) as program:
        yield program


@pytest.fixture(autouse=True)
def nothing_stays_in_flight(picker: Picker, second_picker: Picker) -> Iterator[None]:
    yield
    for program in (picker, second_picker):
        assert asyncio.run(until_idle(program.metrics)).sum("llm_d_epp_inflight_requests") == 0


async def check_all(gateway: Address, cells: Sequence[Cell]) -> None:
    async with asyncio.TaskGroup() as group:
        for cell in cells:
            group.create_task(cell.check(gateway), name=cell.name)


def picks(samples: Samples, endpoint: Address) -> float:
    return samples.sum("llm_d_epp_scheduler_attempts_total", status="success", port=str(endpoint.port))


# --- requests


@pytest.mark.parametrize("mode", REQUEST_MODES)
async def test_a_request_arrives_whole_at_the_destination_in_the_header(envoy: Envoy, cells: list[Cell], mode: str) -> None:
    await check_all(envoy[f"{mode}, by header"], [cell for cell in cells if mode != WITHOUT_WAITING or not cell.holds_trailers])


async def test_trailers_end_a_body_that_is_sent_without_waiting(envoy: Envoy, cells: list[Cell]) -> None:
    async with asyncio.timeout(HANGS_S):
        for cell in cells:
            if cell.holds_trailers:
                await cell.check(envoy[f"{WITHOUT_WAITING}, by header"])


@pytest.mark.parametrize("mode", REQUEST_MODES)
async def test_a_request_arrives_whole_at_the_second_of_a_list_where_the_first_is_dead(
    envoy: Envoy, picker: Picker, addresses: Engines, cells: list[Cell], mode: str
) -> None:
    before = await scrape(picker.metrics)
    sent = [cell for cell in cells if not cell.trailers]
    await check_all(envoy[f"{mode}, by list"], sent)
    after = await scrape(picker.metrics)
    assert picks(after, addresses.dead) - picks(before, addresses.dead) == 2 * len(sent), "the dead one was not the first choice each time"
    assert picks(after, addresses.echo) == picks(before, addresses.echo)


@pytest.mark.parametrize("way", ["FD, 32 KiB", "PARTIAL, 64 KiB"])
async def test_a_request_arrives_whole_through_small_buffers(envoy: Envoy, cells: list[Cell], way: str) -> None:
    """Many small pieces of a body, as the llm-d charts set it up; a body that is decided on by its beginning."""
    await check_all(envoy[way], cells)


async def test_a_request_arrives_whole_through_two_pickers(
    envoy: Envoy, second_picker: Picker, addresses: Engines, cells: list[Cell]
) -> None:
    before = await scrape(second_picker.metrics)
    await check_all(envoy["two pickers"], cells)
    assert picks(await scrape(second_picker.metrics), addresses.echo) - picks(before, addresses.echo) == 2 * len(cells)


@pytest.mark.parametrize("client_type", [Http1, Http2])
async def test_a_body_over_envoy_s_buffer_is_413(envoy: Envoy, client_type: type[Http1 | Http2]) -> None:
    """The larger counts of the route's buffer and the listener's; with HTTP/2, instead of the latter, the window of the client's stream."""
    gateway = envoy["BUFFERED, 1 MiB"]
    async with client_type(gateway) as client:
        assert await status_of(client, chat(text_of(MEGABYTE * 3 // 2))) == 413
    async with client_type(gateway) as client:
        assert await status_of(client, chat("small enough")) == 200


async def status_of(client: Http1 | Http2, body: bytes) -> int:
    """Also of an answer that comes before the body is sent."""
    if isinstance(client, Http1):
        return (await client.request("POST", CHAT, body)).status
    with contextlib.suppress(h2.exceptions.StreamClosedError):
        return (await client.request("POST", CHAT, body)).status
    ((_, head),) = client._heads.items()
    return int(head[":status"])


# --- responses


@pytest.mark.parametrize("client_type", [Http1, Http2])
@pytest.mark.parametrize("way", RESPONSE_WAYS)
async def test_a_response_comes_back_whole(envoy: Envoy, client_type: type[Http1 | Http2], way: str) -> None:
    async with client_type(envoy[way]) as client:
        for path, body in (
            (f"{CHAT}?say=events", b"".join(EVENTS)),
            (f"{CHAT}?say=bytes&count={BACK_LARGE_BYTES}", blob(BACK_LARGE_BYTES)),
        ):
            answer = await client.request("POST", path, chat("x", stream=True))
            assert (answer.status, len(answer.body)) == (200, len(body))
            assert answer.body == body
        empty = await client.request("POST", f"{CHAT}?say=nothing", chat("x"))
        assert (empty.status, empty.body) == (204, b"")


# --- neither request nor response but both at once


class Http2Pieces(Http2):
    """A body sent over time, with what comes back read meanwhile."""

    async def send_piece(self, stream: int, piece: bytes, *, ends: bool = False) -> None:
        self._h2.send_data(stream, piece, end_stream=ends)
        await self._flush()

    async def begin(self, path: str) -> int:
        stream: int = self._h2.get_next_available_stream_id()
        head = [(":method", "POST"), (":scheme", "http"), (":authority", str(self.address)), (":path", path)]
        self._heads[stream], self._bodies[stream] = {}, []
        self._h2.send_headers(stream, [*head, ("content-type", "application/grpc"), ("te", "trailers")])
        await self._flush()
        return stream

    async def until_received(self, stream: int, count: int) -> bytes:
        async with asyncio.timeout(TIMEOUT_S):
            while sum(map(len, self._bodies[stream])) < count:
                assert stream not in self._ended, self._heads[stream]
                await self._read()
        return b"".join(self._bodies[stream])


async def test_a_websocket_says_back_what_it_hears(envoy: Envoy, addresses: Engines) -> None:
    async with upgrading_engine(addresses.upgrading), Http1(envoy["websocket"]) as client, asyncio.timeout(TIMEOUT_S):
        await client.send("GET", "/v1/realtime", headers={"connection": "Upgrade", "upgrade": "websocket"})
        assert await client.head() == 101
        for number in range(PIECES):
            said = b"%d: %b" % (number, PIECE)
            await client.send_raw(said)
            assert await client._reader.readexactly(len(said)) == said.upper()


async def test_a_call_that_sends_and_hears_by_turns_goes_on(envoy: Envoy, addresses: Engines) -> None:
    """A gRPC stream: each piece is answered before the next one is sent."""
    async with grpc_engine(addresses.grpc), Http2Pieces(envoy["grpc"]) as client:
        stream = await client.begin("/inference.Engine/Converse")
        sent = b""
        for _ in range(PIECES):
            sent += PIECE
            await client.send_piece(stream, PIECE)
            assert await client.until_received(stream, len(sent)) == sent
        await client.send_piece(stream, b"", ends=True)
        answer = await client.until_ended(stream)
    assert (answer.status, answer.body) == (200, sent)
    assert answer.headers["content-type"] == "application/grpc"
