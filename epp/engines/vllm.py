"""vLLM's `/metrics`, 0.11 to 0.32.

With data parallelism one server exposes a series per engine (`engine="0"`, `engine="1"`): queues are summed and the fullest cache
counts. `num_gpu_blocks` is already the sum over the engines in each of their series (recorded: 192 in both for twice 96), so the
largest is taken, not the sum. It includes one block per engine that is never used.

A sleeping engine reports no load at all and would attract every request; `vllm:engine_sleep_state` gives it away.

LoRA adapters are told in labels, in a series for every combination ever seen; its value is the time it was last true, so the largest is
the present. Both lists name all adapters in use, running or not: what is in the first is active, waiting is only what is not.
"""

from __future__ import annotations

from collections.abc import Mapping

from epp.datastore import Reading
from epp.engines.exposition import find_all, labels_of, values
from epp.engines.family import METRICS_PATHS, AsleepError, ReadingError, count, fullest, total

WAITING = b"vllm:num_requests_waiting"
RUNNING = b"vllm:num_requests_running"
KV_USAGE = b"vllm:kv_cache_usage_perc"
KV_USAGE_OLD = b"vllm:gpu_cache_usage_perc"
"""Up to 0.11."""
CACHE_CONFIG = b"vllm:cache_config_info"
SLEEP_STATE = b"vllm:engine_sleep_state"
LORA = b"vllm:lora_requests_info"
PREFIX_QUERIES = b"vllm:prefix_cache_queries_total"
PREFIX_HITS = b"vllm:prefix_cache_hits_total"
STARTED = b"process_start_time_seconds"
NO_ADAPTERS: frozenset[str] = frozenset()


class Vllm:
    """An `epp.engines.family.EngineFamily`."""

    name = "vllm"
    paths = METRICS_PATHS

    def read(self, text: bytes) -> Reading:
        waiting = values(text, WAITING)
        running = values(text, RUNNING)
        usage = values(text, KV_USAGE) or values(text, KV_USAGE_OLD)
        if not (waiting or running or usage):
            raise ReadingError("no vllm: metrics in the answer")
        if _asleep(text):
            raise AsleepError("the engine is asleep")
        block_tokens, blocks = _cache_config(text)
        active, pending, adapters_max = adapters(find_all(text, LORA))
        return Reading(
            waiting=total(waiting),
            running=total(running),
            kv_usage=fullest(usage),
            kv_block_tokens=block_tokens,
            kv_blocks=blocks,
            adapters_active=active,
            adapters_waiting=pending,
            adapters_max=adapters_max,
            started_s=max(values(text, STARTED), default=None),
            prefix_queries=total(values(text, PREFIX_QUERIES)),
            prefix_hits=total(values(text, PREFIX_HITS)),
        )


def adapters(series: list[tuple[bytes, float]]) -> tuple[frozenset[str], frozenset[str], int | None]:
    """Active, waiting and most possible LoRA adapters out of such series. Without any (before the first request) none is in use."""
    if not series:
        return NO_ADAPTERS, NO_ADAPTERS, None
    newest = labels_of(max(series, key=lambda sample: sample[1])[0])
    active = _names(newest, "running_lora_adapters")
    return active, _names(newest, "waiting_lora_adapters") - active, count(newest.get("max_lora")) or None


def _names(labels: Mapping[str, str], label: str) -> frozenset[str]:
    return frozenset(name for part in labels.get(label, "").split(",") if (name := part.strip()))


def _asleep(text: bytes) -> bool:
    """True if every engine says it is not awake."""
    awake = [value for labels, value in find_all(text, SLEEP_STATE) if labels_of(labels).get("sleep_state") == "awake"]
    return bool(awake) and not any(awake)


def _cache_config(text: bytes) -> tuple[int | None, int | None]:
    """Tokens a block and blocks in all; None where the engine does not say, or says None."""
    configs = [labels_of(labels) for labels, _ in find_all(text, CACHE_CONFIG)]
    block_tokens = max((count(config.get("block_size")) for config in configs), default=0)
    blocks = max((count(config.get("num_gpu_blocks")) for config in configs), default=0)
    return block_tokens or None, blocks or None
