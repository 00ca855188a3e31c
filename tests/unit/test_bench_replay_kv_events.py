"""The replay's precise mode: what simulated caches tell is what they hold, and the product hears of it when it should."""

from __future__ import annotations

import random
from array import array

import pytest

from bench.__main__ import main
from bench.replay.cells import Cell, Settings, configured, row_of
from bench.replay.engine import Engine
from bench.replay.job import BLOCK_TOKENS, Job
from bench.replay.kv_events import PreciseProduct
from bench.replay.product import prompt_of
from bench.replay.profiles import profile_of
from bench.replay.simulation import Scrapes, Simulation
from bench.replay.workload import Arrival, Incident, Workload
from epp.prefix.kv_view import KvView
from epp.prefix.token_hashes import hashes_of, seed

PROFILE = profile_of("qwen3-32b-2xh100")
CONFIG = configured("cost-aware-precise")


def small(kv_tokens=20 * BLOCK_TOKENS):
    return type(PROFILE)(**{name: getattr(PROFILE, name) for name in PROFILE.__slots__} | {"kv_tokens": kv_tokens, "source": "test"})


def arrivals(count=120, families=5):
    """Conversations that grow: block ids say all that is before them, too."""
    rng = random.Random(3)
    turns = [0] * families
    made = []
    for number in range(count):
        family = rng.randrange(families)
        turns[family] = turns[family] % 6 + 1
        blocks = tuple(family * 1_000 + place for place in range(2 * turns[family]))
        made.append(Arrival(number * 0.3, len(blocks) * BLOCK_TOKENS + 7, 20, (*blocks, 100_000 + number)))
    return tuple(made)


def played(*, delay_s=0.0, offload_tokens=0, incidents=(), config=CONFIG, replicas=2):
    profile = small()
    workload = Workload("test", arrivals(), incidents=incidents)
    engines = [Engine(profile, offload_tokens=offload_tokens) for _ in range(replicas)]
    policy = PreciseProduct(config, "test", profile, random.Random(1), engines, delay_s=delay_s)
    result = Simulation(workload, engines, policy, Scrapes(), [0.1, 0.6]).run()
    policy._at(10_000.0)
    return result, engines, policy


def view_of(policy) -> KvView:
    return policy._producer.index


def hashes(job):
    return hashes_of(prompt_of(job), BLOCK_TOKENS, seed("", "", BLOCK_TOKENS))


@pytest.mark.parametrize("offload_tokens", [0, 8 * BLOCK_TOKENS])
def test_what_caches_hold_is_what_was_told(offload_tokens):
    result, engines, policy = played(offload_tokens=offload_tokens)
    assert sum(engine.cache.evicted_blocks for engine in engines) > 50
    compared = 0
    for job in result.jobs:
        found = view_of(policy).precise.lookup(hashes(job), 0b11)
        for replica, engine in enumerate(engines):
            compared += engine.cache.matched(job.blocks) > 0
            assert found.get(policy._endpoints[replica].slot, 0) == engine.cache.matched(job.blocks)
    assert compared > 50
    assert view_of(policy).precise.counts["skipped_parent"] == 0


def test_a_restart_leaves_nothing():
    incidents = (Incident(20.0, 0, "down"), Incident(20.5, 0, "up"))
    result, engines, policy = played(incidents=incidents)
    assert view_of(policy).precise.counts["clears"] == 1
    for job in result.jobs:
        found = view_of(policy).precise.lookup(hashes(job), 0b11)
        assert found.get(policy._endpoints[0].slot, 0) == engines[0].cache.matched(job.blocks)


def test_what_is_not_known_yet_is_not_there():
    profile = small()
    engine = Engine(profile)
    policy = PreciseProduct(CONFIG, "test", profile, random.Random(1), [engine], delay_s=0.5)
    policy.joined(0, 0.0)
    job = Job(0, 0.0, 3 * BLOCK_TOKENS + 7, 5, (1, 2, 3, 4))
    policy.route(job, 0.0)
    engine.submit(job, 0.0)
    done_s = engine.next_s
    engine.advance()
    precise = view_of(policy).precise
    policy._at(done_s + 0.49)
    assert precise.blocks == 0
    policy._at(done_s + 0.51)
    assert precise.lookup(hashes(job), 1) == {0: 3}


def test_tokens_are_the_prompts():
    policy = PreciseProduct(CONFIG, "test", small(), random.Random(1), [])
    job = Job(0, 0.0, BLOCK_TOKENS + 3, 5, (1, 2))
    request = policy.request_of(job)
    assert len(array("I", request.attributes["tokens"])) == request.prompt_tokens == BLOCK_TOKENS + 3


def test_a_cell_of_it_is_a_cell_like_any_other():
    settings = Settings(replicas=2, kv_tokens=150_000, event_delay_s=0.02)
    cell = Cell("cost-aware-precise", CONFIG, "rag", 1.0, 1)
    row = row_of(settings, cell)
    assert row == row_of(settings, cell)
    assert row["errors"] == 0
    assert row != row_of(Settings(replicas=2, kv_tokens=150_000, event_delay_s=5.0), cell)
    assert row != row_of(Settings(replicas=2, event_delay_s=0.02), cell)


@pytest.mark.parametrize("flags", [["--kv-tokens", "-1"], ["--event-delay", "-0.1"]])
def test_what_can_not_be_is_refused(flags, capsys):
    assert main(["replay", "--scenario", "agents", *flags]) != 0
    assert "not below 0" in capsys.readouterr().err
