"""running-requests-size-scorer: the smaller the engine's running batch, the better."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from epp.plugins.base import Plugin
from epp.types import Endpoint, LLMRequest


class RunningRequestsSizeScorer(Plugin):
    """(max - r) / (max - min) over the candidates' running requests; 1 for all when they are equal."""

    type: ClassVar[str] = "running-requests-size-scorer"
    per_request: ClassVar[bool] = False

    def score(self, _request: LLMRequest, endpoints: Sequence[Endpoint]) -> Sequence[float]:
        sizes = [e.running_estimate for e in endpoints]
        low, high = min(sizes), max(sizes)
        if low == high:
            return [1.0] * len(sizes)
        span = high - low
        return [(high - size) / span for size in sizes]
