"""Requests that wait, over both transports: the answer comes when the wait is over, and who leaves is not waited for."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc.aio
import pytest

from epp._pb import epp_ext_proc_pb2 as pb
from epp.arrival import Arrival
from epp.errors import EppError, SaturatedError
from epp.exchange import Exchange
from epp.types import LLMRequest
from tests.builders import Core, chat, core, echoed, kinds, request_body, request_headers, response_body, response_headers
from tests.integration.test_transports import PROCESS, TRANSPORTS, channel_to, eventually, peer_of, serving


class Held:
    def __init__(self, arrival: Arrival) -> None:
        self.arrival = arrival
        self.error: EppError | None = None
        self.cancelled = False

    def cancel(self) -> None:
        self.cancelled = True


class Gate:
    def __init__(self) -> None:
        self.held: list[Held] = []

    def begin(self, arrival: Arrival) -> Held:
        self.held.append(Held(arrival))
        return self.held[-1]


@pytest.fixture(params=TRANSPORTS)
async def gated(request: pytest.FixtureRequest) -> AsyncIterator[tuple[Core, Gate, Any]]:
    """A picker whose requests all wait, and a call to it."""
    world, gate = core(2), Gate()
    world.director.stages = (gate,)
    async with serving(request.param, world) as server, channel_to(server) as channel:
        yield world, gate, channel.stream_stream(PROCESS, pb.ProcessingRequest.SerializeToString, pb.ProcessingResponse.FromString)


async def send(call: grpc.aio.StreamStreamCall, *messages: pb.ProcessingRequest) -> None:
    for message in messages:
        await call.write(message)


async def read(call: grpc.aio.StreamStreamCall, count: int) -> list[pb.ProcessingResponse]:
    async with asyncio.timeout(10):
        return [await call.read() for _ in range(count)]


async def test_the_answer_comes_when_the_wait_is_over_and_the_stream_goes_on(gated: tuple[Core, Gate, Any]) -> None:
    world, gate, process = gated
    call, body = process(), chat("tell me")
    await send(call, request_headers(), request_body(body, end_of_stream=True))
    await eventually(lambda: len(gate.held) == 1, "it waits")
    gate.held[0].arrival.wake()
    got = await read(call, 2)
    assert kinds(got) == ["request_headers", "request_body"]
    assert echoed(got) == body
    await send(call, response_headers(), response_body(b"x", end_of_stream=True))
    assert kinds(await read(call, 2)) == ["response_headers", "response_body"]
    await call.done_writing()
    await call.code()
    await eventually(lambda: world.inflight == (0, 0, 0, 0), "all is given back")


async def test_many_wait_on_one_connection_and_go_on_in_any_order(gated: tuple[Core, Gate, Any]) -> None:
    _world, gate, process = gated
    calls = [process() for _ in range(20)]
    for number, call in enumerate(calls):
        await send(call, request_headers(headers={"x-request-id": str(number)}), request_body(chat(str(number)), end_of_stream=True))
    await eventually(lambda: len(gate.held) == 20, "all wait")
    for held in sorted(gate.held, key=lambda held: int(held.arrival.request.id) * 7 % 20):
        held.arrival.wake()
        call = calls[int(held.arrival.request.id)]
        assert echoed(await read(call, 2)) == chat(held.arrival.request.id)
        call.cancel()


async def test_a_wait_that_ends_in_a_refusal_ends_the_stream(gated: tuple[Core, Gate, Any]) -> None:
    world, gate, process = gated
    call = process()
    await send(call, request_headers(), request_body(chat(), end_of_stream=True))
    await eventually(lambda: len(gate.held) == 1, "it waits")
    gate.held[0].error = SaturatedError("too long")
    gate.held[0].arrival.wake()
    (answer,) = await read(call, 1)
    assert answer.immediate_response.status.code == 429
    assert await call.code() == grpc.StatusCode.OK
    assert world.inflight == (0, 0, 0, 0)


async def test_who_resets_the_stream_waits_no_more(gated: tuple[Core, Gate, Any]) -> None:
    world, gate, process = gated
    call = process()
    await send(call, request_headers(), request_body(chat(), end_of_stream=True))
    await eventually(lambda: len(gate.held) == 1, "it waits")
    call.cancel()
    await eventually(lambda: gate.held[0].cancelled, "it is told")
    gate.held[0].arrival.wake()
    await eventually(lambda: world.inflight == (0, 0, 0, 0), "all is given back")


async def test_a_gateway_that_half_closes_first_gets_its_answer_and_then_the_end(gated: tuple[Core, Gate, Any]) -> None:
    _world, gate, process = gated
    call = process()
    await send(call, request_headers(modes=None), request_body(chat(), end_of_stream=True))
    await call.done_writing()
    await eventually(lambda: len(gate.held) == 1, "it waits")
    await asyncio.sleep(0)
    gate.held[0].arrival.wake()
    assert kinds(await read(call, 2)) == ["request_headers", "request_body"]
    assert await read(call, 1) == [grpc.aio.EOF]
    assert await call.code() == grpc.StatusCode.OK


async def test_a_body_that_passes_by_follows_the_answer(gated: tuple[Core, Gate, Any]) -> None:
    _world, gate, process = gated
    call = process()
    await send(call, request_headers(path="/v1/audio/transcriptions"))
    await eventually(lambda: len(gate.held) == 1, "it waits")
    await send(call, request_body(b"abc"), request_body(b"def"))
    gate.held[0].arrival.wake()
    await send(call, request_body(b"ghi", end_of_stream=True))
    got = await read(call, 4)
    assert kinds(got)[0] == "request_headers"
    assert echoed(got) == b"abcdefghi"
    call.cancel()


async def test_a_message_that_comes_meanwhile_does_not_lose_the_wake(gated: tuple[Core, Gate, Any]) -> None:
    _world, gate, process = gated
    call = process()
    await send(call, request_headers(path="/v1/audio/transcriptions"))
    await eventually(lambda: len(gate.held) == 1, "it waits")
    await send(call, request_body(b"abc"))
    await eventually(lambda: _world.inflight[3] == 3, "the piece came")
    gate.held[0].arrival.wake()
    got = await read(call, 2)
    assert echoed(got) == b"abc"
    call.cancel()


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_who_waits_when_the_server_stops_is_told(transport: str) -> None:
    world, gate = core(2), Gate()
    world.director.stages = (gate,)
    async with serving(transport, world) as server, channel_to(server) as channel:
        call = channel.stream_stream(PROCESS, pb.ProcessingRequest.SerializeToString, pb.ProcessingResponse.FromString)()
        await send(call, request_headers(), request_body(chat(), end_of_stream=True))
        await eventually(lambda: len(gate.held) == 1, "it waits")
        world.limits.closing = True
        stopping = asyncio.create_task(server.stop(5))
        (answer,) = await read(call, 1)
        assert answer.immediate_response.status.code == 503
        async with asyncio.timeout(5):
            await stopping
    assert gate.held[0].cancelled


async def test_a_server_that_stops_leaves_it_to_the_peer_to_close(monkeypatch: pytest.MonkeyPatch) -> None:
    """grpc-core, and with it any client, may lose an answer it has not read when the connection ends."""
    monkeypatch.setattr("epp.extproc.server.CLOSE_S", 60)
    world, gate = core(2), Gate()
    world.director.stages = (gate,)
    async with serving("h2", world) as server, peer_of(server) as peer:
        stream = peer.open()
        peer.send(stream, request_headers(), request_body(chat(), end_of_stream=True))
        await eventually(lambda: len(gate.held) == 1, "it waits")
        world.limits.closing = True
        stopping = asyncio.create_task(server.stop(60))
        await peer.until(lambda: stream in peer.ended, "it is told")
        late = peer.open()
        await peer.until(lambda: late in peer.ended, "the connection lives")
        assert not stopping.done()
        await peer.close()
        async with asyncio.timeout(10):
            await stopping


@pytest.mark.parametrize("half_closed", [False, True], ids=["open", "the gateway half-closes"])
@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_a_running_request_that_gives_way_is_answered_without_being_asked(transport: str, half_closed: bool) -> None:
    world, exchanges = core(2), []
    world.director.evicts = True
    world.director.stages = (Passing(),)
    world.director.flow = Routed(exchanges)
    async with serving(transport, world) as server, channel_to(server) as channel:
        process = channel.stream_stream(PROCESS, pb.ProcessingRequest.SerializeToString, pb.ProcessingResponse.FromString)
        call = process()
        await send(call, request_headers(), request_body(chat(), end_of_stream=True))
        assert kinds(await read(call, 2)) == ["request_headers", "request_body"]
        await send(call, response_headers(), response_body(b"a"))
        assert kinds(await read(call, 2)) == ["response_headers", "response_body"], "it goes on as any other until then"
        assert exchanges[0].evict is not None
        if half_closed:
            await call.done_writing()
            await eventually(lambda: world.inflight == (0, 0, 0, 0), "the end of the stream is the end of the request")
            assert not exchanges[0].evict(SaturatedError("give way"))
            assert await read(call, 1) == [grpc.aio.EOF]
        else:
            assert exchanges[0].evict(SaturatedError("give way"))
            assert kinds(await read(call, 1)) == ["immediate_response"]
        assert await call.code() == grpc.StatusCode.OK
        await eventually(lambda: world.inflight == (0, 0, 0, 0), "all is given back")


class Passing:
    """A stage nobody waits for."""

    def begin(self, _arrival: Arrival) -> None:
        return None


class Routed:
    """Flow control, as far as it hears of exchanges."""

    def __init__(self, exchanges: list[Exchange]) -> None:
        self._exchanges = exchanges

    def routed(self, _request: LLMRequest, exchange: Exchange | None) -> None:
        assert exchange is not None
        self._exchanges.append(exchange)
