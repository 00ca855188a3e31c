"""running-requests-size-scorer: the smaller the engine's running batch, the better."""

from __future__ import annotations

from typing import ClassVar

from epp.plugins.base import RangeScorer
from epp.types import Endpoint


class RunningRequestsSizeScorer(RangeScorer):
    """(max - r) / (max - min) over the candidates' running requests; 1 for all when they are equal."""

    type: ClassVar[str] = "running-requests-size-scorer"

    def measure(self, endpoint: Endpoint) -> float:
        return endpoint.running_estimate
