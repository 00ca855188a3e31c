"""predicted-latency-producer: what a request would see on each endpoint, learned from what requests saw.

An online model in this process, where the reference picker asks servers beside it. It learns from whole, successful responses only: an
endpoint that fails at once would otherwise look like the fastest. Bounded: a few numbers for each role and each endpoint; what is
known of a request lives and dies with it. Cost: about 1.5 µs an endpoint to predict, 2 µs a pick, 30 µs a response to learn.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import isfinite
from operator import mul
from typing import Annotated, ClassVar, NamedTuple

import msgspec

from epp.config.units import Duration
from epp.plugins.base import Finished, Plugin, match_of
from epp.types import Decision, Endpoint, LLMRequest, Prediction, Snapshot

LATENCY_PREDICTION = "latency-prediction"
TTFT_HEADERS = ("x-llm-d-slo-ttft-ms", "x-slo-ttft-ms")
TPOT_HEADERS = ("x-llm-d-slo-tpot-ms", "x-slo-tpot-ms")

SAMPLES_MIN = 30
"""Responses learned from before anything is predicted."""
FORGETTING = 0.998
"""Weight of each response against the next one's: a memory of about 500."""
RIDGE = 0.1
"""How much of a response it takes to move a weight that nothing is known of: the less, the more a single one can."""
OUTLIER_DEVIATIONS, OUTLIER_SHARE = 8.0, 0.5
"""An error counts for no more than so many usual ones or so much of what was expected: a stuck response must not spoil the model."""
DEVIATION_SHARE = 0.05
CORRECTION_SHARE = 0.05
"""Of the newest response in an endpoint's correction."""
CORRECTION_MAX = 4.0
"""An endpoint is taken for at most so many times slower or faster than the pool."""
TTFT_MIN_S, TTFT_MAX_S = 1e-3, 600.0
TPOT_MIN_S, TPOT_MAX_S = 1e-5, 60.0
ROLES_MAX = 16
"""Values of endpointRoleLabel with a model of their own."""

# Measures are scaled so that those of busy endpoints are around 1.
TOKENS, WAITING, RUNNING = 1 / 1024, 1 / 8, 1 / 32
MEASURE_MAX = 1e5
"""No endpoint is so busy: such a reading is an engine's fault, and not learned from."""


class _Regression:
    """Least squares with forgetting, brought up to date with every sample: the latest linear relation of measures to an outcome.

    Kept as normal equations, which can't lose their balance however long one measure stands still; a weight that the latest samples say
    nothing of stays what it was.
    """

    __slots__ = ("_deviation", "_products", "_targets", "samples", "weights")

    def __init__(self, size: int) -> None:
        self.weights = [0.0] * size
        self.samples = 0
        self._deviation = 0.0
        """How large errors usually are."""
        self._products = [[0.0] * size for _ in range(size)]
        self._targets = [0.0] * size

    def predict(self, measures: Sequence[float]) -> float:
        found: float = sum(map(mul, self.weights, measures))
        return found

    def learn(self, measures: Sequence[float], outcome: float) -> None:
        expected = self.predict(measures)
        error = outcome - expected
        if self.samples >= SAMPLES_MIN:
            limit = max(OUTLIER_DEVIATIONS * self._deviation, OUTLIER_SHARE * abs(expected))
            error = min(limit, max(-limit, error))
        self._deviation += (abs(error) - self._deviation) * max(DEVIATION_SHARE, 1 / (self.samples + 1))
        self.samples += 1
        outcome = expected + error
        self._targets = [FORGETTING * target + measure * outcome for target, measure in zip(self._targets, measures, strict=True)]
        self._products = [
            [FORGETTING * product + row_measure * measure for product, measure in zip(row, measures, strict=True)]
            for row, row_measure in zip(self._products, measures, strict=True)
        ]
        self.weights = self._solved()

    def _solved(self) -> list[float]:
        """Weights w of (products + RIDGE) w = targets + RIDGE x the weights before. Elimination: the left side is positive definite."""
        rows = [[*row, target + RIDGE * weight] for row, target, weight in zip(self._products, self._targets, self.weights, strict=True)]
        size = len(rows)
        for i in range(size):
            rows[i][i] += RIDGE
        for i in range(size):
            pivot = rows[i]
            for row in rows[i + 1 :]:
                factor = row[i] / pivot[i]
                if factor:
                    for column in range(i, size + 1):
                        row[column] -= factor * pivot[column]
        weights = [0.0] * size
        for i in reversed(range(size)):
            row = rows[i]
            weights[i] = (row[size] - sum(map(mul, row[i + 1 : size], weights[i + 1 :]))) / row[i]
        return weights


class _Model:
    """One kind of latency: the pool's regression, and how each endpoint differs from it."""

    __slots__ = ("_high_s", "_low_s", "corrections", "regression")

    def __init__(self, size: int, low_s: float, high_s: float) -> None:
        self.regression = _Regression(size)
        self.corrections: dict[int, float] = {}
        """Slot -> its latencies over the pool's."""
        self._low_s = low_s
        self._high_s = high_s

    @property
    def ready(self) -> bool:
        return self.regression.samples >= SAMPLES_MIN

    def predict_ttft_s(self, endpoints: Sequence[Endpoint], prompt_tokens: int, cached: Mapping[int, int]) -> dict[int, float]:
        """By slot. Written out, not by way of `_ttft_measures`: it runs for every endpoint and request."""
        base, uncached, ahead, waiting, running = self.regression.weights
        uncached, ahead, waiting, running = uncached * TOKENS, ahead * TOKENS, waiting * WAITING, running * RUNNING
        base += uncached * prompt_tokens
        corrections, low_s, high_s = self.corrections, self._low_s, self._high_s
        found = {}
        for endpoint in endpoints:
            slot = endpoint.slot
            seconds = (
                base
                + ahead * endpoint.inflight_tokens
                + waiting * endpoint.waiting_estimate
                + running * endpoint.running_estimate
                - (uncached * cached[slot] if slot in cached else 0.0)
            )
            if slot in corrections:
                seconds *= corrections[slot]
            found[slot] = seconds if low_s <= seconds <= high_s else (low_s if seconds < low_s else high_s)
        return found

    def predict_tpot_s(self, endpoints: Sequence[Endpoint]) -> dict[int, float]:
        """By slot, as above."""
        base, running, kv_usage = self.regression.weights
        running *= RUNNING
        corrections, low_s, high_s = self.corrections, self._low_s, self._high_s
        found = {}
        for endpoint in endpoints:
            slot = endpoint.slot
            seconds = base + running * endpoint.running_estimate + kv_usage * endpoint.kv_usage_estimate
            if slot in corrections:
                seconds *= corrections[slot]
            found[slot] = seconds if low_s <= seconds <= high_s else (low_s if seconds < low_s else high_s)
        return found

    def learn(self, slot: int, measures: Sequence[float], seen_s: float) -> None:
        if not isfinite(seen_s) or seen_s <= 0 or not all(0.0 <= measure <= MEASURE_MAX for measure in measures):
            return
        seen_s = min(self._high_s, max(self._low_s, seen_s))
        if self.ready:
            ratio = seen_s / max(self._low_s, self.regression.predict(measures))
            ratio = min(CORRECTION_MAX, max(1 / CORRECTION_MAX, ratio))
            known = self.corrections.get(slot, 1.0)
            self.corrections[slot] = known + CORRECTION_SHARE * (ratio - known)
        self.regression.learn(measures, seen_s)


class _Models(NamedTuple):
    """Of endpoints of one role. What is streamed and what comes whole begin at very different times."""

    streamed: _Model
    whole: _Model
    tpot: _Model


class _Dispatched(NamedTuple):
    """What an endpoint was like when a request was sent to it."""

    prefill: Endpoint
    decode: Endpoint
    ttft_measures: Sequence[float]
    tpot_measures: Sequence[float]


class PredictedLatencyProducer(Plugin):
    """Predicts time to first token and time per output token on each endpoint, and the headroom to the request's objectives.

    ttft = w . (1, uncached prompt tokens, tokens in flight, waiting, running), tpot = w . (1, running, KV use), times the endpoint's own
    factor. Headroom = objective (x-llm-d-slo-ttft-ms, x-llm-d-slo-tpot-ms) x sloBufferFactor - prediction. With no objective at all it is
    -prediction, so that the fastest endpoint is still the best; with one of the two, the other's is 0. A response that is not streamed has
    no time per token: 0, unless the request has an objective for it. endpointRoleLabel: endpoints are modelled by that label's value.
    predictInProduce false: learn only. Accepted and not needed: contextTTL, streamingMode, useEncoderCacheFeatures, samplingMean,
    maxDecodeTokenSamplesForPrediction.
    """

    type: ClassVar[str] = "predicted-latency-producer"
    produces: ClassVar[tuple[str, ...]] = (LATENCY_PREDICTION,)
    requires: ClassVar[tuple[str, ...]] = ("prefix-match",)
    uses: ClassVar[tuple[str, ...]] = ("inflight-load", "tokens")

    slo_buffer_factor: Annotated[float, msgspec.Meta(gt=0)] = 1.0
    context_ttl: Duration = msgspec.field(name="contextTTL", default="5m")
    streaming_mode: bool = False
    predict_in_produce: bool = True
    endpoint_role_label: str = ""
    use_encoder_cache_features: bool = False
    prefix_match_info_producer_name: str = ""
    sampling_mean: Annotated[float, msgspec.Meta(gt=0)] = 1000.0
    max_decode_token_samples_for_prediction: Annotated[int, msgspec.Meta(ge=0)] = 0

    def __post_init__(self) -> None:
        self.__dict__["_by_role"] = {}

    def produce(self, request: LLMRequest, candidates: Snapshot) -> None:
        if not self.predict_in_produce:
            return
        match = match_of(request, self.prefix_match_info_producer_name)
        cached = match.matched_tokens if match is not None else {}
        ttft_slo_s = self._objective_s(request, TTFT_HEADERS)
        tpot_slo_s = self._objective_s(request, TPOT_HEADERS)
        without = not (ttft_slo_s or tpot_slo_s)
        found: dict[int, Prediction] = {}
        for models, endpoints in self._by_models(candidates.endpoints):
            ttft_s: Mapping[int, float] = {}
            tpot_s: Mapping[int, float] = {}
            ttft = models.streamed if request.stream else models.whole
            if ttft.ready:
                ttft_s = ttft.predict_ttft_s(endpoints, request.prompt_tokens, cached)
            if (request.stream or tpot_slo_s) and models.tpot.ready:
                tpot_s = models.tpot.predict_tpot_s(endpoints)
            for slot in ttft_s or tpot_s:
                first_s, each_s = ttft_s.get(slot, 0.0), tpot_s.get(slot, 0.0)
                found[slot] = Prediction(
                    first_s,
                    each_s,
                    ttft_slo_s - first_s if first_s and (ttft_slo_s or without) else 0.0,
                    tpot_slo_s - each_s if each_s and (tpot_slo_s or without) else 0.0,
                )
        if found:
            request.attributes[self.name] = request.attributes[LATENCY_PREDICTION] = found

    def picked(self, request: LLMRequest, decision: Decision) -> None:
        """Keep what the endpoints are like now, before this request weighs on them."""
        decode = decision.endpoint
        prefill = decision.targets.get("prefill", decode)
        match = match_of(request, self.prefix_match_info_producer_name)
        cached = match.matched_tokens.get(prefill.slot, 0) if match is not None else 0
        ttft = _ttft_measures(prefill, request.prompt_tokens - cached)
        request.attributes[f"{self.name}/dispatched"] = _Dispatched(prefill, decode, ttft, _tpot_measures(decode))

    def finished(self, request: LLMRequest, endpoint: Endpoint, outcome: Finished) -> None:
        dispatched: _Dispatched | None = request.attributes.pop(f"{self.name}/dispatched", None)
        if dispatched is None or endpoint is not dispatched.decode or outcome.status != 200 or outcome.ttft_s <= 0:
            return  # broken off, failed, or served by another endpoint than the measures are of
        prefill = dispatched.prefill
        models = self._models(prefill)
        (models.streamed if request.stream else models.whole).learn(prefill.slot, dispatched.ttft_measures, outcome.ttft_s)
        tokens = outcome.usage.completion_tokens if outcome.usage is not None else 0
        if request.stream and tokens > 1:
            tpot_s = (outcome.duration_s - outcome.ttft_s) / (tokens - 1)
            self._models(endpoint).tpot.learn(endpoint.slot, dispatched.tpot_measures, tpot_s)

    def removed(self, endpoint: Endpoint) -> None:
        """The slot may be another endpoint's soon."""
        for models in self.__dict__["_by_role"].values():
            for model in models:
                model.corrections.pop(endpoint.slot, None)

    def _models(self, endpoint: Endpoint) -> _Models:
        by_role: dict[str, _Models] = self.__dict__["_by_role"]
        role = endpoint.labels.get(self.endpoint_role_label, "") if self.endpoint_role_label else ""
        models = by_role.get(role)
        if models is None:
            if len(by_role) >= ROLES_MAX:
                return next(iter(by_role.values()))
            models = by_role[role] = _Models(
                _Model(5, TTFT_MIN_S, TTFT_MAX_S), _Model(5, TTFT_MIN_S, TTFT_MAX_S), _Model(3, TPOT_MIN_S, TPOT_MAX_S)
            )
        return models

    def _by_models(self, endpoints: Sequence[Endpoint]) -> Iterable[tuple[_Models, Sequence[Endpoint]]]:
        """The endpoints, sorted by the models that are theirs."""
        if not endpoints:
            return ()
        if not self.endpoint_role_label:
            return ((self._models(endpoints[0]), endpoints),)
        groups: dict[int, tuple[_Models, list[Endpoint]]] = {}
        for endpoint in endpoints:
            models = self._models(endpoint)
            groups.setdefault(id(models), (models, []))[1].append(endpoint)
        return groups.values()

    def _objective_s(self, request: LLMRequest, headers: Sequence[str]) -> float:
        """0 where there is none, or none that is a time."""
        for header in headers:
            text = request.headers.get(header)
            if text:
                try:
                    value_s = float(text) / 1000.0 * self.slo_buffer_factor
                except ValueError:
                    return 0.0
                return value_s if isfinite(value_s) and value_s > 0 else 0.0
        return 0.0


def _ttft_measures(endpoint: Endpoint, uncached_tokens: int) -> tuple[float, ...]:
    return (
        1.0,
        max(0, uncached_tokens) * TOKENS,
        endpoint.inflight_tokens * TOKENS,
        endpoint.waiting_estimate * WAITING,
        endpoint.running_estimate * RUNNING,
    )


def _tpot_measures(endpoint: Endpoint) -> tuple[float, ...]:
    return (1.0, endpoint.running_estimate * RUNNING, endpoint.kv_usage_estimate)
