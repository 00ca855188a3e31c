"""inflight-load-producer: what a request weighs on its endpoint from the moment it is sent.

The accounting itself is always on (datastore.Ticket); this plugin is how to configure it. A request weighs its uncached prompt tokens
until its first token; with addEstimatedOutputTokens its expected output too, and all of it until its end.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

import msgspec

from epp.plugins.base import Plugin
from epp.types import LLMRequest, Snapshot


class InflightLoadProducer(Plugin):
    """tokens = uncached prompt tokens [+ min(prompt x outputRatio, maxEstimatedOutputTokens, the request's own limit)]."""

    type: ClassVar[str] = "inflight-load-producer"
    produces: ClassVar[tuple[str, ...]] = ("inflight-load",)

    add_estimated_output_tokens: bool = False
    output_ratio: Annotated[float, msgspec.Meta(ge=0)] = 1.5
    max_estimated_output_tokens: Annotated[int, msgspec.Meta(ge=0)] = 0
    """0: no limit."""
    prefix_match_info_producer_name: str = ""
    sync_cross_replica_state: bool = True
    """Accepted: there is no state shared between replicas yet."""

    def produce(self, request: LLMRequest, candidates: Snapshot) -> None:
        """Nothing per request: endpoints carry their load."""

    def charge(self, request: LLMRequest, uncached_tokens: int) -> int:
        """Tokens the endpoint is charged with."""
        if not self.add_estimated_output_tokens:
            return uncached_tokens
        output = int(request.prompt_tokens * self.output_ratio)
        if self.max_estimated_output_tokens:
            output = min(output, self.max_estimated_output_tokens)
        if request.max_output_tokens is not None:
            output = min(output, max(0, request.max_output_tokens))
        return uncached_tokens + output
