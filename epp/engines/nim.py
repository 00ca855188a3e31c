"""NVIDIA NIM's `/v1/metrics`: vLLM-like names without a prefix, or those of the engine inside, by NIM version and model."""

from __future__ import annotations

from epp.datastore import Reading
from epp.engines.family import Gauges, read_first
from epp.engines.triton import TritonTensorRtLlm
from epp.engines.trtllm_serve import TrtLlmServe
from epp.engines.vllm import Vllm

GAUGES = Gauges(waiting=b"num_requests_waiting", running=b"num_requests_running", kv_usage=b"gpu_cache_usage_perc")
_READERS = (GAUGES, Vllm(), TrtLlmServe(), TritonTensorRtLlm())


class Nim:
    """An `epp.engines.family.EngineFamily`."""

    name = "nim"
    paths = ("/v1/metrics", "/metrics")

    def read(self, text: bytes) -> Reading:
        return read_first(_READERS, text)
