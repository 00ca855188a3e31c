"""load-aware-scorer: half a point for an empty queue, less the longer it is."""

from __future__ import annotations

from typing import Annotated, ClassVar

import msgspec

from epp.plugins.base import PointwiseScorer
from epp.types import Endpoint


class LoadAwareScorer(PointwiseScorer):
    """0.5 * (1 - min(q, threshold) / threshold), q the waiting requests; so 0.5 for an empty queue."""

    type: ClassVar[str] = "load-aware-scorer"

    threshold: Annotated[int, msgspec.Meta(gt=0)] = 128

    def score_one(self, endpoint: Endpoint) -> float:
        waiting = endpoint.waiting_estimate
        return 0.5 * (1.0 - waiting / self.threshold) if waiting < self.threshold else 0.0
