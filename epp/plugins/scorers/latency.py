"""latency-scorer: endpoints that will just meet the request's latency objectives, by what a predictor says.

Per request: about 0.7 µs an endpoint with predictions, 0.4 without. Not here: where predictions come from (predicted-latency-producer).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import floor, isfinite
from typing import Annotated, ClassVar, Literal

import msgspec

from epp.plugins.base import Context, Plugin, Producer, match_of
from epp.types import Endpoint, LLMRequest, Prediction

PREDICTIONS = "latency-prediction"
STEPS = 100
"""Scores are whole hundredths, as the reference picker's are."""
RANGE_MIN_S = 1e-9
"""Headrooms closer together than this are the same."""

Headrooms = Mapping[int, tuple[float, float]]
"""Position of an endpoint -> headroom of its time to first token, and per output token."""
Weight = Annotated[float, msgspec.Meta(ge=0)]


class LatencyScorer(Plugin):
    """(int(100 * (1 - c)) + 1) / 100, c = ttftWeight * n(TTFT) + tpotWeight * n(TPOT), weights divided by their sum.

    n(x) = (|headroom| - min) / (max - min), 0.5 where all are equal (then the other one decides alone). headroom = objective -
    prediction; without an objective, minus the prediction. Scored, the others 0: endpoints that meet both objectives; where none does,
    idle ones; else those that miss TPOT only, TTFT only, both. headroomSelectionStrategy `most` scores c in place of 1 - c where both
    are met.
    Without predictions: hundredths of kv * (1 - KV use) + queue * (maxQ - q) / maxQ + prefix * matched / prompt, weights
    (compositeKVWeight, ...) divided by their sum.
    """

    type: ClassVar[str] = "latency-scorer"
    requires: ClassVar[tuple[str, ...]] = (PREDICTIONS, "prefix-match")
    per_request: ClassVar[bool] = True

    ttft_weight: Weight = 0.8
    tpot_weight: Weight = 0.2
    headroom_selection_strategy: Literal["least", "most"] = "least"
    composite_kv_weight: Weight = msgspec.field(default=1.0, name="compositeKVWeight")
    composite_queue_weight: Weight = 1.0
    composite_prefix_weight: Weight = 1.0
    latency_prediction_info_producer_name: str = ""
    prefix_match_info_producer_name: str = ""

    def bind(self, context: Context) -> None:
        for name, parameter in (
            (self.latency_prediction_info_producer_name, "latencyPredictionInfoProducerName"),
            (self.prefix_match_info_producer_name, "prefixMatchInfoProducerName"),
        ):
            if name:
                context.plugin(name, Producer, parameter=parameter)

    def score(self, request: LLMRequest, endpoints: Sequence[Endpoint]) -> Sequence[float]:
        predictions = request.attributes.get(self.latency_prediction_info_producer_name or PREDICTIONS)
        headrooms = _headrooms(predictions, endpoints) if predictions else {}
        if not headrooms:
            return self._composite(request, endpoints)
        most = False
        group: Headrooms = {i: each for i, each in headrooms.items() if min(each) >= 0}
        if group:
            most = self.headroom_selection_strategy == "most"
        else:
            group = _least_bad(headrooms, endpoints)
        scores = [0.0] * len(endpoints)
        for position, c in self._normalised(group):
            scores[position] = min(1.0, (int((c if most else 1.0 - c) * STEPS) + 1) / STEPS)
        return scores

    def _normalised(self, group: Headrooms) -> Iterator[tuple[int, float]]:
        """Position -> c."""
        ttfts, tpots = [abs(ttft) for ttft, _ in group.values()], [abs(tpot) for _, tpot in group.values()]
        ttft_min, tpot_min = min(ttfts), min(tpots)
        ttft_range, tpot_range = max(ttfts) - ttft_min, max(tpots) - tpot_min
        total = self.ttft_weight + self.tpot_weight
        share = self.ttft_weight / total if total else 1.0
        if ttft_range <= RANGE_MIN_S < tpot_range:
            share = 0.0
        elif tpot_range <= RANGE_MIN_S < ttft_range:
            share = 1.0
        for position, ttft, tpot in zip(group, ttfts, tpots, strict=True):
            n_ttft = (ttft - ttft_min) / ttft_range if ttft_range > RANGE_MIN_S else 0.5
            n_tpot = (tpot - tpot_min) / tpot_range if tpot_range > RANGE_MIN_S else 0.5
            yield position, share * n_ttft + (1.0 - share) * n_tpot

    def _composite(self, request: LLMRequest, endpoints: Sequence[Endpoint]) -> Sequence[float]:
        total = self.composite_kv_weight + self.composite_queue_weight + self.composite_prefix_weight
        kv, queue, prefix = (
            (self.composite_kv_weight / total, self.composite_queue_weight / total, self.composite_prefix_weight / total)
            if total
            else (1.0, 0.0, 0.0)
        )
        waiting = [e.waiting_estimate for e in endpoints]
        longest = max(waiting)
        match = match_of(request, self.prefix_match_info_producer_name)
        cached: Mapping[int, int] = match.matched_tokens if match is not None else {}
        prompt = match.prompt_tokens if match is not None else 1
        scores = []
        for e, q in zip(endpoints, waiting, strict=True):
            free = (longest - q) / longest if longest else 1.0
            score = kv * (1.0 - e.kv_usage_estimate) + queue * free + prefix * cached.get(e.slot, 0) / prompt
            scores.append(floor(STEPS * score + 0.5) / STEPS)
        return scores


def _headrooms(predictions: Mapping[int, Prediction], endpoints: Sequence[Endpoint]) -> Headrooms:
    found = {}
    for position, endpoint in enumerate(endpoints):
        predicted = predictions.get(endpoint.slot)
        if predicted is None or not (isfinite(predicted.ttft_s) and isfinite(predicted.tpot_s)):
            continue
        ttft, tpot = predicted.ttft_headroom_s, predicted.tpot_headroom_s
        found[position] = (ttft if isfinite(ttft) else -predicted.ttft_s, tpot if isfinite(tpot) else -predicted.tpot_s)
    return found


def _least_bad(headrooms: Headrooms, endpoints: Sequence[Endpoint]) -> Headrooms:
    """Of endpoints that each miss an objective: the idle ones, else those that miss the less grave one."""
    idle = {i: each for i, each in headrooms.items() if not endpoints[i].inflight_requests}
    if idle:
        return idle
    tpot_only = {i: each for i, each in headrooms.items() if each[0] >= 0}
    ttft_only = {i: each for i, each in headrooms.items() if each[1] >= 0}
    return tpot_only or ttft_only or headrooms
