"""precise-prefix-cache-scorer: the old all-in-one form of precise prefix routing, kept so that old configurations run.

It scores what a prefix producer found, as prefix-cache-scorer does. Its parameters configured an index fed by the engines' KV events;
they are accepted and not looked into, for such an index is a producer's business.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import msgspec

from epp.plugins.base import Plugin, match_of
from epp.types import Endpoint, LLMRequest


class PrecisePrefixCacheScorer(Plugin):
    """matched / prompt, in tokens, of the first prefix producer.

    KV events come with precise routing and are not read yet: until then it sees the approximate index, of the first prefix producer
    configured, else of approx-prefix-cache-producer, which is added.
    """

    type: ClassVar[str] = "precise-prefix-cache-scorer"
    deprecated: ClassVar[str] = "precise-prefix-cache-producer with prefix-cache-scorer"
    requires: ClassVar[tuple[str, ...]] = ("prefix-match",)
    per_request: ClassVar[bool] = True

    token_processor_config: dict[str, Any] = msgspec.field(default_factory=dict)
    indexer_config: dict[str, Any] = msgspec.field(default_factory=dict)
    kv_events_config: dict[str, Any] = msgspec.field(default_factory=dict)
    speculative_indexing: bool = False
    speculative_ttl: str = msgspec.field(default="", name="speculativeTTL")

    def score(self, request: LLMRequest, endpoints: Sequence[Endpoint]) -> Sequence[float]:
        found = self.score_sparse(request)
        return [found.get(e.slot, 0.0) for e in endpoints]

    def score_sparse(self, request: LLMRequest) -> Mapping[int, float]:
        match = match_of(request, "")
        if match is None or not match.matched_tokens:
            return {}
        total = match.prompt_tokens
        return {slot: tokens / total for slot, tokens in match.matched_tokens.items()}
