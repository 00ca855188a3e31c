"""queue-scorer: the shorter the engine's queue, the better."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from epp.plugins.base import Plugin
from epp.types import Endpoint, LLMRequest


class QueueScorer(Plugin):
    """(max - q) / (max - min) over the candidates' waiting requests; 1 for all when they are equal."""

    type: ClassVar[str] = "queue-scorer"
    per_request: ClassVar[bool] = False

    def score(self, _request: LLMRequest, endpoints: Sequence[Endpoint]) -> Sequence[float]:
        depths = [e.waiting_estimate for e in endpoints]
        low, high = min(depths), max(depths)
        if low == high:
            return [1.0] * len(depths)
        span = high - low
        return [(high - depth) / span for depth in depths]
