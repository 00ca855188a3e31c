"""concurrency-detector: how full the pool is, by our own accounting of what is in flight. Needs no metrics and is never late.

It is a filter too, in profiles that name it, and in the one there is without schedulingProfiles if it is among the plugins: there all
that may filter does. Cost: about 0.1 µs an endpoint each time it is asked.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

import msgspec

from epp.plugins.base import Context, Plugin, Producer
from epp.types import Endpoint, LLMRequest


class ConcurrencyDetector(Plugin):
    """In flight / capacity, over all endpoints: of requests (maxConcurrency each) or of tokens (maxTokenConcurrency each).

    hybrid: the mean over endpoints of the greater of both. No endpoints: 1. As a filter it keeps endpoints below
    int(capacity * (1 + headroom)), in hybrid mode of both; there may be none.
    """

    type: ClassVar[str] = "concurrency-detector"
    uses: ClassVar[tuple[str, ...]] = ("inflight-load",)
    leads: ClassVar[bool] = True
    """It sees a request end at once, before the engine's metrics do."""

    max_concurrency: Annotated[int, msgspec.Meta(gt=0)] = 100
    max_token_concurrency: Annotated[int, msgspec.Meta(gt=0)] = 1_000_000
    concurrency_mode: Literal["requests", "tokens", "hybrid"] = "requests"
    headroom: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    in_flight_load_producer_name: str = ""

    def bind(self, context: Context) -> None:
        if self.in_flight_load_producer_name:
            context.plugin(self.in_flight_load_producer_name, Producer, parameter="inFlightLoadProducerName")

    def saturation(self, endpoints: Sequence[Endpoint]) -> float:
        if not endpoints:
            return 1.0
        requests, tokens = self.max_concurrency, self.max_token_concurrency
        if self.concurrency_mode == "requests":
            return sum(e.inflight_requests for e in endpoints) / (requests * len(endpoints))
        if self.concurrency_mode == "tokens":
            return sum(e.inflight_tokens for e in endpoints) / (tokens * len(endpoints))
        return sum(max(e.inflight_requests / requests, e.inflight_tokens / tokens) for e in endpoints) / len(endpoints)

    def level(self, endpoints: Sequence[Endpoint]) -> tuple[float, float, float]:
        """Saturation, and what one more request, and one more prompt token, adds to it; hybrid: at most."""
        count = max(1, len(endpoints))
        by_request = 1.0 / (self.max_concurrency * count) if self.concurrency_mode != "tokens" else 0.0
        by_token = 1.0 / (self.max_token_concurrency * count) if self.concurrency_mode != "requests" else 0.0
        return self.saturation(endpoints), by_request, by_token

    def keep(self, _request: LLMRequest, endpoints: Sequence[Endpoint]) -> Sequence[Endpoint]:
        factor = 1.0 + self.headroom
        requests, tokens = int(self.max_concurrency * factor), int(self.max_token_concurrency * factor)
        if self.concurrency_mode == "requests":
            return [e for e in endpoints if e.inflight_requests < requests]
        if self.concurrency_mode == "tokens":
            return [e for e in endpoints if e.inflight_tokens < tokens]
        return [e for e in endpoints if e.inflight_requests < requests and e.inflight_tokens < tokens]
