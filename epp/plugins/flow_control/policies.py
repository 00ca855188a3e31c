"""Flow-control policies: who is served next when more requests wait than the pool can take.

Each class is the name and the parameters of one policy; the rule in its docstring is carried out by the flow controller. Plugins of
one file because each is a few lines, and they are read together.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import msgspec

from epp.plugins.base import Plugin

FAIRNESS: tuple[str, ...] = ("fairness-policy",)
ORDERING: tuple[str, ...] = ("ordering-policy",)
USAGE_LIMIT: tuple[str, ...] = ("usage-limit-policy",)

Stability = Literal["beta", "alpha"]
Weight = Annotated[float, msgspec.Meta(ge=0)]


# Which flow of a priority band is next


class GlobalStrictFairnessPolicy(Plugin):
    """The best head over all flows of the band by the ordering policy: flows do not matter."""

    type: ClassVar[str] = "global-strict-fairness-policy"
    roles: ClassVar[tuple[str, ...]] = FAIRNESS


class RoundRobinFairnessPolicy(Plugin):
    """In the order of their keys, the next flow after the last served one that has anything waiting."""

    type: ClassVar[str] = "round-robin-fairness-policy"
    roles: ClassVar[tuple[str, ...]] = FAIRNESS


class ProgramAwareFairness(Plugin):
    """Least attained service first: score = lasWeightService x (1 - norm(service)) + lasWeightHeadWait x norm(wait of the head).

    service: prompt + 2 x completion tokens of a fairness id, halved every lasHalfLifeSeconds (0: times lasDecayFactor a second); norm: over
    the band's flows, 0.5 where they are equal. A flow unseen for evictionTtlSeconds is forgotten, looked for every evictionSweepSeconds.
    """

    type: ClassVar[str] = "program-aware-fairness"
    roles: ClassVar[tuple[str, ...]] = FAIRNESS

    strategy: Literal["las"] = "las"
    las_weight_service: Weight = 0.8
    las_weight_head_wait: Weight = 0.2
    las_half_life_seconds: Annotated[float, msgspec.Meta(ge=0)] = 60.0
    las_decay_factor: Annotated[float, msgspec.Meta(gt=0, le=1)] = 0.99997
    eviction_ttl_seconds: Annotated[float, msgspec.Meta(gt=0)] = 3600.0
    eviction_sweep_seconds: Annotated[float, msgspec.Meta(gt=0)] = 300.0


# Which request of a flow is next


class FcfsOrderingPolicy(Plugin):
    """First come, first served."""

    type: ClassVar[str] = "fcfs-ordering-policy"
    roles: ClassVar[tuple[str, ...]] = ORDERING


class EdfOrderingPolicy(Plugin):
    """Earliest deadline first: arrival + time to live; without one last, and first come first served among equals."""

    type: ClassVar[str] = "edf-ordering-policy"
    roles: ClassVar[tuple[str, ...]] = ORDERING


class SloDeadlineOrderingPolicy(Plugin):
    """Earliest of arrival + x-llm-d-slo-ttft-ms first; without that header, or with one that is no time, last."""

    type: ClassVar[str] = "slo-deadline-ordering-policy"
    roles: ClassVar[tuple[str, ...]] = ORDERING


# How full the pool may be for a band to be served


class StaticUsageLimitPolicy(Plugin):
    """The ceiling of every band is threshold: none is served while the pool's saturation is at or above it."""

    type: ClassVar[str] = "static-usage-limit-policy"
    roles: ClassVar[tuple[str, ...]] = USAGE_LIMIT

    threshold: Weight = 1.0


class PriorityHoldbackPolicy(Plugin):
    """The lower a band's priority, the lower its ceiling: from maxCeiling for the highest to minCeiling for the lowest.

    domain `rank`: in equal steps, maxCeiling - i x (maxCeiling - minCeiling) / (N - 1); `value`: in proportion to the priorities' numbers.
    shape: only `linear`. A single band has maxCeiling. minCeiling must be given.
    """

    type: ClassVar[str] = "priority-holdback-policy"
    roles: ClassVar[tuple[str, ...]] = USAGE_LIMIT
    stability: ClassVar[Stability] = "alpha"

    min_ceiling: Annotated[float, msgspec.Meta(ge=0, lt=1)]
    max_ceiling: Annotated[float, msgspec.Meta(gt=0, le=1)] = 1.0
    domain: Literal["rank", "value"] = "rank"
    shape: Literal["linear"] = "linear"

    def __post_init__(self) -> None:
        if self.min_ceiling >= self.max_ceiling:
            raise ValueError("minCeiling must be less than maxCeiling")


class SoftReflectiveCeilingPolicy(Plugin):
    """Band i of N, at saturation s, has the ceiling 1 - i x s / (N - 1); the highest band always 1.

    While s is below it the band is open. At or above it, it opens for one tick in round(s / (1 - s)), together with every other gated
    band; not at all once s reaches 1.
    """

    type: ClassVar[str] = "soft-reflective-ceiling-policy"
    roles: ClassVar[tuple[str, ...]] = USAGE_LIMIT
    stability: ClassVar[Stability] = "alpha"


# Which request in flight gives way


class SheddableEvictionFilter(Plugin):
    """Requests with a priority below 0."""

    type: ClassVar[str] = "sheddable-eviction-filter"
    roles: ClassVar[tuple[str, ...]] = ("eviction-filter",)
    stability: ClassVar[Stability] = "alpha"


class PriorityThenTimeEvictionOrderPolicy(Plugin):
    """Lowest priority first, then the newest: it has lost the least work."""

    type: ClassVar[str] = "priority-then-time-eviction-order-policy"
    roles: ClassVar[tuple[str, ...]] = ("eviction-order-policy",)
    stability: ClassVar[Stability] = "alpha"
