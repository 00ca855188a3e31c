"""Who is listened to: a hub that is ending takes nobody on, and engines that connect are told apart frame by frame."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest

from epp.clock import VirtualClock
from epp.datastore import Datastore
from epp.events.central import STREAMS_MAX, TOPIC_BYTES_MAX, Central, Intake
from epp.events.hub import EventHub
from epp.events.settings import EVENTS_PORT_LABEL, EventSettings
from epp.prefix.precise import PreciseIndex
from tests.builders import spec

TOPIC = b"kv@pod-1@m"


class World:
    """A hub over one endpoint."""

    def __init__(self, **settings: Any) -> None:
        clock = VirtualClock()
        self.datastore = Datastore(clock)
        self.datastore.apply([spec(1)])
        self.index = PreciseIndex(1 << 26)
        self.hub = EventHub(self.datastore, self.index, EventSettings(**settings), clock=clock, rng=random.Random(1))


@pytest.mark.parametrize("turns", range(5))
async def test_an_endpoint_that_comes_while_a_hub_ends_is_nobodys_fault(turns: int) -> None:
    """The pool's source would be told of the fault, and end."""
    world = World(socket_port=0)
    await world.hub.start()
    running = asyncio.create_task(world.hub.run())
    while not world.hub._tasks:  # noqa: ASYNC110 - it comes in a turn or two, and sets no event
        await asyncio.sleep(0)
    running.cancel()
    for _ in range(turns):
        await asyncio.sleep(0)
    world.datastore.apply([spec(1), spec(2)])
    await asyncio.wait([running])
    assert running.cancelled()
    assert not world.hub._tasks
    assert (world.datastore._added, world.datastore._removed) == ([], [])


@pytest.mark.parametrize("labelled", [False, True])
async def test_two_endpoints_with_one_publisher_are_told_of(caplog: pytest.LogCaptureFixture, *, labelled: bool) -> None:
    world = World(socket_port=5557)
    await world.hub.start()
    running = asyncio.create_task(world.hub.run())
    while not world.hub._tasks:  # noqa: ASYNC110 - as above
        await asyncio.sleep(0)
    neighbour = spec(2, host="10.0.0.1", port=8001)
    world.datastore.apply([spec(1), neighbour._replace(labels={EVENTS_PORT_LABEL: "5558"}) if labelled else neighbour])
    running.cancel()
    await asyncio.wait([running])
    assert (EVENTS_PORT_LABEL in caplog.text) is not labelled


# Engines that connect


class Engine:
    """A connection with messages to be taken."""

    def __init__(self, *messages: Sequence[bytes]) -> None:
        self._messages = list(messages)
        self.closed = self.failed = False

    def take(self) -> Sequence[bytes] | None:
        return self._messages.pop(0) if self._messages else None


def message(number: int, *names: int, topic: bytes = TOPIC) -> list[bytes]:
    """An event a name."""
    events = [{"type": "BlockStored", "block_hashes": [name], "token_ids": [name] * 4, "block_size": 4} for name in names]
    return [topic, number.to_bytes(8, "big"), msgspec.msgpack.encode([1.0, events, 0])]


def central_of(world: World) -> Central:
    assert world.hub._central is not None
    return world.hub._central


def intake(world: World, *messages: Sequence[bytes]) -> Intake:
    return Intake(central_of(world), world.hub._common, Engine(*messages))  # type: ignore[arg-type]


def worked_off(*intakes: Intake) -> None:
    """A step of each in turn, as the feed does."""
    waiting = list(intakes)
    while waiting:
        waiting = [each for each in waiting if each.step()]


def test_frames_of_one_publisher_that_come_by_two_connections_are_applied_one_after_the_other() -> None:
    """An engine that connects again, while what it sent before is not yet worked off."""
    world = World(subscribe=False, bind="tcp://127.0.0.1:0")
    worked_off(intake(world, message(0, *range(1, 50))), intake(world, message(1, 50, 51), message(2, 52)))
    assert world.index.held_blocks(0) == 52
    assert world.index.trusted(0)
    counts = world.hub.counts
    assert (counts.messages, counts.gaps, counts.restarts, counts.frames_seen) == (3, 0, 0, 0)


def test_what_is_kept_of_topics_is_bounded() -> None:
    world = World(subscribe=False, bind="tcp://127.0.0.1:0")
    central = central_of(world)
    longest = TOPIC + b"m" * (TOPIC_BYTES_MAX - len(TOPIC))
    assert central.stream(longest, 0) is not None
    assert central.stream(longest + b"m", 0) is None
    assert world.hub.counts.unknown_topics == 1
    for rank in range(2 * STREAMS_MAX):
        central.stream(TOPIC, rank)
    assert central.publishers == STREAMS_MAX
    assert (
        sum(len(topic) for topic, _rank in central._streams[next(iter(world.datastore.endpoints.values()))])
        <= STREAMS_MAX * TOPIC_BYTES_MAX
    )
