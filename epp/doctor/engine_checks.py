"""Are the model servers what the picker takes them for? Pure: facts in, findings out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from epp.config.schema import EndpointPickerConfig
from epp.doctor.engine_facts import EngineFacts
from epp.doctor.findings import Check, Finding, fail, ok, warn
from epp.prefix.hashing import BLOCK_TOKENS_MIN

NAMES_SHOWN = 5
APPROXIMATE = "approx-prefix-cache-producer"
DEFAULT_BLOCK_TOKENS = 16


def metrics(engines: Sequence[EngineFacts]) -> Iterator[Finding]:
    silent = [engine for engine in engines if engine.error]
    for engine in silent[:NAMES_SHOWN]:
        said = fail if len(silent) == len(engines) else warn
        yield said(
            f"{engine.name} ({engine.address}): {engine.error}",
            "the picker knows nothing of its queue and cache, and routes by its own count of requests",
            "is the engine up? are metrics on (SGLang: --enable-metrics; Triton: port 8002)? another port or path: `metrics-data-source` in the configuration. "
            "From a machine outside the cluster this may be the network alone",
        )
    if len(silent) > NAMES_SHOWN:
        yield warn(f"{len(silent) - NAMES_SHOWN} more engines do not answer", "as above", "as above")
    if engines and not silent:
        families = Counter(engine.family for engine in engines)
        yield ok("metrics read: " + ", ".join(f"{count} {family}" for family, count in families.most_common()))


def block_size(engines: Sequence[EngineFacts], config: EndpointPickerConfig) -> Iterator[Finding]:
    """Blocks of the picker's prefix index against blocks of the engines' own cache."""
    sizes = Counter(engine.reading.kv_block_tokens for engine in engines if engine.reading and engine.reading.kv_block_tokens)
    if not sizes:
        yield ok("the engines do not tell their block size")
        return
    if len(sizes) > 1:
        yield warn(
            "the engines have different block sizes: " + ", ".join(f"{count} with {tokens}" for tokens, count in sizes.items()),
            "one prefix index fits them unequally: cache hits are over- or underrated on some",
            "start all model servers with the same --block-size",
        )
    (engine_tokens, _), *_ = sizes.most_common(1)
    assert engine_tokens is not None
    for plugin in config.plugins:
        if plugin.type == APPROXIMATE:
            yield from _approximate(plugin.name, int(plugin.parameters.get("blockSizeTokens", DEFAULT_BLOCK_TOKENS)), engine_tokens)


def _approximate(name: str, configured_tokens: int, engine_tokens: int) -> Iterator[Finding]:
    block_tokens = max(configured_tokens, BLOCK_TOKENS_MIN)
    if block_tokens % engine_tokens:
        yield warn(
            f"{name} cuts prompts in blocks of {block_tokens} tokens, the engines in blocks of {engine_tokens}",
            "the index takes for cached what ends inside an engine's block, and is not: predicted cache hits are too high",
            f"set blockSizeTokens of {name} to a multiple of {engine_tokens} (at least {BLOCK_TOKENS_MIN})",
        )


def models(engines: Sequence[EngineFacts]) -> Iterator[Finding]:
    told = [engine for engine in engines if engine.models is not None]
    if not told:
        yield ok("the engines do not tell their models")
        return
    everywhere = frozenset.intersection(*(engine.models for engine in told if engine.models is not None))
    anywhere = frozenset[str]().union(*(engine.models for engine in told if engine.models is not None))
    empty = [engine for engine in told if not engine.models]
    if empty:
        yield warn(
            f"no model is loaded on {', '.join(engine.name for engine in empty[:NAMES_SHOWN])}",
            "they get no requests",
            "load the model there, or take them out of the pool",
        )
    elif not everywhere:
        yield warn(
            f"no model is on all endpoints; together they serve {', '.join(sorted(anywhere)[:NAMES_SHOWN])}",
            "each model has only part of the pool; a gateway that fails open sends requests to engines without the model: 404",
            "one InferencePool per model (a picker can serve several: --pool-name repeated), or load the model everywhere",
        )
    else:
        yield ok(f"{', '.join(sorted(everywhere)[:NAMES_SHOWN])} on all {len(told)} endpoints that tell")


def full_cache(engines: Sequence[EngineFacts]) -> Iterator[Finding]:
    full = [engine for engine in engines if engine.reading and (engine.reading.kv_usage or 0) >= 0.98 and (engine.reading.waiting or 0) > 0]
    if full:
        yield warn(
            f"the KV cache is full and requests wait on {', '.join(engine.name for engine in full[:NAMES_SHOWN])}",
            "time to first token grows with the queue",
            "add model servers, or lower --max-num-seqs / --max-model-len",
        )


CHECKS = (
    Check("engine-metrics", "every model server's metrics can be read", ("engines",), metrics),
    Check("engine-block-size", "the prefix index and the engines cut prompts alike", ("engines", "config"), block_size),
    Check("engine-models", "the endpoints serve the same model", ("engines",), models),
    Check("engine-cache", "no model server is full with requests waiting", ("engines",), full_cache),
)
