"""KV-cache events over real ZeroMQ: libzmq publishes as engines do, recordings are what it publishes, and the index must know the same.

The index's own truth is tested elsewhere (tests/unit/test_precise_index.py); here it must end up as one that was told every frame directly.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
import socket
import struct
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq
from aiohttp import web

from epp.clock import MonotonicClock
from epp.datastore import Datastore
from epp.errors import StartError
from epp.events.hub import EventHub
from epp.events.settings import EVENTS_PORT_LABEL, REPLAY_PORT_LABEL, EventSettings
from epp.events.subscriber import Subscriber
from epp.prefix.kv_events import BlockStored, decode
from epp.prefix.precise import PreciseIndex, hashes_of, seed
from epp.sim.options import SimOptions
from epp.sim.server import SimServer
from epp.types import Address, Endpoint, EndpointSpec

DATA = Path(__file__).parent.parent / "data" / "kv-events"
SOON_S = 20.0
BUDGET = 1 << 30
END = b"\xff" * 8
Frame = tuple[bytes, bytes, bytes]


def recorded(name: str, which: str = "") -> list[Frame]:
    raw, at, found = (DATA / f"{name}-kv-events{which}.frames.bin").read_bytes(), 0, []
    while at < len(raw):
        _, count = struct.unpack_from(">dI", raw, at)
        at += 12
        frames = []
        for _ in range(count):
            (size,) = struct.unpack_from(">I", raw, at)
            frames.append(raw[at + 4 : at + 4 + size])
            at += 4 + size
        found.append((frames[0], frames[1], frames[2]))
    return found


VLLM = recorded("vllm-0.32")


def stored(*blocks: int, parent: int | None = None) -> bytes:
    """A batch that says so, of blocks of 16 tokens that follow from their names."""
    tokens = [block for block in blocks for _ in range(16)]
    return batch({"type": "BlockStored", "block_hashes": list(blocks), "parent_block_hash": parent, "token_ids": tokens, "block_size": 16})


def batch(*events: dict[str, Any], rank: int = 0) -> bytes:
    return msgspec.msgpack.encode([1.0, list(events), rank])


CLEARED = batch({"type": "AllBlocksCleared"})


def depth(index: PreciseIndex, slot: int, *blocks: int) -> int:
    """How many leading ones of these blocks are known to be there."""
    tokens = b"".join(struct.pack("<16I", *([block] * 16)) for block in blocks)
    return index.lookup(hashes_of(tokens, 16, seed("", "", 16)), 1 << slot).get(slot, 0)


class Direct:
    """An index told every frame as it is, without a socket."""

    def __init__(self, frames: list[Frame]) -> None:
        self.index = PreciseIndex(BUDGET)
        self.chains: list[list[int]] = []
        chain_of: dict[int, list[int]] = {}
        for _topic, _number, payload in frames:
            for event in decode(payload):
                self.index.apply(0, event)
                if not isinstance(event, BlockStored):
                    continue
                before = chain_of.get(event.parent or 0, [])
                start = before[-1] if before else seed(event.lora, event.salt, event.block_tokens)
                chain = before + hashes_of(event.tokens, event.block_tokens, start, dict(enumerate(event.extras)) or None)
                for number, name in enumerate(event.hashes):
                    chain_of[name] = chain[: len(before) + number + 1]
                self.chains.append(chain)

    def same_as(self, index: PreciseIndex, slot: int) -> bool:
        """Whether that index knows the same of the endpoint, block by block of all that ever were."""
        return index.held_blocks(slot) == self.index.held_blocks(0) and all(
            index.lookup(chain, 1 << slot).get(slot, 0) == self.index.lookup(chain, 1).get(0, 0) for chain in self.chains
        )


class Sockets:
    """Of libzmq, closed when the test is over."""

    def __init__(self) -> None:
        self._context = zmq.Context()
        self._made: list[Any] = []

    def socket(self, kind: int) -> Any:
        self._made.append(self._context.socket(kind))
        return self._made[-1]

    def close(self) -> None:
        for each in self._made:
            each.close(0)
        self._context.term()


class Publisher:
    """An engine's publisher: libzmq's sockets, and whatever a test wants it to say. `form` is how many frames a replayed message has."""

    def __init__(self, context: Sockets, *, topic: bytes = b"kv@x", form: int = 4) -> None:
        self.topic = topic
        self.form = form
        self.kept: list[tuple[int, bytes]] = []
        self.asked: list[int] = []
        self.answering = True
        self._context = context
        self._xpub = context.socket(zmq.XPUB)
        self._xpub.setsockopt(zmq.XPUB_VERBOSE, 1)
        self._xpub.setsockopt(zmq.IPV6, 1)
        self._router = context.socket(zmq.ROUTER)
        self.port = self._xpub.bind_to_random_port("tcp://127.0.0.1")
        self.replay_port = self._router.bind_to_random_port("tcp://127.0.0.1")

    def connect(self, port: int) -> None:
        self._xpub.connect(f"tcp://127.0.0.1:{port}")

    def stop(self) -> None:
        self._xpub.close(0)
        self._router.close(0)

    async def again(self) -> None:
        """Another process on the same ports, with nothing to say yet."""
        self.stop()
        self.kept, self.asked = [], []
        self._xpub, self._router = self._context.socket(zmq.XPUB), self._context.socket(zmq.ROUTER)
        self._xpub.setsockopt(zmq.XPUB_VERBOSE, 1)
        await until(lambda: _bound(self._xpub, self.port) and _bound(self._router, self.replay_port))

    async def subscribed(self) -> bytes:
        """Wait for a subscription; what to."""
        message = b""
        while not message.startswith(b"\x01"):  # not the end of another
            await until(lambda: bool(self._xpub.poll(0)))
            message = self._xpub.recv()
        return message

    def say(self, number: int, payload: bytes, *, topic: bytes | None = None, keep: bool = True, send: bool = True) -> None:
        if keep:
            self.kept.append((number, payload))
        if send:
            self._xpub.send_multipart([self.topic if topic is None else topic, number.to_bytes(8, "big"), payload])

    def raw(self, frames: list[bytes]) -> None:
        self._xpub.send_multipart(frames)

    def serve(self) -> None:
        """Answer what was asked, as vLLM does."""
        while self.answering and self._router.poll(0):
            who, _empty, first = self._router.recv_multipart()
            self.asked.append(int.from_bytes(first, "big"))
            topic = [self.topic] if self.form == 4 else []
            for number, payload in self.kept:
                if number >= self.asked[-1]:
                    self._router.send_multipart([who, b"", *topic, number.to_bytes(8, "big"), payload])
            self._router.send_multipart([who, b"", *([b""] if topic else []), END, b""])


def _bound(ours: Any, port: int) -> bool:
    """Whether it listens there now: libzmq lets go of a port a little after its socket was closed."""
    address = f"tcp://127.0.0.1:{port}"
    if ours.getsockopt(zmq.LAST_ENDPOINT).rstrip(b"\0") == address.encode():
        return True
    try:
        ours.bind(address)
    except zmq.ZMQError:
        return False
    return True


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


async def until(true: Callable[[], bool], *publishers: Publisher) -> None:
    async with asyncio.timeout(SOON_S):
        while not true():
            for each in publishers:
                each.serve()
            await asyncio.sleep(0.001)


@pytest.fixture
def context() -> Iterator[Sockets]:
    made = Sockets()
    yield made
    made.close()


class Running:
    """A hub over endpoints at 127.0.0.1, each with a port of its own for events."""

    def __init__(self, settings: EventSettings, **options: Any) -> None:
        self.datastore = Datastore(MonotonicClock())
        self.index = PreciseIndex(BUDGET)
        self.hub = EventHub(self.datastore, self.index, settings, clock=MonotonicClock(), rng=random.Random(3), **options)
        self.specs: dict[int, EndpointSpec] = {}

    def add(self, port: int, labels: Mapping[str, str], *, name: str = "") -> Endpoint:
        """The endpoint 127.0.0.1:`port`."""
        self.specs[port] = EndpointSpec(name or f"pod-{port}", Address("127.0.0.1", port), labels=labels)
        self.datastore.apply(self.specs.values())
        return self.datastore.endpoints[Address("127.0.0.1", port)]

    def follow(self, publisher: Publisher, port: int = 8000, *, replay: bool = False) -> Endpoint:
        labels = {EVENTS_PORT_LABEL: str(publisher.port)} | ({REPLAY_PORT_LABEL: str(publisher.replay_port)} if replay else {})
        return self.add(port, labels)

    def remove(self, port: int) -> None:
        del self.specs[port]
        self.datastore.apply(self.specs.values())


QUICK = {"backoff_s": 0.01, "backoff_max_s": 0.05, "replay_idle_s": 0.3, "replay_pause_s": 0.01}
PLAIN = EventSettings(socket_port=0, topic_filter="", **QUICK)  # type: ignore[arg-type]


@asynccontextmanager
async def running(settings: EventSettings = PLAIN, **options: Any) -> AsyncIterator[Running]:
    made = Running(settings, **options)
    made.datastore.subscribe(removed=lambda endpoint: made.index.forget(endpoint.slot, made.datastore.free_slot))
    await made.hub.start()
    task = asyncio.create_task(made.hub.run())
    try:
        yield made
    finally:
        task.cancel()
        await asyncio.wait([task])
    assert task.cancelled()
    assert made.hub.counts.connected == 0


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
    await until(lambda: not _listens(publisher.port))  # libzmq closes a little later
    async with running() as run:
        run.follow(publisher)
        await until(lambda: run.hub.counts.zmq_errors["connect"] >= 3)
        assert len([record for record in caplog.records if "can't connect" in record.getMessage()]) == 1
        await publisher.again()
        await publisher.subscribed()
        assert run.hub.counts.reconnections == 0, "it is the first connection"


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


# Engines that connect


def bound(**changes: Any) -> EventSettings:
    return EventSettings(subscribe=False, bind="tcp://127.0.0.1:0", **changes)


async def test_engines_that_connect_are_told_apart_by_topic(context: Sockets) -> None:
    frames = recorded("vllm-0.32", "-two-engines")
    topics = sorted({topic for topic, _number, _payload in frames})
    async with running(bound()) as run:
        endpoints = {topic: run.add(int(topic.split(b"@")[1].rpartition(b":")[2]), {}) for topic in topics}
        engines = {topic: Publisher(context, topic=topic) for topic in topics}
        for engine in engines.values():
            engine.connect(run.hub.port)
            assert await engine.subscribed() == b"\x01kv@"
        for topic, number, payload in frames:
            engines[topic].raw([topic, number, payload])
        await until(lambda: run.hub.counts.messages == len(frames) and not len(run.hub._feed))
        for topic, endpoint in endpoints.items():
            assert Direct([frame for frame in frames if frame[0] == topic]).same_as(run.index, endpoint.slot)
            assert run.index.trusted(endpoint.slot)
        assert run.hub.counts.gaps == run.hub.counts.restarts == run.hub.counts.unknown_topics == 0
        assert run.hub.counts.connected == 2


async def test_topics_of_nobody_are_counted_and_the_rest_goes_on(context: Sockets, caplog: pytest.LogCaptureFixture) -> None:
    async with running(bound()) as run:
        endpoint = run.add(8000, {}, name="pod-a")
        engine = Publisher(context, topic=b"kv@pod-a@m")
        engine.connect(run.hub.port)
        await engine.subscribed()
        for number in range(300):
            engine.say(0, stored(1), topic=b"kv@10.0.0.%d@m" % number)
        engine.say(0, stored(1), topic=b"kv@")
        engine.say(0, stored(1), topic=b"kv@\xff\xfe@" + b"x" * 100_000)
        engine.say(0, stored(5))
        await until(lambda: depth(run.index, endpoint.slot, 5) == 1)
        assert run.hub.counts.unknown_topics == 302
        assert run.index.held_blocks(endpoint.slot) == 1
        assert len(caplog.records) == 1
        run.add(8001, {}, name="pod-b")
        engine.say(0, stored(6), topic=b"kv@pod-b@m")
        other = run.datastore.endpoints[Address("127.0.0.1", 8001)]
        await until(lambda: depth(run.index, other.slot, 6) == 1)


async def test_an_engine_that_connects_again_goes_on_where_it_was_and_a_new_one_begins_anew(context: Sockets) -> None:
    async with running(bound()) as run:
        endpoint = run.add(8000, {})
        first = Publisher(context, topic=b"kv@127.0.0.1:8000@m")
        first.connect(run.hub.port)
        await first.subscribed()
        first.say(0, stored(1))
        await until(lambda: depth(run.index, endpoint.slot, 1) == 1)
        await first.again()
        first.connect(run.hub.port)
        await first.subscribed()
        first.say(1, stored(2))
        await until(lambda: depth(run.index, endpoint.slot, 2) == 1)
        assert run.hub.counts.restarts == run.hub.counts.gaps == 0
        await first.again()
        first.connect(run.hub.port)
        await first.subscribed()
        first.say(0, stored(3))
        await until(lambda: depth(run.index, endpoint.slot, 3) == 1)
        assert run.index.held_blocks(endpoint.slot) == 1
        assert run.hub.counts.restarts == 1
        first.say(5, stored(4))
        await until(lambda: run.hub.counts.gaps == 1)


async def test_over_ipv6_too(context: Sockets) -> None:
    try:
        probe = socket.create_server(("::1", 0), family=socket.AF_INET6)
    except OSError:
        pytest.skip("no IPv6 here")
    probe.close()
    async with running(EventSettings(subscribe=False, bind="tcp://[::1]:0")) as run:
        run.specs[1] = EndpointSpec("pod-6", Address("::1", 8000))
        run.datastore.apply(run.specs.values())
        endpoint = run.datastore.endpoints[Address("::1", 8000)]
        engine = Publisher(context, topic=b"kv@[::1]:8000@m")
        engine._xpub.connect(f"tcp://[::1]:{run.hub.port}")
        await engine.subscribed()
        engine.say(0, stored(1))
        engine.say(1, stored(2), topic=b"kv@::1@m")
        await until(lambda: depth(run.index, endpoint.slot, 1) == depth(run.index, endpoint.slot, 2) == 1)


async def test_a_host_with_several_endpoints_says_nothing_by_itself(context: Sockets) -> None:
    async with running(bound()) as run:
        run.add(8000, {})
        second = run.add(8001, {})
        engine = Publisher(context)
        engine.connect(run.hub.port)
        await engine.subscribed()
        engine.say(0, stored(1), topic=b"kv@127.0.0.1@m")
        engine.say(0, stored(1), topic=b"kv@127.0.0.1:8001@m")
        await until(lambda: depth(run.index, second.slot, 1) == 1)
        assert run.hub.counts.unknown_topics == 1


async def test_more_connections_than_the_limit_are_refused(context: Sockets) -> None:
    async with running(bound(connections_max=1)) as run:
        engine = Publisher(context)
        engine.connect(run.hub.port)
        await engine.subscribed()
        assert run.hub._central is not None
        reader, writer = await asyncio.open_connection("127.0.0.1", run.hub.port)
        async with asyncio.timeout(SOON_S):
            assert await reader.read() == b""
        writer.close()
        assert run.hub._central._listener.refused_total == 1


async def test_a_port_that_is_taken_is_one_clear_line() -> None:
    async with running(bound()) as run:
        other = Running(EventSettings(subscribe=False, bind=f"tcp://127.0.0.1:{run.hub.port}"))
        with pytest.raises(StartError, match="can't listen for KV-cache events on tcp://127"):
            await other.hub.start()


# TensorRT-LLM


async def test_tensorrt_llm_is_asked_where_its_operator_wants_it() -> None:
    answers: list[Any] = []
    asked: list[str] = []

    async def events(request: web.Request) -> web.Response:
        asked.append(request.path)
        answer = answers.pop(0) if answers else []
        return web.Response(status=answer) if isinstance(answer, int) else web.json_response(answer)

    def said(number: int, **data: Any) -> dict[str, Any]:
        return {"event_id": number, "data": data}

    def block(number: int) -> dict[str, Any]:
        tokens = [{"type": "unique_token", "token_id": number, "token_extra_id": 0}] * 16
        return {"type": "stored_block", "block_hash": number, "tokens": tokens, "cache_level": 0, "priority": 35}

    app = web.Application()
    app.add_routes([web.post("/kv_cache_events", events)])
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    port = runner.addresses[0][1]
    settings = EventSettings(socket_port=0, trtllm_poll_s=0.005, **QUICK)  # type: ignore[arg-type]
    families = {port: "trtllm-serve"}
    answers += [
        [said(0, type="created", num_blocks_per_cache_level=[8]), said(1, type="stored", parent_hash=None, blocks=[block(1), block(2)])],
        503,
        [said(2, type="removed", block_hashes=[2])],
    ]
    try:
        async with running(settings, engine=lambda endpoint: families.get(endpoint.spec.address.port, "vllm")) as run:
            run.add(1, {EVENTS_PORT_LABEL: "1"})
            endpoint = run.add(port, {})
            await until(lambda: run.hub.counts.zmq_errors["poll"] == 1)
            await until(lambda: depth(run.index, endpoint.slot, 1, 2) == 1 and run.index.held_blocks(endpoint.slot) == 1)
            assert run.index.trusted(endpoint.slot)
            answers.append([said(9, type="stored", parent_hash=1, blocks=[block(3)])])
            await until(lambda: run.hub.counts.gaps == 1)
            assert run.hub.counts.frames_lost == 6
            answers.append([said(0, type="created", num_blocks_per_cache_level=[8])])
            await until(lambda: run.hub.counts.restarts == 1)
            await until(lambda: run.index.trusted(endpoint.slot))
            answers.append({"not": "a list"})
            await until(lambda: run.hub.counts.malformed == 1)
            assert set(asked) == {"/kv_cache_events"}
            assert run.hub.counts.connected == 0
    finally:
        await runner.cleanup()


# Simulated engines


async def test_a_simulated_engine_tells_the_truth_about_its_cache(context: Sockets) -> None:
    """After requests with shared prefixes and evictions, what the index knows is what the engine has; a libzmq subscriber hears it too."""
    import aiohttp

    from epp.sim.engine import EngineProfile

    options = SimOptions(
        model="tiny", time_scale=200.0, profile=EngineProfile(kv_blocks=24, block_tokens=16), kv_events_port=0, kv_events_replay_port=0
    )
    server = SimServer(options)
    await server.start("127.0.0.1", 0)
    assert server.publisher is not None
    subscriber = context.socket(zmq.SUB)
    subscriber.setsockopt(zmq.SUBSCRIBE, b"kv@")
    subscriber.connect(f"tcp://127.0.0.1:{server.publisher.port}")
    await until(lambda: server.publisher is not None and server.publisher.subscribers == 1)
    prompts = [f"{'abcd' * 16 * (1 + number % 3)}{number:04d}{'wxyz' * 40}" for number in range(12)]
    try:
        async with running() as run, aiohttp.ClientSession() as client:
            labels = {EVENTS_PORT_LABEL: str(server.publisher.port), REPLAY_PORT_LABEL: str(server.publisher.replay_port)}
            for place, prompt in enumerate(prompts):
                if place == 6:  # the second half is heard, the first asked for
                    endpoint = run.add(server.port, labels)
                    await until(lambda: server.publisher is not None and server.publisher.subscribers == 2)
                body = {"model": "tiny", "prompt": prompt, "max_tokens": 4}
                async with client.post(f"http://{server.address}/v1/completions", json=body) as answer:
                    assert answer.status == 200
            assert server.engine.cache.evictions_total > 0
            await until(lambda: run.index.held_blocks(endpoint.slot) == server.engine.cache.cached)
            for prompt in prompts:
                text = prompt.encode()
                hashes = hashes_of(text, 16, seed("", "", 16))
                held = server.engine.cache.match(server.engine.submit(text, 1, 0.0).hashes_up_to(len(hashes), 64))
                assert run.index.lookup(hashes, 1 << endpoint.slot).get(endpoint.slot, 0) == len(held)
            assert run.index.trusted(endpoint.slot)
            assert run.hub.counts.gaps == 0
            published = server.publisher.published
            for number in range(published):
                await until(lambda: bool(subscriber.poll(0)))
                topic, seq, _payload = subscriber.recv_multipart()
                assert (topic.decode(), int.from_bytes(seq, "big")) == (f"kv@{server.address}@tiny", number)
            text = "\n".join(json.dumps([family.name, list(map(str, family.values))]) for family in run.hub.families())
            assert "llm_d_epp_kv_cache_events_messages_received_total" in text
    finally:
        await server.stop()
