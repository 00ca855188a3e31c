"""trtllm-serve's `/prometheus/metrics`; the engine answers there only with `return_perf_metrics: true`.

Not its `/metrics`: that is JSON, and reading it takes the statistics away from whoever else wants them, so it is never asked for.
"""

from __future__ import annotations

from epp.datastore import Reading
from epp.engines.family import Gauges

GAUGES = Gauges(
    waiting=b"trtllm_num_requests_waiting",
    running=b"trtllm_num_requests_running",
    kv_usage=b"trtllm_kv_cache_utilization",
    kv_block_tokens=b"trtllm_kv_cache_tokens_per_block",
    kv_blocks=b"trtllm_kv_cache_max_blocks",
)


class TrtLlmServe:
    """An `epp.engines.family.EngineFamily`."""

    name = "trtllm-serve"
    paths = ("/prometheus/metrics",)

    def read(self, text: bytes) -> Reading:
        return GAUGES.read(text)
