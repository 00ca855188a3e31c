"""latency-slo-admitter: refuses sheddable requests whose latency objectives no endpoint should meet.

Only requests of priority below 0 with objectives can be refused, and only those cost anything: about 0.2 µs an endpoint.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from epp.errors import SaturatedError
from epp.plugins.base import Context, Plugin, Producer
from epp.types import Endpoint, LLMRequest, Prediction

PREDICTIONS = "latency-prediction"
OBJECTIVES = ("x-llm-d-slo-ttft-ms", "x-slo-ttft-ms", "x-llm-d-slo-tpot-ms", "x-slo-tpot-ms")
"""Request headers; one of them above 0 is an objective."""
COLD_KV_USE = 0.02
"""An endpoint that has cached less than this has served so little that predictions of it mean nothing."""


class LatencySloAdmitter(Plugin):
    """Refuses a request of priority < 0 with an objective (429) if no candidate meets it, is idle, or is cold (KV use < 2 %).

    It meets it where the predicted headroom of both times is >= 0. Without any prediction the request is admitted. Objectives are the
    headers x-llm-d-slo-ttft-ms and x-llm-d-slo-tpot-ms (x-slo-...).
    """

    type: ClassVar[str] = "latency-slo-admitter"
    requires: ClassVar[tuple[str, ...]] = (PREDICTIONS,)

    latency_prediction_info_producer_name: str = ""

    def bind(self, context: Context) -> None:
        if self.latency_prediction_info_producer_name:
            context.plugin(self.latency_prediction_info_producer_name, Producer, parameter="latencyPredictionInfoProducerName")

    def admit(self, request: LLMRequest, candidates: Sequence[Endpoint]) -> None:
        if request.priority >= 0 or not any(_above_0(request.headers.get(name, "")) for name in OBJECTIVES):
            return
        predictions: Mapping[int, Prediction] | None = request.attributes.get(self.latency_prediction_info_producer_name or PREDICTIONS)
        if not predictions:
            return
        for endpoint in candidates:
            if endpoint.kv_usage_estimate < COLD_KV_USE or not endpoint.running_estimate:
                return
            predicted = predictions.get(endpoint.slot)
            if predicted is not None and predicted.ttft_headroom_s >= 0 and predicted.tpot_headroom_s >= 0:
                return
        raise SaturatedError("no endpoint can meet the latency objectives of a request of this priority")


def _above_0(value: str) -> bool:
    try:
        return float(value) > 0
    except ValueError:
        return False
