"""KV-cache events over real ZeroMQ: libzmq publishes as engines do, recordings are what it publishes, and the index must know the same.

The index's own truth is tested elsewhere (tests/unit/test_precise_index.py); here it must end up as one that was told every frame directly.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator

import pytest
import zmq

from epp.events.settings import EventSettings
from tests.kv_streams import (
    CLEARED,
    QUICK,
    VLLM,
    Direct,
    Publisher,
    Sockets,
    depth,
    recorded,
    running,
    stored,
    until,
)


@pytest.fixture
def context() -> Iterator[Sockets]:
    made = Sockets()
    yield made
    made.close()


# What was published is known


@pytest.mark.parametrize("name", ["vllm-0.32", "vllm-0.23", "dynamo-mocker-1.6.1", "vllm-0.32-dp2-rank1-bytes"])
async def test_the_index_knows_what_an_engine_published(context: Sockets, name: str) -> None:
    frames, publisher = recorded(name), Publisher(context)
    async with running() as run:
        endpoint = run.follow(publisher)
        assert await publisher.subscribed() == b"\x01"
        for frame in frames:
            publisher.raw(list(frame))
        await until(lambda: run.hub.counts.messages == len(frames) and not len(run.hub._feed))
        assert Direct(frames).same_as(run.index, endpoint.slot)
        assert run.index.held_blocks(endpoint.slot)
        assert run.index.trusted(endpoint.slot)
        assert run.hub.counts.gaps == run.hub.counts.malformed == 0


async def test_only_the_topics_asked_for_come(context: Sockets) -> None:
    publisher = Publisher(context)
    async with running(EventSettings(socket_port=0, **QUICK)) as run:  # type: ignore[arg-type]
        endpoint = run.follow(publisher)
        assert await publisher.subscribed() == b"\x01kv@"
        publisher.say(0, stored(1), topic=b"other")
        publisher.say(0, stored(2), topic=b"kv@10.0.0.1:8000@m")
        await until(lambda: run.hub.counts.messages == 1)
        await until(lambda: depth(run.index, endpoint.slot, 2) == 1)
        assert depth(run.index, endpoint.slot, 1) == 0


async def test_ranks_of_one_server_are_publishers_of_one_endpoint(context: Sockets) -> None:
    first = Publisher(context)
    second = context.socket(zmq.XPUB)
    try:
        second.bind(f"tcp://127.0.0.1:{first.port + 1}")
    except zmq.ZMQError:
        pytest.skip("the next port is taken")
    async with running(EventSettings(socket_port=0, topic_filter="", ranks=2, **QUICK)) as run:  # type: ignore[arg-type]
        endpoint = run.follow(first)
        await first.subscribed()
        await until(lambda: bool(second.poll(0)))
        first.say(0, stored(1))
        second.send_multipart([b"", bytes(8), stored(2)])
        await until(lambda: depth(run.index, endpoint.slot, 1) == depth(run.index, endpoint.slot, 2) == 1)
        assert run.hub.counts.restarts == run.hub.counts.gaps == 0


# What was lost


async def test_a_hole_in_the_numbers_without_a_replay_is_a_gap_said_once(context: Sockets, caplog: pytest.LogCaptureFixture) -> None:
    publisher = Publisher(context)
    caplog.set_level(logging.INFO, "epp.events")
    async with running() as run:
        endpoint = run.follow(publisher)
        await publisher.subscribed()
        publisher.say(0, stored(1))
        await until(lambda: run.index.trusted(endpoint.slot))
        publisher.say(3, stored(2))
        publisher.say(9, stored(3))
        await until(lambda: run.hub.counts.gaps == 2)
        assert run.hub.counts.frames_lost == 2 + 5
        assert not run.index.trusted(endpoint.slot)
        assert depth(run.index, endpoint.slot, 1) == 1, "what was known is still the best guess"
        publisher.say(10, CLEARED)
        await until(lambda: run.index.trusted(endpoint.slot))
    assert [record.getMessage().partition(":")[0] for record in caplog.records] == [
        "KV-cache events were lost",
        "what is cached there is known again",
    ]


@pytest.mark.parametrize("form", [3, 4])
async def test_lost_frames_are_asked_for_and_nothing_is_missing(context: Sockets, form: int) -> None:
    publisher = Publisher(context, form=form)
    async with running() as run:
        endpoint = run.follow(publisher, replay=True)
        await publisher.subscribed()
        await until(lambda: run.hub.counts.replays["complete"] == 1, publisher)
        for place, (_topic, number, payload) in enumerate(VLLM):
            publisher.say(int.from_bytes(number, "big"), payload, send=place % 7 < 4)
        await until(lambda: run.index.trusted(endpoint.slot) and Direct(VLLM).same_as(run.index, endpoint.slot), publisher)
        sent = sum(place % 7 < 4 for place in range(len(VLLM)))
        await until(lambda: run.hub.counts.messages == sent and run.hub.counts.replays["complete"] >= 2, publisher)
        await until(lambda: run.hub.counts.frames_seen > 0, publisher)  # what was replayed came a second time and was passed over
        assert publisher.asked[0] == 0
        assert Direct(VLLM).same_as(run.index, endpoint.slot)
        assert run.hub.counts.gaps == run.hub.counts.restarts == 0


async def test_what_was_published_before_we_came_is_asked_for_at_once(context: Sockets) -> None:
    publisher = Publisher(context)
    for number, payload in enumerate([stored(1), stored(2, parent=1), stored(3, parent=2)]):
        publisher.say(number, payload, send=False)
    async with running() as run:
        endpoint = run.follow(publisher, replay=True)
        await until(lambda: depth(run.index, endpoint.slot, 1, 2, 3) == 3, publisher)
        assert publisher.asked == [0]
        assert run.index.trusted(endpoint.slot)


async def test_a_stream_joined_in_the_middle_without_a_replay_is_a_gap(context: Sockets) -> None:
    publisher = Publisher(context)
    async with running() as run:
        endpoint = run.follow(publisher)
        await publisher.subscribed()
        publisher.say(7, stored(1))
        await until(lambda: run.hub.counts.gaps == 1)
        await until(lambda: depth(run.index, endpoint.slot, 1) == 1)
        assert not run.index.trusted(endpoint.slot)


async def test_an_engine_that_no_longer_has_all_is_a_gap(context: Sockets) -> None:
    publisher = Publisher(context)
    publisher.say(5, stored(1), send=False)
    async with running() as run:
        endpoint = run.follow(publisher, replay=True)
        await until(lambda: run.hub.counts.replays["incomplete"] == 1, publisher)
        assert (run.hub.counts.gaps, run.hub.counts.frames_lost) == (1, 5)
        assert depth(run.index, endpoint.slot, 1) == 1
        assert not run.index.trusted(endpoint.slot)


async def test_a_replay_nobody_answers_is_given_up_and_live_frames_go_on(context: Sockets) -> None:
    publisher = Publisher(context)
    publisher.answering = False
    async with running() as run:
        endpoint = run.follow(publisher, replay=True)
        await publisher.subscribed()
        publisher.say(4, stored(1))
        await until(lambda: depth(run.index, endpoint.slot, 1) == 1)
        assert run.hub.counts.replays["failed"] == run.hub.counts.zmq_errors["replay"] == 1
        assert run.hub.counts.gaps == 1
        publisher.say(9, stored(2))  # too soon after a failure to ask again
        await until(lambda: run.hub.counts.gaps == 2)
        assert run.hub.counts.replays.total() == 1


@pytest.mark.parametrize("answer", [[b"x"], [b"", b"short", b""], [b"", b"", b"", b"", b""], [b"", bytes(8), b"\xc1"]])
async def test_a_hostile_answer_to_a_replay_fails_it_alone(context: Sockets, answer: list[bytes]) -> None:
    publisher = Publisher(context)
    publisher.answering = False
    async with running() as run:
        endpoint = run.follow(publisher, replay=True)
        await publisher.subscribed()
        await until(lambda: bool(publisher._router.poll(0)))
        who = publisher._router.recv_multipart()[0]
        publisher._router.send_multipart([who, *answer])
        await until(lambda: run.hub.counts.replays.total() == 1)
        publisher.say(1, stored(1))
        await until(lambda: depth(run.index, endpoint.slot, 1) == 1)
        assert not run.index.trusted(endpoint.slot)


# Restarts


async def test_an_engine_that_began_anew_has_nothing_of_before(context: Sockets) -> None:
    publisher = Publisher(context)
    async with running() as run:
        endpoint = run.follow(publisher)
        await publisher.subscribed()
        for number in range(5):
            publisher.say(number, stored(number + 1))
        await until(lambda: depth(run.index, endpoint.slot, 5) == 1)
        await publisher.again()
        await publisher.subscribed()
        publisher.say(0, stored(9))
        await until(lambda: depth(run.index, endpoint.slot, 9) == 1)
        assert run.index.held_blocks(endpoint.slot) == 1
        assert depth(run.index, endpoint.slot, 5) == 0
        assert run.hub.counts.restarts == run.hub.counts.reconnections == 1
        assert run.index.trusted(endpoint.slot)


@pytest.mark.parametrize("frames", [3, 40])
async def test_a_restart_is_noticed_however_far_the_new_numbers_are(context: Sockets, frames: int) -> None:
    """With fewer frames than before the number goes back; with more, the replay's first frame is not the one we know."""
    publisher = Publisher(context)
    async with running() as run:
        endpoint = run.follow(publisher, replay=True)
        await publisher.subscribed()
        await until(lambda: bool(run.hub.counts.replays), publisher)
        for number in range(10):
            publisher.say(number, stored(number + 1))
        await until(lambda: depth(run.index, endpoint.slot, 10) == 1, publisher)
        await publisher.again()
        for number in range(frames):
            publisher.say(number, stored(100 + number), send=False)
        await publisher.subscribed()
        await until(lambda: run.hub.counts.replays["complete"] >= 2, publisher)
        publisher.say(frames, stored(100 + frames))
        await until(lambda: depth(run.index, endpoint.slot, 100 + frames) == 1, publisher)
        assert run.index.held_blocks(endpoint.slot) == frames + 1
        assert depth(run.index, endpoint.slot, 10) == 0
        assert run.hub.counts.restarts == 1


async def test_what_a_replay_brought_of_one_process_says_nothing_of_the_next(context: Sockets) -> None:
    publisher = Publisher(context)
    for number in range(10):
        publisher.say(number, stored(number + 1), send=False)
    async with running() as run:
        endpoint = run.follow(publisher, replay=True)
        await until(lambda: depth(run.index, endpoint.slot, 10) == 1 and run.hub.counts.replays["complete"] == 1, publisher)
        await publisher.again()
        await publisher.subscribed()
        await until(lambda: run.hub.counts.replays["complete"] == 2, publisher)
        publisher.say(0, stored(50))
        await until(lambda: depth(run.index, endpoint.slot, 50) == 1, publisher)
        assert run.index.held_blocks(endpoint.slot) == 1
        assert run.hub.counts.restarts == 1


async def test_a_connection_lost_and_made_again_loses_nothing_that_can_be_asked_for(context: Sockets) -> None:
    publisher = Publisher(context)
    async with running() as run:
        endpoint = run.follow(publisher, replay=True)
        await publisher.subscribed()
        await until(lambda: bool(run.hub.counts.replays), publisher)
        publisher.say(0, stored(1))
        await until(lambda: depth(run.index, endpoint.slot, 1) == 1, publisher)
        kept = publisher.kept
        await publisher.again()
        publisher.kept = kept  # the same process: only its sockets were closed
        publisher.say(1, stored(2, parent=1), send=False)
        await until(lambda: depth(run.index, endpoint.slot, 1, 2) == 2, publisher)
        assert run.hub.counts.restarts == run.hub.counts.gaps == 0
        assert run.hub.counts.reconnections == 1


async def test_another_event_loop_does_as_well(context: Sockets) -> None:
    uvloop = pytest.importorskip("uvloop")

    async def scenario() -> None:
        publisher = Publisher(context)
        async with running() as run:
            endpoint = run.follow(publisher, replay=True)
            await publisher.subscribed()
            for place, (_topic, number, payload) in enumerate(VLLM):
                publisher.say(int.from_bytes(number, "big"), payload, send=place != 3)
            await until(lambda: Direct(VLLM).same_as(run.index, endpoint.slot), publisher)

    await asyncio.to_thread(lambda: asyncio.Runner(loop_factory=uvloop.new_event_loop).run(scenario()))
