"""precise-prefix-cache-producer: whose word counts, what is predicted, and how it notices that tokens are not the engine's."""

from __future__ import annotations

import json
import logging
import random
from array import array
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import msgspec
import pytest

from epp.clock import VirtualClock
from epp.plugins.base import Context, EndpointIndex, Finished
from epp.plugins.producers.precise_prefix_cache import BUDGET_BYTES_MIN, PrecisePrefixCacheProducer
from epp.plugins.scorers.precise_prefix_cache import PrecisePrefixCacheScorer
from epp.prefix import kv_view, token_check
from epp.prefix.kv_events import AllBlocksCleared, BlockRemoved, BlockStored
from epp.prefix.kv_view import TOKENS_MAX, PreciseMatch
from epp.prefix.precise import BLOCK_BYTES, ENTRY_BYTES
from epp.types import TOKEN_IDS, TOKEN_MEDIA, Decision, Endpoint, LLMRequest, Snapshot, Usage
from tests.builders import core, llm_request, pool_of, spec

NAME = PrecisePrefixCacheProducer.type
BLOCK = 16


def ids(*tokens: int) -> bytes:
    return array("I", tokens).tobytes()


def tokens_of(seed: int, count: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(50_000) for _ in range(count)]


def prompted(tokens: Sequence[int], **values: object) -> LLMRequest:
    """A prompt whose tokens are known."""
    request = llm_request(prompt=ids(*tokens), prompt_tokens=len(tokens), **{"target_model": "m", **values})
    request.attributes[TOKEN_IDS] = ids(*tokens)
    return request


def texted(tokens: Sequence[int]) -> LLMRequest:
    """The same, its tokens not known."""
    return llm_request(prompt=ids(*tokens), prompt_tokens=len(tokens), target_model="m")


class Engine:
    """Tells the producer what a real one would, a block at a time or several, under names of its own."""

    def __init__(self, made: PrecisePrefixCacheProducer, endpoint: Endpoint, *, block: int = BLOCK) -> None:
        self._made = made
        self._slot = endpoint.slot
        self._block = block
        self._names: dict[tuple[object, ...], int] = {}

    def stores(self, tokens: Sequence[int], *, lora: str = "", salt: str = "", medium: str = "gpu") -> list[int]:
        whole = len(tokens) // self._block * self._block
        names = [hash((lora, salt, tuple(tokens[: end + self._block]))) & (1 << 63) - 1 for end in range(0, whole, self._block)]
        event = BlockStored(names, None, ids(*tokens[:whole]), self._block, medium, lora, salt)
        self._made.index.precise.apply(self._slot, event)
        return names

    def removes(self, names: Sequence[int], medium: str = "gpu") -> None:
        self._made.index.precise.apply(self._slot, BlockRemoved(names, medium))

    def clears(self) -> None:
        self._made.index.precise.apply(self._slot, AllBlocksCleared())


class World:
    """A producer, two endpoints and a clock."""

    def __init__(self, **parameters: object) -> None:
        self.clock = VirtualClock(1_000.0)
        self.made = msgspec.convert(parameters, PrecisePrefixCacheProducer)
        self.made.bind(Context(self.clock, random.Random(1), {}))
        self.pool = pool_of({}, {}, {})
        for endpoint in self.pool:
            self.made.added(endpoint)
        self.one, self.two, self.silent = self.pool
        self.engines = [Engine(self.made, endpoint) for endpoint in self.pool]

    def matched(self, request: LLMRequest) -> dict[int, int]:
        self.made.produce(request, Snapshot.of(self.pool))
        assert request.prefix is not None
        assert request.prefix is request.attributes[NAME]
        return request.prefix.matched_tokens

    def sends(self, request: LLMRequest, endpoint: Endpoint) -> None:
        self.matched(request)
        self.made.picked(request, Decision(endpoint, (), "default"))

    def answers(self, request: LLMRequest, endpoint: Endpoint, *, cached: int = -1, status: int = 200) -> None:
        self.made.finished(request, endpoint, Finished(status, 0.1, 0.2, Usage(len(request.attributes[TOKEN_IDS]) // 4, 5, cached), 0))


# Whose word counts


def test_the_engines_word_counts_where_there_is_one() -> None:
    world = World()
    tokens = tokens_of(1, 100)
    world.engines[0].stores(tokens)
    assert world.matched(prompted(tokens)) == {0: 96}
    assert world.matched(prompted(tokens + tokens_of(2, 50))) == {0: 96}
    assert world.matched(prompted(tokens_of(3, 100))) == {}


def test_what_was_sent_counts_where_there_is_no_word() -> None:
    world = World()
    tokens = tokens_of(1, 640)
    world.sends(prompted(tokens), world.silent)
    world.engines[0].stores(tokens[:160])
    world.engines[1].stores(tokens_of(9, 16))
    world.sends(prompted(tokens), world.two)
    assert world.matched(prompted(tokens)) == {0: 160, 2: 640}, "what was sent to an engine that tells of itself is no news"


def test_without_tokens_everybody_goes_by_what_was_sent() -> None:
    world = World()
    tokens = tokens_of(1, 640)
    world.engines[0].stores(tokens)
    without = texted(tokens)
    assert world.matched(without) == {}
    world.made.picked(without, Decision(world.one, (), "default"))
    again = texted(tokens)
    assert world.matched(again) == {0: 640}
    assert not isinstance(again.prefix, PreciseMatch)
    assert world.matched(prompted(tokens, media=1)) == {0: 640}, "tokens alone do not tell which picture it is"
    assert world.made.index.approximated == 3


class Picture(NamedTuple):
    offset: int
    length: int
    content: bytes


def test_pictures_are_told_apart_by_the_engines_names_for_them() -> None:
    world = World()
    tokens = [7] * 97
    extras = (b"", b"cat", b"cat\0dog", b"dog", b"", b"")
    world.made.index.precise.apply(0, BlockStored([1, 2, 3, 4, 5, 6], None, ids(*tokens[:96]), BLOCK, extras=extras))

    def seen(*pictures: Picture) -> dict[int, int]:
        request = prompted(tokens, media=len(pictures))
        request.attributes[TOKEN_MEDIA] = pictures
        return world.matched(request)

    assert seen(Picture(20, 20, b"cat"), Picture(40, 24, b"dog")) == {0: 96}
    assert seen(Picture(20, 20, b"cat"), Picture(40, 24, b"cow")) == {0: 32}
    assert seen(Picture(20, 20, b"cow"), Picture(40, 24, b"dog")) == {0: 16}
    assert seen(Picture(20, 20, b"cat"), Picture(40, 25, b"dog")) == {0: 64}


def test_an_endpoint_in_doubt_goes_by_what_was_sent_until_it_clears() -> None:
    world = World()
    tokens = tokens_of(1, 640)
    world.engines[0].stores(tokens)
    world.sends(prompted(tokens), world.one)
    world.made.index.precise.gap(0)
    assert world.matched(prompted(tokens)) == {0: 640}, "guessed: whole blocks of its own, and the last token too"
    world.engines[0].clears()
    assert world.matched(prompted(tokens)) == {}


def test_salts_and_loras_share_nothing() -> None:
    world = World()
    tokens = tokens_of(1, 64)
    longer = [*tokens, 1]
    world.engines[0].stores(tokens, salt="tenant")
    world.engines[1].stores(tokens, lora="sql")
    assert world.matched(prompted(longer)) == {}
    assert world.matched(prompted(longer, cache_salt="tenant")) == {0: 64}
    assert world.matched(prompted(longer, cache_salt="other")) == {}
    assert world.matched(prompted(longer, target_model="sql")) == {1: 64}
    assert world.matched(prompted(longer, target_model="sql", cache_salt="tenant")) == {}
    world.engines[0].stores(tokens)
    assert world.matched(prompted(longer)) == world.matched(prompted(longer, target_model="alias")) == {0: 64}


# What is predicted


@pytest.mark.parametrize(("prompt", "cached"), [(1, 0), (16, 0), (17, 16), (31, 16), (32, 16), (33, 32), (96, 80), (97, 96), (130, 96)])
def test_the_last_token_is_computed_in_any_case(prompt: int, cached: int) -> None:
    world = World()
    tokens = tokens_of(1, 130)
    world.engines[0].stores(tokens[:96])
    assert world.matched(prompted(tokens[:prompt])) == ({0: cached} if cached else {})


def test_an_evicted_block_ends_the_prefix() -> None:
    world = World()
    tokens = tokens_of(1, 97)
    names = world.engines[0].stores(tokens)
    world.engines[0].removes(names[3:4])
    assert world.matched(prompted(tokens)) == {0: 48}
    world.engines[0].removes(names[:1])
    assert world.matched(prompted(tokens)) == {}


def test_engines_of_other_block_sizes_are_each_asked_in_their_own() -> None:
    world = World()
    tokens = tokens_of(1, 100)
    world.engines[0].stores(tokens)
    Engine(world.made, world.two, block=32).stores(tokens)
    Engine(world.made, world.silent, block=64).stores(tokens)
    assert world.matched(prompted(tokens)) == {0: 96, 1: 96, 2: 64}


def test_a_lower_tier_is_cached_and_worth_less() -> None:
    world = World(indexerConfig={"kvCacheBackendConfigs": [{"name": "CPU", "weight": 0.5}, {"name": "disk", "weight": 0.1}]})
    tokens = tokens_of(1, 97)
    for medium, until in (("gpu", 32), ("cpu", 64), ("disk", 96), ("tape", 96)):
        world.engines[0].stores(tokens[:until], medium=medium)
    world.engines[1].stores(tokens[:48])
    request = prompted(tokens)
    assert world.matched(request) == {0: 96, 1: 48}
    assert isinstance(request.prefix, PreciseMatch)
    assert request.prefix.weighted_tokens == pytest.approx({0: 32 + 16 + 3.2, 1: 48})
    scores = PrecisePrefixCacheScorer().score_sparse(request)
    assert scores == pytest.approx({0: 51.2 / 97, 1: 48 / 97})


def test_weights_are_told_of_engines_of_every_block_size_and_of_none() -> None:
    world = World()
    tokens = tokens_of(1, 97)
    world.engines[0].stores(tokens[:32])
    Engine(world.made, world.two, block=32).stores(tokens, medium="cpu")
    world.sends(prompted(tokens), world.silent)
    request = prompted(tokens)
    assert world.matched(request) == {0: 32, 1: 96, 2: 64}
    assert isinstance(request.prefix, PreciseMatch)
    assert request.prefix.weighted_tokens == pytest.approx({0: 32, 1: 0.8 * 96, 2: 64})


def test_of_a_prompt_without_end_the_beginning_is_matched() -> None:
    world = World()
    tokens = [7] * (TOKENS_MAX + 1_000)
    world.engines[0].stores(tokens[: 4 * BLOCK])
    assert world.matched(prompted(tokens)) == {0: 64}
    request = prompted(tokens)
    world.matched(request)
    assert isinstance(request.prefix, PreciseMatch)
    assert len(request.prefix.blocks[0]) == TOKENS_MAX // BLOCK


def test_of_a_prompt_in_tiny_blocks_so_many_are_hashed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_view, "BLOCKS_MAX", 32)
    world = World()
    tokens = tokens_of(1, 100)
    Engine(world.made, world.one, block=1).stores(tokens)
    world.engines[1].stores(tokens)
    request = prompted(tokens)
    assert world.matched(request) == {0: 32, 1: 96}
    match = request.prefix
    assert isinstance(match, PreciseMatch)
    assert sorted(map(len, match.blocks)) == [6, 32]


def test_predictions_are_held_against_what_engines_report() -> None:
    world = World()
    tokens = tokens_of(1, 100)
    world.engines[0].stores(tokens)
    for cached in (96, 96, 64, 98, -1):
        request = prompted(tokens)
        world.sends(request, world.one)
        world.answers(request, world.one, cached=cached)
    silent = prompted(tokens)
    world.sends(silent, world.silent)
    world.answers(silent, world.silent, cached=0)  # nothing was predicted, it was guessed
    failed = prompted(tokens)
    world.sends(failed, world.one)
    world.answers(failed, world.one, cached=0, status=500)
    assert world.made.state()["predictions"] == {"exact": 2, "over": 1, "over_tokens": 32, "under": 1, "under_tokens": 2}


# What was just sent


def test_nothing_is_speculated_unless_it_is_asked_for() -> None:
    world = World()
    tokens = tokens_of(1, 97)
    world.engines[0].stores(tokens_of(9, 16))
    world.sends(prompted(tokens), world.one)
    assert world.matched(prompted(tokens)) == {}


def test_what_was_just_sent_counts_until_the_events_tell() -> None:
    world = World(speculativeIndexing=True, speculativeTTL="3s")
    tokens = tokens_of(1, 97)
    for engine in world.engines[:2]:
        engine.stores(tokens_of(9, 16))
    request = prompted(tokens)
    world.matched(request)
    world.made.picked(request, Decision(world.one, (), "decode", {"prefill": world.two}))
    assert world.matched(prompted(tokens)) == {0: 96, 1: 96}
    names = world.engines[0].stores(tokens)
    world.clock.advance(2.9)
    world.made.index.tick()
    assert world.matched(prompted(tokens)) == {0: 96, 1: 96}
    world.clock.advance(0.2)
    world.made.index.tick()
    assert world.matched(prompted(tokens)) == {0: 96}, "the other engine has said nothing of it"
    world.engines[0].removes(names)
    assert world.matched(prompted(tokens)) == {}


def test_who_served_it_in_anothers_stead_will_have_it() -> None:
    world = World(speculativeIndexing=True)
    tokens = tokens_of(1, 97)
    for engine in world.engines[:2]:
        engine.stores(tokens_of(9, 16))
    request = prompted(tokens)
    world.sends(request, world.one)
    world.made.served(request, world.two)
    assert world.matched(prompted(tokens)) == {0: 96, 1: 96}


# Wrong tokens


def played(world: World, stored_of: Callable[[list[int]], list[int]], count: int, *, first: int = 0, model: str = "m") -> None:
    for number in range(first, first + count):
        tokens = tokens_of(number, 40)
        request = prompted(tokens, target_model=model)
        world.sends(request, world.one)
        world.engines[0].stores(stored_of(tokens))
        world.answers(request, world.one)
        world.clock.advance(token_check.WAIT_S)
        world.made.index.tick()


def right(tokens: list[int]) -> list[int]:
    return tokens


def wrong(tokens: list[int]) -> list[int]:
    """As if another tokenizer had cut the text."""
    return [0, *tokens]


def test_wrong_tokens_are_noticed_told_once_and_forgiven(caplog: pytest.LogCaptureFixture) -> None:
    world = World()
    with caplog.at_level(logging.INFO, "epp.prefix"):
        played(world, right, 5)
        played(world, wrong, token_check.WINDOW - 2, first=100)
        assert not caplog.records
        assert world.made.index.mismatches == 0
        played(world, wrong, 200, first=200)
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        assert "chat template" in caplog.records[0].message
        assert world.made.index.mismatches == 1
        tokens = tokens_of(250, 640)
        world.sends(prompted(tokens), world.two)
        assert world.matched(prompted(tokens)) == {1: 640}, "what was sent counts, whatever engines say"
        played(world, right, token_check.RIGHT_MIN - 1, first=500)
        assert len(caplog.records) == 1
        played(world, right, 1, first=600)
        assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]
    engine_has = tokens_of(500, 40)
    assert world.matched(prompted([*engine_has[:32], 1])) == {0: 32}


def test_each_model_is_judged_by_its_own(caplog: pytest.LogCaptureFixture) -> None:
    world = World()
    with caplog.at_level(logging.WARNING, "epp.prefix"):
        played(world, wrong, 40, model="bad")
        played(world, right, 40, first=100, model="good")
    assert world.made.index.check.wrong == {"bad"}
    assert len(caplog.records) == 1


@pytest.mark.parametrize("share", [3, 8])
def test_now_and_then_a_prompt_may_be_evicted_before_it_is_looked_for(share: int) -> None:
    world = World()
    for number in range(0, 200, share):
        played(world, wrong, share - 1, first=1_000 + number)
        played(world, right, 1, first=number)
    assert world.made.index.mismatches == 0


def test_the_event_may_come_after_the_answer() -> None:
    world = World()
    world.engines[0].stores(tokens_of(9, 16))
    for number in range(100, 140):
        tokens = tokens_of(number, 40)
        request = prompted(tokens)
        world.sends(request, world.one)
        world.answers(request, world.one)
        world.clock.advance(token_check.WAIT_S / 2)
        world.made.index.tick()
        world.engines[0].stores(tokens)
        world.clock.advance(token_check.WAIT_S / 2)
        world.made.index.tick()
    state = world.made.state()
    assert (state["prompts_found"], state["prompts_missed"]) == (40, 0)


@pytest.mark.parametrize("why", ["in doubt", "gone", "failed", "short", "unheard"])
def test_what_says_nothing_of_tokens_is_not_judged(why: str) -> None:
    world = World()
    if why != "unheard":
        world.engines[0].stores(tokens_of(9, 16))
    for number in range(100):
        request = prompted(tokens_of(100 + number, 31 if why == "short" else 40))
        world.sends(request, world.one)
        world.answers(request, world.one, status=503 if why == "failed" else 200)
        if why == "in doubt":
            world.made.index.precise.gap(0)
        elif why == "gone":
            world.made.index.forget(0)
        world.clock.advance(token_check.WAIT_S)
        world.made.index.tick()
    assert world.made.state()["prompts_missed"] == 0


def test_what_was_only_speculated_was_not_found() -> None:
    world = World(speculativeIndexing=True, speculativeTTL="1h")
    world.engines[0].stores(tokens_of(9, 16))
    played(world, wrong, token_check.WINDOW)
    assert world.made.index.mismatches == 1


def test_answers_waiting_to_be_judged_and_models_have_limits() -> None:
    world = World()
    world.engines[0].stores(tokens_of(9, 16))
    for number in range(token_check.PENDING_MAX + 50):
        request = prompted(tokens_of(100 + number, 40), target_model=f"model-{number}")
        world.sends(request, world.one)
        world.answers(request, world.one)
    world.clock.advance(token_check.WAIT_S)
    world.made.index.tick()
    assert world.made.state()["prompts_missed"] == token_check.PENDING_MAX
    played(world, wrong, 2 * token_check.WINDOW, first=5_000, model="one more")
    assert world.made.index.check.wrong == set(), "names come from clients"


# As a part of the picker


def test_it_is_one_index_to_whoever_gives_out_slots() -> None:
    world = World()
    index = world.made.index
    assert isinstance(index, EndpointIndex)
    tokens = tokens_of(1, 640)
    world.engines[0].stores(tokens)
    world.sends(prompted(tokens), world.one)
    assert index.held_blocks(0) == index.blocks == 40 + 10
    freed: list[int] = []
    world.made.removed(world.one)
    index.forget(0, freed.append)
    while index.tick():
        pass
    assert (freed, index.blocks, len(index)) == ([0], 0, 0)
    assert world.matched(prompted(tokens)) == {}
    assert not index.precise.trusted(0)
    assert [each["name"] for each in world.made.state()["endpoints"]] == ["pod-2", "pod-3"]


def test_an_answer_of_an_endpoint_that_is_gone_is_not_held_against_who_has_its_slot_now() -> None:
    world = World()
    for number in range(2 * token_check.WINDOW):
        tokens = tokens_of(number, 40)
        request = prompted(tokens)
        world.engines[0].stores(tokens_of(-1, 16))
        world.sends(request, world.one)
        world.made.index.forget(world.one.slot)
        world.made.index.tick()
        world.engines[0].stores(tokens_of(-2, 16))  # another, in its slot
        world.answers(request, world.one, cached=0)
        world.clock.advance(token_check.WAIT_S)
        world.made.index.tick()
    check, predictions = world.made.index.check, world.made.index.predictions
    assert (check.found_total, check.missed_total, predictions.exact) == (0, 0, 0)
    assert not check.wrong
    request = prompted(tokens_of(5, 40))
    world.sends(request, world.one)
    world.engines[0].stores(tokens_of(5, 40))
    world.answers(request, world.one, cached=0)
    assert (check.found_total, predictions.exact) == (1, 1)


def test_of_loras_the_ones_heard_of_last_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_view, "LORAS_MAX", 3)
    world, tokens = World(), tokens_of(1, 49)
    for name in ("a", "\x007", "b", "c", "a", "d", "e"):
        world.engines[0].stores(tokens, lora=name)
    assert list(world.made.index.precise.loras) == ["c", "d", "e"]
    world.engines[0].stores(tokens, lora="a")
    assert world.matched(prompted(tokens, target_model="a")) == {0: 48}
    assert world.matched(prompted(tokens, target_model="b")) == {}, "taken for the base model: nothing of that is there"


def test_a_restarted_engine_has_nothing() -> None:
    world = World()
    tokens = tokens_of(1, 640)
    world.engines[0].stores(tokens)
    world.sends(prompted(tokens), world.silent)
    world.made.index.reset(0)
    world.made.index.reset(world.silent.slot)
    assert world.matched(prompted(tokens)) == {}


CONFIG = """
apiVersion: llm-d.ai/v1alpha1
kind: EndpointPickerConfig
plugins:
- {type: precise-prefix-cache-producer, parameters: {speculativeIndexing: true, speculativeTTL: 3s}}
- {type: prefix-cache-scorer}
"""


def test_in_a_picker_it_forgets_ages_and_starts_anew_with_the_endpoints() -> None:
    world = core(2, config=CONFIG)
    made = world.built.plugins[NAME]
    assert isinstance(made, PrecisePrefixCacheProducer)
    assert list(world.built.indexes) == [(NAME, NAME)]
    one, two = (world.endpoint(number) for number in (1, 2))
    engines = [Engine(made, endpoint) for endpoint in (one, two)]
    tokens = tokens_of(1, 97)

    def matched() -> dict[int, int]:
        request = prompted(tokens)
        made.produce(request, world.datastore.ready)
        assert request.prefix is not None
        return request.prefix.matched_tokens

    engines[0].stores(tokens)
    engines[1].stores(tokens_of(9, 16))
    world.director.route(prompted(tokens, path="/v1/chat/completions"), None, ("10.0.0.2",), 0.0).finish(complete=True)
    assert matched() == {one.slot: 96, two.slot: 96}
    world.clock.advance(3.1)
    world.policy.tick()
    assert matched() == {one.slot: 96}
    world.policy.restarted(one)
    assert matched() == {}
    engines[0].stores(tokens)
    world.datastore.apply([spec(2), spec(3)])
    world.policy.tick()
    world.datastore.apply([spec(2), spec(3), spec(4)])
    assert world.endpoint(4).slot == one.slot, "given out again"
    assert matched() == {}
    assert made.state()["endpoints"] == [
        {"name": "pod-2", "trusted": True, "blocks": 1, "gaps": 0},
        {"name": "pod-3", "trusted": False, "blocks": 0, "gaps": 0},
        {"name": "pod-4", "trusted": False, "blocks": 0, "gaps": 0},
    ]


def test_what_it_shows_of_itself_names_no_prompt() -> None:
    world = World()
    tokens = tokens_of(1, 64)
    world.engines[0].stores(tokens, salt="secret-salt")
    world.made.index.precise.gap(1)
    world.sends(prompted(tokens, cache_salt="secret-salt"), world.one)
    state = world.made.state()
    shown = [
        {"name": f"pod-{number + 1}", "trusted": number == 0, "blocks": 4 * (number == 0), "gaps": int(number == 1)} for number in range(3)
    ]
    assert state["endpoints"] == shown
    assert state["block_tokens"] == [BLOCK]
    text = json.dumps(state)
    assert "secret-salt" not in text
    assert not any(str(token) in text for token in tokens if token > 9_999)


@pytest.mark.parametrize(
    ("indexer", "budget_bytes"),
    [
        ({}, 2 << 30),
        ({"costAwareMemoryConfig": {}}, 2 << 30),
        ({"costAwareMemoryConfig": {"size": "500 MB"}}, 500_000_000),
        ({"costAwareMemoryConfig": {"size": "64MiB"}}, 64 << 20),
        ({"costAwareMemoryConfig": {"size": "3000000K"}}, 3_000_000_000),
        ({"costAwareMemoryConfig": {"size": "4096kiB"}}, 4 << 20),
        ({"costAwareMemoryConfig": {"size": "1"}}, BUDGET_BYTES_MIN),
        ({"inMemoryConfig": {}}, 2 << 30),
        ({"inMemoryConfig": {"size": 10_000, "podCacheSize": 2}}, 10_000 * (BLOCK_BYTES + 2 * ENTRY_BYTES)),
        ({"inMemoryConfig": {"size": 10_000}, "costAwareMemoryConfig": {"size": "1GiB"}}, 1 << 30),
    ],
)
def test_how_much_memory_it_takes(indexer: dict[str, Any], budget_bytes: int) -> None:
    made = msgspec.convert({"indexerConfig": {"kvBlockIndexConfig": indexer}}, PrecisePrefixCacheProducer)
    assert made.index.precise.budget_bytes == budget_bytes


def test_a_gpu_that_is_worth_nothing_is_a_fault() -> None:
    with pytest.raises(msgspec.ValidationError, match="gpu"):
        msgspec.convert({"indexerConfig": {"kvCacheBackendConfigs": [{"name": "gpu", "weight": 0}]}}, PrecisePrefixCacheProducer)


def test_what_an_old_scorer_was_told_is_what_a_producer_is() -> None:
    old = {
        "tokenProcessorConfig": {"blockSize": 64, "hashSeed": "42"},
        "kvEventsConfig": {"zmqEndpoint": "tcp://*:5557"},
        "indexerConfig": {"tokenizersPoolConfig": {"hf": {}}, "kvCacheBackendConfigs": [{"name": "gpu"}], "prefixStoreConfig": {}},
        "speculativeIndexing": True,
        "speculativeTTL": "5s",
    }
    made = msgspec.convert(PrecisePrefixCacheScorer.producer_parameters(old), PrecisePrefixCacheProducer)
    assert made.kv_events_config.zmq_endpoint == "tcp://*:5557"
    assert (made.token_processor_config.block_size, made.speculative_indexing, made.speculative_ttl) == (64, True, "5s")
    assert [each.name for each in made.indexer_config.kv_cache_backend_configs] == ["gpu"]
    inside = {"indexerConfig": {"tokenProcessorConfig": {"blockSize": 128}}}
    assert PrecisePrefixCacheScorer.producer_parameters(inside) == {"tokenProcessorConfig": {"blockSize": 128}}
    assert PrecisePrefixCacheScorer.producer_parameters({}) == {}


OLD = """
apiVersion: llm-d.ai/v1alpha1
kind: EndpointPickerConfig
plugins:
- {{type: precise-prefix-cache-scorer, parameters: {parameters}}}
{more}
"""


@pytest.mark.parametrize(
    ("parameters", "more", "producers"),
    [
        ({"kvEventsConfig": {"podDiscoveryConfig": {"socketPort": 5560}}}, "", [NAME]),
        ({}, "", ["approx-prefix-cache-producer"]),
        ({"kvEventsConfig": {"podDiscoveryConfig": {"socketPort": "of old"}}}, "", ["approx-prefix-cache-producer"]),
        ({"kvEventsConfig": {"topicFilter": "x"}}, "- {type: approx-prefix-cache-producer, name: mine}", ["mine"]),
    ],
)
def test_an_old_scorer_brings_its_producer(parameters: dict[str, Any], more: str, producers: list[str]) -> None:
    world = core(1, config=OLD.format(parameters=json.dumps(parameters), more=more))
    assert [name for name, _ in world.built.indexes] == producers
    made = world.built.plugins[producers[0]]
    if isinstance(made, PrecisePrefixCacheProducer):
        assert made.kv_events_config.pod_discovery_config is not None
        assert made.kv_events_config.pod_discovery_config.socket_port == 5560
