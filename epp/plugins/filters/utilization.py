"""utilization-filter: endpoints that are below some limits of load.

Per request, for load changes: about 0.1 µs an endpoint and condition. Not here: how full the whole pool is (detectors).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter
from typing import Annotated, ClassVar, Literal

import msgspec

from epp.plugins.base import Context, Plugin, Producer
from epp.types import Endpoint, LLMRequest

METRICS: Mapping[str, Callable[[Endpoint], float]] = {
    "active-requests": attrgetter("inflight_requests"),
    "running-requests": attrgetter("running_estimate"),
    "waiting-queue": attrgetter("waiting_estimate"),
    "kv-cache-utilization": attrgetter("kv_usage_estimate"),
}


class Condition(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="camel"):
    """`metric` is at most `maxValue`."""

    metric: Literal["active-requests", "running-requests", "waiting-queue", "kv-cache-utilization"]
    max_value: Annotated[float, msgspec.Meta(ge=0)]


class UtilizationFilter(Plugin):
    """Keeps endpoints for which every one of conditions holds: metric <= maxValue. fallbackOnEmpty: keep all where none would stay.

    active-requests are those we have in flight there; running-requests, waiting-queue and kv-cache-utilization (0 to 1) are the engine's,
    with what was sent since its last reading.
    """

    type: ClassVar[str] = "utilization-filter"
    uses: ClassVar[tuple[str, ...]] = ("inflight-load",)

    conditions: Annotated[tuple[Condition, ...], msgspec.Meta(min_length=1)]
    fallback_on_empty: bool = False
    in_flight_load_producer_name: str = ""

    def bind(self, context: Context) -> None:
        if self.in_flight_load_producer_name:
            context.plugin(self.in_flight_load_producer_name, Producer, parameter="inFlightLoadProducerName")

    def keep(self, _request: LLMRequest, endpoints: Sequence[Endpoint]) -> Sequence[Endpoint]:
        kept = endpoints
        for condition in self.conditions:
            measure, most = METRICS[condition.metric], condition.max_value
            kept = [e for e in kept if measure(e) <= most]
        return kept if kept or not self.fallback_on_empty else endpoints
