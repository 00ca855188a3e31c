"""queue-scorer: the shorter the engine's queue, the better."""

from __future__ import annotations

from typing import ClassVar

from epp.plugins.base import RangeScorer
from epp.types import Endpoint


class QueueScorer(RangeScorer):
    """(max - q) / (max - min) over the candidates' waiting requests; 1 for all when they are equal."""

    type: ClassVar[str] = "queue-scorer"

    def measure(self, endpoint: Endpoint) -> float:
        return endpoint.waiting_estimate
