"""slo-headroom-tier-filter: endpoints that should meet the request's latency objectives, by what a predictor says.

Cost: about 0.1 µs an endpoint. Not here: where predictions come from (predicted-latency-producer).
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar

import msgspec

from epp.plugins.base import Context, Plugin
from epp.types import Endpoint, LLMRequest, Prediction

PREDICTIONS = "latency-prediction"


class SloHeadroomTierFilter(Plugin):
    """Keeps endpoints whose predicted headroom is >= 0 for both objectives, if there are any; all without predictions.

    With probability epsilonExploreNeg it keeps the others instead, so that an endpoint that looks slow gets a chance to show otherwise.
    One without a prediction is among the others.
    """

    type: ClassVar[str] = "slo-headroom-tier-filter"
    requires: ClassVar[tuple[str, ...]] = (PREDICTIONS,)

    epsilon_explore_neg: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.01

    def bind(self, context: Context) -> None:
        self.__dict__["_rng"] = context.rng

    def keep(self, request: LLMRequest, endpoints: Sequence[Endpoint]) -> Sequence[Endpoint]:
        predictions: Mapping[int, Prediction] | None = request.attributes.get(PREDICTIONS)
        if not predictions:
            return endpoints
        positive: list[Endpoint] = []
        negative: list[Endpoint] = []
        for endpoint in endpoints:
            predicted = predictions.get(endpoint.slot)
            meets = predicted is not None and predicted.ttft_headroom_s >= 0 and predicted.tpot_headroom_s >= 0
            (positive if meets else negative).append(endpoint)
        if not positive or not negative:
            return endpoints
        rng: random.Random = self.__dict__["_rng"]
        return negative if rng.random() < self.epsilon_explore_neg else positive
