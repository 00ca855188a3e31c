"""precise-prefix-cache-producer: which prompt blocks each endpoint has, by the engines' own word.

How to write it, and what of a request it hears; the machinery is kv_view, the events come from epp.events. Its parameters are the reference
picker's, all of them checked, so that a configuration written for that works unchanged.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import msgspec

from epp.clock import MonotonicClock
from epp.config.quantities import quantity
from epp.config.units import Duration, OptionalDuration, duration_s
from epp.plugins.base import Context, Finished, Plugin
from epp.prefix.approximate import ApproximatePrefixes
from epp.prefix.kv_view import KvView, WatchedIndex
from epp.prefix.precise import BLOCK_BYTES, ENTRY_BYTES, TIER_WEIGHTS
from epp.types import Decision, Endpoint, LLMRequest, Snapshot

BLOCK_TOKENS = 16
CAPACITY_BLOCKS = 31_250
"""Blocks remembered per endpoint, beside what its KV cache holds: the approximate producer's default."""
TOKENS_MAX = 131_072
"""Of a prompt, for the approximate index."""
BUDGET = "2GiB"
BUDGET_BYTES_MIN = 1 << 20
ENDPOINTS_SHOWN_MAX = 256
OK = 200

Port = Annotated[int, msgspec.Meta(ge=0, le=65535)]
Count = Annotated[int, msgspec.Meta(ge=0)]


class TokenProcessorConfig(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, rename="camel", frozen=True):
    """How prompts are cut. blockSize is the deprecated name of blockSizeTokens."""

    block_size_tokens: Count = 0
    block_size: Count = 0
    hash_seed: str = ""
    hash_algorithm: Literal["", "cbor-fnv", "xxh64"] = ""


class InMemoryConfig(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, rename="camel", frozen=True):
    size: Annotated[int, msgspec.Meta(ge=1)] = 100_000_000
    pod_cache_size: Annotated[int, msgspec.Meta(ge=1)] = 10


class RedisConfig(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, rename="camel", frozen=True):
    address: str = "redis://127.0.0.1:6379"
    backend_type: Literal["", "redis", "valkey"] = ""
    enable_rdma: bool = msgspec.field(name="enableRDMA", default=False)


class CostAwareMemoryConfig(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, rename="camel", frozen=True):
    size: Annotated[str, msgspec.Meta(pattern=r"^[0-9]+(?:\.[0-9]+)? ?(?:[kKMGTP]i?)?B?$", max_length=32)] = BUDGET


class KvBlockIndexConfig(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, rename="camel", frozen=True):
    in_memory_config: InMemoryConfig | None = None
    redis_config: RedisConfig | None = None
    valkey_config: RedisConfig | None = None
    cost_aware_memory_config: CostAwareMemoryConfig | None = None
    enable_metrics: bool = False
    metrics_logging_interval: OptionalDuration = ""


class KvCacheBackendConfig(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, rename="camel", frozen=True):
    """What a cached block is worth on a tier (`gpu`, `cpu`)."""

    name: Annotated[str, msgspec.Meta(min_length=1)]
    weight: Annotated[float, msgspec.Meta(ge=0)] = 1.0


class IndexerConfig(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, rename="camel", frozen=True):
    kv_block_index_config: KvBlockIndexConfig = KvBlockIndexConfig()
    kv_cache_backend_configs: list[KvCacheBackendConfig] = []

    @property
    def budget_bytes(self) -> int:
        """Memory for what engines have."""
        kinds = self.kv_block_index_config
        if kinds.cost_aware_memory_config is not None:
            return max(BUDGET_BYTES_MIN, _bytes(kinds.cost_aware_memory_config.size))
        budget = _bytes(BUDGET)
        if kinds.in_memory_config is not None:
            sizes = kinds.in_memory_config
            budget = min(budget, sizes.size * (BLOCK_BYTES + sizes.pod_cache_size * ENTRY_BYTES))
        return max(BUDGET_BYTES_MIN, budget)

    @property
    def tier_weights(self) -> Mapping[str, float]:
        return {**TIER_WEIGHTS, **{each.name.lower(): each.weight for each in self.kv_cache_backend_configs}}


class PodDiscoveryConfig(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, rename="camel", frozen=True):
    pod_label_selector: str = "llm-d.ai/inference-serving=true"
    pod_namespace: str = ""
    socket_port: Port = 5557
    replay_socket_port: Port = 0


class KvEventsConfig(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, rename="camel", frozen=True):
    zmq_endpoint: str = ""
    topic_filter: str = "kv@"
    concurrency: Annotated[int, msgspec.Meta(ge=1)] = 4
    engine_type: Literal["", "vllm", "sglang"] = "vllm"
    discover_pods: bool = True
    pod_discovery_config: PodDiscoveryConfig | None = None
    data_parallel_ranks: Annotated[int, msgspec.Meta(ge=1, le=1024)] = 1
    """Of each endpoint, behind its one address: their events come from the ports after socketPort. At most 16."""
    trtllm_poll_interval: OptionalDuration = ""
    """How often TensorRT-LLM servers are asked for their events, which nobody else gets then; empty: never."""


def _bytes(size: str) -> int:
    """Of `2GiB`, `500 MB`, `1k`; Ki is also written ki, and k K."""
    number = size.rstrip("B").replace(" ", "")
    return quantity(number.replace("ki", "Ki") if number.endswith("ki") else f"{number[:-1]}k" if number.endswith("K") else number)


class PrecisePrefixCacheProducer(Plugin):
    """What engines publish of their KV caches (KV events) says who has how much of a prompt, in the engines' own blocks.

    That takes the prompt's tokens: token-producer with a tokenizer, or a prompt of token ids. Without them, and for endpoints that have
    published nothing or whose events were lost, prompts are matched by what was sent where, in blocks of
    tokenProcessorConfig.blockSizeTokens (at least 64) tokens.
    indexerConfig: kvCacheBackendConfigs says what a block is worth by where it is (gpu 1, cpu 0.8; media not named do not count),
    costAwareMemoryConfig.size (2GiB) bounds the memory, inMemoryConfig.size x podCacheSize may lower that.
    redisConfig or valkeyConfig: a server where replicas share what they hear; look-ups stay in the process.
    kvEventsConfig: where engines publish; its dataParallelRanks and trtllmPollInterval are ours alone. speculativeIndexing: what was just sent counts as cached for speculativeTTL.
    Hash seeds and algorithms, concurrency and enableMetrics are accepted; nothing depends on them.
    """

    type: ClassVar[str] = "precise-prefix-cache-producer"
    produces: ClassVar[tuple[str, ...]] = ("prefix-match",)
    uses: ClassVar[tuple[str, ...]] = ("tokens",)

    token_processor_config: TokenProcessorConfig = TokenProcessorConfig()
    indexer_config: IndexerConfig = IndexerConfig()
    kv_events_config: KvEventsConfig = KvEventsConfig()
    speculative_indexing: bool = False
    speculative_ttl: Duration = msgspec.field(name="speculativeTTL", default="2s")

    def __post_init__(self) -> None:
        tokens = self.token_processor_config
        precise = WatchedIndex(
            self.indexer_config.budget_bytes,
            tier_weights=self.indexer_config.tier_weights,
            speculative_ttl_s=duration_s(self.speculative_ttl) if self.speculative_indexing else 0.0,
        )
        approximate = ApproximatePrefixes(
            block_tokens=tokens.block_size_tokens or tokens.block_size or BLOCK_TOKENS,
            tokens_max=TOKENS_MAX,
            geometric=False,
            capacity_blocks=CAPACITY_BLOCKS,
            auto_tune=True,
        )
        names: dict[int, str] = {}
        self.__dict__.update(_clock=MonotonicClock(), _names=names)
        self.__dict__["_view"] = KvView(precise, approximate, lambda: float(self.__dict__["_clock"].now_s()))

    def bind(self, context: Context) -> None:
        self.__dict__["_clock"] = context.clock

    @property
    def index(self) -> KvView:
        view: KvView = self.__dict__["_view"]
        return view

    def added(self, endpoint: Endpoint) -> None:
        self.__dict__["_names"][endpoint.slot] = endpoint.name

    def removed(self, endpoint: Endpoint) -> None:
        self.__dict__["_names"].pop(endpoint.slot, None)

    def produce(self, request: LLMRequest, candidates: Snapshot) -> None:
        self.index.match(self.name, request, candidates)

    def picked(self, request: LLMRequest, decision: Decision) -> None:
        self.index.picked(self.name, request, decision)

    def served(self, request: LLMRequest, endpoint: Endpoint) -> None:
        self.index.served(self.name, request, endpoint)

    def finished(self, request: LLMRequest, endpoint: Endpoint, outcome: Finished) -> None:
        if outcome.status == OK:
            self.index.answered(self.name, request, endpoint, outcome.usage)

    def state(self) -> dict[str, Any]:
        return self.index.state(self.__dict__["_names"], ENDPOINTS_SHOWN_MAX)
