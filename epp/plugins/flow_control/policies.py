"""Flow-control policies: who is served next when more requests wait than the pool can take.

An ordering policy has `order`, a usage limit `ceiling` (and `opens_s`, if time alone can open a band), an eviction filter `evictable`, an
eviction order `eviction_order`: a policy written elsewhere needs no more. A fairness policy is a name and parameters: which flow is next
is kept in queues, by the flow controller. Plugins of one file because each is a few lines, and they are read together.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf, isfinite
from typing import Annotated, ClassVar, Literal

import msgspec

from epp.plugins.base import Plugin
from epp.types import LLMRequest

FAIRNESS: tuple[str, ...] = ("fairness-policy",)
ORDERING: tuple[str, ...] = ("ordering-policy",)
USAGE_LIMIT: tuple[str, ...] = ("usage-limit-policy",)

Stability = Literal["beta", "alpha"]
Weight = Annotated[float, msgspec.Meta(ge=0)]

SLO_HEADERS = ("x-llm-d-slo-ttft-ms", "x-slo-ttft-ms")
TICK_S = 1e-3
"""The reference picker's cycle, in which soft-reflective-ceiling-policy counts."""


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

    def order(self, _request: LLMRequest, _received_s: float, queued_s: float, _ttl_s: float) -> float:
        """The lowest is next; equal ones as they came."""
        return queued_s


class EdfOrderingPolicy(Plugin):
    """Earliest deadline first: arrival + time to live; without one last, and first come first served among equals."""

    type: ClassVar[str] = "edf-ordering-policy"
    roles: ClassVar[tuple[str, ...]] = ORDERING

    def order(self, _request: LLMRequest, _received_s: float, queued_s: float, ttl_s: float) -> float:
        return queued_s + ttl_s if ttl_s > 0 else inf


class SloDeadlineOrderingPolicy(Plugin):
    """Earliest of arrival + x-llm-d-slo-ttft-ms first; without that header, or with one that is no time, last."""

    type: ClassVar[str] = "slo-deadline-ordering-policy"
    roles: ClassVar[tuple[str, ...]] = ORDERING

    def order(self, request: LLMRequest, received_s: float, _queued_s: float, _ttl_s: float) -> float:
        headers = request.headers
        written = headers.get(SLO_HEADERS[0]) or headers.get(SLO_HEADERS[1])
        if not written:
            return inf
        try:
            slo_ms = float(written)
        except ValueError:
            return inf
        return received_s + slo_ms / 1e3 if slo_ms >= 0 and isfinite(slo_ms) else inf


# How full the pool may be for a band to be served


class StaticUsageLimitPolicy(Plugin):
    """The ceiling of every band is threshold: none is served while the pool's saturation is at or above it."""

    type: ClassVar[str] = "static-usage-limit-policy"
    roles: ClassVar[tuple[str, ...]] = USAGE_LIMIT

    threshold: Weight = 1.0

    def ceiling(self, _position: int, _priorities: Sequence[int], _saturation: float, _now_s: float) -> float:
        """A band is served while saturation is below it. `position`: of the band among all bands' priorities, the highest first."""
        return self.threshold


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

    def ceiling(self, position: int, priorities: Sequence[int], _saturation: float, _now_s: float) -> float:
        if len(priorities) < 2:
            return self.max_ceiling
        if self.domain == "rank":
            part = position / (len(priorities) - 1)
        else:
            part = (priorities[0] - priorities[position]) / (priorities[0] - priorities[-1])
        return self.max_ceiling - part * (self.max_ceiling - self.min_ceiling)


class SoftReflectiveCeilingPolicy(Plugin):
    """Band i of N, at saturation s, has the ceiling 1 - i x s / (N - 1); the highest band always 1.

    While s is below it the band is open. At or above it, it opens for one tick in round(s / (1 - s)), together with every other gated
    band; not at all once s reaches 1.
    """

    type: ClassVar[str] = "soft-reflective-ceiling-policy"
    roles: ClassVar[tuple[str, ...]] = USAGE_LIMIT
    stability: ClassVar[Stability] = "alpha"

    def __post_init__(self) -> None:
        self.__dict__.update(opened=-inf, period=1)

    def ceiling(self, position: int, priorities: Sequence[int], saturation: float, now_s: float) -> float:
        if position == 0 or saturation < 1.0 - position * saturation / (len(priorities) - 1):
            return 1.0
        if saturation >= 1.0:
            return 0.0
        state = self.__dict__
        tick = now_s // TICK_S
        period = state["period"] = max(1, round(saturation / (1.0 - saturation)))
        if tick != state["opened"]:
            if tick - state["opened"] < period:
                return 0.0
            state["opened"] = tick
        return 1.0

    def opens_s(self, now_s: float) -> float:
        """When bands that are gated now open next."""
        state = self.__dict__
        opens_s: float = (state["opened"] + state["period"] + 0.5) * TICK_S
        return max(now_s + TICK_S, opens_s)


# Which request in flight gives way


class SheddableEvictionFilter(Plugin):
    """Requests with a priority below 0."""

    type: ClassVar[str] = "sheddable-eviction-filter"
    roles: ClassVar[tuple[str, ...]] = ("eviction-filter",)
    stability: ClassVar[Stability] = "alpha"

    def evictable(self, request: LLMRequest) -> bool:
        return request.priority < 0


class PriorityThenTimeEvictionOrderPolicy(Plugin):
    """Lowest priority first, then the newest: it has lost the least work."""

    type: ClassVar[str] = "priority-then-time-eviction-order-policy"
    roles: ClassVar[tuple[str, ...]] = ("eviction-order-policy",)
    stability: ClassVar[Stability] = "alpha"

    def eviction_order(self, request: LLMRequest, dispatched_s: float) -> tuple[float, float]:
        """The lowest gives way first."""
        return float(request.priority), -dispatched_s
