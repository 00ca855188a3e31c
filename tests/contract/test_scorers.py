"""The contract of every scorer."""

from __future__ import annotations

import random
from math import isfinite

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from epp.plugins.base import PointwiseScorer, RangeScorer
from epp.types import Decision, Endpoint, LLMRequest
from tests.builders import llm_request
from tests.contract.situations import CLASSES, Case, cases, ready, situations, state_of

SCORERS = cases("score")
Situation = tuple[LLMRequest, list[Endpoint]]


def ids(case: Case) -> str:
    return str(case)


@pytest.mark.parametrize("case", SCORERS, ids=ids)
@settings(deadline=None, max_examples=40)
@given(situations())
def test_scores_are_one_finite_number_from_0_to_1_per_endpoint_and_nothing_is_changed(case: Case, situation: Situation) -> None:
    request, endpoints = situation
    scorer = ready(case, endpoints)
    before = state_of(endpoints)
    scores = scorer.score(request, tuple(endpoints))
    assert len(scores) == len(endpoints)
    assert all(isfinite(score) and 0.0 <= score <= 1.0 for score in scores)
    assert state_of(endpoints) == before
    assert list(scorer.score(request, tuple(endpoints))) == list(scores), "asked again, the same answer"


@pytest.mark.parametrize("case", SCORERS, ids=ids)
@settings(deadline=None, max_examples=40)
@given(situations(), st.randoms(use_true_random=False))
def test_scores_do_not_depend_on_the_order_of_endpoints(case: Case, situation: Situation, rng: random.Random) -> None:
    request, endpoints = situation
    scorer = ready(case, endpoints)
    by_slot = dict(zip((e.slot for e in endpoints), scorer.score(request, tuple(endpoints)), strict=True))
    shuffled = tuple(rng.sample(endpoints, len(endpoints)))
    assert list(scorer.score(request, shuffled)) == [by_slot[e.slot] for e in shuffled]


@pytest.mark.parametrize("case", SCORERS, ids=ids)
@settings(deadline=None, max_examples=20)
@given(situations(), situations())
def test_what_a_scorer_keeps_for_one_set_of_candidates_is_not_told_of_another(case: Case, one: Situation, two: Situation) -> None:
    request, endpoints = one
    fresh = list(ready(case, endpoints).score(request, tuple(endpoints)))
    used = ready(case, endpoints)
    used.score(two[0], tuple(two[1]))
    used.score(two[0], tuple(endpoints))
    assert list(used.score(request, tuple(endpoints))) == fresh


@pytest.mark.parametrize("case", cases("score_sparse"), ids=ids)
@settings(deadline=None, max_examples=50)
@given(situations())
def test_sparse_scores_are_the_scores(case: Case, situation: Situation) -> None:
    request, endpoints = situation
    scorer = ready(case, endpoints)
    if hasattr(scorer, "picked"):
        scorer.picked(request, Decision(endpoints[0], (), "default"))
    sparse = scorer.score_sparse(request)
    assert [sparse.get(e.slot, 0.0) for e in endpoints] == list(scorer.score(request, endpoints))
    assert all(isfinite(score) and 0.0 <= score <= 1.0 for score in sparse.values())


@pytest.mark.parametrize("case", [case for case in SCORERS if not CLASSES[case.type].per_request], ids=ids)  # type: ignore[attr-defined]
@settings(deadline=None, max_examples=50)
@given(situations())
def test_a_scorer_of_load_does_not_look_at_the_request(case: Case, situation: Situation) -> None:
    request, endpoints = situation
    scorer = ready(case, endpoints)
    assert list(scorer.score(request, endpoints)) == list(scorer.score(llm_request(), endpoints))


@pytest.mark.parametrize("case", [case for case in SCORERS if issubclass(CLASSES[case.type], PointwiseScorer)], ids=ids)
@settings(deadline=None, max_examples=50)
@given(situations())
def test_a_pointwise_scorers_endpoints_are_scored_alone(case: Case, situation: Situation) -> None:
    request, endpoints = situation
    scorer = ready(case, endpoints)
    assert list(scorer.score(request, endpoints)) == [scorer.score(request, [e])[0] for e in endpoints]


def test_load_scorers_are_computed_change_by_change() -> None:
    """What the pipeline need not compute whole: the reason `profile: llm-d` costs the same at any size."""
    for type_ in ("queue-scorer", "running-requests-size-scorer", "kv-cache-utilization-scorer", "load-aware-scorer"):
        assert issubclass(CLASSES[type_], PointwiseScorer | RangeScorer), type_
