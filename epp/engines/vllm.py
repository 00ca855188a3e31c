"""vLLM's `/metrics`.

With data parallelism one server exposes a series per engine (`engine="0"`, `engine="1"`): queues are summed and the fullest cache
counts. `num_gpu_blocks` is already the sum over the engines in each of their series (recorded: 192 in both for twice 96), so the
largest is taken, not the sum. It includes one block per engine that is never used.

A sleeping engine reports no load at all and would attract every request; `vllm:engine_sleep_state` gives it away.
"""

from __future__ import annotations

from math import isfinite

from epp.datastore import Reading
from epp.engines.exposition import find_all, labels_of
from epp.engines.family import AsleepError, ReadingError

WAITING = b"vllm:num_requests_waiting"
RUNNING = b"vllm:num_requests_running"
KV_USAGE = b"vllm:kv_cache_usage_perc"
KV_USAGE_OLD = b"vllm:gpu_cache_usage_perc"
"""Up to 0.11."""
CACHE_CONFIG = b"vllm:cache_config_info"
SLEEP_STATE = b"vllm:engine_sleep_state"


class Vllm:
    """An `epp.engines.family.EngineFamily`."""

    name = "vllm"

    def read(self, text: bytes) -> Reading:
        waiting = _values(text, WAITING)
        running = _values(text, RUNNING)
        usage = _values(text, KV_USAGE) or _values(text, KV_USAGE_OLD)
        if not (waiting or running or usage):
            raise ReadingError("no vllm: metrics in the answer")
        if _asleep(text):
            raise AsleepError("the engine is asleep")
        block_tokens, blocks = _cache_config(text)
        return Reading(
            waiting=sum(waiting) if waiting else None,
            running=sum(running) if running else None,
            kv_usage=min(1.0, max(usage)) if usage else None,
            kv_block_tokens=block_tokens,
            kv_blocks=blocks,
        )


def _values(text: bytes, family: bytes) -> list[float]:
    return [value for _, value in find_all(text, family) if isfinite(value) and value >= 0]


def _asleep(text: bytes) -> bool:
    """True if every engine says it is not awake."""
    awake = [value for labels, value in find_all(text, SLEEP_STATE) if labels_of(labels).get("sleep_state") == "awake"]
    return bool(awake) and not any(awake)


def _cache_config(text: bytes) -> tuple[int | None, int | None]:
    """Tokens a block and blocks in all; None where the engine does not say, or says None."""
    block_tokens, blocks = [], []
    for labels, _ in find_all(text, CACHE_CONFIG):
        config = labels_of(labels)
        block_tokens.append(_count(config.get("block_size", "")))
        blocks.append(_count(config.get("num_gpu_blocks", "")))
    return max(block_tokens, default=0) or None, max(blocks, default=0) or None


def _count(text: str) -> int:
    return int(text) if text.isascii() and text.isdigit() and len(text) < 16 else 0
