"""utilization-detector: how full the pool is, by what engines say of their queues and KV caches, and what was sent since.

It is a filter too, in profiles that name it, and in the one there is without schedulingProfiles if it is among the plugins: there all
that may filter does. Cost: about 0.2 µs an endpoint each time it is asked.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar

import msgspec

from epp.clock import Clock
from epp.config.units import Duration, duration_s
from epp.plugins.base import Context, Plugin
from epp.types import Endpoint, LLMRequest

STALE_MIN_S = 3.0
"""Idle engines are read about once a second, so no reading younger than this is stale. The reference picker, which reads every engine all
the time, counts from 200 ms; here that would make every idle pool look full."""


class UtilizationDetector(Plugin):
    """Mean over endpoints of max(waiting / queueDepthThreshold, KV use / kvCacheUtilThreshold); 1 for one whose reading is stale.

    Stale is older than metricsStalenessThreshold and than 3 s, and not read yet. An engine that answers but has no metrics is judged by
    what we have in flight there, as if all of it were waiting. No endpoints: 1. As a filter it keeps endpoints with a fresh reading, or
    without metrics, and both below their threshold * (1 + headroom); all where none is.
    """

    type: ClassVar[str] = "utilization-detector"

    queue_depth_threshold: Annotated[int, msgspec.Meta(gt=0)] = 5
    kv_cache_util_threshold: Annotated[float, msgspec.Meta(gt=0, le=1)] = 0.8
    metrics_staleness_threshold: Duration = "200ms"
    headroom: Annotated[float, msgspec.Meta(ge=0)] = 0.0

    def __post_init__(self) -> None:
        self.__dict__["_stale_s"] = max(STALE_MIN_S, duration_s(self.metrics_staleness_threshold))

    def bind(self, context: Context) -> None:
        self.__dict__["_clock"] = context.clock

    def saturation(self, endpoints: Sequence[Endpoint]) -> float:
        if not endpoints:
            return 1.0
        fresh_s = self._fresh_s()
        queue, kv = self.queue_depth_threshold, self.kv_cache_util_threshold
        total = 0.0
        for endpoint in endpoints:
            if endpoint.scraped_at_s < fresh_s and not _without_metrics(endpoint):
                total += 1.0
                continue
            by_queue, by_kv = endpoint.waiting_estimate / queue, endpoint.kv_usage_estimate / kv
            total += by_queue if by_queue > by_kv else by_kv  # noqa: FURB136 - `max` would cost as much as all the rest
        return total / len(endpoints)

    def level(self, endpoints: Sequence[Endpoint]) -> tuple[float, float, float]:
        """Saturation, and what one more request, and one more prompt token, adds to it at most: a request that finds no room waits."""
        count = max(1, len(endpoints))
        capacity_tokens = min((e.kv_capacity_tokens for e in endpoints if e.kv_capacity_tokens), default=0)
        by_token = 1.0 / (self.kv_cache_util_threshold * capacity_tokens * count) if capacity_tokens else 0.0
        return self.saturation(endpoints), 1.0 / (self.queue_depth_threshold * count), by_token

    def stale(self, endpoints: Sequence[Endpoint]) -> int:
        """How many of them count as full for want of a fresh reading."""
        fresh_s = self._fresh_s()
        return sum(e.scraped_at_s < fresh_s and not _without_metrics(e) for e in endpoints)

    def keep(self, _request: LLMRequest, endpoints: Sequence[Endpoint]) -> Sequence[Endpoint]:
        fresh_s, factor = self._fresh_s(), 1.0 + self.headroom
        queue, kv = self.queue_depth_threshold * factor, self.kv_cache_util_threshold * factor
        known = [e for e in endpoints if e.scraped_at_s >= fresh_s or _without_metrics(e)]
        kept = [e for e in known if e.waiting_estimate < queue and e.kv_usage_estimate < kv]
        return kept or endpoints

    def _fresh_s(self) -> float:
        """Readings from then on are fresh."""
        clock: Clock = self.__dict__["_clock"]
        stale_s: float = self.__dict__["_stale_s"]
        return clock.now_s() - stale_s


def _without_metrics(endpoint: Endpoint) -> bool:
    """Its last answer told no load: nothing is trusted but our own count, and not because it failed to answer."""
    return not endpoint.trusted and not endpoint.scrape_failures
