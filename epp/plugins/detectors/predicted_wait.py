"""predicted-wait-detector: how full the pool is, by how long the next request would wait at each endpoint.

The endpoint where it would wait least decides, as it is where a good scheduler sends the request: a pool with one idle endpoint is not full.
Until then it is as full as its endpoints are in the mean, so that a ceiling below 1 keeps that share of the pool for others. What was sent counts
from the moment it is sent, so that a burst can't pass before metrics move. Where a plugin keeps better books (`wait_s(endpoint)`, as
cost-aware-scorer's), those are asked; else the prompt tokens in flight are divided by the prefill rate the endpoint showed. A queue inside
the engine (its batch or its KV cache is full) is as long as it takes requests to end there. The KV cache counts in its last tenth alone:
before, it makes nobody wait, and ceilings of lower bands (holdback) would leave most of it empty.

Not here: who waits (admission). Cost: about 0.4 µs an endpoint each time it is asked.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Protocol, runtime_checkable

import msgspec

from epp.config.units import Duration, duration_s
from epp.plugins.base import Context, Finished, Plugin
from epp.types import Endpoint, LLMRequest

GAP_WEIGHT = 0.1
"""Of a new sample in the mean time between two ends of requests at one endpoint."""
GAP_MAX_S = 60.0
WAITING_S = 0.05
"""What one waiting request is taken to take at an endpoint nothing ended at yet."""
KV_FREE = 0.9
"""Of the KV cache's threshold: so much of it may be used without counting."""
REQUEST_TOKENS = 16
"""What a request weighs besides its prompt, so that those without one can't pass in any number."""


@runtime_checkable
class Waits(Protocol):
    """A plugin that knows how long a prompt would wait."""

    def wait_s(self, endpoint: Endpoint) -> float:
        """Until the endpoint is through with the prompts it has."""
        ...


class PredictedWaitDetector(Plugin):
    """An endpoint's is max(wait / maxWait, how far KV use / kvCacheUtilThreshold is from 0.9 to 1); 1 without endpoints.

    The pool's is the mean, each counted up to 1, and once all of them are full the least.

    wait: that of a plugin that predicts it (waitPluginName, else the first that can), else prompt tokens in flight / the endpoint's prefill
    rate, or the pool's, or initialPrefillTokensPerSecond; at least: requests waiting in the engine x the mean time between two ends there.
    """

    type: ClassVar[str] = "predicted-wait-detector"
    uses: ClassVar[tuple[str, ...]] = ("inflight-load",)
    leads: ClassVar[bool] = True
    """It sees a request end at once, before the engine's metrics do."""

    max_wait: Duration = "250ms"
    kv_cache_util_threshold: Annotated[float, msgspec.Meta(gt=0, le=1)] = 0.98
    initial_prefill_tokens_per_second: Annotated[float, msgspec.Meta(gt=0)] = 8_000.0
    wait_plugin_name: str = ""

    def __post_init__(self) -> None:
        max_wait_s = duration_s(self.max_wait)
        if max_wait_s <= 0:
            raise ValueError("maxWait must be above 0")
        self.__dict__.update(max_wait_s=max_wait_s, waits=None, gaps={}, clock=None)

    def bind(self, context: Context) -> None:
        self.__dict__["clock"] = context.clock
        if self.wait_plugin_name:
            self.__dict__["waits"] = context.plugin(self.wait_plugin_name, Waits, parameter="waitPluginName")
        else:
            self.__dict__["waits"] = next((p for p in context.plugins.values() if isinstance(p, Waits)), None)

    def finished(self, _request: LLMRequest, endpoint: Endpoint, _outcome: Finished) -> None:
        """Learn how often a place comes free while there is work."""
        gaps: dict[int, tuple[float, float]] = self.__dict__["gaps"]
        now_s: float = self.__dict__["clock"].now_s()
        last_s, gap_s = gaps.get(endpoint.slot, (-1.0, 0.0))
        if last_s >= 0:
            sample_s = min(GAP_MAX_S, now_s - last_s)
            gap_s = sample_s if not gap_s else gap_s + GAP_WEIGHT * (sample_s - gap_s)
        gaps[endpoint.slot] = (now_s if endpoint.inflight_requests else -1.0), gap_s

    def removed(self, endpoint: Endpoint) -> None:
        self.__dict__["gaps"].pop(endpoint.slot, None)

    def saturation(self, endpoints: Sequence[Endpoint]) -> float:
        return self.level(endpoints)[0]

    def level(self, endpoints: Sequence[Endpoint]) -> tuple[float, float, float]:
        """Saturation, and what one more request, and one more prompt token, adds to it: as the room there is fills up."""
        if not endpoints:
            return 1.0, 0.0, 0.0
        state = self.__dict__
        max_wait_s: float = state["max_wait_s"]
        waits: Waits | None = state["waits"]
        gaps: dict[int, tuple[float, float]] = state["gaps"]
        usual = self._rate(endpoints)
        lowest, used, room_tokens = float("inf"), 0.0, 0.0
        for endpoint in endpoints:
            rate = endpoint.capacity.prefill_tokens_per_s or usual
            wait_s = waits.wait_s(endpoint) if waits is not None else endpoint.inflight_tokens / rate
            waiting = endpoint.waiting_estimate
            if waiting:
                gap = gaps.get(endpoint.slot)
                wait_s = max(wait_s, waiting * (gap[1] if gap is not None and gap[1] else WAITING_S))
            kv = (endpoint.kv_usage_estimate / self.kv_cache_util_threshold - KV_FREE) / (1.0 - KV_FREE)
            full = max(wait_s / max_wait_s, kv)
            lowest = min(lowest, full)
            if full < 1.0:
                used += full
                room_tokens += (1.0 - full) * max_wait_s * rate
            else:
                used += 1.0
        if lowest >= 1.0:
            return lowest, 0.0, 0.0
        saturation = used / len(endpoints)
        by_token = (1.0 - saturation) / room_tokens
        return saturation, REQUEST_TOKENS * by_token, by_token

    def state(self) -> dict[str, Any]:
        """Mean seconds between two ends, by slot."""
        return {"ends_apart_s": {str(slot): round(gap_s, 4) for slot, (_, gap_s) in self.__dict__["gaps"].items()}}

    def _rate(self, endpoints: Sequence[Endpoint]) -> float:
        """Prompt tokens a second of an endpoint nothing is known of."""
        known = [e.capacity.prefill_tokens_per_s for e in endpoints if e.capacity.prefill_tokens_per_s]
        return sum(known) / len(known) if known else self.initial_prefill_tokens_per_second
