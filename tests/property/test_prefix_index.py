"""The prefix index against a naive model, through any history of records, rotations, ticks and endpoints that come and go.

Hashes come from a trie, as chained hashes do: a block has one parent, equal blocks mean equal prefixes.
"""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import epp.prefix.index as index_module
from epp.prefix.index import PrefixIndex

SLOTS = 3
CHAIN_BLOCKS_MAX = 12
BLOCK_TOKENS = 64
CUMULATIVE = tuple(BLOCK_TOKENS * (number + 1) for number in range(CHAIN_BLOCKS_MAX))
EVERYONE = (1 << 64) - 1

CHAINS = st.lists(st.integers(0, 2), min_size=1, max_size=CHAIN_BLOCKS_MAX)
"""Which child to take at each level: three per block make shared prefixes common."""


def hashes_of(path: list[int]) -> list[int]:
    """Chained: each names the whole path to it."""
    return [hash(tuple(path[: depth + 1])) for depth in range(len(path))]


def walk(index: PrefixIndex, hashes: list[int], slot: int) -> int:
    """Leading blocks that slot has, the slow and obvious way."""
    depth = 0
    for block in hashes:
        if not index._masks.get(block, 0) >> slot & 1:
            break
        depth += 1
    return depth


class IndexMachine(RuleBasedStateMachine):
    """`recorded[slot]`: every chain the living endpoint at that slot was ever sent, as far as half the capacity lets in."""

    @initialize(capacity=st.integers(2, 30), slice_blocks=st.integers(1, 7))
    def start(self, capacity: int, slice_blocks: int) -> None:
        self.slice_before = index_module.SLICE_BLOCKS
        index_module.SLICE_BLOCKS = slice_blocks  # the real slice is longer than any history made here
        self.capacity = capacity
        self.index = PrefixIndex(capacity)
        self.living: set[int] = set(range(SLOTS))
        self.leaving: set[int] = set()
        self.freed: list[int] = []
        self.recorded: dict[int, set[int]] = {slot: set() for slot in range(SLOTS)}
        self.last: dict[int, list[int]] = {}
        self.parents: dict[int, int] = {}

    def teardown(self) -> None:
        if hasattr(self, "slice_before"):
            index_module.SLICE_BLOCKS = self.slice_before

    @precondition(lambda self: self.living)
    @rule(paths=st.lists(CHAINS, min_size=1, max_size=6), data=st.data())
    def record(self, paths: list[list[int]], data: st.DataObject) -> None:
        slot = data.draw(st.sampled_from(sorted(self.living)))
        for path in paths:
            hashes = hashes_of(path)
            before = {other: walk(self.index, hashes, other) for other in self.living - {slot}}
            self.index.record(slot, hashes, CUMULATIVE)
            kept = hashes[: self.capacity // 2]
            self.recorded[slot].update(kept)
            self.parents.update(zip(hashes[1:], hashes, strict=False))
            self.last[slot] = kept
            assert {other: walk(self.index, hashes, other) for other in before} == before, "what others have is not touched"

    @precondition(lambda self: self.living | self.leaving)
    @rule(path=CHAINS, data=st.data())
    def answered(self, path: list[int], data: st.DataObject) -> None:
        """Whatever was sent to whatever has a slot, or had one: nothing comes back with it that was not sent to who has it now."""
        slot = data.draw(st.sampled_from(sorted(self.living | self.leaving)))
        hashes = hashes_of(path)[: self.capacity // 2]
        if slot in self.living and not set(hashes) <= self.recorded[slot]:
            return
        known = self.index.held_blocks(slot) > 0
        self.index.used(slot, hashes, CUMULATIVE)
        if slot in self.living and known:
            self.last[slot] = hashes

    @rule(path=CHAINS, mask=st.integers(0, (1 << SLOTS) - 1))
    def lookup(self, path: list[int], mask: int) -> None:
        hashes = hashes_of(path)
        for asked in (mask, EVERYONE):
            wanted = {slot: walk(self.index, hashes, slot) for slot in self.living if asked >> slot & 1}
            living = sum(1 << slot for slot in self.living)
            assert self.index.lookup(hashes, asked & living) == {slot: depth for slot, depth in wanted.items() if depth}
            for slot, depth in wanted.items():
                assert set(hashes[:depth]) <= self.recorded[slot], "a cached length that was never recorded"

    @precondition(lambda self: self.living)
    @rule(tokens=st.integers(0, 20 * BLOCK_TOKENS), data=st.data())
    def set_capacity_tokens(self, tokens: int, data: st.DataObject) -> None:
        self.index.set_capacity_tokens(data.draw(st.sampled_from(sorted(self.living))), tokens)

    @precondition(lambda self: self.living)
    @rule(data=st.data())
    def forget(self, data: st.DataObject) -> None:
        slot = data.draw(st.sampled_from(sorted(self.living)))
        self.living.discard(slot)
        self.leaving.add(slot)
        self.last.pop(slot, None)
        self.index.forget(slot, self.freed.append)

    @rule()
    def tick(self) -> None:
        before = self.index.due
        left = self.index.tick()
        assert left == self.index.due == max(0, before - index_module.SLICE_BLOCKS)

    @precondition(lambda self: self.freed)
    @rule()
    def reuse_a_freed_slot(self) -> None:
        slot = self.freed.pop()
        assert slot in self.leaving
        self.leaving.discard(slot)
        self.living.add(slot)
        self.recorded[slot] = set()

    @rule()
    def forget_everyone_and_tick_to_the_end(self) -> None:
        for slot in sorted(self.living):
            self.index.forget(slot, self.freed.append)
        self.leaving |= self.living
        self.living.clear()
        self.last.clear()
        while self.index.tick():
            pass
        assert len(self.index) == 0, "no mask is left"
        assert self.index.blocks == 0
        assert sorted(self.freed) == sorted(self.leaving), "every slot was freed, once"

    @invariant()
    def what_was_recorded_last_is_found_whole(self) -> None:
        for slot, kept in getattr(self, "last", {}).items():
            expected = {slot: len(kept)} if kept else {}
            assert self.index.lookup(kept, 1 << slot) == expected

    @invariant()
    def every_endpoint_holds_no_more_than_its_capacity(self) -> None:
        for slot in getattr(self, "living", ()):
            held = self.index._held.get(slot)
            assert self.index.held_blocks(slot) <= self.capacity
            bits = sum(mask >> slot & 1 for mask in self.index._masks.values())
            assert bits == (len(held.latest) if held else 0)
            assert bits <= 2 * self.capacity, "with what is being dropped"
            if held:
                self.counts_are_true(held)

    def counts_are_true(self, held: index_module._Held) -> None:
        """Of every generation and of all."""
        for generation in held.generations:
            living = [block for block, latest in held.latest.items() if latest == generation.number]
            assert generation.live_blocks == len(living)
            assert generation.live_tokens == BLOCK_TOKENS * len(living)
            assert set(living) <= set(generation.blocks)
        assert held.live_blocks == sum(generation.live_blocks for generation in held.generations)
        assert held.live_tokens == BLOCK_TOKENS * held.live_blocks
        if held.capacity_tokens and len(held.generations) > 1:
            assert held.live_tokens <= held.capacity_tokens

    @invariant()
    def whoever_has_a_block_has_all_before_it(self) -> None:
        """Bisection rests on it; it must hold in the middle of a rotation and of a drop, too."""
        masks = self.index._masks if hasattr(self, "index") else {}
        for block, parent in getattr(self, "parents", {}).items():
            orphans = masks.get(block, 0) & ~masks.get(parent, 0)
            assert not any(orphans >> slot & 1 for slot in self.living)

    @invariant()
    def a_freed_slot_has_left_no_trace(self) -> None:
        for slot in getattr(self, "freed", ()):
            assert not any(mask >> slot & 1 for mask in self.index._masks.values())

    @invariant()
    def no_mask_is_empty(self) -> None:
        if hasattr(self, "index"):
            assert all(self.index._masks.values())


IndexMachine.TestCase.settings = settings(
    deadline=None, max_examples=150, stateful_step_count=60, suppress_health_check=[HealthCheck.too_slow]
)
TestPrefixIndex = IndexMachine.TestCase


def test_a_capacity_in_tokens_bounds_what_is_remembered() -> None:
    index = PrefixIndex(10_000)
    index.set_capacity_tokens(0, 80 * BLOCK_TOKENS)
    for number in range(200):
        index.record(0, hashes_of([number, 1, 1, 1]), CUMULATIVE)
    assert index.held_blocks(0) == int(index_module.OUTLIVES * 80), "what the cache holds, and a little more"
    assert index.rotations_total > 0
    without = PrefixIndex(10_000)
    for number in range(200):
        without.record(0, hashes_of([number, 1, 1, 1]), CUMULATIVE)
    assert without.held_blocks(0) == 800


def test_a_prompt_larger_than_the_cache_is_still_remembered_whole() -> None:
    index = PrefixIndex(1_000)
    index.set_capacity_tokens(0, BLOCK_TOKENS)
    chain = hashes_of([1] * 12)
    index.record(0, chain, CUMULATIVE)
    assert index.lookup(chain, 1) == {0: 12}


def test_a_capacity_below_two_blocks_makes_no_index() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        PrefixIndex(1)


def test_a_slot_that_was_never_seen_is_free_at_once() -> None:
    index = PrefixIndex(10)
    freed: list[int] = []
    index.forget(3, freed.append)
    assert freed == [3]
    assert index.tick() == 0


def test_slots_far_apart_and_beyond_a_machine_word() -> None:
    index = PrefixIndex(100)
    chain = hashes_of([1, 2, 0, 1])
    for slot, depth in [(0, 1), (63, 2), (64, 3), (900, 4)]:
        index.record(slot, chain[:depth], CUMULATIVE)
    assert index.lookup(chain, (1 << 1000) - 1) == {0: 1, 63: 2, 64: 3, 900: 4}
    assert index.lookup(chain, 1 << 64) == {64: 3}
    assert index.lookup([], 1) == {}
    assert index.blocks == 10


def test_what_is_sent_again_and_again_is_not_listed_without_end() -> None:
    index = PrefixIndex(3_000)
    chains = [hashes_of([number] + [1] * 11) for number in range(100)]
    for turn in range(3_000):
        index.record(0, chains[turn % 100], CUMULATIVE)
    held = index._held[0]
    assert sum(len(generation.blocks) for generation in held.generations) + held.due <= 3 * 3_000
    assert all(index.lookup(chain, 1) == {0: 12} for chain in chains)


def test_no_single_prompt_drops_more_than_a_slice() -> None:
    index = PrefixIndex(60_000)
    for number in range(4_000):
        index.record(0, hashes_of([number] + [1] * 11), CUMULATIVE)
    index.reset(0)
    due = index.due
    assert due > 2 * index_module.SLICE_BLOCKS
    index.record(0, hashes_of([5_000, 1, 1]), CUMULATIVE)
    assert due - index.due <= index_module.SLICE_BLOCKS + 6


def test_what_is_there_already_does_not_count_towards_a_full_generation() -> None:
    """A long prompt sent again and again, a block longer each time, is one block's worth of new work each time."""
    index = PrefixIndex(10_000)
    index.set_capacity_tokens(0, 220 * BLOCK_TOKENS)  # a generation is 7 blocks
    for length in range(1, 8):
        index.record(0, hashes_of([1] * length), CUMULATIVE)
    assert index.rotations_total == 0
    index.record(0, hashes_of([1] * 8), CUMULATIVE)
    assert index.rotations_total == 1


def test_a_look_up_in_tokens_is_one_in_blocks() -> None:
    index = PrefixIndex(1_000)
    chain = hashes_of([1, 2, 0, 1, 1, 2])
    sizes = (64, 128, 256, 512, 1_024, 2_048)
    for slot, depth in [(2, 6), (5, 3), (7, 3), (70, 1)]:
        index.record(slot, chain[:depth], sizes)
    assert index.lookup(chain, EVERYONE | 1 << 70) == {70: 1, 5: 3, 7: 3, 2: 6}
    assert index.lookup(chain, EVERYONE | 1 << 70, sizes) == {70: 64, 5: 256, 7: 256, 2: 2_048}


@pytest.mark.parametrize("slots", [(), (0,), (63, 64), (0, 5, 900), tuple(range(300))])
def test_a_mask_spelled_out(slots: tuple[int, ...]) -> None:
    assert index_module.slots_of(sum(1 << slot for slot in slots)) == slots


def test_sets_of_endpoints_are_not_remembered_without_end() -> None:
    index = PrefixIndex(10_000)
    for number in range(3 * index_module.MASKS_MAX):
        chain = hashes_of([number])
        for slot in range(10):
            if number >> slot & 1:
                index.record(slot, chain, CUMULATIVE)
        assert index.lookup(chain, EVERYONE) == {slot: 1 for slot in range(10) if number >> slot & 1}
        assert len(index._slots) <= index_module.MASKS_MAX
