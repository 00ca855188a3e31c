"""A model for Triton's python backend that reports what the TensorRT-LLM backend does, with the numbers it is sent.

NUMBERS is waiting, active, blocks used, blocks in all. The families go through Triton's own custom-metrics API: names and labels are the
backend's, the text is Triton's.
"""

from __future__ import annotations

import triton_python_backend_utils as triton  # Triton's own; only there while it runs

REQUESTS = "nv_trt_llm_request_metrics"
BLOCKS = "nv_trt_llm_kv_cache_block_metrics"
FAMILIES = {
    REQUESTS: ("request_type", ("waiting", "context", "scheduled", "max", "active")),
    BLOCKS: ("kv_cache_block_type", ("used", "free", "max", "tokens_per", "fraction")),
}
BLOCK_TOKENS = 64
REQUESTS_MAX = 512


class TritonPythonModel:
    def initialize(self, args):
        model = {"model": args["model_name"], "version": args["model_version"]}
        self._families = []  # Triton forgets a family nobody holds
        self._gauges = {}
        for name, (label, kinds) in FAMILIES.items():
            family = triton.MetricFamily(name=name, description=name, kind=triton.MetricFamily.GAUGE)
            self._families.append(family)
            for kind in kinds:
                self._gauges[name, kind] = family.Metric(labels=model | {label: kind})
        self._set(REQUESTS, max=REQUESTS_MAX)

    def execute(self, requests):
        answers = []
        for request in requests:
            numbers = triton.get_input_tensor_by_name(request, "NUMBERS").as_numpy()
            waiting, active, used, blocks = (float(number) for number in numbers.ravel())
            self._set(REQUESTS, waiting=waiting, active=active, scheduled=active - waiting)
            self._set(BLOCKS, used=used, free=blocks - used, max=blocks, tokens_per=BLOCK_TOKENS, fraction=used / blocks)
            answers.append(triton.InferenceResponse([triton.Tensor("ECHO", numbers)]))
        return answers

    def _set(self, family, **values):
        for kind, value in values.items():
            self._gauges[family, kind].set(value)
