"""approx-prefix-cache-producer: what each endpoint should have cached, learned from what was sent to it."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import msgspec

from epp.plugins.base import Plugin
from epp.prefix import hashing
from epp.prefix.index import PrefixIndex
from epp.types import Endpoint, LLMRequest, PrefixMatch

UNLIMITED_TOKENS = 1 << 24
"""Stands for 'no limit' when both limits are 0: more than any context window."""


class ApproxPrefixCacheProducer(Plugin):
    """Hashes the prompt in blocks, looks up who was sent each, and records the pick.

    blockSizeTokens is never below 64; blockGrowth `geometric` doubles the block size along long prompts (`uniform`: as the reference
    picker). maxPrefixTokensToMatch wins over maxPrefixBlocksToMatch; both 0 is unlimited. lruCapacityPerServer bounds the blocks
    remembered per endpoint; autoTune also bounds them by the engine's own KV cache once /metrics has told its size.
    """

    type: ClassVar[str] = "approx-prefix-cache-producer"

    auto_tune: bool = True
    block_size_tokens: Annotated[int, msgspec.Meta(ge=0)] = 16
    block_growth: Literal["geometric", "uniform"] = "geometric"
    max_prefix_tokens_to_match: Annotated[int, msgspec.Meta(ge=0)] = 131_072
    max_prefix_blocks_to_match: Annotated[int, msgspec.Meta(ge=0)] = 2_048
    lru_capacity_per_server: Annotated[int, msgspec.Meta(ge=2)] = 31_250

    def __post_init__(self) -> None:
        block_tokens = max(self.block_size_tokens, hashing.BLOCK_TOKENS_MIN)
        tokens_max = self.max_prefix_tokens_to_match or self.max_prefix_blocks_to_match * block_tokens or UNLIMITED_TOKENS
        self.__dict__.update(
            index=PrefixIndex(self.lru_capacity_per_server),
            _layout=hashing.blocks(block_tokens, tokens_max, tokens_max // block_tokens, geometric=self.block_growth == "geometric"),
        )

    @property
    def index(self) -> PrefixIndex:
        index: PrefixIndex = self.__dict__["index"]
        return index

    def produce(self, request: LLMRequest, mask: int) -> None:
        state = self.__dict__
        layout: hashing.Blocks = state["_layout"]
        tokens = request.prompt_tokens
        if not tokens:
            return
        hashes = hashing.chain(request.prompt, layout, hashing.seed(request.target_model, request.cache_salt))
        cumulative = layout.cumulative
        found = state["index"].lookup(hashes, mask)
        request.prefix = PrefixMatch(hashes, cumulative, tokens, {slot: cumulative[blocks - 1] for slot, blocks in found.items()})

    def picked(self, request: LLMRequest, endpoint: Endpoint) -> None:
        match = request.prefix
        if match is None:
            return
        state = self.__dict__
        index: PrefixIndex = state["index"]
        if self.auto_tune:
            index.set_capacity_tokens(endpoint.slot, endpoint.kv_capacity_tokens)
        index.record(endpoint.slot, match.hashes, match.sizes)
