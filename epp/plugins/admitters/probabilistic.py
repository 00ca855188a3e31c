"""probabilistic-admitter: sheds part of the sheddable requests, the more the fuller the pool.

Only requests of priority below 0 can be refused, and only those cost anything: about 0.3 µs an endpoint.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Annotated, ClassVar

import msgspec

from epp.errors import SaturatedError
from epp.plugins.base import Context, Plugin
from epp.types import Endpoint, LLMRequest

Positive = Annotated[float, msgspec.Meta(gt=0)]


class ProbabilisticAdmitter(Plugin):
    """Refuses a request of priority < 0 (429) with probability min(s^power * k, 1).

    s is the mean over the candidates of max(waiting / queueDepthThreshold, KV use / kvCacheUtilThreshold).
    """

    type: ClassVar[str] = "probabilistic-admitter"

    queue_depth_threshold: Annotated[int, msgspec.Meta(gt=0)] = 5
    kv_cache_util_threshold: Positive = 0.8
    power: Positive = 5.0
    k: Positive = 300.0

    def bind(self, context: Context) -> None:
        self.__dict__["_rng"] = context.rng

    def admit(self, request: LLMRequest, candidates: Sequence[Endpoint]) -> None:
        if request.priority >= 0 or not candidates:
            return
        queue, kv = self.queue_depth_threshold, self.kv_cache_util_threshold
        saturation = sum(max(e.waiting_estimate / queue, e.kv_usage_estimate / kv) for e in candidates) / len(candidates)
        rng: random.Random = self.__dict__["_rng"]
        if rng.random() < self.probability(saturation):
            raise SaturatedError("the pool is too full for a request of this priority")

    def probability(self, saturation: float) -> float:
        """That a request of priority < 0 is refused."""
        try:
            return min(1.0, float(saturation**self.power) * self.k)
        except OverflowError:
            return 1.0
