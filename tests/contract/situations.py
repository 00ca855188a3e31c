"""What the contract is checked with: every built-in class, the ways of configuring it that matter, pools and requests of every kind."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from hypothesis import strategies as st

from epp.clock import VirtualClock
from epp.plugins.base import Context, Plugin
from epp.plugins.registry import BUILT_IN, Registry, UnknownPluginError
from epp.types import Endpoint, LLMRequest, Prediction, PrefixMatch
from tests.builders import llm_request, pool_of

NOW_S = 1000.0

REQUIRED: Mapping[str, Mapping[str, Any]] = {
    "token-rate-limit": {"tokens": 1000},
    "by-label": {"label": "tier", "validValues": ["gold"]},
    "endpoint-attribute-filter": {
        "attribute": "GPUUtilization",
        "algorithm": {"type": "threshold", "threshold": {"operator": "LessThan", "value": 50}},
    },
    "endpoint-attribute-scorer": {"attributeKey": "GPUUtilization", "algorithm": {"type": "linear_lower_is_better"}},
    "header-label-affinity-scorer": {"headerName": "x-tier", "labelKey": "tier"},
    "utilization-filter": {"conditions": [{"metric": "waiting-queue", "maxValue": 3}]},
    "priority-holdback-policy": {"minCeiling": 0.5},
    "k8s-notification-source": {"version": "v1", "kind": "Pod"},
    "file-discovery": {"path": "/etc/epp/endpoints.yaml"},
    "request-attribute-reporter": {"attributes": [{"key": {"name": "cost"}, "expression": "usage.total_tokens"}]},
}
"""Type -> parameters without which it can't be built."""

VARIANTS: Sequence[tuple[str, Mapping[str, Any]]] = (
    ("active-request-scorer", {"idleThreshold": 2, "maxBusyScore": 0.5}),
    ("concurrency-detector", {"concurrencyMode": "hybrid", "maxConcurrency": 4, "headroom": 0.5}),
    ("concurrency-detector", {"concurrencyMode": "tokens", "maxTokenConcurrency": 1000}),
    ("context-length-aware", {"enableFiltering": True, "label": "range"}),
    ("context-length-aware", {"label": "range"}),
    ("endpoint-attribute-filter", {**REQUIRED["endpoint-attribute-filter"], "onMissing": "Fail", "fallbackOnEmpty": True}),
    (
        "endpoint-attribute-scorer",
        {
            "attributeKey": "KVCacheUsagePercent",
            "algorithm": {"type": "linear_higher_is_better", "normalization": {"fixedRange": {"min": 0.2, "max": 0.7}}},
        },
    ),
    ("label-selector-filter", {"matchExpressions": [{"key": "tier", "operator": "NotIn", "values": ["gold"]}]}),
    ("latency-scorer", {"headroomSelectionStrategy": "most", "ttftWeight": 0, "tpotWeight": 0}),
    ("latency-scorer", {"compositeKVWeight": 0, "compositeQueueWeight": 0, "compositePrefixWeight": 0}),
    ("prefix-cache-affinity-filter", {"affinityThreshold": 0.3, "maxTTFTPenaltyMs": 1, "peakPrefillThroughput": 1000}),
    ("prefix-cache-scorer", {"matchLengthWeight": 0.4}),
    ("session-affinity-filter", {"strategy": "session_id"}),
    ("session-affinity-scorer", {"strategy": "session_id"}),
    ("token-load-scorer", {"queueThresholdTokens": 100}),
    ("topology-affinity-filter", {"minAffinity": "zone"}),
    ("utilization-filter", {"conditions": [{"metric": "active-requests", "maxValue": 1}], "fallbackOnEmpty": True}),
)
"""Ways of configuring a type that run other code than the default."""


def _classes() -> dict[str, type[Plugin]]:
    """By type. One that can't be loaded is missing here; test_plugins has a test for each."""
    registry = Registry(entry_point_group="")
    found = {}
    for name in BUILT_IN:
        try:
            cls = registry.load(name)
        except UnknownPluginError:
            continue
        found[cls.type] = cls
    return found


CLASSES = _classes()


class Case(NamedTuple):
    """A type and parameters."""

    type: str
    parameters: Mapping[str, Any] = {}

    def __str__(self) -> str:
        return f"{self.type}{dict(self.parameters) or ''}"


def cases(method: str) -> list[Case]:
    """Of the types that have that method."""
    every = [*((type_, REQUIRED.get(type_, {})) for type_ in CLASSES), *VARIANTS]
    return [Case(type_, parameters) for type_, parameters in every if hasattr(CLASSES[type_], method)]


def built(type_: str, **parameters: object) -> Plugin:
    registry = Registry()
    given = {**REQUIRED.get(type_, {}), **parameters}
    assert registry.problems(type_, given, "plugins[0]") == []
    return registry.build(type_, given, type_)


def ready(case: Case, endpoints: Sequence[Endpoint] = (), *, others: Sequence[Plugin] = (), seed: int = 1) -> Any:
    """A plugin as it is when requests come: bound, and told of the endpoints."""
    plugin = built(case.type, **case.parameters)
    if hasattr(plugin, "bind"):
        plugins = {each.name: each for each in (plugin, *others)}
        plugin.bind(Context(VirtualClock(NOW_S), random.Random(seed), plugins))
    if hasattr(plugin, "added"):
        for endpoint in endpoints:
            plugin.added(endpoint)
    return plugin


LABELS = st.fixed_dictionaries(
    {},
    optional={
        "tier": st.sampled_from(["gold", "silver", ""]),
        "range": st.sampled_from(["0-100", "100-200000", "50-50", "nonsense", "9-1", "-"]),
        "llm-d.ai/role": st.sampled_from(["decode", "prefill", "encode", "both", "prefill-decode", "unheard-of"]),
        "kubernetes.io/hostname": st.sampled_from(["h1", "h2", ""]),
        "topology.kubernetes.io/zone": st.sampled_from(["z1", "z2"]),
    },
)
ADAPTERS = st.frozensets(st.sampled_from(["a", "b", "c"]))
STATES = st.fixed_dictionaries(
    {
        "waiting": st.sampled_from([0.0, 1.0, 3.0, 1e9]) | st.floats(0, 100),
        "running": st.sampled_from([0.0, 2.0, 1e9]) | st.floats(0, 300),
        "kv_usage": st.sampled_from([0.0, 1.0]) | st.floats(0, 1),
        "kv_capacity_tokens": st.sampled_from([0, 1, 16, 500_000]),
        "sent_requests": st.integers(0, 5),
        "sent_tokens": st.integers(0, 1_000_000),
        "inflight_requests": st.integers(0, 6) | st.just(10_000),
        "inflight_tokens": st.integers(0, 5_000_000),
        "scraped_at_s": st.sampled_from([float("-inf"), NOW_S - 100, NOW_S]),
        "healthy": st.booleans(),
        "adapters_active": ADAPTERS,
        "adapters_waiting": ADAPTERS,
        "adapters_max": st.integers(0, 4),
        "labels": LABELS,
        "attributes": st.dictionaries(
            st.just("GPUUtilization"), st.sampled_from([0.0, 50.0, float("nan"), float("inf")]) | st.floats(0, 100)
        ),
    }
)
SECONDS = st.sampled_from([0.0, 0.05, 3.0, float("inf"), -1.0, -0.01]) | st.floats(-10, 10)
PREDICTIONS = st.builds(Prediction, st.floats(0, 20), st.floats(0, 1), SECONDS, SECONDS)
HEADERS = st.fixed_dictionaries(
    {},
    optional={
        "x-tier": st.sampled_from(["gold", "silver", "bronze", ""]),
        "x-session-id": st.sampled_from(["s1", "s2", " ", "x" * 500]),
        "x-session-token": st.sampled_from(["", "ZGVmYXVsdC9wb2QtMQ==", "nonsense"]),
        "test-epp-endpoint-selection": st.sampled_from(["10.0.0.1", "10.0.0.2:8000, 10.0.0.1", "", ","]),
    },
)


@st.composite
def situations(draw: st.DrawFn) -> tuple[LLMRequest, list[Endpoint]]:
    """A request with whatever producers may have put on it, and its candidates."""
    endpoints = pool_of(*draw(st.lists(STATES, min_size=1, max_size=8)))
    total = draw(st.integers(1, 200_000))
    matched = draw(st.dictionaries(st.integers(0, 10), st.integers(1, total), max_size=8))
    prefix = draw(st.sampled_from([None, PrefixMatch([1], [64], total, matched), PrefixMatch([], [], total, {})]))
    attributes: dict[str, object] = {}
    if draw(st.booleans()):
        attributes["latency-prediction"] = draw(st.dictionaries(st.integers(0, 9), PREDICTIONS))
    if draw(st.booleans()):
        attributes["peer-endpoint"] = draw(st.sampled_from(endpoints))
    request = llm_request(
        prompt_tokens=total,
        prefix=prefix,
        headers=draw(HEADERS),
        attributes=attributes,
        target_model=draw(st.sampled_from(["", "a", "b"])),
        priority=draw(st.sampled_from([-1, 0, 3])),
    )
    return request, endpoints


def state_of(endpoints: Sequence[Endpoint]) -> list[str]:
    """Everything an endpoint knows; as text, for what is not a number is not equal to itself."""
    return [repr({name: getattr(each, name) for name in Endpoint.__slots__}) for each in endpoints]
