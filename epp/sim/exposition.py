"""An engine's `/metrics` page: vLLM's names, labels and text format, as recorded from vLLM 0.32.

As in vLLM the numbers move once a scheduler step, when the step ends: a page read during a long prefill is stale, and a picker must
live with that. Not here: python_, process_ and http_ families and the `_created` gauges, which only make a real page longer.
Cost: 50 µs a page; 1 µs a step and 1 µs a finished request to keep.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable

from epp.sim.engine import EngineProfile, Load, Sequence, Step

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_TTFT_BOUNDS_S = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0,
)  # fmt: skip
_REQUEST_BOUNDS_S = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0,
)  # fmt: skip


class Histogram:
    """Counts under fixed upper bounds."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def lines(self, name: str, model_name: str) -> Iterable[str]:
        """Cumulative, as Prometheus wants them."""
        total = 0
        for bound, count in zip((*map(str, self.bounds), "+Inf"), self.counts, strict=True):
            total += count
            yield f'{name}_bucket{{engine="0",le="{bound}",model_name={model_name}}} {float(total)}'
        yield f'{name}_count{{engine="0",model_name={model_name}}} {float(total)}'
        yield f'{name}_sum{{engine="0",model_name={model_name}}} {self.sum}'


class EngineMetrics:
    """What one engine has published: hand it every step once the step's time is over."""

    def __init__(self, profile: EngineProfile, model: str) -> None:
        self.load = Load()
        self.finished = {"stop": 0, "length": 0, "abort": 0, "error": 0, "repetition": 0}
        self.prefix_queries_tokens = 0
        self.prefix_hits_tokens = 0
        self.prompt_tokens = 0
        self.generation_tokens = 0
        self.preemptions = 0
        self.time_to_first_token_s = Histogram(_TTFT_BOUNDS_S)
        self.request_latency_s = Histogram(_REQUEST_BOUNDS_S)
        self.queue_time_s = Histogram(_REQUEST_BOUNDS_S)
        self._model_name = _quoted(model)
        self._cache_config = _cache_config(profile)

    def record_step(self, step: Step, load: Load) -> None:
        self.load = load
        self.generation_tokens += len(step.emitted)
        self.preemptions += len(step.preempted)
        for sequence in step.admitted:
            self.prefix_queries_tokens += sequence.prompt_tokens
            self.prefix_hits_tokens += sequence.cached_tokens
        for sequence in step.emitted:
            if sequence.generated_tokens == 1:
                self.prompt_tokens += sequence.prompt_tokens
                self.time_to_first_token_s.observe(max(0.0, step.end_s - sequence.arrival_s))
        for sequence in step.finished:
            self._record_finished(sequence, step.end_s)

    def record_abort(self, load: Load) -> None:
        self.load = load
        self.finished["abort"] += 1

    def _record_finished(self, sequence: Sequence, end_s: float) -> None:
        self.finished[sequence.finish_reason] += 1
        self.request_latency_s.observe(max(0.0, end_s - sequence.arrival_s))
        self.queue_time_s.observe(max(0.0, sequence.admitted_s - sequence.arrival_s))

    def text(self) -> str:
        """The page."""
        model = self._model_name
        plain = f'{{engine="0",model_name={model}}}'
        load = self.load
        hits, computed = float(self.prefix_hits_tokens), float(self.prompt_tokens)
        lines: list[str] = []

        def family(name: str, kind: str, text: str, samples: Iterable[str]) -> None:
            lines.append(f"# HELP vllm:{name} {text}\n# TYPE vllm:{name} {kind}")
            lines.extend(samples)

        def single(name: str, kind: str, text: str, value: float) -> None:
            family(name, kind, text, [f"vllm:{name}{plain} {float(value)}"])

        single("num_requests_running", "gauge", "Number of requests in model execution batches.", load.running)
        single("num_requests_waiting", "gauge", "Number of requests waiting to be processed.", load.waiting)
        family(
            "num_requests_waiting_by_reason", "gauge", "Number of waiting requests by reason.",
            [
                f'vllm:num_requests_waiting_by_reason{{engine="0",model_name={model},reason="capacity"}} {float(load.waiting)}',
                f'vllm:num_requests_waiting_by_reason{{engine="0",model_name={model},reason="deferred"}} 0.0',
            ],
        )  # fmt: skip
        family(
            "engine_sleep_state", "gauge", "Engine sleep state; awake = 0 means engine is sleeping; awake = 1 means engine is awake.",
            [
                f'vllm:engine_sleep_state{{engine="0",model_name={model},sleep_state="{state}"}} {value}'
                for state, value in (("awake", 1.0), ("weights_offloaded", 0.0), ("discard_all", 0.0))
            ],
        )  # fmt: skip
        single("kv_cache_usage_perc", "gauge", "KV-cache usage. 1 means 100 percent usage.", load.kv_usage)
        single(
            "prefix_cache_queries_total",
            "counter",
            "Prefix cache queries, in terms of number of queried tokens.",
            self.prefix_queries_tokens,
        )
        single("prefix_cache_hits_total", "counter", "Prefix cache hits, in terms of number of cached tokens.", hits)
        single("num_preemptions_total", "counter", "Cumulative number of preemption from the engine.", self.preemptions)
        single("prompt_tokens_total", "counter", "Number of prefill tokens processed.", computed)
        single("prompt_tokens_cached_total", "counter", "Number of cached prompt tokens (local + external).", hits)
        single("generation_tokens_total", "counter", "Number of generation tokens processed.", self.generation_tokens)
        family(
            "request_success_total", "counter", "Count of successfully processed requests.",
            [
                f'vllm:request_success_total{{engine="0",finished_reason="{reason}",model_name={model}}} {float(count)}'
                for reason, count in self.finished.items()
            ],
        )  # fmt: skip
        for name, text, histogram in (
            ("time_to_first_token_seconds", "Histogram of time to first token in seconds.", self.time_to_first_token_s),
            ("e2e_request_latency_seconds", "Histogram of e2e request latency in seconds.", self.request_latency_s),
            ("request_queue_time_seconds", "Histogram of time spent in WAITING phase for request.", self.queue_time_s),
        ):
            family(name, "histogram", text, histogram.lines(f"vllm:{name}", model))
        family("cache_config_info", "gauge", "Information of the LLMEngine CacheConfig", [self._cache_config])
        lines.append("")
        return "\n".join(lines)


def _cache_config(profile: EngineProfile) -> str:
    labels = {
        "block_size": profile.block_tokens,
        "cache_dtype": "auto",
        "enable_prefix_caching": True,
        "engine": 0,
        "gpu_memory_utilization": 0.92,
        "kv_cache_size_tokens": profile.kv_blocks * profile.block_tokens,
        "num_cpu_blocks": None,
        "num_gpu_blocks": profile.kv_blocks,
        "num_gpu_blocks_override": profile.kv_blocks,
        "prefix_caching_hash_algo": "xxhash",
    }
    return "vllm:cache_config_info{" + ",".join(f'{name}="{value}"' for name, value in labels.items()) + "} 1.0"


def _quoted(value: str) -> str:
    escaped = value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'
