"""active-request-scorer: the fewer requests we have in flight at an endpoint, the better.

Computed when load changes, for all candidates at once: every score depends on the greatest count. About 0.07 µs an endpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar

import msgspec

from epp.plugins.base import Context, Plugin, Producer
from epp.types import Endpoint, LLMRequest


class ActiveRequestScorer(Plugin):
    """1 where the count is at most idleThreshold, else (max - count) / max * maxBusyScore; max is over the candidates.

    A maxBusyScore below 1 leaves a gap between idle and busy endpoints. requestTimeout is accepted and ignored: a request counts until
    its stream ends, and streams end.
    """

    type: ClassVar[str] = "active-request-scorer"
    requires: ClassVar[tuple[str, ...]] = ("inflight-load",)
    per_request: ClassVar[bool] = False

    idle_threshold: Annotated[int, msgspec.Meta(ge=0)] = 0
    max_busy_score: Annotated[float, msgspec.Meta(ge=0, le=1)] = 1.0
    in_flight_load_producer_name: str = ""
    request_timeout: str = ""

    def bind(self, context: Context) -> None:
        if self.in_flight_load_producer_name:
            context.plugin(self.in_flight_load_producer_name, Producer, parameter="inFlightLoadProducerName")

    def score(self, _request: LLMRequest, endpoints: Sequence[Endpoint]) -> Sequence[float]:
        counts = [e.inflight_requests for e in endpoints]
        most, idle = max(counts), self.idle_threshold
        if most <= idle:
            return [1.0] * len(counts)
        share = self.max_busy_score / most
        return [1.0 if count <= idle else (most - count) * share for count in counts]
