"""precise-prefix-cache-producer: which prompt blocks each endpoint has, by the engines' own word.

The engines' KV-cache events are not read yet: until they are, this producer learns from what was sent where, as the approximate one
does, and says so once in the log. Its parameters are all checked, so that a configuration written for it works unchanged.
"""

from __future__ import annotations

import logging
from typing import Annotated, ClassVar, Literal

import msgspec

from epp.config.units import Duration, OptionalDuration
from epp.plugins.base import Context, Plugin
from epp.prefix.approximate import ApproximatePrefixes
from epp.prefix.index import PrefixIndex
from epp.types import Decision, Endpoint, LLMRequest, Snapshot

_log = logging.getLogger("epp.plugins")

BLOCK_TOKENS = 16
CAPACITY_BLOCKS = 31_250
"""Blocks remembered per endpoint, beside what its KV cache holds: the approximate producer's default."""
TOKENS_MAX = 131_072

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
    size: Annotated[str, msgspec.Meta(pattern=r"^[0-9]+(?:\.[0-9]+)? ?(?:[kKMGTP]i?)?B?$")] = "2GiB"


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


class PrecisePrefixCacheProducer(Plugin):
    """For now an approximate index: prompts are cut in blocks of tokenProcessorConfig.blockSizeTokens (at least 64) tokens.

    The rest is accepted and waits for the engines' events: indexerConfig (where block locations are kept, what a tier is worth),
    kvEventsConfig (where the engines publish), speculativeIndexing and speculativeTTL.
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
        self.__dict__["_prefixes"] = ApproximatePrefixes(
            block_tokens=tokens.block_size_tokens or tokens.block_size or BLOCK_TOKENS,
            tokens_max=TOKENS_MAX,
            geometric=False,
            capacity_blocks=CAPACITY_BLOCKS,
            auto_tune=True,
        )

    def bind(self, _context: Context) -> None:
        _log.warning(
            "KV-cache events of engines are not read yet: prefixes are matched by what was sent where",
            extra={"fields": {"plugin": self.name}},
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
