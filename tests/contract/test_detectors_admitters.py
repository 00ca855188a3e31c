"""Detectors and admitters: how full a pool is, and who is turned away."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Any

import pytest
from hypothesis import given, settings

from epp.errors import SaturatedError
from epp.types import Endpoint, LLMRequest, Prediction
from tests.builders import llm_request, pool_of
from tests.contract.situations import NOW_S, Case, cases, ready, situations, state_of

Situation = tuple[LLMRequest, list[Endpoint]]


@pytest.mark.parametrize("case", cases("saturation"), ids=str)
@settings(deadline=None, max_examples=40)
@given(situations())
def test_saturation_is_finite_not_below_0_and_looks_only(case: Case, situation: Situation) -> None:
    _, endpoints = situation
    detector = ready(case, endpoints)
    before = state_of(endpoints)
    saturation = detector.saturation(endpoints)
    assert isfinite(saturation)
    assert saturation >= 0
    assert detector.saturation(endpoints[::-1]) == pytest.approx(saturation)
    assert state_of(endpoints) == before
    assert detector.saturation([]) == 1.0


FRESH = {"scraped_at_s": NOW_S - 2.9}
WITHOUT_METRICS = {"trusted": 0.0}
"""As `Datastore.record_answer` leaves an endpoint."""


@pytest.mark.parametrize(
    ("type_", "parameters", "states", "saturation"),
    [
        # (30 + 90) / 200
        ("concurrency-detector", {}, [{"inflight_requests": 30}, {"inflight_requests": 90}], 0.6),
        ("concurrency-detector", {"maxConcurrency": 10}, [{"inflight_requests": 30}], 3.0),
        # (1000 + 0) / 4000
        (
            "concurrency-detector",
            {"concurrencyMode": "tokens", "maxTokenConcurrency": 2000},
            [{"inflight_tokens": 1000, "inflight_requests": 99}, {}],
            0.25,
        ),
        # max(0.5, 0.1), max(0.2, 0.4)
        (
            "concurrency-detector",
            {"concurrencyMode": "hybrid", "maxTokenConcurrency": 1000, "maxConcurrency": 10},
            [{"inflight_requests": 5, "inflight_tokens": 100}, {"inflight_requests": 2, "inflight_tokens": 400}],
            0.45,
        ),
        # max(1/5, 0.4/0.8), max(10/5, 0)
        ("utilization-detector", {}, [{**FRESH, "waiting": 1.0, "kv_usage": 0.4}, {**FRESH, "waiting": 10.0}], 1.25),
        # a reading too old, and none at all, count 1
        ("utilization-detector", {}, [FRESH, {"scraped_at_s": NOW_S - 3.1}, {}, FRESH], 0.5),
        # no metrics at all: what is in flight counts as waiting. Not one that stopped answering, which is as one with too old a reading
        ("utilization-detector", {}, [{**WITHOUT_METRICS, "waiting": 9.0, "kv_usage": 1.0}], 0.0),
        ("utilization-detector", {}, [{**WITHOUT_METRICS, "inflight_requests": 7}, {**FRESH, "waiting": 1.0}], 0.8),
        ("utilization-detector", {}, [{**WITHOUT_METRICS, "scrape_failures": 1}], 1.0),
        ("utilization-detector", {}, [{**WITHOUT_METRICS, "scraped_at_s": NOW_S - 60}], 0.0),
        ("utilization-detector", {}, [{"trusted": 0.5, "scrape_failures": 3, "scraped_at_s": NOW_S - 6}], 1.0),
        # 3 s is the least that is taken for old, more if asked
        ("utilization-detector", {"metricsStalenessThreshold": "200ms"}, [{"scraped_at_s": NOW_S - 2.9}], 0.0),
        ("utilization-detector", {"metricsStalenessThreshold": "1m"}, [{"scraped_at_s": NOW_S - 59}], 0.0),
        ("utilization-detector", {"metricsStalenessThreshold": "1m"}, [{"scraped_at_s": NOW_S - 61}], 1.0),
        (
            "utilization-detector",
            {"queueDepthThreshold": 2, "kvCacheUtilThreshold": 1.0},
            [{**FRESH, "waiting": 1.0, "kv_usage": 0.1}],
            0.5,
        ),
    ],
)
def test_saturation_worked_out_by_hand(type_: str, parameters: Mapping[str, Any], states: Sequence[Any], saturation: float) -> None:
    endpoints = pool_of(*states)
    assert ready(Case(type_, parameters), endpoints).saturation(endpoints) == pytest.approx(saturation)


@pytest.mark.parametrize(
    ("states", "kept"),
    [
        ([{**FRESH, "waiting": 5.0}, {**WITHOUT_METRICS, "inflight_requests": 4}, WITHOUT_METRICS], [1, 2]),
        ([{**WITHOUT_METRICS, "inflight_requests": 5}, FRESH], [1]),
        ([{**WITHOUT_METRICS, "scrape_failures": 1}, FRESH], [1]),
        ([{**FRESH, "waiting": 5.0}, {}], [0, 1]),  # all where none is
    ],
)
def test_engines_without_metrics_are_left_out_for_what_is_in_flight_there_alone(states: Sequence[Any], kept: list[int]) -> None:
    endpoints = pool_of(*states)
    assert [each.slot for each in ready(Case("utilization-detector"), endpoints).keep(llm_request(), endpoints)] == kept


def refusals(admitter: Any, request: LLMRequest, endpoints: Sequence[Endpoint], draws: int) -> int:
    refused = 0
    for _ in range(draws):
        try:
            admitter.admit(request, endpoints)
        except SaturatedError as error:
            assert error.http_status == 429  # noqa: PT017 - any of the draws may raise
            refused += 1
    return refused


@pytest.mark.parametrize("case", cases("admit"), ids=str)
@settings(deadline=None, max_examples=40)
@given(situations())
def test_who_is_not_sheddable_is_never_refused_and_nothing_is_changed(case: Case, situation: Situation) -> None:
    request, endpoints = situation
    admitter = ready(case, endpoints)
    before = state_of(endpoints)
    refused = refusals(admitter, request, endpoints, 3)
    assert not refused or request.priority < 0
    assert state_of(endpoints) == before


@pytest.mark.parametrize(
    ("states", "share"),
    [
        ([{"waiting": 1.0}], 0.096),  # s = 1/5: 0.2^5 * 300
        ([{"waiting": 1.0}, {"kv_usage": 0.16}], 0.096),  # (1/5 + 0.16/0.8) / 2
        ([{"waiting": 0.0}], 0.0),
        ([{"kv_usage": 0.4}], 1.0),  # s = 0.5: 0.5^5 * 300 = 9.4
        ([{"waiting": 1e80}], 1.0),  # s^5 is no number any more
    ],
)
def test_a_pool_sheds_the_more_the_fuller_it_is(states: list[Any], share: float) -> None:
    endpoints = pool_of(*states)
    refused = refusals(ready(Case("probabilistic-admitter")), llm_request(priority=-1), endpoints, 4000)
    assert refused == pytest.approx(4000 * share, abs=90)  # 4.8 standard deviations at 0.096; the seed is fixed
    assert refusals(ready(Case("probabilistic-admitter")), llm_request(priority=0), endpoints, 50) == 0


def test_the_probability_of_being_shed_is_what_the_parameters_say() -> None:
    admitter = ready(Case("probabilistic-admitter", {"power": 2, "k": 0.5}))
    assert admitter.probability(0.5) == pytest.approx(0.125)
    assert admitter.probability(2.0) == 1.0


LOADED = {"kv_usage": 0.5, "running": 3.0}


def test_a_sheddable_request_that_no_endpoint_can_serve_in_time_is_refused() -> None:
    admitter = ready(Case("latency-slo-admitter"))
    slow, fast = Prediction(9, 1, -4, 0.5), Prediction(1, 0.1, 4, 0.5)

    def refused(predictions: dict[int, Prediction] | None, *states: dict[str, Any], priority: int = -1, slo: str = "5000") -> bool:
        request = llm_request(priority=priority, headers={"x-llm-d-slo-ttft-ms": slo})
        if predictions is not None:
            request.attributes["latency-prediction"] = predictions
        return bool(refusals(admitter, request, pool_of(*states), 1))

    assert refused({0: slow, 1: slow}, LOADED, LOADED)
    assert refused({0: slow}, LOADED, LOADED), "nothing is known of the second"
    assert not refused({0: slow, 1: fast}, LOADED, LOADED)
    assert not refused({0: slow, 1: slow}, LOADED, {**LOADED, "running": 0.0}), "one is idle"
    assert not refused({0: slow, 1: slow}, LOADED, {**LOADED, "kv_usage": 0.019}), "one is cold"
    assert not refused({0: slow, 1: slow}, LOADED, LOADED, priority=0)
    assert not refused({0: slow, 1: slow}, LOADED, LOADED, slo="0"), "no objective"
    assert not refused({0: slow, 1: slow}, LOADED, LOADED, slo="soon"), "no objective"
    assert not refused({}, LOADED, LOADED)
    assert not refused(None, LOADED, LOADED)


@pytest.mark.parametrize("header", ["x-llm-d-slo-ttft-ms", "x-slo-ttft-ms", "x-llm-d-slo-tpot-ms", "x-slo-tpot-ms"])
def test_an_objective_may_be_named_the_old_way_too(header: str) -> None:
    request = llm_request(priority=-1, headers={header: "1.5"}, attributes={"latency-prediction": {0: Prediction(9, 1, 1, -1)}})
    with pytest.raises(SaturatedError):
        ready(Case("latency-slo-admitter")).admit(request, pool_of(LOADED))
