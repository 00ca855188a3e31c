"""kv-cache-utilization-scorer: the emptier the engine's KV cache, the better."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from epp.plugins.base import Plugin
from epp.types import Endpoint, LLMRequest


class KvCacheUtilizationScorer(Plugin):
    """1 - KV cache utilization."""

    type: ClassVar[str] = "kv-cache-utilization-scorer"
    per_request: ClassVar[bool] = False

    def score(self, _request: LLMRequest, endpoints: Sequence[Endpoint]) -> Sequence[float]:
        return [1.0 - e.kv_usage_estimate for e in endpoints]
