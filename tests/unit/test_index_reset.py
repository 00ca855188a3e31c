"""An engine that was started anew holds nothing of what the index says it holds."""

from __future__ import annotations

import random

from epp.plugins.producers.approx_prefix_cache import ApproxPrefixCacheProducer
from epp.prefix.index import SLICE_BLOCKS, PrefixIndex

SIZES = [64 * (n + 1) for n in range(10_000)]


def prompt(seed: int, blocks: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.getrandbits(64) for _ in range(blocks)]


def test_after_a_reset_nothing_is_found_there_and_others_keep_theirs() -> None:
    index = PrefixIndex(1_000)
    hashes = prompt(1, 10)
    index.record(0, hashes, SIZES)
    index.record(1, hashes, SIZES)
    index.reset(0)
    assert index.lookup(hashes, 0b11) == {1: 10}
    while index.tick():
        pass
    assert index.lookup(hashes, 0b11) == {1: 10}
    assert (index.held_blocks(0), index.held_blocks(1)) == (0, 10)


def test_what_is_sent_after_a_reset_counts_once_the_old_is_dropped() -> None:
    index = PrefixIndex(20 * SLICE_BLOCKS)
    old, new = prompt(1, 3 * SLICE_BLOCKS), prompt(2, 10)
    index.record(0, old, SIZES)
    index.reset(0)
    index.record(0, new, SIZES)
    index.record(0, old[:5], SIZES)
    assert index.lookup(new, 1) == {}, "while the old is being dropped, nothing counts"
    while index.tick():
        pass
    assert index.lookup(new, 1) == {0: 10}
    assert index.lookup(old, 1) == {0: 5}, "what was sent again is held again"
    assert len(index) == 15


def test_reset_then_forget_leaves_nothing() -> None:
    index = PrefixIndex(1_000)
    index.record(0, prompt(1, 100), SIZES)
    index.reset(0)
    index.record(0, prompt(2, 50), SIZES)
    freed: list[int] = []
    index.forget(0, freed.append)
    while index.tick():
        pass
    assert (freed, len(index), index.due) == ([0], 0, 0)
    index.record(0, prompt(3, 5), SIZES)
    assert index.lookup(prompt(3, 5), 1) == {0: 5}, "the slot's next endpoint is seen"


def test_a_full_generation_after_a_reset_ends_the_blindness() -> None:
    index = PrefixIndex(20)
    index.record(0, prompt(1, 9), SIZES)
    index.reset(0)
    for seed in range(2, 8):
        index.record(0, prompt(seed, 9), SIZES)
    assert index.lookup(prompt(7, 9), 1) == {0: 9}


def test_resetting_who_holds_nothing_is_nothing() -> None:
    index = PrefixIndex(20)
    index.reset(3)
    index.record(3, prompt(1, 4), SIZES)
    assert index.lookup(prompt(1, 4), 8) == {3: 4}


def test_how_full_an_index_is_can_be_looked_at() -> None:
    producer = ApproxPrefixCacheProducer(lru_capacity_per_server=100)
    for slot, seed in [(0, 1), (1, 1), (1, 2)]:
        producer.index.record(slot, prompt(seed, 10), SIZES)
    assert producer.state() == {"blocks": 30, "distinct_blocks": 20, "due_blocks": 0, "rotations": 1}
    producer.index.reset(1)
    assert producer.state() == {"blocks": 10, "distinct_blocks": 20, "due_blocks": 20, "rotations": 1}
