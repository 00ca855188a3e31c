"""approx-prefix-cache-producer: what each endpoint should have cached, learned from what was sent to it."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import msgspec

from epp.plugins.base import Finished, Plugin
from epp.prefix.approximate import ApproximatePrefixes
from epp.prefix.hashing import BLOCK_TOKENS_MIN
from epp.prefix.index import PrefixIndex
from epp.types import Decision, Endpoint, LLMRequest, Snapshot


class ApproxPrefixCacheProducer(Plugin):
    """Hashes the prompt in blocks, looks up who was sent each, and records the pick.

    blockSizeTokens is never below 64; blockGrowth `geometric` doubles the block size along long prompts (`uniform`: as the reference
    picker). maxPrefixTokensToMatch wins over maxPrefixBlocksToMatch; both 0 is unlimited. lruCapacityPerServer bounds the blocks
    remembered per endpoint; autoTune also bounds them by the engine's own KV cache once /metrics has told its size.
    """

    type: ClassVar[str] = "approx-prefix-cache-producer"
    produces: ClassVar[tuple[str, ...]] = ("prefix-match",)
    uses: ClassVar[tuple[str, ...]] = ("tokens",)

    auto_tune: bool = True
    block_size_tokens: Annotated[int, msgspec.Meta(ge=0)] = 16
    block_growth: Literal["geometric", "uniform"] = "geometric"
    max_prefix_tokens_to_match: Annotated[int, msgspec.Meta(ge=0)] = 131_072
    max_prefix_blocks_to_match: Annotated[int, msgspec.Meta(ge=0)] = 2_048
    lru_capacity_per_server: Annotated[int, msgspec.Meta(ge=2)] = 31_250

    def __post_init__(self) -> None:
        block_tokens = max(self.block_size_tokens, BLOCK_TOKENS_MIN)
        self.__dict__["_prefixes"] = ApproximatePrefixes(
            block_tokens=block_tokens,
            tokens_max=self.max_prefix_tokens_to_match or self.max_prefix_blocks_to_match * block_tokens,
            geometric=self.block_growth == "geometric",
            capacity_blocks=self.lru_capacity_per_server,
            auto_tune=self.auto_tune,
        )

    @property
    def index(self) -> PrefixIndex:
        prefixes: ApproximatePrefixes = self.__dict__["_prefixes"]
        return prefixes.index

    def produce(self, request: LLMRequest, candidates: Snapshot) -> None:
        self.__dict__["_prefixes"].match(self.name, request, candidates)

    def picked(self, request: LLMRequest, decision: Decision) -> None:
        self.__dict__["_prefixes"].picked(self.name, request, decision)

    def served(self, request: LLMRequest, endpoint: Endpoint) -> None:
        self.__dict__["_prefixes"].served(self.name, request, endpoint)

    def finished(self, request: LLMRequest, endpoint: Endpoint, outcome: Finished) -> None:
        if outcome.status == 200:
            self.__dict__["_prefixes"].answered(self.name, request, endpoint)

    def state(self) -> dict[str, Any]:
        state: dict[str, Any] = self.__dict__["_prefixes"].state()
        return state
