"""prefix-cache-affinity-filter: endpoints that have nearly the whole prompt cached, unless waiting there costs more than it saves.

Where prefix-cache-scorer weighs cache against load, this decides for the cache first and gives way to load at a limit. Cost: next to
nothing without a match; about 0.2 µs an endpoint with one.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar, Literal

import msgspec

from epp.plugins.base import Context, Plugin, Producer, match_of
from epp.types import Endpoint, LLMRequest, Prediction, PrefixMatch

PREDICTIONS = "latency-prediction"
Share = Annotated[float, msgspec.Meta(ge=0, le=1)]


class PrefixCacheAffinityFilter(Plugin):
    """Keeps the endpoints with matched / prompt >= affinityThreshold, if there are any.

    All stay where the best time to first token of those kept is worse than the best of the others by more than maxTTFTPenaltyMs (0:
    however much), or is not known; and with probability explorationProbability. ttftSource prefillThroughput: (tokens in flight + this
    request's that are not cached) / peakPrefillThroughput (tokens a second); latencyPredictor: what predicted-latency-producer says.
    """

    type: ClassVar[str] = "prefix-cache-affinity-filter"
    requires: ClassVar[tuple[str, ...]] = ("prefix-match", "inflight-load")
    uses: ClassVar[tuple[str, ...]] = (PREDICTIONS,)

    affinity_threshold: Share = 0.8
    exploration_probability: Share = 0.0
    max_ttft_penalty_ms: Annotated[float, msgspec.Meta(ge=0)] = msgspec.field(default=18_000.0, name="maxTTFTPenaltyMs")
    ttft_source: Literal["prefillThroughput", "latencyPredictor"] = "prefillThroughput"
    peak_prefill_throughput: Annotated[float, msgspec.Meta(gt=0)] = 15_928.0
    prefix_match_info_producer_name: str = ""
    latency_prediction_info_producer_name: str = ""
    in_flight_load_producer_name: str = ""

    def bind(self, context: Context) -> None:
        self.__dict__["_rng"] = context.rng
        for name, parameter in (
            (self.prefix_match_info_producer_name, "prefixMatchInfoProducerName"),
            (self.latency_prediction_info_producer_name, "latencyPredictionInfoProducerName"),
            (self.in_flight_load_producer_name, "inFlightLoadProducerName"),
        ):
            if name:
                context.plugin(name, Producer, parameter=parameter)
        predicts = any(PREDICTIONS in plugin.produces for plugin in context.plugins.values())
        if self.ttft_source == "latencyPredictor" and not predicts:
            raise ValueError("ttftSource: latencyPredictor needs a predicted-latency-producer among the plugins")

    def keep(self, request: LLMRequest, endpoints: Sequence[Endpoint]) -> Sequence[Endpoint]:
        match = match_of(request, self.prefix_match_info_producer_name)
        if match is None or not match.matched_tokens or not self.affinity_threshold:
            return endpoints
        enough = self.affinity_threshold * match.prompt_tokens
        having = {slot for slot, tokens in match.matched_tokens.items() if tokens >= enough}
        sticky = [e for e in endpoints if e.slot in having] if having else []
        if not sticky or len(sticky) == len(endpoints):
            return endpoints
        rng: random.Random = self.__dict__["_rng"]
        if self.exploration_probability and rng.random() < self.exploration_probability:
            return endpoints
        if self.max_ttft_penalty_ms:
            best = self._ttft_ms(request, match, sticky)
            other = self._ttft_ms(request, match, [e for e in endpoints if e.slot not in having])
            if best is None or other is None or best - other > self.max_ttft_penalty_ms:
                return endpoints
        return sticky

    def _ttft_ms(self, request: LLMRequest, match: PrefixMatch, endpoints: Sequence[Endpoint]) -> float | None:
        """The best of them; None while nothing is known."""
        if self.ttft_source == "latencyPredictor":
            predictions: Mapping[int, Prediction] = request.attributes.get(self.latency_prediction_info_producer_name or PREDICTIONS) or {}
            known = [predictions[e.slot].ttft_s for e in endpoints if e.slot in predictions]
            return min(known) * 1000 if known else None
        prompt = match.prompt_tokens
        uncached = {slot: max(0, prompt - tokens) for slot, tokens in match.matched_tokens.items()}
        tokens = min([e.inflight_tokens + uncached.get(e.slot, prompt) for e in endpoints])
        return tokens / self.peak_prefill_throughput * 1000
