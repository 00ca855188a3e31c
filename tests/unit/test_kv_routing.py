"""Precise routing put together: what the configuration means for the events, and what becomes of hubs when it changes."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import random
import socket
import weakref
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from epp.clock import VirtualClock
from epp.datastore import Datastore
from epp.errors import StartError
from epp.kv_routing import KvRouting, event_settings
from epp.observe import text
from epp.observe.kv_index import index_families
from epp.plugins.producers.precise_prefix_cache import PrecisePrefixCacheProducer
from epp.plugins.producers.token import TokenProducer
from epp.prefix.kv_events import BlockRemoved, BlockStored
from epp.types import Snapshot
from tests.builders import llm_request, pool_of

TURNS_MAX = 1_000


def producer(name: str = "precise", **events: object) -> PrecisePrefixCacheProducer:
    made = msgspec.convert({"kvEventsConfig": events}, PrecisePrefixCacheProducer)
    made.named(name)
    return made


def routing() -> KvRouting:
    clock = VirtualClock(1_000.0)
    return KvRouting(Datastore(clock), clock, random.Random(1))


def bound(name: str = "precise", port: int = 0) -> PrecisePrefixCacheProducer:
    return producer(name, zmqEndpoint=f"tcp://127.0.0.1:{port}")


def port_taken() -> socket.socket:
    taken = socket.socket()
    taken.bind(("127.0.0.1", 0))
    taken.listen()
    return taken


async def until(reached: Callable[[], bool]) -> None:
    for _ in range(TURNS_MAX):
        if reached():
            return
        await asyncio.sleep(0)
    raise AssertionError("never came")


async def eventually(reached: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not reached():  # noqa: ASYNC110 - sockets and the threads that look names up set no event
            await asyncio.sleep(0.001)


# What the configuration means


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (
            {},
            {"subscribe": True, "socket_port": 5557, "replay_port": 0, "bind": "", "topic_filter": "kv@", "ranks": 1, "trtllm_poll_s": 0.0},
        ),
        ({"podDiscoveryConfig": {"socketPort": 5000, "replaySocketPort": 6000}}, {"socket_port": 5000, "replay_port": 6000}),
        ({"zmqEndpoint": "tcp://*:5557"}, {"bind": "tcp://*:5557", "subscribe": False}),
        ({"zmqEndpoint": "tcp://*:5557", "podDiscoveryConfig": {}}, {"bind": "tcp://*:5557", "subscribe": True}),
        ({"discoverPods": False}, {"subscribe": False}),
        ({"topicFilter": ""}, {"topic_filter": ""}),
        ({"dataParallelRanks": 4}, {"ranks": 4}),
        ({"trtllmPollInterval": "250ms"}, {"trtllm_poll_s": 0.25}),
    ],
)
def test_what_the_parameters_mean(config: dict[str, Any], expected: dict[str, object]) -> None:
    settings = event_settings(producer(**config))
    assert {name: getattr(settings, name) for name in expected} == expected


@pytest.mark.parametrize(("kind", "address"), [("redisConfig", "redis://10.0.0.9:6379"), ("valkeyConfig", "valkey://10.0.0.9:6379")])
def test_where_replicas_share_what_they_hear(kind: str, address: str) -> None:
    made = msgspec.convert({"indexerConfig": {"kvBlockIndexConfig": {kind: {"address": address}}}}, PrecisePrefixCacheProducer)
    backend = event_settings(made).backend
    assert backend is not None
    assert backend.url == "redis://10.0.0.9:6379"
    assert event_settings(producer()).backend is None
    wrong = msgspec.convert({"indexerConfig": {"kvBlockIndexConfig": {kind: {"address": "http://x:y"}}}}, PrecisePrefixCacheProducer)
    with pytest.raises(ValueError, match="address"):
        routing().use([wrong])


@pytest.mark.parametrize(
    "config",
    [{"zmqEndpoint": "5557"}, {"dataParallelRanks": 1024, "podDiscoveryConfig": {"socketPort": 65_000}}, {"dataParallelRanks": 17}],
)
def test_what_can_not_be_is_named_and_changes_nothing(config: dict[str, Any]) -> None:
    made = routing()
    with pytest.raises(ValueError, match=r"^mine: "):
        made.use([producer("mine", **config)])
    assert made.stages == ()
    assert made.follow([producer("mine", **config)]) == ()


# Hubs


async def test_a_hub_lives_as_long_as_its_producer() -> None:
    made, first, second = routing(), bound("first"), bound("second")
    made.use([first])
    await made.start()
    async with asyncio.TaskGroup() as tasks:
        running = tasks.create_task(made.run())
        assert list(made.state()["events"]) == ["first"]
        hub = made._served[id(first)].hub
        port_of_first = hub.port
        assert port_of_first
        made.follow([first, second])
        await until(lambda: len(made._served) == 2)
        assert made._served[id(first)].hub is hub, "what stays is not touched"
        port = made._served[id(second)].hub.port
        assert port not in (0, port_of_first)
        again = bound("again", port_of_first)
        made.follow([again, second])
        await until(lambda: id(again) in made._served)
        assert (made._served[id(again)].hub.port, made._served[id(second)].hub.port) == (port_of_first, port)
        made.follow([])
        await until(lambda: not made._served)
        running.cancel()
    with port_taken():
        assert list(made.families()) == []


async def test_a_port_that_is_taken_stops_the_start() -> None:
    with port_taken() as taken:
        made = routing()
        made.use([bound("mine", taken.getsockname()[1])])
        with pytest.raises(StartError):
            await made.start()


async def test_a_port_that_is_taken_later_costs_the_events_alone(caplog: pytest.LogCaptureFixture) -> None:
    made = routing()
    await made.start()
    with port_taken() as taken, caplog.at_level(logging.WARNING, "epp.kv_routing"):
        async with asyncio.TaskGroup() as tasks:
            running = tasks.create_task(made.run())
            refused = bound("mine", taken.getsockname()[1])
            made.follow([refused])
            await until(lambda: bool(caplog.records))
            made.follow([refused, bound("other")])
            await until(lambda: bool(made._served))
            assert list(made.state()["events"]) == ["other"]
            running.cancel()
    assert [record.levelname for record in caplog.records] == ["WARNING"], "once, not with every change"


async def test_what_a_configuration_no_longer_has_is_not_kept() -> None:
    """An index may have gigabytes: neither the pool's subscribers nor a loop's variables may hold on to it."""
    made, gone = routing(), []
    await made.start()
    async with asyncio.TaskGroup() as tasks:
        running = tasks.create_task(made.run())
        for number in range(3):
            each = bound(f"precise-{number}")
            gone.append(weakref.ref(each.index.precise))
            made.follow([each])
            await until(lambda name=f"precise-{number}": list(made.state()["events"]) == [name])  # type: ignore[misc]
            del each
        made.follow([])
        await eventually(lambda: gc.collect() >= 0 and all(index() is None for index in gone))
        assert (made._datastore._added, made._datastore._removed) == ([], [])
        running.cancel()


async def test_a_producer_that_can_not_be_served_costs_no_other_its_events(caplog: pytest.LogCaptureFixture) -> None:
    kept = {"kvBlockIndexConfig": {"redisConfig": {"address": "http://user:secret@x"}}}
    wrong, right = msgspec.convert({"indexerConfig": kept}, PrecisePrefixCacheProducer), bound("right")
    wrong.named("wrong")
    nowhere = producer("nowhere", zmqEndpoint="tcp://a..b:5557")
    made, before = routing(), bound("before")
    made.use([before])
    await made.start()
    with caplog.at_level(logging.WARNING, "epp.kv_routing"):
        async with asyncio.TaskGroup() as tasks:
            running = tasks.create_task(made.run())
            for _ in range(2):
                made.follow([wrong, nowhere, right])
                await eventually(lambda: list(made.state()["events"]) == ["right"])
            running.cancel()
    reasons = [str(vars(record)["fields"]["reason"]) for record in caplog.records]
    assert [vars(record)["fields"]["plugin"] for record in caplog.records] == ["wrong", "nowhere"], "once, not with every change"
    assert "can't listen" in reasons[1]
    assert "secret" not in str(reasons)


async def test_a_start_that_fails_gives_back_what_it_took() -> None:
    with port_taken() as taken:
        made, first = routing(), bound("first")
        made.use([first, bound("second", taken.getsockname()[1])])
        started: list[int] = []
        serve = made._serve

        async def noted(each: PrecisePrefixCacheProducer) -> None:
            await serve(each)
            started.append(made._served[id(each)].hub.port)

        made._serve = noted  # type: ignore[method-assign]
        with pytest.raises(StartError):
            await made.start()
        with socket.create_server(("127.0.0.1", started[0])):
            assert not made._served


def test_exact_tokens_are_a_stage_only_where_they_are_wanted() -> None:
    made = routing()
    made.use([producer(), TokenProducer()])
    assert made.stages == ()
    made.use([producer(), msgspec.convert({"backend": "engine"}, TokenProducer)])
    assert made.stages == (made.tokens,)


# Metrics


def test_the_index_is_told_under_the_reference_pickers_names() -> None:
    made = producer()
    (endpoint,) = pool = pool_of({})
    index = made.index
    index.precise.apply(0, BlockStored([1, 2, 3], None, bytes(4 * 48), 16))
    index.precise.apply(0, BlockRemoved([3]))
    request = llm_request(prompt=bytes(4 * 40), prompt_tokens=40, target_model="m", attributes={"tokens": bytes(4 * 40)})
    made.produce(request, Snapshot.of(pool))
    index.predictions.add(32, 32)
    index.predictions.add(32, 16)
    written = "".join(text.plain(family) for family in index_families(index))
    for line in (
        "llm_d_epp_kv_cache_index_admissions_total 3",
        "llm_d_epp_kv_cache_index_evictions_total 1",
        "llm_d_epp_kv_cache_index_lookup_requests_total 1",
        "llm_d_epp_kv_cache_index_lookup_hits_total 2",
        "llm_d_epp_kv_cache_index_max_pod_hit_count_total 2",
        "llm_d_epp_kv_cache_index_lookup_latency_seconds_count 1",
        "kvcache_index_admissions_total 3",
        "epp_kv_index_blocks 2",
        'epp_kv_index_predictions_total{outcome="exact"} 1',
        'epp_kv_index_mispredicted_tokens_total{outcome="over"} 16',
        "epp_kv_index_token_mismatches_total 0",
    ):
        assert f"\n{line}\n" in f"\n{written}", line
    assert json.dumps(made.state())
    assert endpoint.slot == 0
