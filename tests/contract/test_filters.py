"""The contract of every filter, and what each keeps, worked out by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import inf
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings

from epp.plugins.registry import Registry
from epp.types import Endpoint, LLMRequest, Prediction, PrefixMatch
from tests.builders import llm_request, pool_of
from tests.contract.situations import CLASSES, NOW_S, Case, cases, ready, situations, state_of

FILTERS = cases("keep")
Situation = tuple[LLMRequest, list[Endpoint]]
ROLE = "llm-d.ai/role"


@pytest.mark.parametrize("case", FILTERS, ids=str)
@settings(deadline=None, max_examples=40)
@given(situations())
def test_a_filter_keeps_some_in_order_and_changes_nothing(case: Case, situation: Situation) -> None:
    request, endpoints = situation
    each = ready(case, endpoints)
    before = state_of(endpoints)
    kept = each.keep(request, tuple(endpoints))
    slots = [e.slot for e in kept]
    assert slots == [e.slot for e in endpoints if e.slot in set(slots)]
    assert all(e is endpoints[e.slot] for e in kept)
    assert state_of(endpoints) == before


FAIL_OPEN = [
    "header-based-testing-filter",
    "prefix-cache-affinity-filter",
    "session-affinity-filter",
    "slo-headroom-tier-filter",
    "topology-affinity-filter",
    "utilization-detector",
]


@pytest.mark.parametrize("type_", FAIL_OPEN)
def test_a_preference_without_anything_to_go_by_keeps_all(type_: str) -> None:
    endpoints = tuple(pool_of({"waiting": 1e6}, {"waiting": 1e6}))
    assert list(ready(Case(type_), endpoints).keep(llm_request(), endpoints)) == list(endpoints)


@pytest.mark.parametrize("case", [case for case in FILTERS if not getattr(CLASSES[case.type], "per_request", True)], ids=str)
@settings(deadline=None, max_examples=20)
@given(situations(), situations())
def test_a_filter_of_labels_looks_at_labels_alone(case: Case, situation: Situation, other: Situation) -> None:
    request, endpoints = situation
    relabelled = pool_of(*[{"labels": e.labels} for e in endpoints])
    kept = [e.slot for e in ready(case).keep(request, tuple(endpoints))]
    assert kept == [e.slot for e in ready(case).keep(other[0], tuple(relabelled))]


class Row(NamedTuple):
    """A filter, its parameters, endpoints' state by slot, and the slots it keeps for a request of 1000 tokens."""

    type: str
    kept: Sequence[int]
    endpoints: Sequence[Mapping[str, Any]]
    parameters: Mapping[str, Any] = {}
    matched: Mapping[int, int] | None = None
    headers: Mapping[str, str] = {}
    predictions: Mapping[int, tuple[float, float]] | None = None
    """slot -> TTFT in seconds, least headroom."""


def labels(*values: str | None, key: str = "l") -> list[dict[str, Any]]:
    return [{"labels": {} if value is None else {key: value}} for value in values]


def expression(operator: str, *values: str) -> dict[str, Any]:
    return {"matchExpressions": [{"key": "l", "operator": operator, "values": list(values)}]}


def threshold(operator: str, value: float, **more: Any) -> dict[str, Any]:
    return {"attribute": "g", "algorithm": {"type": "threshold", "threshold": {"operator": operator, "value": value}}, **more}


def gpu(*values: float | None) -> list[dict[str, Any]]:
    return [{"attributes": {} if value is None else {"g": value}} for value in values]


def below(**limits: float) -> dict[str, Any]:
    return {"conditions": [{"metric": name.replace("_", "-"), "maxValue": value} for name, value in limits.items()]}


ROLES = labels(None, "decode", "prefill", "encode", "both", "prefill-decode", "encode-prefill", "encode-prefill-decode", "other", key=ROLE)
FRESH = {"scraped_at_s": NOW_S - 2.9}
PAIR = [{"inflight_tokens": 0}, {"inflight_tokens": 0}]

GOLDEN = [
    Row("decode-filter", [0, 1, 4, 5, 7], ROLES),
    Row("prefill-filter", [2, 4, 5, 6, 7], ROLES),
    Row("encode-filter", [3, 6, 7], ROLES),
    Row("by-label", [0, 1], labels("a", "b", "c", None), {"label": "l", "validValues": ["a", "b"]}),
    Row("by-label", [0, 3], labels("a", "b", "", None), {"label": "l", "validValues": ["a"], "allowsNoLabel": True}),
    Row("label-selector-filter", [0, 1], labels("a", None)),
    Row("label-selector-filter", [0], labels("a", "b", None), {"matchLabels": {"l": "a"}}),
    Row("label-selector-filter", [], labels("a", "b"), {"matchLabels": {"l": "a", "m": "x"}}),
    Row("label-selector-filter", [0, 1], labels("a", "b", "c", None), expression("In", "a", "b")),
    Row("label-selector-filter", [2, 3], labels("a", "b", "c", None), expression("NotIn", "a", "b")),
    Row("label-selector-filter", [0, 1], labels("a", "", None), expression("Exists")),
    Row("label-selector-filter", [2], labels("a", "", None), expression("DoesNotExist")),
    Row("label-selector-filter", [1], labels("a", "b", None), {"matchLabels": {"l": "b"}, **expression("Exists")}),
    # within 0-2000; not within 1001-2000; at both ends; no label; no range
    Row("context-length-aware", [0, 2, 3], labels("0-2000", "1001-2000", "1000-1000", None, "x"), {"label": "l", "enableFiltering": True}),
    Row("context-length-aware", [0, 1], labels("0-2000", "1001-2000"), {"label": "l"}),
    Row("header-based-testing-filter", [0, 1, 2], [{}, {}, {}]),
    Row("header-based-testing-filter", [0, 2], [{}, {}, {}], headers={"test-epp-endpoint-selection": "10.0.0.3:8000, 10.0.0.1,10.0.0.1"}),
    Row("header-based-testing-filter", [], [{}, {}], headers={"test-epp-endpoint-selection": "10.0.0.1:9999"}),
    Row("header-based-testing-filter", [], [{}, {}], headers={"test-epp-endpoint-selection": ""}),
    Row("endpoint-attribute-filter", [0, 3], gpu(1, 2, 3, None), threshold("LessThan", 2)),
    Row("endpoint-attribute-filter", [0, 1], gpu(1, 2, 3, None), threshold("LessThanOrEqual", 2, onMissing="Fail")),
    Row("endpoint-attribute-filter", [2], gpu(1, 2, 3), threshold("GreaterThan", 2)),
    Row("endpoint-attribute-filter", [1, 2], gpu(1, 2, 3), threshold("GreaterThanOrEqual", 2)),
    Row("endpoint-attribute-filter", [1], gpu(1, 2, 3), threshold("Equal", 2)),
    Row("endpoint-attribute-filter", [0, 2], gpu(1, 2, 3), threshold("NotEqual", 2)),
    Row("endpoint-attribute-filter", [], gpu(1, 2), threshold("GreaterThan", 9)),
    Row("endpoint-attribute-filter", [0, 1], gpu(1, 2), threshold("GreaterThan", 9, fallbackOnEmpty=True)),
    Row(
        "endpoint-attribute-filter",
        [0],
        [{"waiting": 1.0}, {"waiting": 5.0}],
        {**threshold("LessThan", 5), "attribute": "WaitingQueueSize"},
    ),
    Row("utilization-filter", [0, 1], [{"waiting": q} for q in (0.0, 3.0, 4.0)], below(waiting_queue=3)),
    Row(
        "utilization-filter",
        [0],
        [{"running": 1.0}, {"running": 2.0}, {"inflight_requests": 3}],
        below(running_requests=1, active_requests=2),
    ),
    Row("utilization-filter", [1], [{"kv_usage": 0.9}, {"kv_usage": 0.8}], below(kv_cache_utilization=0.8)),
    Row("utilization-filter", [], [{"waiting": 9.0}], below(waiting_queue=3)),
    Row("utilization-filter", [0], [{"waiting": 9.0}], {**below(waiting_queue=3), "fallbackOnEmpty": True}),
    # 800 of 1000 is enough, 799 is not; nobody has enough; everybody has
    Row("prefix-cache-affinity-filter", [0], PAIR, matched={0: 800, 1: 799}),
    Row("prefix-cache-affinity-filter", [0, 1], PAIR, matched={0: 799, 1: 10}),
    Row("prefix-cache-affinity-filter", [0, 1], PAIR, matched={0: 1000, 1: 1000}),
    Row("prefix-cache-affinity-filter", [0, 1], PAIR, {"affinityThreshold": 0}, {0: 1000}),
    Row("prefix-cache-affinity-filter", [0, 1], PAIR, {"explorationProbability": 1}, {0: 1000}),
    # 1000 tokens a second: (3000 + 0) s - (0 + 1000) s = 2 s, no more than 2000 ms; 1 token more is
    Row(
        "prefix-cache-affinity-filter",
        [0],
        [{"inflight_tokens": 3000}, {}],
        {"peakPrefillThroughput": 1000, "maxTTFTPenaltyMs": 2000},
        {0: 1000},
    ),
    Row(
        "prefix-cache-affinity-filter",
        [0, 1],
        [{"inflight_tokens": 3001}, {}],
        {"peakPrefillThroughput": 1000, "maxTTFTPenaltyMs": 2000},
        {0: 1000},
    ),
    Row("prefix-cache-affinity-filter", [0], [{"inflight_tokens": 10**9}, {}], {"maxTTFTPenaltyMs": 0}, {0: 1000}),
    # both objectives met by 0 and 2 (2 has none); 3 has no prediction
    Row("slo-headroom-tier-filter", [0, 2], [{}] * 4, {"epsilonExploreNeg": 0}, predictions={0: (1, 0.0), 1: (1, -0.1), 2: (1, inf)}),
    Row("slo-headroom-tier-filter", [1, 3], [{}] * 4, {"epsilonExploreNeg": 1}, predictions={0: (1, 0.0), 1: (1, -0.1), 2: (1, inf)}),
    Row("slo-headroom-tier-filter", [0, 1], [{}] * 2, predictions={0: (1, -1)}),
    # requests: fewer than int(2 * 1.5) = 3; tokens: fewer than 100; both
    Row("concurrency-detector", [0, 1], [{"inflight_requests": c} for c in (0, 2, 3)], {"maxConcurrency": 2, "headroom": 0.5}),
    Row(
        "concurrency-detector", [0], [{"inflight_tokens": t} for t in (99, 100)], {"maxTokenConcurrency": 100, "concurrencyMode": "tokens"}
    ),
    Row(
        "concurrency-detector",
        [0],
        [{}, {"inflight_tokens": 100}, {"inflight_requests": 2}],
        {"maxTokenConcurrency": 100, "maxConcurrency": 2, "concurrencyMode": "hybrid"},
    ),
    Row("concurrency-detector", [], [{"inflight_requests": 100}]),
    # queue below 5 and KV below 0.8, fresh
    Row(
        "utilization-detector",
        [0],
        [{**FRESH, "waiting": 4.0, "kv_usage": 0.7}, {**FRESH, "waiting": 5.0}, {**FRESH, "kv_usage": 0.8}, {"scraped_at_s": NOW_S - 3.1}],
    ),
    Row("utilization-detector", [0], [{**FRESH, "waiting": 5.0}, {**FRESH, "waiting": 6.0}], {"headroom": 0.2}),
    Row("utilization-detector", [0, 1], [{**FRESH, "waiting": 5.0}, {}]),
]


@pytest.mark.parametrize("row", GOLDEN, ids=lambda row: row.type)
def test_kept_worked_out_by_hand(row: Row) -> None:
    endpoints = pool_of(*row.endpoints)
    attributes = {}
    if row.predictions is not None:
        attributes["latency-prediction"] = {slot: Prediction(ttft, 0.1, worst, inf) for slot, (ttft, worst) in row.predictions.items()}
    request = llm_request(
        prompt_tokens=1000,
        prefix=None if row.matched is None else PrefixMatch([], [], 1000, dict(row.matched)),
        headers=row.headers,
        attributes=attributes,
    )
    kept = ready(Case(row.type, row.parameters), endpoints).keep(request, tuple(endpoints))
    assert [e.slot for e in kept] == list(row.kept)


ELSEWHERE = {"session-affinity-filter": "test_session_affinity", "topology-affinity-filter": "below"}


def test_every_filter_has_golden_rows() -> None:
    assert {case.type for case in FILTERS} == {row.type for row in GOLDEN} | ELSEWHERE.keys()


@pytest.mark.parametrize(
    ("level", "kept"),
    [("host", [0]), ("rack", [0, 1]), ("zone", [0, 1, 2]), ("region", [0, 1, 2, 3])],
    ids=["host", "rack", "zone", "region"],
)
def test_topology_keeps_what_is_near_enough_or_all(level: str, kept: list[int]) -> None:
    names = ("kubernetes.io/hostname", *(f"topology.kubernetes.io/{each}" for each in ("rack", "zone", "region")))
    places = ("a b c d", "x b c d", "x x c d", "x x x d", "x x x x")
    endpoints = tuple(pool_of(*[{"labels": dict(zip(names, place.split(), strict=True))} for place in places], {"labels": {}}))
    each = ready(Case("topology-affinity-filter", {"minAffinity": level}))
    assert [e.slot for e in each.keep(llm_request(attributes={"peer-endpoint": endpoints[0]}), endpoints)] == kept
    assert each.keep(llm_request(attributes={"peer-endpoint": endpoints[5]}), endpoints) == endpoints, "a peer without a place"
    assert each.keep(llm_request(attributes={"peer-endpoint": endpoints[4]}), endpoints[:1]) == endpoints[:1], "nobody is near"


def test_affinity_goes_by_predictions_where_it_is_told_to() -> None:
    endpoints = tuple(pool_of({}, {}, {}))
    predictor = ready(Case("predicted-latency-producer"))
    each = ready(Case("prefix-cache-affinity-filter", {"ttftSource": "latencyPredictor", "maxTTFTPenaltyMs": 1000}), others=[predictor])

    def kept(predictions: dict[int, float] | None) -> list[int]:
        request = llm_request(prompt_tokens=1000, prefix=PrefixMatch([], [], 1000, {0: 1000, 1: 1000}))
        if predictions is not None:
            request.attributes["latency-prediction"] = {slot: Prediction(ttft, 0.1, 0, 0) for slot, ttft in predictions.items()}
        return [e.slot for e in each.keep(request, endpoints)]

    assert kept({0: 9.0, 1: 2.0, 2: 1.0}) == [0, 1]
    assert kept({0: 9.0, 1: 2.25, 2: 1.0}) == [0, 1, 2]
    assert kept({0: 1.0}) == [0, 1, 2], "nothing is known of the others"
    assert kept(None) == [0, 1, 2]
    with pytest.raises(ValueError, match="ttftSource"):
        ready(Case("prefix-cache-affinity-filter", {"ttftSource": "latencyPredictor"}))


def test_a_tier_is_explored_as_often_as_asked() -> None:
    endpoints = tuple(pool_of({}, {}))
    each = ready(Case("slo-headroom-tier-filter", {"epsilonExploreNeg": 0.1}))
    request = llm_request(attributes={"latency-prediction": {0: Prediction(1, 1, 1, 1), 1: Prediction(1, 1, -1, 1)}})
    explored = sum(each.keep(request, endpoints)[0] is endpoints[1] for _ in range(5000))
    assert 400 < explored < 600  # 500, 4.7 standard deviations either way; the seed is fixed


def test_a_tier_is_of_both_objectives() -> None:
    endpoints = tuple(pool_of({}, {}, {}))
    each = ready(Case("slo-headroom-tier-filter", {"epsilonExploreNeg": 0}))
    predictions = {0: Prediction(1, 1, 1, -0.1), 1: Prediction(1, 1, -0.1, 1), 2: Prediction(1, 1, 0, 0)}
    assert list(each.keep(llm_request(attributes={"latency-prediction": predictions}), endpoints)) == [endpoints[2]]


def test_affinity_is_explored_as_often_as_asked() -> None:
    endpoints = tuple(pool_of({}, {}))
    each = ready(Case("prefix-cache-affinity-filter", {"explorationProbability": 0.1}))
    request = llm_request(prompt_tokens=100, prefix=PrefixMatch([], [], 100, {0: 100}))
    explored = sum(len(each.keep(request, endpoints)) == 2 for _ in range(5000))
    assert 400 < explored < 600


@pytest.mark.parametrize(
    ("type_", "parameters", "at"),
    [
        ("by-label", {"label": "l"}, ""),
        ("label-selector-filter", expression("In"), ".matchExpressions[0]"),
        ("label-selector-filter", expression("Exists", "a"), ".matchExpressions[0]"),
        ("label-selector-filter", expression("Like", "a"), ".matchExpressions[0].operator"),
        ("utilization-filter", {"conditions": []}, ".conditions"),
        ("utilization-filter", {"conditions": [{"metric": "temperature", "maxValue": 1}]}, ".conditions[0].metric"),
        ("endpoint-attribute-filter", {"attribute": "g", "algorithm": {"type": "threshold"}}, ".algorithm.threshold"),
        ("endpoint-attribute-filter", threshold("Near", 1), ".algorithm.threshold.operator"),
        ("prefix-cache-affinity-filter", {"affinityThreshold": 1.5}, ".affinityThreshold"),
        ("context-length-aware", {"label": ""}, ".label"),
        ("utilization-detector", {"metricsStalenessThreshold": "soon"}, ".metricsStalenessThreshold"),
    ],
)
def test_parameters_that_make_no_sense_are_a_problem_where_they_stand(type_: str, parameters: dict[str, Any], at: str) -> None:
    (problem,) = Registry().problems(type_, parameters, "p")
    assert problem.path == f"p.parameters{at}"
