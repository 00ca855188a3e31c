"""precise-prefix-cache-scorer: the old all-in-one form of precise prefix routing, kept so that old configurations run.

It scores what a prefix producer found, as prefix-cache-scorer does, and weighs it by where it is cached (gpu, cpu) where the producer knows.
Its parameters configured an index fed by the engines' KV events: those that still mean something are the producer's (`producer_parameters`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import msgspec

from epp.plugins.base import Plugin, match_of
from epp.types import Endpoint, LLMRequest


class PrecisePrefixCacheScorer(Plugin):
    """matched / prompt, in tokens, of the first prefix producer; a token on a slower tier counts by the weight of that.

    Where no prefix producer is configured, one is added. Parameters are those of precise-prefix-cache-producer, and what was configured beside
    them in the old form, which is accepted and not looked into.
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
        return {slot: tokens / total for slot, tokens in getattr(match, "weighted_tokens", match.matched_tokens).items()}

    @classmethod
    def producer_parameters(cls, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """What of an old configuration is for precise-prefix-cache-producer."""
        kept = {name: parameters[name] for name in ("kvEventsConfig", "speculativeIndexing") if parameters.get(name)}
        if parameters.get("speculativeTTL"):
            kept["speculativeTTL"] = parameters["speculativeTTL"]
        indexer = parameters.get("indexerConfig") or {}
        found = {name: indexer[name] for name in ("kvBlockIndexConfig", "kvCacheBackendConfigs") if indexer.get(name)}
        processor = parameters.get("tokenProcessorConfig") or indexer.get("tokenProcessorConfig")
        return kept | ({"indexerConfig": found} if found else {}) | ({"tokenProcessorConfig": processor} if processor else {})
