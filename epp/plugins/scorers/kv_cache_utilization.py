"""kv-cache-utilization-scorer: the emptier the engine's KV cache, the better."""

from __future__ import annotations

from typing import ClassVar

from epp.plugins.base import PointwiseScorer
from epp.types import Endpoint


class KvCacheUtilizationScorer(PointwiseScorer):
    """1 - KV cache utilization."""

    type: ClassVar[str] = "kv-cache-utilization-scorer"

    def score_one(self, endpoint: Endpoint) -> float:
        return 1.0 - endpoint.kv_usage_estimate
