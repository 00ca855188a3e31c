"""Triton's `/metrics` (port 8002 as a rule): of a server with the TensorRT-LLM backend, and of one without.

The backend tells each model's state in a few families whose one label says which number it is. Backends before `waiting` and `fraction`
had them count what is active but not scheduled, and blocks used of all. Several models share one server: requests are summed, the
fullest cache counts, and the sizes are added up.

Without the backend only the requests pending are a load. `nv_inference_exec_count`, which the reference picker reads as running, counts
executions since the start and says nothing of now: running stays unknown.
"""

from __future__ import annotations

from epp.datastore import Reading
from epp.engines.exposition import VALUE_MAX, find_all, labels_of
from epp.engines.family import METRICS_PATHS, Gauges, ReadingError, fullest, total

REQUESTS = b"nv_trt_llm_request_metrics"
KV_BLOCKS = b"nv_trt_llm_kv_cache_block_metrics"
PENDING = b"nv_inference_pending_request_count"

_PLAIN = Gauges(waiting=PENDING, running=b"")


class TritonTensorRtLlm:
    """An `epp.engines.family.EngineFamily`."""

    name = "triton-tensorrt-llm"
    paths = METRICS_PATHS

    def read(self, text: bytes) -> Reading:
        requests = _by_model(text, REQUESTS, "request_type")
        caches = _by_model(text, KV_BLOCKS, "kv_cache_block_type")
        waiting = [depth for model in requests if (depth := _waiting(model)) is not None]
        running = [model["scheduled"] for model in requests if "scheduled" in model]
        usage = [used for cache in caches if (used := _usage(cache)) is not None]
        if not (waiting or running or usage):
            raise ReadingError("no nv_trt_llm_ metrics in the answer")
        block_tokens = int(max((cache.get("tokens_per", 0.0) for cache in caches), default=0.0))
        tokens = sum(cache.get("max", 0.0) * cache.get("tokens_per", 0.0) for cache in caches)
        return Reading(
            waiting=total(waiting),
            running=total(running),
            kv_usage=fullest(usage),
            kv_block_tokens=block_tokens or None,
            kv_blocks=(int(tokens) // block_tokens or None) if block_tokens else None,
        )


class Triton:
    """An `epp.engines.family.EngineFamily`."""

    name = "triton"
    paths = METRICS_PATHS

    def read(self, text: bytes) -> Reading:
        return _PLAIN.read(text)


def _by_model(text: bytes, family: bytes, kind: str) -> list[dict[str, float]]:
    """For each model, the family's numbers by what their label `kind` says."""
    models: dict[tuple[str, str], dict[str, float]] = {}
    for labels, value in find_all(text, family):
        if 0 <= value <= VALUE_MAX:
            told = labels_of(labels)
            model = models.setdefault((told.get("model", ""), told.get("version", "")), {})
            model[told.get(kind, "")] = value
    return list(models.values())


def _waiting(model: dict[str, float]) -> float | None:
    if "waiting" in model:
        return model["waiting"]
    if "active" in model:
        return max(0.0, model["active"] - model.get("scheduled", 0.0))
    return None


def _usage(cache: dict[str, float]) -> float | None:
    if "fraction" in cache:
        return cache["fraction"]
    if "used" in cache and cache.get("max"):
        return cache["used"] / cache["max"]
    return None
