"""token-load-scorer: the fewer prompt tokens an endpoint has yet to prefill, this request's included, the better.

Per request, for what this request adds differs by what is cached where: about 0.06 µs an endpoint, 0.1 where there is a prefix match.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar

import msgspec

from epp.plugins.base import Context, Plugin, Producer, match_of
from epp.types import Endpoint, LLMRequest


class TokenLoadScorer(Plugin):
    """1 - min(t, queueThresholdTokens) / queueThresholdTokens, t = tokens in flight + tokens of this request not cached there."""

    type: ClassVar[str] = "token-load-scorer"
    requires: ClassVar[tuple[str, ...]] = ("inflight-load",)
    uses: ClassVar[tuple[str, ...]] = ("prefix-match",)
    per_request: ClassVar[bool] = True

    queue_threshold_tokens: Annotated[int, msgspec.Meta(gt=0)] = 4_194_304
    in_flight_load_producer_name: str = ""
    prefix_match_info_producer_name: str = ""

    def bind(self, context: Context) -> None:
        for name, parameter in (
            (self.in_flight_load_producer_name, "inFlightLoadProducerName"),
            (self.prefix_match_info_producer_name, "prefixMatchInfoProducerName"),
        ):
            if name:
                context.plugin(name, Producer, parameter=parameter)

    def score(self, request: LLMRequest, endpoints: Sequence[Endpoint]) -> Sequence[float]:
        limit, prompt = self.queue_threshold_tokens, request.prompt_tokens
        match = match_of(request, self.prefix_match_info_producer_name)
        if match is None or not match.matched_tokens:
            return [(limit - t) / limit if (t := e.inflight_tokens + prompt) < limit else 0.0 for e in endpoints]
        uncached = {slot: max(0, prompt - tokens) for slot, tokens in match.matched_tokens.items()}
        return [(limit - t) / limit if (t := e.inflight_tokens + uncached.get(e.slot, prompt)) < limit else 0.0 for e in endpoints]
