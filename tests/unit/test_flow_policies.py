"""Flow-control policies as configurations name them: what each is for, what it takes, what it refuses."""

from __future__ import annotations

import msgspec
import pytest

from epp.plugins.base import Plugin
from epp.plugins.flow_control import policies

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
