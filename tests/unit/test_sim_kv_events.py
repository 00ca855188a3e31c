"""What a simulated engine says of its cache is what is in it."""

from __future__ import annotations

import argparse
import random

import msgspec

from epp.prefix.kv_events import BlockStored, decode
from epp.prefix.precise import PreciseIndex, hashes_of, seed
from epp.sim.engine import Engine, EngineProfile
from epp.sim.options import add_sim_arguments, sim_options
from epp.sim.server import running_engines

BLOCK_TOKENS = 8


def drain(engine: Engine, now_s: float = 0.0) -> float:
    while engine.busy:
        now_s = engine.step(now_s).end_s
    return now_s


def told(engine: Engine, index: PreciseIndex) -> list[object]:
    """Everything since the last time, through the wire's own format."""
    assert engine.events is not None
    events = list(decode(msgspec.msgpack.encode([1.0, engine.events.take(), 0])))
    for event in events:
        index.apply(0, event)
    return list(events)


def test_through_evictions_and_shared_prefixes_the_index_equals_the_cache() -> None:
    rng = random.Random(5)
    engine = Engine(EngineProfile(kv_blocks=40, block_tokens=BLOCK_TOKENS, max_running=3))
    engine.log_events()
    index, prompts = PreciseIndex(1 << 24), []
    for _ in range(120):
        stem = b"stem%04d" % rng.randrange(4) * 4 * rng.randrange(1, 6)
        prompts.append(stem + b"%07d." % rng.randrange(10_000) * rng.randrange(1, 12))
        engine.submit(prompts[-1], rng.randrange(1, 20), 0.0)
        if rng.random() < 0.6:
            drain(engine)
            told(engine, index)
            assert index.held_blocks(0) == engine.cache.cached
    drain(engine)
    told(engine, index)
    assert engine.cache.evictions_total > 50
    assert index.counts["skipped_parent"] == index.counts["removed_unknown"] == 0
    whole = 0
    for prompt in prompts:
        hashes = hashes_of(prompt, BLOCK_TOKENS, seed("", "", BLOCK_TOKENS))
        held = engine.cache.match(engine.submit(prompt, 1, 0.0).hashes_up_to(len(hashes), BLOCK_TOKENS * 4))
        assert index.lookup(hashes, 1).get(0, 0) == len(held)
        whole += len(held) == len(hashes)
    assert 0 < whole < len(prompts)


def test_neighbours_are_one_event_and_a_salt_is_named() -> None:
    engine = Engine(EngineProfile(block_tokens=BLOCK_TOKENS))
    engine.log_events()
    engine.submit(b"a" * 32 * 5, 1, 0.0, cache_salt="tenant-a")
    drain(engine)
    index = PreciseIndex(1 << 20)
    (event,) = told(engine, index)
    assert isinstance(event, BlockStored)
    assert (len(event.hashes), event.salt, event.medium, event.block_tokens) == (5, "tenant-a", "gpu", BLOCK_TOKENS)
    hashes = hashes_of(b"a" * 32 * 5, BLOCK_TOKENS, seed("", "tenant-a", BLOCK_TOKENS))
    assert index.lookup(hashes, 1) == {0: 5}
    assert index.lookup(hashes_of(b"a" * 160, BLOCK_TOKENS, seed("", "", BLOCK_TOKENS)), 1) == {}


def test_a_reset_clears_and_a_refused_one_does_not() -> None:
    engine = Engine(EngineProfile(block_tokens=BLOCK_TOKENS))
    engine.log_events()
    index = PreciseIndex(1 << 20)
    engine.submit(b"b" * 64, 2, 0.0)
    engine.step(0.0)
    assert not engine.reset_cache()
    drain(engine)
    told(engine, index)
    assert index.held_blocks(0) == engine.cache.cached > 0
    assert engine.reset_cache()
    told(engine, index)
    assert index.held_blocks(0) == engine.cache.cached == 0


def test_without_a_log_nothing_is_kept() -> None:
    engine = Engine(EngineProfile(block_tokens=BLOCK_TOKENS))
    engine.submit(b"b" * 64, 2, 0.0)
    drain(engine)
    assert engine.events is None
    assert engine.reset_cache()


async def test_the_flags_give_every_engine_a_publisher_of_its_own() -> None:
    parser = argparse.ArgumentParser()
    add_sim_arguments(parser)
    args = ["--port", "0", "--count", "3", "--kv-events-port", "0", "--kv-events-replay-port", "0", "--kv-events-topic", "mine"]
    async with running_engines(sim_options(parser.parse_args(args))) as servers:
        publishers = [server.publisher for server in servers]
        ports = {port for each in publishers if each is not None for port in (each.port, each.replay_port)}
        assert len(ports) == 6
    assert sim_options(parser.parse_args([])).kv_events_port is None
