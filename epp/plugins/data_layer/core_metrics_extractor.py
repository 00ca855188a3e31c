"""core-metrics-extractor: which metrics of which engine mean what."""

from __future__ import annotations

import re
from typing import Annotated, ClassVar

import msgspec

from epp.plugins.base import Plugin

BUILT_IN_ENGINES = ("vllm", "sglang", "trtllm-serve", "triton-tensorrt-llm", "triton", "nim", "tgi", "llamacpp", "dynamo")

_LABEL = r'\s*[a-zA-Z_]\w*\s*=\s*(?:"[^"]*"|[^",}\s]+)\s*'
_SPEC = re.compile(rf"\s*(?:[a-zA-Z_:][\w:]*\s*(?:\{{(?:{_LABEL}(?:,{_LABEL})*)?,?\s*\}})?\s*)?")


def _check(spec: str, parameter: str) -> None:
    if not _SPEC.fullmatch(spec):
        raise ValueError(f"{parameter}: {spec!r} is no metric; write name or name{{label=value,...}}")


class CustomMetric(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, rename="camel", frozen=True):
    """One more number to read, and the endpoint attribute it becomes."""

    attribute_key: Annotated[str, msgspec.Meta(min_length=1)]
    metric_spec: Annotated[str, msgspec.Meta(min_length=1)]

    def __post_init__(self) -> None:
        _check(self.metric_spec, "metricSpec")


class EngineConfig(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, rename="camel", frozen=True):
    """The metrics of one engine, each as `name` or `name{label=value,...}`; empty: it has no such metric. Replaces a built-in one of its name."""

    name: Annotated[str, msgspec.Meta(min_length=1)]
    queued_requests_spec: str = ""
    running_requests_spec: str = ""
    kv_usage_spec: str = ""
    lora_spec: str = ""
    cache_info_spec: str = ""
    """A gauge that tells block size and number of blocks in its labels."""
    cache_block_size_label_name: str = ""
    """Empty: block_size."""
    cache_num_blocks_label_name: str = ""
    """Empty: num_gpu_blocks."""
    cache_block_size_spec: str = ""
    """Gauges that tell them as values instead."""
    cache_num_blocks_spec: str = ""
    custom_metrics: tuple[CustomMetric, ...] = ()

    def __post_init__(self) -> None:
        for parameter, spec in (
            ("queuedRequestsSpec", self.queued_requests_spec),
            ("runningRequestsSpec", self.running_requests_spec),
            ("kvUsageSpec", self.kv_usage_spec),
            ("loraSpec", self.lora_spec),
            ("cacheInfoSpec", self.cache_info_spec),
            ("cacheBlockSizeSpec", self.cache_block_size_spec),
            ("cacheNumBlocksSpec", self.cache_num_blocks_spec),
        ):
            _check(spec, parameter)


class CoreMetricsExtractor(Plugin):
    """Queue depth, running requests, KV-cache use and size, and LoRA adapters, from each endpoint's metrics.

    The label engineLabelKey of an endpoint names its engine; defaultEngine is that of endpoints without it, and where it is empty what they
    answer tells. Built in: vllm, sglang, trtllm-serve, triton-tensorrt-llm, triton, nim, tgi, llamacpp, dynamo; engineConfigs[] adds others
    or replaces these.
    """

    type: ClassVar[str] = "core-metrics-extractor"
    roles: ClassVar[tuple[str, ...]] = ("extractor",)

    engine_label_key: str = "llm-d.ai/engine-type"
    default_engine: str = ""
    engine_configs: tuple[EngineConfig, ...] = ()

    def __post_init__(self) -> None:
        names = [engine.name for engine in self.engine_configs]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"engineConfigs: {', '.join(twice)} is there twice")
        known = {*BUILT_IN_ENGINES, *names}
        if self.default_engine and self.default_engine not in known:
            raise ValueError(f"defaultEngine: no engine is named {self.default_engine!r}; known: {', '.join(sorted(known))}")
