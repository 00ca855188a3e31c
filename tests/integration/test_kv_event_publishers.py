"""Publishers of KV-cache events that misbehave, go away or move: each is its own problem, and nothing of one is taken for another's."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from epp.events.settings import EVENTS_PORT_LABEL, EventSettings
from epp.events.subscriber import Subscriber
from epp.types import Address, EndpointSpec
from tests.kv_streams import (
    CLEARED,
    QUICK,
    VLLM,
    Direct,
    Publisher,
    Sockets,
    batch,
    depth,
    listens,
    running,
    stored,
    until,
)


@pytest.fixture
def context() -> Iterator[Sockets]:
    made = Sockets()
    yield made
    made.close()


# Hostile and slow publishers


async def _garbage(writer: asyncio.StreamWriter) -> None:
    writer.write(random.Random(1).randbytes(1 << 20))


async def _http(writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n" * 10)


async def _huge(writer: asyncio.StreamWriter) -> None:
    writer.write(_GREETED + b"\x02" + (1 << 60).to_bytes(8, "big"))


async def _endless(writer: asyncio.StreamWriter) -> None:
    writer.write(_GREETED + b"\x01\x00" * 100_000)


async def _silent(_writer: asyncio.StreamWriter) -> None:
    await asyncio.Event().wait()


async def _pings(writer: asyncio.StreamWriter) -> None:
    writer.write(_GREETED)
    while True:
        writer.write((b"\x04\x17\x04PING\x00\x00" + b"x" * 16) * 1_000)
        await writer.drain()


async def _flood(writer: asyncio.StreamWriter) -> None:
    writer.write(_GREETED)
    while True:
        writer.write(b"\x01\x00\x01\x00\x00\x00" * 10_000)
        await writer.drain()


_READY = b"\x05READY\x0bSocket-Type\x00\x00\x00\x03PUB"
_GREETED = (b"\xff" + bytes(8) + b"\x7f\x03\x00NULL").ljust(64, b"\0") + bytes((4, len(_READY))) + _READY


@pytest.mark.parametrize("behave", [_garbage, _http, _huge, _endless, _silent, _pings, _flood], ids=lambda each: each.__name__)
async def test_a_publisher_that_misbehaves_is_its_own_problem(context: Sockets, behave: Callable[[asyncio.StreamWriter], Any]) -> None:
    tasks: set[asyncio.Task[Any]] = set()

    async def serve(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        try:
            await behave(writer)
        except (ConnectionError, asyncio.CancelledError):
            pass
        finally:
            writer.transport.abort()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    publisher = Publisher(context)
    async with running() as run:
        run.add(8001, {EVENTS_PORT_LABEL: str(server.sockets[0].getsockname()[1])})
        endpoint = run.follow(publisher)
        await publisher.subscribed()
        for _topic, number, payload in VLLM:
            publisher.say(int.from_bytes(number, "big"), payload)
        direct = Direct(VLLM)
        await until(lambda: direct.same_as(run.index, endpoint.slot))
        assert run.index.trusted(endpoint.slot)
        await until(lambda: bool(tasks), publisher)
        if behave not in {_silent, _pings}:
            await until(lambda: bool(run.hub.counts.zmq_errors or run.hub.counts.malformed), publisher)
    for task in tasks:
        task.cancel()
    server.close()
    await asyncio.wait(tasks)


async def test_frames_that_can_not_be_read_are_counted_and_doubted(context: Sockets) -> None:
    publisher = Publisher(context)
    async with running() as run:
        endpoint = run.follow(publisher)
        await publisher.subscribed()
        publisher.say(0, stored(1))
        await until(lambda: run.index.trusted(endpoint.slot))
        publisher.raw([b"one frame"])
        publisher.raw([b"", b"short", b""])
        await until(lambda: run.hub.counts.malformed == 2)
        assert run.index.trusted(endpoint.slot), "these had no number: nothing is missing"
        publisher.say(1, b"\xc1 is nothing in msgpack")
        await until(lambda: run.hub.counts.malformed == 3)
        assert not run.index.trusted(endpoint.slot)
        publisher.say(2, stored(2))
        await until(lambda: depth(run.index, endpoint.slot, 2) == 1)
        publisher.say(3, CLEARED)
        publisher.say(4, batch({"type": "BlockStored", "block_hashes": [1, 2]}, {"type": "Later"}, {"type": "AllBlocksCleared"}))
        await until(lambda: run.hub.counts.skipped["type"] == 1)
        assert run.hub.counts.malformed == 4


async def test_a_message_too_large_costs_its_connection_and_no_more(context: Sockets) -> None:
    publisher = Publisher(context)
    settings = EventSettings(socket_port=0, topic_filter="", message_bytes_max=10_000, **QUICK)  # type: ignore[arg-type]
    async with running(settings) as run:
        endpoint = run.follow(publisher)
        await publisher.subscribed()
        publisher.say(0, stored(1))
        await until(lambda: depth(run.index, endpoint.slot, 1) == 1)
        publisher.say(1, bytes(20_000))
        await publisher.subscribed()
        publisher.say(2, stored(2))
        await until(lambda: depth(run.index, endpoint.slot, 2) == 1)
        assert run.hub.counts.zmq_errors["receive"] == 1
        assert run.hub.counts.gaps == 1


# Endpoints come and go


async def test_fifty_endpoints_that_come_and_go(context: Sockets) -> None:
    publishers = [Publisher(context) for _ in range(50)]
    async with running() as run:
        endpoints = [run.follow(publisher, 8000 + number) for number, publisher in enumerate(publishers)]
        for publisher in publishers:
            await publisher.subscribed()
        for number, publisher in enumerate(publishers):
            publisher.say(0, stored(1, number + 2))
        await until(lambda: run.hub.counts.messages == 50 and not len(run.hub._feed))
        assert [depth(run.index, endpoint.slot, 1, number + 2) for number, endpoint in enumerate(endpoints)] == [2] * 50
        for number in range(0, 50, 2):
            run.remove(8000 + number)
        await until(lambda: run.hub.counts.connected == 25)
        for number in range(0, 50, 2):  # new ones, in the slots of those that went
            run.follow(publishers[number], 9000 + number)
            await publishers[number].subscribed()
        news = [run.datastore.endpoints[Address("127.0.0.1", 9000 + number)] for number in range(0, 50, 2)]
        assert {each.slot for each in news} <= set(range(50))
        assert [run.index.held_blocks(each.slot) for each in news] == [0] * 25
        for number in range(0, 50, 2):
            publishers[number].say(1, stored(7))
        await until(lambda: all(depth(run.index, each.slot, 7) == 1 for each in news))
        assert not any(run.index.trusted(each.slot) for each in news), "joined in the middle"
        assert all(run.index.trusted(endpoints[number].slot) for number in range(1, 50, 2))
        assert len(run.hub.state()) == 50


async def test_not_a_step_is_done_for_an_endpoint_that_is_gone(context: Sockets) -> None:
    """The slot may be given away in the same moment: there is no await in between to stop a task in."""
    publisher = Publisher(context)
    async with running() as run:
        endpoint = run.follow(publisher)
        await publisher.subscribed()
        (subscriber,) = run.hub._followers[endpoint]
        assert isinstance(subscriber, Subscriber)
        subscriber.stream.take(0, stored(1, 2, 3))
        run.remove(8000)
        assert not subscriber.step()
        assert run.index.held_blocks(endpoint.slot) == 0


async def test_an_endpoint_without_a_publisher_is_asked_again_and_said_once(context: Sockets, caplog: pytest.LogCaptureFixture) -> None:
    publisher = Publisher(context)
    publisher.stop()
    await until(lambda: not listens(publisher.port))  # libzmq closes a little later
    async with running() as run:
        run.follow(publisher)
        await until(lambda: run.hub.counts.zmq_errors["connect"] >= 3)
        assert len([record for record in caplog.records if "can't connect" in record.getMessage()]) == 1
        await publisher.again()
        await publisher.subscribed()
        assert run.hub.counts.reconnections == 0, "it is the first connection"


async def test_a_host_that_can_be_no_name_costs_its_own_events_alone(context: Sockets) -> None:
    """An address with a scope is looked up as a name, and Python finds fault with some names before it asks anybody."""
    publisher = Publisher(context)
    async with running() as run:
        run.specs[1] = EndpointSpec("odd", Address.parse("[fe80::1%a..b]:8000"), labels={EVENTS_PORT_LABEL: "1"})
        endpoint = run.follow(publisher)
        await until(lambda: run.hub.counts.zmq_errors["connect"] >= 2)
        await publisher.subscribed()
        publisher.say(0, stored(1))
        await until(lambda: depth(run.index, endpoint.slot, 1) == 1)


async def test_an_endpoint_whose_publisher_stays_away_is_in_doubt(context: Sockets) -> None:
    publisher = Publisher(context)
    async with running(EventSettings(socket_port=0, topic_filter="", absent_s=0.0, **QUICK)) as run:  # type: ignore[arg-type]
        endpoint = run.follow(publisher)
        await publisher.subscribed()
        publisher.say(0, stored(1))
        await until(lambda: run.index.trusted(endpoint.slot))
        publisher.stop()
        await until(lambda: run.hub.counts.gaps == 1)
        assert not run.index.trusted(endpoint.slot)
        assert depth(run.index, endpoint.slot, 1) == 1
