"""Scores worked out by hand, for every formula."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import inf
from typing import Any, NamedTuple

import pytest

from epp.plugins.registry import Registry
from epp.types import LLMRequest, Prediction, PrefixMatch
from tests.builders import llm_request, pool_of
from tests.contract.situations import Case, cases, ready


class Row(NamedTuple):
    """A scorer, its parameters, endpoints' state by slot, and what they score for a request of 1000 tokens."""

    type: str
    scores: Sequence[float]
    endpoints: Sequence[Mapping[str, Any]]
    parameters: Mapping[str, Any] = {}
    matched: Mapping[int, int] | None = None
    """slot -> tokens cached there."""
    request: Mapping[str, Any] = {}
    predictions: Mapping[int, tuple[float, ...]] | None = None
    """slot -> headrooms of TTFT and TPOT, after them the predicted times where they matter."""


def kv(*labels: str | None, key: str = "label") -> list[dict[str, Any]]:
    return [{"labels": {} if label is None else {key: label}} for label in labels]


def gpu(*values: float | None) -> list[dict[str, Any]]:
    return [{"attributes": {} if value is None else {"g": value}} for value in values]


def attribute(kind: str, **normalization: Any) -> dict[str, Any]:
    return {"attributeKey": "g", "algorithm": {"type": f"linear_{kind}_is_better", "normalization": normalization}}


IDLE: Mapping[str, Any] = {}
BUSY = {"inflight_requests": 1}
HALF = {"ttftWeight": 3, "tpotWeight": 1}

GOLDEN = [
    # (max - q) / (max - min) of 0, 5, 20
    Row("queue-scorer", [1.0, 0.75, 0.0], [{"waiting": 0.0}, {"waiting": 5.0}, {"waiting": 20.0}]),
    Row("queue-scorer", [1.0, 1.0], [{"waiting": 3.0}, {"waiting": 3.0}]),
    Row("queue-scorer", [1.0], [{"waiting": 9.0}]),
    # one sent since the reading joins the queue where there is one, else the running batch: 2, 4, 0
    Row("queue-scorer", [0.5, 0.0, 1.0], [{"waiting": 1.0, "sent_requests": 1}, {"waiting": 4.0}, {"sent_requests": 9}]),
    Row("running-requests-size-scorer", [1.0, 0.75, 0.0], [{"running": 2.0}, {"running": 4.0}, {"running": 10.0}]),
    Row("running-requests-size-scorer", [1.0, 1.0], [{"running": 0.0}, {"running": 0.0}]),
    Row("running-requests-size-scorer", [0.5, 0.0, 1.0], [{"running": 1.0, "sent_requests": 3}, {"running": 8.0}, {}]),
    Row("running-requests-size-scorer", [1.0, 0.0], [{"running": 1.0, "waiting": 1.0, "sent_requests": 3}, {"running": 2.0}]),
    Row("kv-cache-utilization-scorer", [1.0, 0.75, 0.0], [{"kv_usage": 0.0}, {"kv_usage": 0.25}, {"kv_usage": 1.0}]),
    # 1 - (0.25 + 250/1000); 1 - min(1, 0.5 + 90/100)
    Row(
        "kv-cache-utilization-scorer",
        [0.5, 0.0],
        [
            {"kv_usage": 0.25, "kv_capacity_tokens": 1000, "sent_tokens": 250},
            {"kv_usage": 0.5, "kv_capacity_tokens": 100, "sent_tokens": 90},
        ],
    ),
    Row("kv-cache-utilization-scorer", [0.75], [{"kv_usage": 0.25, "sent_tokens": 9_999}]),
    # 0.5 for an empty queue; 0.5 * (1 - 32/128); at the threshold and beyond 0
    Row("load-aware-scorer", [0.5, 0.375, 0.0, 0.0], [{"waiting": q} for q in (0.0, 32.0, 128.0, 129.0)]),
    Row("load-aware-scorer", [0.25], [{"waiting": 5.0}], {"threshold": 10}),
    # loaded; 1 + 0 < 2; waits, and 1 + 1 is not < 2; full of others; waits but 0 + 1 < 4; no limit known
    Row(
        "lora-affinity-scorer",
        [1.0, 0.8, 0.6, 0.0, 0.8, 0.0],
        [
            {"adapters_active": frozenset("ab"), "adapters_max": 2},
            {"adapters_active": frozenset("b"), "adapters_max": 2},
            {"adapters_active": frozenset("b"), "adapters_waiting": frozenset("a"), "adapters_max": 2},
            {"adapters_active": frozenset("b"), "adapters_waiting": frozenset("c"), "adapters_max": 2},
            {"adapters_waiting": frozenset("a"), "adapters_max": 4},
            {},
        ],
        request={"target_model": "a"},
    ),
    # t = 1000 in flight + 1000 asked; + 3000 in flight; 4000 and more is the limit
    Row(
        "token-load-scorer",
        [0.75, 0.5, 0.0, 0.0],
        [{"inflight_tokens": t} for t in (0, 1000, 3000, 9000)],
        {"queueThresholdTokens": 4000},
    ),
    # cached: all of it, so t = 0; 500, so t = 3000 + 500; more than asked, so t = 0
    Row(
        "token-load-scorer",
        [1.0, 0.125, 1.0, 0.75],
        [{}, {"inflight_tokens": 3000}, {}, {}],
        {"queueThresholdTokens": 4000},
        matched={0: 1000, 1: 500, 2: 1064},
    ),
    Row("token-load-scorer", [0.5], [{"inflight_tokens": 2_097_152}], request={"prompt_tokens": 0}),
    # (8 - c) / 8
    Row("active-request-scorer", [1.0, 0.75, 0.5, 0.0], [{"inflight_requests": c} for c in (0, 2, 4, 8)]),
    Row("active-request-scorer", [0.0, 0.0], [{"inflight_requests": 3}, {"inflight_requests": 3}]),
    Row("active-request-scorer", [1.0, 1.0], [{}, {}]),
    # idle up to 2; (8 - 4) / 8 * 0.5
    Row(
        "active-request-scorer",
        [1.0, 1.0, 0.25, 0.0],
        [{"inflight_requests": c} for c in (1, 2, 4, 8)],
        {"idleThreshold": 2, "maxBusyScore": 0.5},
    ),
    Row("prefix-cache-scorer", [1.0, 0.0, 0.25], [{}, {}, {}], matched={0: 1000, 2: 250}),
    Row("prefix-cache-scorer", [0.0, 0.0], [{}, {}], matched={}),
    Row("prefix-cache-scorer", [0.0, 0.0], [{}, {}]),
    # w * min(1, 250/500)^2; w = 1 leaves no share of 250/1000
    Row("prefix-cache-scorer", [0.25, 1.0], [{}, {}], {"matchLengthWeight": 1.0, "matchLengthScaleTokens": 500}, {0: 250, 1: 900}),
    # 0.5 * 1 + 0.5 * 500/1000; 0.5 * 0.25 + 0.5 * 250/1000
    Row("prefix-cache-scorer", [0.75, 0.25], [{}, {}], {"matchLengthWeight": 0.5, "matchLengthScaleTokens": 500}, {0: 500, 1: 250}),
    Row("precise-prefix-cache-scorer", [1.0, 0.0, 0.25], [{}, {}, {}], matched={0: 1000, 2: 250}),
    # cold, nobody used before: 1 - i / 3; warm; alone
    Row("no-hit-lru-scorer", [1.0, 2 / 3, 1 / 3, 0.0], [{}, {}, {}, {}], matched={}),
    Row("no-hit-lru-scorer", [0.5, 0.5], [{}, {}], matched={1: 64}),
    Row("no-hit-lru-scorer", [1.0], [{}]),
    Row("no-hit-lru-scorer", [1.0, 0.0], [{}, {}], matched={7: 64}),  # a hit somewhere else is none of ours
    Row(
        "context-length-aware",
        [
            0.5,  # no label
            0.3 + 0.7 * (0.7 / 1.2 + 0.3 * 0.5),  # 0-2000: width 2000, half of it above 1000
            0.3 + 0.7 * (0.7 / 2 + 0.3 * 0.9),  # 0-10000
            0.3 + 0.7 * (0.7 / 1.1 + 0.0),  # 0-1000: at its end
            1.0,  # 1000-1000
            0.2,  # 1500-2000: 500 below, 0.3 / 1.5
            0.15,  # 0-0: 1000 above, 0.3 / 2
            0.0,  # no range
            0.0,  # upside down
        ],
        kv(None, "0-2000", "0-10000", "0-1000", "1000-1000", "1500-2000", "0-0", "large", "9-1"),
        {"label": "label"},
    ),
    Row(
        "header-label-affinity-scorer",
        [1.0, 0.0, 0.0],
        kv("a", "b", None),
        {"headerName": "X-L", "labelKey": "label"},
        request={"headers": {"x-l": "a"}},
    ),
    Row(
        "header-label-affinity-scorer",
        [0.0, 0.0],
        kv("", None),
        {"headerName": "x-l", "labelKey": "label"},
        request={"headers": {"x-l": ""}},
    ),
    Row("header-label-affinity-scorer", [0.0, 0.0], kv("a", None), {"headerName": "x-l", "labelKey": "label"}),
    Row("endpoint-attribute-scorer", [1.0, 0.5, 0.0, 0.0], gpu(10, 20, 30, None), attribute("lower")),
    Row("endpoint-attribute-scorer", [0.0, 0.5, 1.0, 0.0], gpu(10, 20, 30, None), attribute("higher", adaptiveRange={})),
    Row("endpoint-attribute-scorer", [1.0, 1.0, 0.0], gpu(5, 5, None), attribute("lower")),
    Row("endpoint-attribute-scorer", [0.0], gpu(None), attribute("higher")),
    Row("endpoint-attribute-scorer", [0.75, 0.0, 1.0, 0.0], gpu(25, 150, -5, None), attribute("lower", fixedRange={"min": 0, "max": 100})),
    Row("endpoint-attribute-scorer", [0.25, 1.0], gpu(25, 150), attribute("higher", fixedRange={"min": 0, "max": 100})),
    Row(
        "endpoint-attribute-scorer",
        [1.0, 0.0],
        [{}, {"inflight_requests": 4}],
        {"attributeKey": "InflightRequests", "algorithm": {"type": "linear_lower_is_better"}},
    ),
    # both objectives met, TTFT headrooms 1, 2, 3, TPOT flat and so without a say: n = 0, 0.5, 1; `least` scores 1 - n in hundredths + 1
    Row("latency-scorer", [1.0, 0.51, 0.01], [BUSY] * 3, predictions={0: (1, 0.5), 1: (2, 0.5), 2: (3, 0.5)}),
    # and the other way round
    Row("latency-scorer", [1.0, 0.01], [BUSY] * 2, predictions={0: (2, 0.25), 1: (2, 0.5)}),
    Row(
        "latency-scorer",
        [0.01, 0.51, 1.0],
        [BUSY] * 3,
        {"headroomSelectionStrategy": "most"},
        predictions={0: (1, 0.5), 1: (2, 0.5), 2: (3, 0.5)},
    ),
    # weights 3 and 1 are 0.75 and 0.25: c = 0.25 * 1, 0.75 * 1
    Row("latency-scorer", [0.76, 0.26], [BUSY] * 2, HALF, predictions={0: (1, 0.75), 1: (3, 0.25)}),
    # one meets both: alone, so 0.5 and 0.5, so 0.51
    Row("latency-scorer", [0.51, 0.0, 0.0], [BUSY] * 3, predictions={0: (1, 1), 1: (-1, 1), 2: (1, -1)}),
    # none does; one is idle
    Row("latency-scorer", [0.0, 0.51], [BUSY, IDLE], predictions={0: (-1, 1), 1: (-9, -9)}),
    # none does, none is idle: TPOT alone is missed, then TTFT alone, then both
    Row("latency-scorer", [0.0, 0.51, 0.0], [BUSY] * 3, predictions={0: (-1, 1), 1: (1, -1), 2: (-1, -1)}),
    Row("latency-scorer", [0.51, 0.0], [BUSY] * 2, predictions={0: (-1, 1), 1: (-1, -1)}),
    # the nearest to its objective, with `most` too
    Row("latency-scorer", [1.0, 0.01], [BUSY] * 2, {"headroomSelectionStrategy": "most"}, predictions={0: (-1, -1), 1: (-3, -1)}),
    # no objectives: the fastest
    Row("latency-scorer", [0.01, 1.0], [BUSY] * 2, predictions={0: (inf, inf, 0.5, 0.25), 1: (inf, inf, 0.25, 0.25)}),
    Row("latency-scorer", [0.51, 0.0], [BUSY] * 2, predictions={0: (1, 1)}),
    # no predictions: thirds of (1 - KV) + (4 - q) / 4 + matched / 1000: (0.5 + 1 + 1) / 3, (1 + 0 + 0) / 3, (0.8 + 0.5 + 0.5) / 3
    Row(
        "latency-scorer",
        [0.83, 0.33, 0.6],
        [{"kv_usage": 0.5}, {"waiting": 4.0}, {"kv_usage": 0.2, "waiting": 2.0}],
        matched={0: 1000, 2: 500},
    ),
    Row("latency-scorer", [0.75], [{"kv_usage": 0.25}], {"compositeQueueWeight": 0, "compositePrefixWeight": 0}),
    Row(
        "latency-scorer",
        [0.75],
        [{"kv_usage": 0.25}],
        dict.fromkeys(("compositeKVWeight", "compositeQueueWeight", "compositePrefixWeight"), 0),
    ),
]


def asked(row: Row) -> LLMRequest:
    attributes = {}
    if row.predictions is not None:
        attributes["latency-prediction"] = {
            slot: Prediction(*(times or (1.0, 1.0)), ttft, tpot) for slot, (ttft, tpot, *times) in row.predictions.items()
        }
    prefix = None if row.matched is None else PrefixMatch([], [], 1000, dict(row.matched))
    return llm_request(**{"prompt_tokens": 1000, "prefix": prefix, "attributes": attributes, **row.request})


@pytest.mark.parametrize("row", GOLDEN, ids=lambda row: row.type)
def test_scores_worked_out_by_hand(row: Row) -> None:
    endpoints = pool_of(*row.endpoints)
    scorer = ready(Case(row.type, row.parameters), endpoints)
    assert list(scorer.score(asked(row), tuple(endpoints))) == pytest.approx(list(row.scores))


ELSEWHERE = {
    "session-affinity-scorer": "test_session_affinity",
    "topology-affinity-scorer": "test_scorers_with_memory",
    "cost-aware-scorer": "tests/unit/test_cost_aware.py, whose scores depend on what came before",
}


def test_every_scorer_has_golden_scores() -> None:
    assert {case.type for case in cases("score")} == {row.type for row in GOLDEN} | ELSEWHERE.keys()


@pytest.mark.parametrize("name", ["", "other"])
def test_a_scorer_reads_the_match_of_the_producer_it_names(name: str) -> None:
    request = llm_request(prompt_tokens=1000, prefix=PrefixMatch([], [], 1000, {0: 500}))
    request.attributes["other"] = PrefixMatch([], [], 1000, {1: 1000})
    endpoints = pool_of({}, {})
    others = [ready(Case("inflight-load-producer"))]
    others[0].named("other")
    scorer = ready(Case("prefix-cache-scorer", {"prefixMatchInfoProducerName": name}), others=others)
    assert list(scorer.score(request, endpoints)) == ([0.0, 1.0] if name else [0.5, 0.0])
    loads = ready(Case("token-load-scorer", {"prefixMatchInfoProducerName": name, "queueThresholdTokens": 2000}), others=others)
    assert list(loads.score(request, endpoints)) == ([0.5, 1.0] if name else [0.75, 0.5])


@pytest.mark.parametrize(
    ("parameters", "at"),
    [
        ({"attributeKey": "g", "algorithm": {"type": "linear"}}, "algorithm.type"),
        (attribute("lower", fixedRange={"min": 1, "max": 1}), "algorithm.normalization.fixedRange"),
        (attribute("lower", fixedRange={"min": 0, "max": 1}, adaptiveRange={}), "algorithm"),
        ({"attributeKey": "", "algorithm": {"type": "linear_lower_is_better"}}, "attributeKey"),
    ],
)
def test_what_an_attribute_scorer_does_not_take(parameters: dict[str, Any], at: str) -> None:
    (problem,) = Registry().problems("endpoint-attribute-scorer", parameters, "p")
    assert problem.path.startswith(f"p.parameters.{at}")
