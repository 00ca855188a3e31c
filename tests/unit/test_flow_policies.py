"""Flow-control policies as configurations name them: what each is for, what it takes, what it refuses."""

from __future__ import annotations

from math import inf

import msgspec
import pytest

from epp.plugins.base import Plugin
from epp.plugins.flow_control import policies
from epp.types import LLMRequest

FAIRNESS, ORDERING, LIMIT = ("fairness-policy",), ("ordering-policy",), ("usage-limit-policy",)
EVICTED, EVICTION_ORDER = ("eviction-filter",), ("eviction-order-policy",)

TABLE: list[tuple[type[Plugin], str, tuple[str, ...], str, dict[str, object]]] = [
    # class, type, roles, stability, the parameters it can't do without
    (policies.GlobalStrictFairnessPolicy, "global-strict-fairness-policy", FAIRNESS, "beta", {}),
    (policies.RoundRobinFairnessPolicy, "round-robin-fairness-policy", FAIRNESS, "beta", {}),
    (policies.ProgramAwareFairness, "program-aware-fairness", FAIRNESS, "beta", {}),
    (policies.FcfsOrderingPolicy, "fcfs-ordering-policy", ORDERING, "beta", {}),
    (policies.EdfOrderingPolicy, "edf-ordering-policy", ORDERING, "beta", {}),
    (policies.SloDeadlineOrderingPolicy, "slo-deadline-ordering-policy", ORDERING, "beta", {}),
    (policies.StaticUsageLimitPolicy, "static-usage-limit-policy", LIMIT, "beta", {}),
    (policies.PriorityHoldbackPolicy, "priority-holdback-policy", LIMIT, "alpha", {"minCeiling": 0.5}),
    (policies.SoftReflectiveCeilingPolicy, "soft-reflective-ceiling-policy", LIMIT, "alpha", {}),
    (policies.SheddableEvictionFilter, "sheddable-eviction-filter", EVICTED, "alpha", {}),
    (policies.PriorityThenTimeEvictionOrderPolicy, "priority-then-time-eviction-order-policy", EVICTION_ORDER, "alpha", {}),
]


@pytest.mark.parametrize(("cls", "type_", "roles", "stability", "needed"), TABLE)
def test_what_each_policy_is(*, cls: type[Plugin], type_: str, roles: tuple[str, ...], stability: str, needed: dict[str, object]) -> None:
    made = msgspec.convert(needed, cls)
    assert (made.type, made.roles, made.stability, made.name) == (type_, roles, stability, type_)
    assert cls.__doc__, "the rule"
    with pytest.raises(msgspec.ValidationError, match="noSuchParameter"):
        msgspec.convert({**needed, "noSuchParameter": 1}, cls)


def test_least_attained_service_by_default() -> None:
    made = msgspec.convert({}, policies.ProgramAwareFairness)
    assert (made.strategy, made.las_weight_service, made.las_weight_head_wait, made.las_half_life_seconds) == ("las", 0.8, 0.2, 60.0)
    assert (made.eviction_ttl_seconds, made.eviction_sweep_seconds) == (3600.0, 300.0)
    given = {"strategy": "las", "lasWeightService": 1, "lasWeightHeadWait": 0, "lasHalfLifeSeconds": 0, "lasDecayFactor": 0.5}
    assert msgspec.convert(given, policies.ProgramAwareFairness).las_decay_factor == 0.5


@pytest.mark.parametrize(
    ("cls", "wrong"),
    [
        (policies.ProgramAwareFairness, {"strategy": "drr"}),
        (policies.ProgramAwareFairness, {"lasWeightService": -0.1}),
        (policies.ProgramAwareFairness, {"lasHalfLifeSeconds": -1}),
        (policies.ProgramAwareFairness, {"lasDecayFactor": 0}),
        (policies.ProgramAwareFairness, {"lasDecayFactor": 1.5}),
        (policies.ProgramAwareFairness, {"evictionTtlSeconds": 0}),
        (policies.ProgramAwareFairness, {"evictionSweepSeconds": 0}),
        (policies.StaticUsageLimitPolicy, {"threshold": -1}),
        (policies.StaticUsageLimitPolicy, {"threshold": "full"}),
        (policies.PriorityHoldbackPolicy, {}),
        (policies.PriorityHoldbackPolicy, {"minCeiling": -0.1}),
        (policies.PriorityHoldbackPolicy, {"minCeiling": 1.0}),
        (policies.PriorityHoldbackPolicy, {"minCeiling": 0.5, "maxCeiling": 0.5}),
        (policies.PriorityHoldbackPolicy, {"minCeiling": 0.5, "maxCeiling": 1.1}),
        (policies.PriorityHoldbackPolicy, {"minCeiling": 0.5, "maxCeiling": 0.0}),
        (policies.PriorityHoldbackPolicy, {"minCeiling": 0.5, "domain": "name"}),
        (policies.PriorityHoldbackPolicy, {"minCeiling": 0.5, "shape": "sigmoid"}),
    ],
)
def test_parameters_that_make_no_sense(cls: type[Plugin], wrong: dict[str, object]) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(wrong, cls)


def test_ceilings() -> None:
    made = msgspec.convert({"minCeiling": 0.0, "domain": "value"}, policies.PriorityHoldbackPolicy)
    assert (made.min_ceiling, made.max_ceiling, made.domain, made.shape) == (0.0, 1.0, "value", "linear")
    assert msgspec.convert({}, policies.StaticUsageLimitPolicy).threshold == 1.0
    assert msgspec.convert({"threshold": 0.8}, policies.StaticUsageLimitPolicy).threshold == 0.8


def asked(**headers: str) -> LLMRequest:
    return LLMRequest(id="r", path="/", headers={name.replace("_", "-"): value for name, value in headers.items()})


def test_orders_by_the_rule() -> None:
    request = asked()
    assert policies.FcfsOrderingPolicy().order(request, 1.0, 2.0, 3.0) == 2.0
    assert policies.EdfOrderingPolicy().order(request, 1.0, 2.0, 3.0) == 5.0
    assert policies.EdfOrderingPolicy().order(request, 1.0, 2.0, 0.0) == inf
    assert policies.EdfOrderingPolicy().order(request, 1.0, 2.0, -1.0) == inf


@pytest.mark.parametrize(
    ("headers", "due_s"),
    [
        ({"x_llm_d_slo_ttft_ms": "500"}, 10.5),
        ({"x_slo_ttft_ms": "250"}, 10.25),
        ({"x_llm_d_slo_ttft_ms": "500", "x_slo_ttft_ms": "1"}, 10.5),
        ({"x_llm_d_slo_ttft_ms": "0"}, 10.0),
        ({}, inf),
        ({"x_llm_d_slo_ttft_ms": "soon"}, inf),
        ({"x_llm_d_slo_ttft_ms": "-1"}, inf),
        ({"x_llm_d_slo_ttft_ms": "1e400"}, inf),
        ({"x_llm_d_slo_ttft_ms": "nan"}, inf),
    ],
)
def test_a_service_objective_is_a_deadline(headers: dict[str, str], due_s: float) -> None:
    assert policies.SloDeadlineOrderingPolicy().order(asked(**headers), 10.0, 12.0, 60.0) == due_s


def test_a_static_ceiling_is_everyone_s() -> None:
    made = policies.StaticUsageLimitPolicy(threshold=0.9)
    assert [made.ceiling(position, (5, 0, -5), 0.5, 0.0) for position in range(3)] == [0.9, 0.9, 0.9]


@pytest.mark.parametrize(
    ("domain", "priorities", "ceilings"),
    [
        ("rank", (10, 0, -1), [0.9, 0.7, 0.5]),
        ("value", (10, 0, -10), [0.9, 0.7, 0.5]),
        ("value", (10, 9, 0), [0.9, 0.86, 0.5]),
        ("rank", (7,), [0.9]),
        ("value", (7,), [0.9]),
    ],
)
def test_held_back_by_rank_or_by_value(domain: str, priorities: tuple[int, ...], ceilings: list[float]) -> None:
    made = msgspec.convert({"minCeiling": 0.5, "maxCeiling": 0.9, "domain": domain}, policies.PriorityHoldbackPolicy)
    found = [made.ceiling(position, priorities, 0.5, 0.0) for position in range(len(priorities))]
    assert found == pytest.approx(ceilings)


def test_soft_reflective_ceilings() -> None:
    made = policies.SoftReflectiveCeilingPolicy()
    priorities = (2, 1, 0)
    assert [made.ceiling(position, priorities, 0.4, 0.0) for position in range(3)] == [1.0, 1.0, 1.0], "0.4 < 1 - 2 x 0.4 / 2"
    assert made.ceiling(0, priorities, 5.0, 0.0) == 1.0, "the highest band always"
    assert made.ceiling(1, priorities, 1.0, 0.0) == 0.0
    opened = [tick for tick in range(20) if made.ceiling(1, priorities, 0.8, tick * 1e-3 + 5e-4)]
    assert opened == [0, 4, 8, 12, 16]
    assert made.ceiling(2, priorities, 0.8, 0.0165) == 1.0, "every gated band in the same tick"
    assert 0.020 <= made.opens_s(0.0181) < 0.021


def test_who_gives_way() -> None:
    low, lower, normal = asked(), asked(), asked()
    low.priority, lower.priority = -1, -2
    assert [policies.SheddableEvictionFilter().evictable(each) for each in (low, lower, normal)] == [True, True, False]
    order = policies.PriorityThenTimeEvictionOrderPolicy().eviction_order
    assert order(lower, 1.0) < order(low, 9.0) < order(low, 1.0), "lowest priority, then newest"
