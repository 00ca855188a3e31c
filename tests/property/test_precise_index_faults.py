"""Engines publish, frames are delivered, lost, repeated and swapped, engines restart and go: what must be true of the precise index throughout."""

from __future__ import annotations

import struct
from collections import Counter

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from epp.prefix import precise
from epp.prefix.columns import walk
from epp.prefix.kv_events import AllBlocksCleared, BlockRemoved, BlockStored, Event
from epp.prefix.masks import Masks
from epp.prefix.precise import PreciseIndex, hashes_of, seed

SLOTS, PUBLISHERS, SIZE = 3, ("", "rank 1"), 2
Prompt = tuple[int, ...]
"""One number a block, from the root."""
Where = tuple[int, str]

prompts = st.lists(st.integers(0, 2), min_size=1, max_size=6).map(tuple)
where = st.tuples(st.integers(0, SLOTS - 1), st.sampled_from(PUBLISHERS))


def packed(prompt: Prompt) -> bytes:
    return struct.pack(f"<{len(prompt) * SIZE}I", *(block for block in prompt for _ in range(SIZE)))


def hashes(prompt: Prompt) -> list[int]:
    return hashes_of(packed(prompt), SIZE, seed("", "", SIZE))


class Engine:
    """Copies of blocks, and what it has published of that and nobody has read."""

    def __init__(self, salt: int) -> None:
        self.salt = salt
        """Its hashes are its own."""
        self.copies: Counter[Prompt] = Counter()
        self.sent: list[Event] = []

    def name(self, prompt: Prompt) -> int:
        return hash((self.salt, prompt))

    def compute(self, prompt: Prompt, *, anew: bool) -> None:
        """Blocks it has are used, or, where two prompts are computed at the same time, made twice."""
        known = 0
        while not anew and known < len(prompt) and self.copies[prompt[: known + 1]]:
            known += 1
        made = [prompt[:depth] for depth in range(known + 1, len(prompt) + 1)]
        self.copies.update(made)
        if made:
            names = tuple(map(self.name, made))
            self.sent.append(BlockStored(names, self.name(prompt[:known]) if known else None, packed(prompt[known:]), SIZE))

    def evict(self, prompt: Prompt) -> None:
        if self.copies[prompt]:
            self.copies[prompt] -= 1
            self.sent.append(BlockRemoved((self.name(prompt),)))

    def cached(self, prompt: Prompt) -> int:
        depth = 0
        while depth < len(prompt) and self.copies[prompt[: depth + 1]]:
            depth += 1
        return depth


class IndexMachine(RuleBasedStateMachine):
    @initialize()
    def make(self) -> None:
        self.index = PreciseIndex(1 << 24, speculative_ttl_s=2)
        self.engines: dict[Where, Engine] = {}
        self.true: set[Where] = set()
        """Those of which every frame was delivered once and in order."""
        self.engines_made = 0
        self.now_s = 0.0
        self.until_s = -1.0

    def engine(self, at: Where) -> Engine:
        if at not in self.engines:
            self.engines_made += 1
            self.engines[at] = Engine(self.engines_made)
            self.true.add(at)
        return self.engines[at]

    @rule(at=where, prompt=prompts, anew=st.booleans())
    def compute(self, at: Where, prompt: Prompt, anew: bool) -> None:
        self.engine(at).compute(prompt, anew=anew)

    @rule(at=where, prompt=prompts)
    def evict(self, at: Where, prompt: Prompt) -> None:
        """Any block, parents before children as well."""
        self.engine(at).evict(prompt)

    @rule(at=where)
    def clear(self, at: Where) -> None:
        engine = self.engine(at)
        engine.copies.clear()
        engine.sent.append(AllBlocksCleared())

    @rule(at=where, pieces=st.integers(1, 3))
    def deliver(self, at: Where, pieces: int) -> None:
        engine = self.engine(at)
        for event in engine.sent:
            for piece in event.pieces(pieces) if isinstance(event, BlockStored) else (event,):
                self.index.apply(at[0], piece, at[1])
            if isinstance(event, AllBlocksCleared) and event is engine.sent[-1] and not +engine.copies:
                self.true.add(at)  # whatever went wrong before; swapped with a store, it is not the last thing the engine did
        engine.sent.clear()

    @precondition(lambda self: any(engine.sent for engine in getattr(self, "engines", {}).values()))
    @rule(data=st.data(), fault=st.sampled_from(["lost", "twice", "swapped"]))
    def deliver_wrongly(self, data: st.DataObject, fault: str) -> None:
        at = data.draw(st.sampled_from(sorted(at for at, engine in self.engines.items() if engine.sent)))
        sent = self.engines[at].sent
        if fault == "lost":
            sent.pop(0)
            self.index.gap(at[0], at[1], lost_blocks=data.draw(st.integers(0, 3)))
        elif fault == "twice":
            sent.insert(0, sent[0])
        else:
            sent.reverse()
        self.true.discard(at)

    @rule(at=where)
    def restart(self, at: Where) -> None:
        """The engine is another; its stream begins anew."""
        self.engines.pop(at, None)
        self.engine(at)
        self.index.restarted(*at)
        self.true.add(at)

    @rule(slot=st.integers(0, SLOTS - 1))
    def forget(self, slot: int) -> None:
        freed: list[int] = []
        self.index.forget(slot, freed.append)
        assert freed == [slot]
        for publisher in PUBLISHERS:
            self.engines.pop((slot, publisher), None)
            self.true.discard((slot, publisher))
        assert not self.index.trusted(slot)

    @rule(slot=st.integers(0, SLOTS - 1), prompt=prompts)
    def speculate(self, slot: int, prompt: Prompt) -> None:
        self.index.speculate(slot, hashes(prompt), self.now_s)
        self.until_s = self.now_s + 2

    @rule(passed_s=st.sampled_from([0.5, 2.0]))
    def tick(self, passed_s: float) -> None:
        self.now_s += passed_s
        due = self.index.due
        assert max(0, due - precise.SLICE_BLOCKS) <= self.index.tick(self.now_s) <= due

    @rule(prompt=prompts)
    def where_all_was_delivered_the_index_says_what_the_engines_have(self, prompt: Prompt) -> None:
        """Speculation may add to it within its time."""
        found = self.index.lookup(hashes(prompt), (1 << SLOTS) - 1)
        for slot in range(SLOTS):
            mine = [at for at in self.engines if at[0] == slot]
            if any(self.engines[at].sent or at not in self.true for at in mine):
                continue
            cached = max((self.engines[at].cached(prompt) for at in mine), default=0)
            if self.now_s >= self.until_s:
                assert found.get(slot, 0) == cached
            else:
                assert found.get(slot, 0) >= cached
        self.as_by_hand(prompt, found)

    def as_by_hand(self, prompt: Prompt, found: dict[int, int]) -> None:
        expected: dict[int, int] = {}
        for slot, views in self.index._views.items():
            for view in views.values():
                blocks = set(view.speculative).union(
                    *(set(names.held.values()) | set(names.before.values()) for names in view.names.values())
                )
                depth = 0
                for block in hashes(prompt):
                    if block not in blocks:
                        break
                    depth += 1
                if depth:
                    expected[slot] = max(depth, expected.get(slot, 0))
        assert found == expected
        assert self.index.cached(hashes(prompt), (1 << SLOTS) - 1).tokens == expected

    @invariant()
    def bits_are_set_where_a_name_stands_for_the_block(self) -> None:
        index = getattr(self, "index", None)
        if index is None:
            return
        columns = index._columns
        expected: dict[int, int] = {}
        names = 0
        for column, parts in [(view.column, view.names) for views in index._views.values() for view in views.values()] + [
            (leaving.column, leaving.names) for leaving in columns._leaving
        ]:
            for part in parts.values():
                assert not set(part.held) & set(part.before)
                assert set(part.copies) <= set(part.held) | set(part.before)
                assert all(number > 1 for number in part.copies.values())
                for block in (*part.held.values(), *part.before.values()):
                    expected[block] = expected.get(block, 0) | 1 << column
                    names += 1
        assert dict(columns.masks["gpu"].items()) == expected
        assert columns.masks["gpu"].blocks == len(index) == len(expected)
        assert index.blocks == names
        used = [view.column for views in index._views.values() for view in views.values()] + [
            leaving.column for leaving in columns._leaving
        ]
        assert sorted(used + columns._free) == list(range(len(columns.slot_of))), "every column belongs to one"

    @invariant()
    def trust_is_what_the_views_say(self) -> None:
        for slot, views in getattr(self, "index", PreciseIndex(1 << 20))._views.items():
            assert self.index.trusted(slot) == (not any(view.doubtful for view in views.values()))
            for view in views.values():
                assert view.doubtful or not any(names.before for names in view.names.values())

    def teardown(self) -> None:
        index = getattr(self, "index", None)
        if index is None:
            return
        for slot in range(SLOTS):
            index.forget(slot)
        index.tick(self.now_s + 9)
        assert len(index) == index.blocks == index.due == index._speculation.blocks == 0
        assert not index._columns.speculative.items()


IndexMachine.TestCase.settings = settings(
    deadline=None, max_examples=200, stateful_step_count=50, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much]
)
TestPreciseIndex = IndexMachine.TestCase


def test_the_walk_is_the_longest_prefix_for_any_masks() -> None:
    """Holes anywhere, chunks of every size, several sources: against one block at a time."""
    import random

    rng = random.Random(7)
    for _ in range(300):
        blocks = list(range(rng.choice([1, 5, 63, 64, 65, 66, 200])))
        sources = []
        for _ in range(rng.choice([1, 1, 2, 3])):
            source = Masks()
            for block in blocks:
                if rng.random() < 0.999:
                    source.add([block], rng.choice([31, 31, 31, 31, rng.randrange(1, 32)]))
            sources.append(source)
        expected: dict[int, int] = {}
        for column in range(5):
            depth = 0
            while depth < len(blocks) and any(source.of(blocks[depth]) >> column & 1 for source in sources):
                depth += 1
            if depth:
                expected[column] = depth
        found = {column: depth for columns, depth in walk(blocks, 31, sources) for column in range(5) if columns >> column & 1}
        assert found == expected
