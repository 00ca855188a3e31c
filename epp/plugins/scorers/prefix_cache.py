"""prefix-cache-scorer: the more of the prompt an endpoint has in its KV cache, the better.

Sparse: costs the endpoints that have some of the prompt, not the size of the pool.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar

import msgspec

from epp.plugins.base import Context, Plugin, Producer, match_of
from epp.types import Endpoint, LLMRequest


class PrefixCacheScorer(Plugin):
    """w * min(1, matched / scale)^2 + (1 - w) * matched / prompt, in tokens; w = matchLengthWeight, scale = matchLengthScaleTokens.

    Reads the match of the producer prefixMatchInfoProducerName, of the first prefix producer if that is empty;
    approx-prefix-cache-producer is added when there is none.
    """

    type: ClassVar[str] = "prefix-cache-scorer"
    requires: ClassVar[tuple[str, ...]] = ("prefix-match",)
    per_request: ClassVar[bool] = True

    match_length_weight: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.0
    match_length_scale_tokens: Annotated[int, msgspec.Meta(gt=0)] = 8192
    prefix_match_info_producer_name: str = ""

    def bind(self, context: Context) -> None:
        if self.prefix_match_info_producer_name:
            context.plugin(self.prefix_match_info_producer_name, Producer, parameter="prefixMatchInfoProducerName")

    def score(self, request: LLMRequest, endpoints: Sequence[Endpoint]) -> Sequence[float]:
        found = self.score_sparse(request)
        return [found.get(e.slot, 0.0) for e in endpoints]

    def score_sparse(self, request: LLMRequest) -> Mapping[int, float]:
        match = match_of(request, self.prefix_match_info_producer_name)
        if match is None or not match.matched_tokens:
            return {}
        total = match.prompt_tokens
        weight, scale = self.match_length_weight, self.match_length_scale_tokens
        if not weight:
            return {slot: tokens / total for slot, tokens in match.matched_tokens.items()}
        return {
            slot: weight * min(1.0, tokens / scale) ** 2 + (1.0 - weight) * tokens / total for slot, tokens in match.matched_tokens.items()
        }
