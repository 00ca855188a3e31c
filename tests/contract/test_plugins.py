"""The contract of every built-in plugin, and the formulas, worked out by hand."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from math import isfinite

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from epp.plugins.base import Filter, Picker, Plugin, Producer, Scorer, SparseScorer
from epp.plugins.pickers.max_score import MaxScorePicker
from epp.plugins.producers.approx_prefix_cache import ApproxPrefixCacheProducer
from epp.plugins.registry import BUILT_IN, Registry
from epp.types import Endpoint, LLMRequest, PrefixMatch
from tests.builders import llm_request, pool_of

ROLES = (Filter, Scorer, Picker, Producer)


def built(cls: type[Plugin], **parameters: object) -> Plugin:
    registry = Registry()
    assert registry.problems(cls.type, parameters, "plugins[0]") == []
    return registry.build(cls.type, parameters, cls.type)


def of_role(role: type) -> list[type[Plugin]]:
    return [cls for cls in BUILT_IN if isinstance(built(cls), role)]


LOADS = st.fixed_dictionaries(
    {
        "waiting": st.sampled_from([0.0, 1.0, 3.0, 1e9]) | st.floats(0, 100),
        "running": st.sampled_from([0.0, 2.0, 1e9]) | st.floats(0, 300),
        "kv_usage": st.sampled_from([0.0, 1.0]) | st.floats(0, 1),
        "kv_capacity_tokens": st.sampled_from([0, 1, 16, 500_000]),
        "sent_requests": st.integers(0, 5),
        "sent_tokens": st.integers(0, 1_000_000),
    }
)


@st.composite
def situations(draw: st.DrawFn) -> tuple[LLMRequest, list[Endpoint]]:
    endpoints = pool_of(*draw(st.lists(LOADS, min_size=1, max_size=8)))
    total = draw(st.integers(1, 200_000))
    matched = draw(st.dictionaries(st.integers(0, 10), st.integers(1, total), max_size=8))
    prefix = draw(st.sampled_from([None, PrefixMatch([1], [64], total, matched), PrefixMatch([], [], total, {})]))
    return llm_request(prompt_tokens=total, prefix=prefix), endpoints


def state_of(endpoints: Sequence[Endpoint]) -> list[dict[str, object]]:
    return [{name: getattr(each, name) for name in Endpoint.__slots__} for each in endpoints]


# Every plugin


@pytest.mark.parametrize("cls", BUILT_IN)
def test_a_type_is_a_lower_case_name_and_its_own(cls: type[Plugin]) -> None:
    assert cls.type == cls.type.lower()
    assert cls.type.replace("-", "").isalnum()
    assert [other.type for other in BUILT_IN].count(cls.type) == 1
    assert built(cls).name == cls.type


@pytest.mark.parametrize("cls", BUILT_IN)
def test_unknown_parameters_are_a_problem_that_names_them(cls: type[Plugin]) -> None:
    (problem,) = Registry().problems(cls.type, {"noSuchParameter": 1}, "plugins[3]")
    assert problem.path == "plugins[3].parameters.noSuchParameter"
    with pytest.raises(msgspec.ValidationError, match="noSuchParameter"):
        Registry().build(cls.type, {"noSuchParameter": 1}, "x")


@pytest.mark.parametrize("cls", BUILT_IN)
def test_parameters_of_a_wrong_type_are_a_problem_each(cls: type[Plugin]) -> None:
    fields = msgspec.structs.fields(cls)
    wrong = {field.encode_name: {"not": "this"} for field in fields}
    problems = Registry().problems(cls.type, wrong, "plugins[0]")
    assert sorted(problem.path for problem in problems) == sorted(f"plugins[0].parameters.{name}" for name in wrong)


@pytest.mark.parametrize("cls", BUILT_IN)
def test_two_instances_share_no_state(cls: type[Plugin]) -> None:
    one, two = built(cls), built(cls)
    one.named("one")
    assert two.name == cls.type
    if isinstance(one, ApproxPrefixCacheProducer) and isinstance(two, ApproxPrefixCacheProducer):
        assert one.index is not two.index


# Every scorer


@pytest.mark.parametrize("cls", of_role(Scorer))
@settings(deadline=None, max_examples=100)
@given(situations())
def test_scores_are_one_finite_number_from_0_to_1_per_endpoint_and_nothing_is_changed(
    cls: type[Plugin], situation: tuple[LLMRequest, list[Endpoint]]
) -> None:
    scorer = built(cls)
    assert isinstance(scorer, Scorer)
    request, endpoints = situation
    before = state_of(endpoints)
    scores = scorer.score(request, tuple(endpoints))
    assert len(scores) == len(endpoints)
    assert all(isfinite(score) and 0.0 <= score <= 1.0 for score in scores)
    assert state_of(endpoints) == before
    assert list(scorer.score(request, tuple(endpoints))) == list(scores), "asked again, the same answer"


@pytest.mark.parametrize("cls", of_role(Scorer))
@settings(deadline=None, max_examples=100)
@given(situations(), st.randoms(use_true_random=False))
def test_scores_do_not_depend_on_the_order_of_endpoints(
    cls: type[Plugin], situation: tuple[LLMRequest, list[Endpoint]], rng: random.Random
) -> None:
    scorer = built(cls)
    assert isinstance(scorer, Scorer)
    request, endpoints = situation
    by_slot = dict(zip((e.slot for e in endpoints), scorer.score(request, endpoints), strict=True))
    shuffled = rng.sample(endpoints, len(endpoints))
    assert list(scorer.score(request, shuffled)) == [by_slot[e.slot] for e in shuffled]


@pytest.mark.parametrize("cls", of_role(SparseScorer))
@pytest.mark.parametrize("weight", [0.0, 0.4, 1.0])
@settings(deadline=None, max_examples=100)
@given(situations())
def test_sparse_scores_are_the_dense_ones(cls: type[Plugin], weight: float, situation: tuple[LLMRequest, list[Endpoint]]) -> None:
    scorer = built(cls, matchLengthWeight=weight)
    assert isinstance(scorer, Scorer)
    assert isinstance(scorer, SparseScorer)
    request, endpoints = situation
    sparse = scorer.score_sparse(request)
    assert [sparse.get(e.slot, 0.0) for e in endpoints] == list(scorer.score(request, endpoints))
    assert all(isfinite(score) and 0.0 <= score <= 1.0 for score in sparse.values())


@pytest.mark.parametrize("cls", [cls for cls in of_role(Scorer) if not cls.per_request])  # type: ignore[attr-defined]
@settings(deadline=None, max_examples=50)
@given(situations())
def test_a_scorer_of_load_does_not_look_at_the_request(cls: type[Plugin], situation: tuple[LLMRequest, list[Endpoint]]) -> None:
    scorer = built(cls)
    assert isinstance(scorer, Scorer)
    request, endpoints = situation
    assert list(scorer.score(request, endpoints)) == list(scorer.score(llm_request(), endpoints))


GOLDEN: list[tuple[str, dict[str, object], list[dict[str, float]], dict[int, int] | None, list[float]]] = [
    # type, parameters, endpoints, matched tokens of a 1000-token prompt by slot, scores
    ("queue-scorer", {}, [{"waiting": 0.0}, {"waiting": 5.0}, {"waiting": 20.0}], None, [1.0, 0.75, 0.0]),
    ("queue-scorer", {}, [{"waiting": 3.0}, {"waiting": 3.0}], None, [1.0, 1.0]),
    ("queue-scorer", {}, [{"waiting": 9.0}], None, [1.0]),
    # one sent since the reading joins the queue where there is one, else the running batch
    ("queue-scorer", {}, [{"waiting": 1.0, "sent_requests": 1}, {"waiting": 4.0}, {"sent_requests": 9}], None, [0.5, 0.0, 1.0]),
    ("running-requests-size-scorer", {}, [{"running": 2.0}, {"running": 4.0}, {"running": 10.0}], None, [1.0, 0.75, 0.0]),
    ("running-requests-size-scorer", {}, [{"running": 0.0}, {"running": 0.0}], None, [1.0, 1.0]),
    ("running-requests-size-scorer", {}, [{"running": 1.0, "sent_requests": 3}, {"running": 8.0}, {}], None, [0.5, 0.0, 1.0]),
    ("running-requests-size-scorer", {}, [{"running": 1.0, "waiting": 1.0, "sent_requests": 3}, {"running": 2.0}], None, [1.0, 0.0]),
    ("kv-cache-utilization-scorer", {}, [{"kv_usage": 0.0}, {"kv_usage": 0.25}, {"kv_usage": 1.0}], None, [1.0, 0.75, 0.0]),
    (
        "kv-cache-utilization-scorer",
        {},
        [
            {"kv_usage": 0.25, "kv_capacity_tokens": 1000, "sent_tokens": 250},
            {"kv_usage": 0.5, "kv_capacity_tokens": 100, "sent_tokens": 90},
        ],
        None,
        [0.5, 0.0],
    ),
    ("kv-cache-utilization-scorer", {}, [{"kv_usage": 0.25, "sent_tokens": 9_999}], None, [0.75]),
    ("prefix-cache-scorer", {}, [{}, {}, {}], {0: 1000, 2: 250}, [1.0, 0.0, 0.25]),
    ("prefix-cache-scorer", {}, [{}, {}], {}, [0.0, 0.0]),
    ("prefix-cache-scorer", {}, [{}, {}], None, [0.0, 0.0]),
    # (1 - w) * 250/1000 + w * min(1, 250/500)^2
    ("prefix-cache-scorer", {"matchLengthWeight": 1.0, "matchLengthScaleTokens": 500}, [{}, {}], {0: 250, 1: 900}, [0.25, 1.0]),
    ("prefix-cache-scorer", {"matchLengthWeight": 0.5, "matchLengthScaleTokens": 500}, [{}, {}], {0: 500, 1: 250}, [0.75, 0.25]),
]


@pytest.mark.parametrize(("type_", "parameters", "states", "matched", "scores"), GOLDEN)
def test_scores_worked_out_by_hand(
    type_: str, parameters: dict[str, object], states: list[dict[str, float]], matched: dict[int, int] | None, scores: list[float]
) -> None:
    scorer = Registry().build(type_, parameters, "x")
    assert isinstance(scorer, Scorer)
    prefix = None if matched is None else PrefixMatch([], [], 1000, matched)
    assert list(scorer.score(llm_request(prompt_tokens=1000, prefix=prefix), pool_of(*states))) == pytest.approx(scores)


def test_every_scorer_has_golden_scores() -> None:
    assert {cls.type for cls in of_role(Scorer)} == {row[0] for row in GOLDEN}


# Every picker

PICKERS = of_role(Picker)
TOTALS = st.lists(st.sampled_from([0.0, 0.5, 1.0, 7.0]) | st.floats(0, 7), min_size=1, max_size=12)


@pytest.mark.parametrize("cls", PICKERS)
@settings(deadline=None, max_examples=200)
@given(TOTALS, st.integers(1, 5), st.randoms(use_true_random=False))
def test_a_picker_picks_from_the_endpoints_best_first_each_once(
    cls: type[Plugin], totals: list[float], wanted: int, rng: random.Random
) -> None:
    picker = built(cls, maxNumOfEndpoints=wanted)
    assert isinstance(picker, Picker)
    endpoints = pool_of(*[{} for _ in totals])
    given_totals, given_endpoints = list(totals), list(endpoints)
    picked = picker.pick(totals, endpoints, rng)
    assert (totals, endpoints) == (given_totals, given_endpoints)
    assert len(picked) == min(wanted, len(endpoints))
    assert len({e.slot for e in picked}) == len(picked)
    assert set(map(id, picked)) <= set(map(id, endpoints))
    assert [totals[e.slot] for e in picked] == sorted(totals, reverse=True)[: len(picked)]


@pytest.mark.parametrize("cls", PICKERS)
@pytest.mark.parametrize("wanted", [1, 2])
@pytest.mark.parametrize("totals", [[1.0] * 5, [0.0, 1.0, 1.0, 0.5, 1.0], [0.0] * 3])
def test_a_picker_is_uniform_among_ties(cls: type[Plugin], wanted: int, totals: list[float]) -> None:
    picker = built(cls, maxNumOfEndpoints=wanted)
    assert isinstance(picker, Picker)
    endpoints = pool_of(*[{} for _ in totals])
    rng = random.Random(11)
    draws = 6_000
    counts = Counter(picker.pick(totals, endpoints, rng)[0].slot for _ in range(draws))
    best = [slot for slot, total in enumerate(totals) if total == max(totals)]
    assert sorted(counts) == best
    expected = draws / len(best)
    chi_square = sum((counts[slot] - expected) ** 2 / expected for slot in best)
    assert chi_square < 20, counts  # p < 0.0005 at 4 degrees of freedom; the seed is fixed


@pytest.mark.parametrize("written", [0, -1])
def test_fewer_than_one_endpoint_is_one(written: int) -> None:
    endpoints = pool_of({}, {})
    assert MaxScorePicker(max_num_of_endpoints=written).pick([0.0, 1.0], endpoints, random.Random(1)) == (endpoints[1],)


# The prefix producer


def producer(**parameters: object) -> ApproxPrefixCacheProducer:
    made = built(ApproxPrefixCacheProducer, **parameters)
    assert isinstance(made, ApproxPrefixCacheProducer)
    return made


def prompted(text: bytes, **values: object) -> LLMRequest:
    return llm_request(prompt=text, prompt_tokens=-(-len(text) // 4), target_model="m", **values)


def test_the_producer_finds_what_was_picked_before_and_only_that() -> None:
    made = producer()
    first, second = pool_of({}, {})
    text = bytes(range(256)) * 8  # 512 tokens, 8 blocks
    request = prompted(text)
    made.produce(request, 0b11)
    assert request.prefix is not None
    assert request.prefix.matched_tokens == {}
    made.picked(request, first)
    longer = prompted(text + b"more" * 100)
    made.produce(longer, 0b11)
    assert longer.prefix is not None
    assert longer.prefix.matched_tokens == {first.slot: 512}
    for other in (prompted(text, cache_salt="s"), llm_request(prompt=text, prompt_tokens=512, target_model="other")):
        made.produce(other, 0b11)
        assert other.prefix is not None
        assert other.prefix.matched_tokens == {}, "another tenant or model shares nothing"
    only_second = prompted(text)
    made.produce(only_second, 1 << second.slot)
    assert only_second.prefix is not None
    assert only_second.prefix.matched_tokens == {}


def test_the_producer_says_nothing_of_a_request_without_a_prompt() -> None:
    made = producer()
    request = llm_request()
    made.produce(request, 1)
    assert request.prefix is None
    made.picked(request, pool_of({})[0])
    assert made.index.blocks == 0


def test_a_prompt_shorter_than_a_block_matches_nothing() -> None:
    made = producer()
    request = prompted(b"x" * 255)
    made.produce(request, 1)
    made.picked(request, pool_of({})[0])
    assert request.prefix is not None
    assert (request.prefix.hashes, request.prefix.matched_tokens) == ([], {})


@pytest.mark.parametrize("auto_tune", [True, False])
def test_the_size_of_the_engines_cache_bounds_what_is_remembered_if_auto_tune_is_on(auto_tune: bool) -> None:
    made = producer(autoTune=auto_tune)
    (endpoint,) = pool_of({"kv_capacity_tokens": 64 * 10})
    for number in range(100):
        request = prompted(number.to_bytes(256, "big") + bytes(256))
        made.produce(request, 1)
        made.picked(request, endpoint)
    assert made.index.held_blocks(0) <= 20 if auto_tune else made.index.held_blocks(0) == 200


def test_an_endpoint_that_takes_over_a_slot_is_bounded_by_its_cache_as_the_one_before() -> None:
    """The slot was forgotten in the index, its bound with it; the newcomer's cache has the same size."""
    made = producer()
    for _ in range(2):
        (endpoint,) = pool_of({"kv_capacity_tokens": 64 * 10})
        for number in range(100):
            request = prompted(number.to_bytes(256, "big") + bytes(256))
            made.produce(request, 1)
            made.picked(request, endpoint)
        assert made.index.held_blocks(0) <= 20
        made.index.forget(endpoint.slot)
        while made.index.tick():
            pass


@pytest.mark.parametrize(
    ("parameters", "blocks"),
    [
        ({}, 128),
        ({"blockGrowth": "uniform"}, 2_048),
        ({"blockSizeTokens": 128, "blockGrowth": "uniform"}, 1_024),
        ({"maxPrefixTokensToMatch": 6_400}, 57),
        ({"maxPrefixTokensToMatch": 6_400, "blockGrowth": "uniform"}, 100),
        ({"maxPrefixTokensToMatch": 0, "maxPrefixBlocksToMatch": 50, "blockGrowth": "uniform"}, 50),
    ],
)
def test_how_many_blocks_a_long_prompt_is_cut_into(parameters: dict[str, object], blocks: int) -> None:
    made = producer(**parameters)
    request = prompted(bytes(4 * 131_072))
    made.produce(request, 1)
    assert request.prefix is not None
    assert len(request.prefix.hashes) == blocks
