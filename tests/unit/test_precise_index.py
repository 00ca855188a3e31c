"""The precise index against recordings of real engines, and case by case."""

from __future__ import annotations

import random
import struct
from collections.abc import Sequence

import pytest

from epp.prefix import kv_events, precise
from epp.prefix.kv_events import AllBlocksCleared, BlockRemoved, BlockStored
from epp.prefix.masks import Masks
from epp.prefix.precise import PreciseIndex, hashes_of, seed
from tests.kv_replay import RECORDINGS, Engine, Prompt, events, frames

BUDGET_BYTES = 64 << 20
SIZE = 4
"""Tokens a block in the cases below."""
NAMES = sorted(path.name.removesuffix(".frames.bin") for path in RECORDINGS.glob("*.bin"))


def packed(tokens: Sequence[int]) -> bytes:
    return struct.pack(f"<{len(tokens)}I", *tokens)


def blocks_of(prompt: Prompt, size: int) -> list[int]:
    lora, salt, tokens = prompt
    return hashes_of(packed(tokens), size, seed(lora, salt, size))


def stored(names: Sequence[int], *, parent: int | None = None, tokens: Sequence[int] = (), **others: object) -> BlockStored:
    """Blocks whose tokens, unless given, follow from their names: the same name, the same block."""
    said = tokens or [name % 1000 for name in names for _ in range(SIZE)]
    return BlockStored(tuple(names), parent, packed(said), SIZE, **others)  # type: ignore[arg-type]


def chain(*names: int, lora: str = "", salt: str = "") -> list[int]:
    return hashes_of(packed([name % 1000 for name in names for _ in range(SIZE)]), SIZE, seed(lora, salt, SIZE))


@pytest.fixture
def index() -> PreciseIndex:
    return PreciseIndex(BUDGET_BYTES, speculative_ttl_s=2)


# Recordings


def test_every_recording_is_here() -> None:
    assert len(NAMES) == 9


@pytest.mark.parametrize("name", NAMES)
def test_after_every_frame_the_index_says_what_the_engine_has(name: str) -> None:
    index, engines = PreciseIndex(BUDGET_BYTES), {}
    compared = 0
    for topic, _, payload in frames(name):
        engine = engines.setdefault(topic, Engine())
        slot = list(engines).index(topic)
        for event in events(payload):
            engine.take(event)
        for understood in kv_events.decode(payload):
            index.apply(slot, understood)
        assert index.held_blocks(slot) == len(engine.prompts)
        have = set(engine.prompts.values())
        for prompt, size in engine.ever.items():
            cached = engine.cached_tokens(prompt, have)
            hashes = blocks_of(prompt, size)
            assert index.lookup(hashes, 1 << slot) == ({slot: cached // size} if cached else {})
            compared += 1
    assert compared > 0
    assert set(index.counts) <= {"stored", "removed", "clears", "removed_unknown"}
    while index.tick():
        pass
    assert len(index) == len(
        {blocks_of(prompt, engine.ever[prompt])[-1] for engine in engines.values() for prompt in engine.prompts.values()}
    )


def test_bisection_would_have_been_right_in_every_state_of_the_recordings() -> None:
    """Engines evict children first; what the walk guards against is lost frames and lower tiers."""
    states = 0
    for name in NAMES:
        engine = Engine()
        for _, _, payload in frames(name):
            for event in events(payload):
                engine.take(event)
            have = set(engine.prompts.values())
            for lora, salt, tokens in have:
                size = engine.ever[lora, salt, tokens]
                assert len(tokens) == size or (lora, salt, tokens[:-size]) in have
                states += 1
    assert states > 1_000


@pytest.mark.parametrize("name", ["vllm-0.32-kv-events", "sglang-0.5.23-kv-events"])
def test_large_batches_can_be_fed_in_slices(name: str) -> None:
    whole, sliced = PreciseIndex(BUDGET_BYTES), PreciseIndex(BUDGET_BYTES)
    for _, _, payload in frames(name):
        for event in kv_events.decode(payload):
            whole.apply(0, event)
            for piece in event.pieces(2) if isinstance(event, BlockStored) else (event,):
                sliced.apply(0, piece)
    assert sorted(whole._columns.masks["gpu"].items()) == sorted(sliced._columns.masks["gpu"].items())
    assert whole.blocks == sliced.blocks


# Look-ups


def test_the_longest_unbroken_prefix_of_each_endpoint(index: PreciseIndex) -> None:
    index.apply(0, stored([1, 2, 3]))
    index.apply(5, stored([1]))
    index.apply(700, stored([1, 2]))
    index.apply(9, stored([7, 2, 3]))
    asked = chain(1, 2, 3, 4)
    assert index.lookup(asked, (1 << 701) - 1) == {0: 3, 5: 1, 700: 2}
    assert index.lookup(asked, 1 << 5, (4, 8, 12, 16)) == {5: 4}
    assert index.lookup(asked, 0) == index.lookup([], 1) == {}


def test_a_parent_that_goes_before_its_child_breaks_the_prefix_and_mends_it_when_it_returns(index: PreciseIndex) -> None:
    names = list(range(1, 201))
    index.apply(0, stored(names))
    index.apply(0, BlockRemoved((150,)))
    assert index.lookup(chain(*names), 1) == {0: 149}
    index.apply(0, stored([150], parent=149))
    assert index.lookup(chain(*names), 1) == {0: 200}


def test_engines_that_name_the_same_blocks_otherwise_share_them(index: PreciseIndex) -> None:
    index.apply(0, stored([1, 2], tokens=range(8)))
    index.apply(1, stored([-5, 1 << 63], tokens=range(8)))
    assert len(index) == 2
    assert index.lookup(hashes_of(packed(range(8)), SIZE, seed("", "", SIZE)), 3) == {0: 2, 1: 2}


def test_loras_salts_block_sizes_and_images_share_nothing(index: PreciseIndex) -> None:
    for slot, event in enumerate(
        [
            stored([1]),
            stored([1], lora="sql"),
            stored([1], salt="tenant"),
            BlockStored((1,), None, packed([1] * 8), 8),
            stored([1], extras=(b"cat",)),
        ]
    ):
        index.apply(slot, event)
    assert index.lookup(chain(1), 31) == {0: 1}
    assert index.lookup(chain(1, lora="sql"), 31) == {1: 1}
    assert index.lookup(chain(1, salt="tenant"), 31) == {2: 1}
    assert index.lookup(hashes_of(packed([1] * 8), 8, seed("", "", 8)), 31) == {3: 1}
    assert index.lookup(hashes_of(packed([1] * 4), 4, seed("", "", 4), {0: b"cat"}), 31) == {4: 1}
    assert set(index.block_sizes) == {4, 8}


def test_ranks_of_one_endpoint_count_by_the_one_that_has_most(index: PreciseIndex) -> None:
    index.apply(0, stored([1, 2]), "rank 0")
    index.apply(0, stored([1, 2, 3]), "rank 1")
    assert index.lookup(chain(1, 2, 3), 1) == {0: 3}
    index.apply(0, AllBlocksCleared(), "rank 1")
    assert index.lookup(chain(1, 2, 3), 1) == {0: 2}
    index.apply(0, BlockRemoved((2,)), "rank 0")
    assert index.lookup(chain(1, 2, 3), 1) == {0: 1}


# Copies and names


def test_a_copy_outlives_the_removal_of_another(index: PreciseIndex) -> None:
    index.apply(0, stored([1, 2]))
    index.apply(0, stored([1, 2, 3]))  # computed twice at the same time: announced from the beginning
    index.apply(0, BlockRemoved((2, 1)))
    assert index.lookup(chain(1, 2, 3), 1) == {0: 3}
    index.apply(0, BlockRemoved((3, 2, 1)))
    assert index.lookup(chain(1, 2, 3), 1) == {}
    assert len(index) == index.blocks == 0


def test_an_engine_that_says_how_many_copies_are_left_is_believed(index: PreciseIndex) -> None:
    for _ in range(3):
        index.apply(0, stored([1]))
    index.apply(0, BlockRemoved((1,), left=(1,)))
    assert index.lookup(chain(1), 1) == {0: 1}
    index.apply(0, BlockRemoved((1,), left=(0,)))
    assert index.lookup(chain(1), 1) == {}


def test_a_block_with_two_names_goes_with_the_second(index: PreciseIndex) -> None:
    index.apply(0, stored([1001], lora="sql"))
    index.apply(0, stored([2001], lora="sql"))
    assert len(index) == 1
    index.apply(0, BlockRemoved((1001,)))
    assert index.lookup(chain(1, lora="sql"), 1) == {0: 1}
    index.apply(0, BlockRemoved((2001,)))
    assert index.lookup(chain(1, lora="sql"), 1) == {}


def test_a_name_twice_in_one_event(index: PreciseIndex) -> None:
    index.apply(0, stored([1, 1]))
    index.apply(0, BlockRemoved((1,)))
    index.apply(0, BlockRemoved((1,)))
    assert len(index) == index.blocks == 0


# What is not taken


def test_what_can_not_be_placed_is_counted_by_reason(index: PreciseIndex) -> None:
    index.apply(0, stored([1, 2], parent=99))
    index.apply(0, stored([1], medium="tape"))
    index.apply(0, BlockStored((1, 2), None, b"", 0, medium="cpu"))
    index.apply(0, BlockRemoved((1, 2, 3)))
    for size in range(1, 12):
        index.apply(1, BlockStored((size,), None, packed([1] * size), size))
    assert +index.counts == {
        "skipped_parent": 2,
        "skipped_medium": 1,
        "skipped_tokens": 2,
        "removed_unknown": 3,
        "skipped_block_size": 3,
        "stored": 8,
    }
    for number in range(20):
        index.apply(2, AllBlocksCleared(), str(number))
    assert index.counts["skipped_publisher"] == 4


def test_only_the_first_group_of_layers_is_followed(index: PreciseIndex) -> None:
    index.apply(0, stored([1, 2], group=0))
    index.apply(0, stored([1, 2], group=1))
    index.apply(0, BlockRemoved((1, 2), group=1))
    assert index.lookup(chain(1, 2), 1) == {0: 2}
    assert (index.counts["skipped_group"], index.counts["removed_group"]) == (2, 2)


def test_the_budget_is_kept_and_room_is_made_by_what_leaves() -> None:
    index = PreciseIndex(100_000)
    for name in range(0, 2_000, 2):
        index.apply(0, stored([name, name + 1], tokens=[name] * 8))
        assert index.bytes_used <= 100_000
    assert index.counts["skipped_budget"] > 1_000
    first = hashes_of(packed([0] * 8), SIZE, seed("", "", SIZE))
    assert index.lookup(first, 1) == {0: 2}, "what was there stays"
    index.apply(0, AllBlocksCleared())
    index.tick()
    index.apply(0, stored([5000, 5001]))
    assert index.lookup(chain(5000, 5001), 1) == {0: 2}


def test_a_budget_for_nothing_and_weights_without_gpu_are_refused() -> None:
    with pytest.raises(ValueError, match="budget_bytes"):
        PreciseIndex(100)
    with pytest.raises(ValueError, match="gpu"):
        PreciseIndex(BUDGET_BYTES, tier_weights={"cpu": 1})


# Tiers


def test_tiers_count_whole_for_what_is_cached_and_by_weight_for_scores() -> None:
    index = PreciseIndex(BUDGET_BYTES, tier_weights={"gpu": 1.0, "cpu": 0.5, "disk": 0.25})
    index.apply(0, stored([1, 2]))
    index.apply(0, stored([1, 2, 3], medium="cpu"))
    index.apply(0, stored([4], parent=3, medium="disk"))
    index.apply(1, stored([1, 2, 3, 4]))
    index.apply(2, stored([1], medium="disk"))
    found = index.cached(chain(1, 2, 3, 4), 7, (4, 8, 12, 16))
    assert found.tokens == {0: 16, 1: 16, 2: 4} == index.lookup(chain(1, 2, 3, 4), 7, (4, 8, 12, 16))
    assert found.gpu_tokens == {0: 8, 1: 16}
    assert found.weighted_tokens == {0: 8 + 2 + 1, 1: 16, 2: 1}
    assert index.cached(chain(1, 2, 3, 4), 7).weighted_tokens == {0: 2.75, 1: 4, 2: 0.25}
    index.apply(0, BlockRemoved((2,)))
    assert index.cached(chain(1, 2, 3, 4), 1) == ({0: 4}, {0: 1}, {0: 1 + 0.5 + 0.5 + 0.25})


def test_weights_of_several_tiers_are_what_looking_at_every_block_says() -> None:
    weights = {"gpu": 1.0, "cpu": 0.5, "disk": 0.25}
    rng = random.Random(5)
    for _ in range(50):
        index = PreciseIndex(BUDGET_BYTES, tier_weights=weights, speculative_ttl_s=2)
        names, sizes = list(range(1, 13)), range(SIZE, 13 * SIZE, SIZE)
        there: dict[tuple[int, int], set[str]] = {}
        for slot in range(4):
            for medium in weights:
                count = rng.randrange(13)
                if count:
                    index.apply(slot, stored(names[:count], medium=medium))
                gone = {name for name in names[:count] if rng.random() < 0.2}
                index.apply(slot, BlockRemoved(sorted(gone), medium))
                for name in set(names[:count]) - gone:
                    there.setdefault((slot, name), set()).add(medium)
        found = index.cached(chain(*names), 0b1111, sizes)
        for slot in range(4):
            depth = next((number for number, name in enumerate(names) if (slot, name) not in there), len(names))
            expected = sum(SIZE * max(weights[medium] for medium in there[slot, name]) for name in names[:depth])
            assert found.tokens.get(slot, 0) == depth * SIZE
            assert found.weighted_tokens.get(slot, 0.0) == pytest.approx(expected)


def test_weights_cost_about_the_same_for_many_endpoints_as_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A long prompt that all have in a lower tier held the event loop for a tenth of a second and more."""
    looked_at: list[int] = []
    of, of_all = Masks.of, Masks.of_all
    monkeypatch.setattr(Masks, "of", lambda self, block: looked_at.append(1) or of(self, block))
    monkeypatch.setattr(Masks, "of_all", lambda self, blocks: looked_at.append(len(blocks)) or of_all(self, blocks))
    index = PreciseIndex(BUDGET_BYTES)
    names = list(range(1, 901))
    for slot in range(16):
        index.apply(slot, stored(names, medium="cpu"))
    found = index.cached(chain(*names), (1 << 16) - 1)
    assert found.weighted_tokens == dict.fromkeys(range(16), pytest.approx(0.8 * len(names)))
    assert sum(looked_at) <= 4 * len(names)


def test_with_gpus_only_nothing_is_counted_twice(index: PreciseIndex) -> None:
    index.apply(0, stored([1, 2]))
    found = index.cached(chain(1, 2), 1, (4, 8))
    assert found.tokens is found.gpu_tokens
    assert found == ({0: 8}, {0: 8}, {0: 8.0})


def test_a_tier_that_names_blocks_only_is_known_from_the_other(index: PreciseIndex) -> None:
    index.apply(0, stored([1, 2]))
    index.apply(0, BlockStored((1, 2), None, b"", 0, medium="cpu"))
    index.apply(0, BlockRemoved((2, 1)))
    assert index.cached(chain(1, 2), 1) == ({0: 2}, {}, {0: 1.6})


# Speculation


def test_a_prompt_just_sent_counts_until_its_time_is_over(index: PreciseIndex) -> None:
    index.apply(0, stored([1]))
    index.speculate(0, chain(1, 2, 3), now_s=10)
    assert index.lookup(chain(1, 2, 3), 1) == {0: 3}
    index.tick(11.9)
    index.speculate(0, chain(1, 2), now_s=11.9)
    index.tick(12)
    assert index.lookup(chain(1, 2, 3), 1) == {0: 2}, "what was sent again stays"
    index.tick(13.9)
    assert index.lookup(chain(1, 2, 3), 1) == {0: 1}


def test_events_take_the_place_of_speculation(index: PreciseIndex) -> None:
    index.speculate(0, chain(1), now_s=0)
    assert index.lookup(chain(1), 1) == {}, "an endpoint that publishes nothing"
    index.apply(0, stored([9]))
    index.speculate(0, chain(1, 2), now_s=0)
    index.apply(0, stored([1, 2]))
    index.apply(0, BlockRemoved((2,)))
    assert index.lookup(chain(1, 2), 1) == {0: 1}, "stored and gone within its time"
    index.speculate(0, chain(1, 5), now_s=1)
    index.apply(0, AllBlocksCleared())
    assert index.lookup(chain(1, 5), 1) == {}
    index.tick(5)
    assert len(index) == index.bytes_used == 0


def test_speculation_is_bounded() -> None:
    index = PreciseIndex(BUDGET_BYTES, speculative_ttl_s=2, speculative_blocks_max=3)
    index.apply(0, stored([9]))
    index.speculate(0, chain(1, 2), now_s=0)
    index.speculate(0, chain(3, 4), now_s=0)
    assert index.counts["skipped_speculative"] == 2
    index.tick(2)
    index.speculate(0, chain(3, 4), now_s=2)
    assert index.lookup(chain(3, 4), 1) == {0: 2}


def test_what_was_speculated_leaves_in_slices() -> None:
    index = PreciseIndex(BUDGET_BYTES, speculative_ttl_s=2)
    index.apply(0, stored([9]))
    index.speculate(0, list(range(5_000)), now_s=0)
    index.tick(2)
    assert index._speculation.blocks == 5_000 - precise.SLICE_BLOCKS // 2
    index.speculate(0, list(range(10_000, 10_100)), now_s=2)
    assert index._speculation.blocks == 4_000 - 200 + 100, "and a little with every prompt"
    for _ in range(5):
        index.tick(9)
    assert index._speculation.blocks == index._columns.speculative.blocks == 0


def test_speculation_goes_to_the_rank_that_has_most(index: PreciseIndex) -> None:
    index.apply(0, stored([9]), "rank 0")
    index.apply(0, stored([1]), "rank 1")
    index.speculate(0, chain(1, 2), now_s=0)
    assert index.lookup(chain(1, 2), 1) == {0: 2}


# Trust


def test_who_was_heard_is_trusted_until_frames_are_lost(index: PreciseIndex) -> None:
    assert not index.trusted(0)
    index.apply(0, stored([1]))
    assert index.trusted(0)
    assert index.trusted_mask == 1
    index.gap(0)
    assert not index.trusted(0)
    index.apply(0, AllBlocksCleared())
    assert index.trusted(0)
    index.gap(1)
    assert not index.trusted(1), "joined in the middle"


def test_enough_new_blocks_make_a_view_trusted_again(index: PreciseIndex) -> None:
    index.apply(0, stored(range(1, 11)))
    index.gap(0, lost_blocks=0)
    index.apply(0, stored(range(101, 181)))
    index.tick()
    assert not index.trusted(0), "10 of 90 are in doubt"
    index.apply(0, stored([201, 202], parent=10))
    index.tick()
    assert index.trusted(0), "9 of 92: naming a parent proves it"
    assert index.lookup(chain(*range(1, 11)), 1) == {0: 10}, "nothing was lost"


def test_what_may_be_lacking_delays_trust(index: PreciseIndex) -> None:
    index.gap(0, lost_blocks=10)
    index.apply(0, stored(range(1, 91)))
    index.tick()
    assert not index.trusted(0)
    index.apply(0, BlockRemoved((9001,)))  # one of those that were lost
    index.tick()
    assert index.trusted(0)


def test_a_cache_turned_over_drops_what_nothing_proved(index: PreciseIndex) -> None:
    index.apply(0, stored([1, 2, 3]))
    index.apply(0, stored([501, 502, 503, 504]))
    index.gap(0, lost_blocks=1)
    index.speculate(0, chain(1, 2), now_s=0)  # a prompt sent since: the engine has it
    index.apply(0, stored([601, 602]))
    index.apply(0, BlockRemoved((9001, 9002, 9003, 602, 601, 504, 503)))
    index.tick()
    assert not index.trusted(0), "7 removed, 8 were there"
    index.apply(0, BlockRemoved((9004,)))
    index.tick(9)
    assert index.trusted(0)
    assert index.lookup(chain(1, 2, 3), 1) == {0: 2}
    assert index.lookup(chain(501, 502), 1) == {}
    assert index.counts["doubted"] == 3


def test_a_second_gap_while_the_first_is_being_gone_through(index: PreciseIndex) -> None:
    index.apply(0, stored(range(1, 101)))
    index.gap(0, lost_blocks=0)
    index.apply(0, BlockRemoved(tuple(range(9001, 9101))))
    index.gap(0, lost_blocks=0)
    index.tick()
    assert not index.trusted(0)
    assert index.lookup(chain(*range(1, 101)), 1) == {0: 100}


def test_a_second_gap_moves_the_fewer_of_what_is_in_doubt_and_what_came_since(index: PreciseIndex) -> None:
    """All of it is in doubt again; moving hundreds of thousands of names would hold the event loop."""
    index.apply(0, stored(range(1, 101)))
    index.gap(0)
    index.apply(0, stored(range(1, 81)))
    (names,) = index._views[0][""].names.values()
    more = names.held
    assert (len(more), len(names.before)) == (80, 20)
    index.gap(0)
    assert names.before is more
    assert (len(names.before), len(names.held)) == (100, 0)
    assert index.lookup(chain(*range(1, 101)), 1) == {0: 100}


def test_an_endpoint_that_goes_while_it_is_being_gone_through(index: PreciseIndex) -> None:
    index.apply(0, stored(range(1, 101)))
    index.gap(0, lost_blocks=0)
    index.apply(0, BlockRemoved(tuple(range(9001, 9101))))
    index.forget(0)
    index.apply(0, stored([1]))
    index.tick()
    assert index.counts["doubted"] == 0, "it is dropped, not judged"
    assert index.trusted(0)
    assert len(index) == index.blocks == 1


def test_what_is_stored_again_after_a_gap_is_one_copy(index: PreciseIndex) -> None:
    index.apply(0, stored([1]))
    index.apply(0, stored([1]))
    index.gap(0)
    index.apply(0, stored([1]))
    index.apply(0, BlockRemoved((1,)))
    assert index.lookup(chain(1), 1) == {}


def test_one_publisher_in_doubt_is_enough(index: PreciseIndex) -> None:
    index.apply(0, stored([1]), "rank 0")
    index.apply(0, stored([1]), "rank 1")
    index.gap(0, "rank 1")
    assert not index.trusted(0)
    index.restarted(0, "rank 1")
    assert index.trusted(0)
    assert index.lookup(chain(1), 1) == {0: 1}


# Coming and going


def test_what_leaves_is_dropped_in_slices_and_seen_by_nobody(index: PreciseIndex) -> None:
    tokens = range(SIZE * 10_000)
    whole = hashes_of(packed(tokens), SIZE, seed("", "", SIZE))
    event = stored(range(1, 10_001), tokens=tokens)
    index.apply(0, event)
    index.apply(1, event)
    index.apply(0, AllBlocksCleared())
    assert index.due == 8_000
    assert index.lookup(whole, 3) == {1: 10_000}
    index.apply(0, stored([1], tokens=tokens[:SIZE]))
    assert index.lookup(whole, 3) == {0: 1, 1: 10_000}, "what comes after a clear counts at once"
    freed: list[int] = []
    index.forget(1, freed.append)
    assert freed == [1]
    assert not index.trusted(1)
    before = index.due
    assert before - index.tick() == precise.SLICE_BLOCKS
    while index.tick():
        pass
    assert len(index) == index.blocks == 1
    assert index.lookup(whole, 3) == {0: 1}


def test_columns_are_used_again(index: PreciseIndex) -> None:
    for number in range(500):
        index.apply(number % 3, stored([1, 2]))
        index.apply(number % 3, AllBlocksCleared())
        index.tick()
    assert len(index._columns.slot_of) <= 6
    assert len(index) == 0
    assert index.block_sizes == ()


def test_clears_without_end_pile_nothing_up(index: PreciseIndex) -> None:
    tokens = range(SIZE * 3_000)
    for _ in range(20):
        index.apply(0, stored(range(1, 3_001), tokens=tokens))
        index.apply(0, AllBlocksCleared())
    assert index.due <= 2 * 3_000


def test_a_restart_is_acted_on_once_whoever_sees_it_first(index: PreciseIndex) -> None:
    index.apply(0, stored([1]))
    index.restarted(0)
    index.apply(0, stored([2]))
    index.reset(0)  # the metrics show the same restart later
    assert index.lookup(chain(2), 1) == {0: 1}
    index.reset(0)
    assert index.lookup(chain(2), 1) == {}
    index.apply(0, stored([3]))
    index.restarted(0)
    index.reset(0)
    assert index.lookup(chain(3), 1) == {}
    index.reset(7)


@pytest.mark.parametrize("told", ["by its events", "by its metrics"])
def test_another_process_names_its_groups_anew(index: PreciseIndex, told: str) -> None:
    """An engine that is updated where it is: the old one named no groups, the new one does."""
    index.apply(0, stored([1, 2]))
    if told == "by its events":
        index.restarted(0)
    else:
        index.reset(0)
    index.apply(0, stored([1, 2, 3], group=0))
    assert index.lookup(chain(1, 2, 3), 1) == {0: 3}
    index.apply(0, AllBlocksCleared())
    index.apply(0, stored([1], group=1))
    assert index.counts["skipped_group"] == 1, "a clear is the same process's"


def test_a_slot_given_out_again_has_nothing_of_the_one_before(index: PreciseIndex) -> None:
    index.apply(0, stored([1, 2]))
    index.speculate(0, chain(1, 2, 3), now_s=0)
    index.forget(0)
    index.apply(0, stored([1]))
    assert index.lookup(chain(1, 2, 3), 1) == {0: 1}
    index.tick(9)
    assert index.lookup(chain(1, 2, 3), 1) == {0: 1}
    assert index.blocks == 1
