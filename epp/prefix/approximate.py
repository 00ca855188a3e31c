"""What each endpoint should have cached, learned from what was sent to it: cut, hash, look up, record.

The machinery of the prefix producers, which differ in their parameters alone. Not here: the index itself (index), how prompts are cut
(hashing). Cost per request: 0.13 µs a block to hash, 2-4 µs to look up, 0.3 µs for every block recorded anew,
0.25 µs for each when the answer ends.
"""

from __future__ import annotations

from typing import Any

from epp.prefix import hashing
from epp.prefix.index import PrefixIndex
from epp.types import Decision, Endpoint, LLMRequest, PrefixMatch, Snapshot

UNLIMITED_TOKENS = 1 << 24
"""Stands for 'no limit': more than any context window."""


class ApproximatePrefixes:
    """One index and how prompts are cut for it."""

    __slots__ = ("_auto_tune", "_layout", "_sent_to", "index")

    def __init__(self, *, block_tokens: int, tokens_max: int, geometric: bool, capacity_blocks: int, auto_tune: bool) -> None:
        """`tokens_max`: of a prompt, no more than so many are hashed; 0: no limit. `auto_tune`: an engine's own KV cache bounds it too."""
        block_tokens = max(block_tokens, hashing.BLOCK_TOKENS_MIN)
        tokens_max = tokens_max or UNLIMITED_TOKENS
        self.index = PrefixIndex(capacity_blocks)
        self._layout = hashing.blocks(block_tokens, tokens_max, tokens_max // block_tokens, geometric=geometric)
        self._auto_tune = auto_tune
        self._sent_to: dict[int, Endpoint] = {}
        """Slot -> the endpoint there that was sent something last: a slot is given to another when its endpoint is gone."""

    def match(self, name: str, request: LLMRequest, candidates: Snapshot) -> None:
        """Put what the candidates have of the prompt on the request, as `name`'s; for scorers that name no producer, the first one's."""
        tokens = request.prompt_tokens
        if not tokens:
            return
        layout = self._layout
        cumulative = layout.cumulative
        hashes = hashing.chain(request.prompt, layout, hashing.seed(request.target_model, request.cache_salt))
        match = PrefixMatch(hashes, cumulative, tokens, self.index.lookup(hashes, candidates.mask, cumulative))
        request.attributes[name] = match
        if request.prefix is None:
            request.prefix = match

    def picked(self, name: str, request: LLMRequest, decision: Decision) -> None:
        """Whoever decodes the prompt will hold it, and whoever prefills it."""
        self.served(name, request, decision.endpoint)
        if decision.targets:
            prefill = decision.targets.get("prefill")
            if prefill is not None:
                self.served(name, request, prefill)

    def served(self, name: str, request: LLMRequest, endpoint: Endpoint) -> None:
        """The endpoint was sent the prompt."""
        match = request.attributes.get(name)
        if match is None:
            return
        if self._auto_tune:
            self.index.set_capacity_tokens(endpoint.slot, endpoint.kv_capacity_tokens)
        self._sent_to[endpoint.slot] = endpoint
        self.index.record(endpoint.slot, match.hashes, match.sizes)

    def answered(self, name: str, request: LLMRequest, endpoint: Endpoint) -> None:
        """The endpoint used the prompt until now."""
        match = request.attributes.get(name)
        if match is not None and self._sent_to.get(endpoint.slot) is endpoint:
            self.index.used(endpoint.slot, match.hashes, match.sizes)

    def state(self) -> dict[str, Any]:
        """How full the index is."""
        index = self.index
        return {"blocks": index.blocks, "distinct_blocks": len(index), "due_blocks": index.due, "rotations": index.rotations_total}
