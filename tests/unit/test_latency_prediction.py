"""predicted-latency-producer in simulated worlds, where latency is a known function of load."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import msgspec
import pytest

from epp.plugins.base import Finished
from epp.plugins.producers.predicted_latency import SAMPLES_MIN, TPOT_MAX_S, TTFT_MAX_S, TTFT_MIN_S, PredictedLatencyProducer
from epp.types import Decision, Endpoint, LLMRequest, Prediction, PrefixMatch, Snapshot, Usage
from tests.builders import llm_request, pool_of

OUTPUT_TOKENS = 100


def linear_ttft_s(endpoint: Endpoint, uncached: int) -> float:
    """20 ms, 10 000 tokens a second for what is ahead and for the prompt, 50 ms for each one waiting, 2 ms for each one running."""
    return 0.02 + (uncached + endpoint.inflight_tokens) / 10_000 + 0.05 * endpoint.waiting_estimate + 0.002 * endpoint.running_estimate


def linear_tpot_s(endpoint: Endpoint) -> float:
    return 0.010 + 0.0002 * endpoint.running_estimate + 0.01 * endpoint.kv_usage


@dataclass
class World:
    """Endpoints under a load that moves at random, and requests that see what the functions say, give or take `noise`."""

    producer: PredictedLatencyProducer
    endpoints: Sequence[Endpoint]
    noise: float = 0.0
    slower: Mapping[int, float] = field(default_factory=dict)
    ttft_s: Callable[[Endpoint, int], float] = linear_ttft_s
    rng: random.Random = field(default_factory=lambda: random.Random(5))

    def move(self) -> None:
        rng = self.rng
        for endpoint in self.endpoints:
            endpoint.running = float(rng.randint(0, 60))
            endpoint.waiting = float(rng.choice([0, 0, 0, 3, 10]))
            endpoint.kv_usage = rng.random()
            endpoint.inflight_tokens = rng.choice([0, 0, 1000, 4000])

    def asked(self, *, stream: bool = True, **headers: str) -> LLMRequest:
        tokens = self.rng.randint(100, 8000)
        cached = {self.rng.choice(self.endpoints).slot: tokens // 2}
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        return llm_request(stream=stream, prompt_tokens=tokens, prefix=PrefixMatch([], [], tokens, cached), headers=names)

    def truth_s(self, request: LLMRequest, endpoint: Endpoint) -> tuple[float, float]:
        assert request.prefix is not None
        uncached = request.prompt_tokens - request.prefix.matched_tokens.get(endpoint.slot, 0)
        factor = self.slower.get(endpoint.slot, 1.0)
        return factor * self.ttft_s(endpoint, uncached), factor * linear_tpot_s(endpoint)

    def serve(self, count: int, *, stream: bool = True, status: int = 200) -> None:
        for _ in range(count):
            self.move()
            request = self.asked(stream=stream)
            endpoint = self.rng.choice(self.endpoints)
            ttft_s, tpot_s = (each * (1 + self.rng.gauss(0, self.noise)) for each in self.truth_s(request, endpoint))
            self.producer.produce(request, Snapshot.of(self.endpoints))
            self.producer.picked(request, Decision(endpoint, (), "default"))
            duration_s = ttft_s + tpot_s * (OUTPUT_TOKENS - 1)
            self.producer.finished(request, endpoint, Finished(status, ttft_s, duration_s, Usage(10, OUTPUT_TOKENS), 0))

    def predictions(self, **asked: str) -> Mapping[int, Prediction]:
        request = self.asked(**asked)
        self.producer.produce(request, Snapshot.of(self.endpoints))
        found: Mapping[int, Prediction] = request.attributes.get("latency-prediction", {})
        return found

    def errors(self, count: int = 200) -> tuple[float, float]:
        """Mean relative errors of both predictions, without the noise."""
        ttft, tpot = 0.0, 0.0
        for _ in range(count):
            self.move()
            request = self.asked()
            self.producer.produce(request, Snapshot.of(self.endpoints))
            for endpoint in self.endpoints:
                prediction = request.attributes["latency-prediction"][endpoint.slot]
                ttft_s, tpot_s = self.truth_s(request, endpoint)
                ttft += abs(prediction.ttft_s - ttft_s) / ttft_s
                tpot += abs(prediction.tpot_s - tpot_s) / tpot_s
        return ttft / count / len(self.endpoints), tpot / count / len(self.endpoints)


def world(parameters: dict[str, object] | None = None, *, size: int = 4, **values: object) -> World:
    return World(msgspec.convert(parameters or {}, PredictedLatencyProducer), pool_of(*[{}] * size), **values)  # type: ignore[arg-type]


def test_an_exactly_linear_world_is_learned_exactly() -> None:
    simulated = world()
    simulated.serve(200)
    assert max(simulated.errors()) < 0.001


@pytest.mark.parametrize(("noise", "samples", "error"), [(0.1, 200, 0.1), (0.3, 200, 0.1), (0.1, 5_000, 0.05)])
def test_a_noisy_world_is_learned_well_enough(noise: float, samples: int, error: float) -> None:
    simulated = world(noise=noise)
    simulated.serve(samples)
    assert max(simulated.errors()) < error


def test_an_endpoint_slower_than_the_others_is_known_to_be() -> None:
    simulated = world(noise=0.05, slower={0: 2.0})
    simulated.serve(1_000)
    assert max(simulated.errors()) < 0.1


def test_the_world_changes_and_is_learned_anew() -> None:
    simulated = world(noise=0.05)
    simulated.serve(500)
    simulated.ttft_s = lambda endpoint, uncached: 3 * linear_ttft_s(endpoint, uncached)
    assert simulated.errors()[0] > 0.5
    simulated.serve(1_500)
    assert simulated.errors()[0] < 0.1


def test_a_long_idle_time_does_not_unlearn_what_queues_cost() -> None:
    simulated = world(noise=0.05)
    simulated.serve(500)
    busy = simulated.move
    simulated.move = lambda: None  # type: ignore[method-assign]
    for endpoint in simulated.endpoints:
        endpoint.waiting = endpoint.running = endpoint.kv_usage = 0.0
        endpoint.inflight_tokens = 0
    simulated.serve(20_000)
    simulated.move = busy  # type: ignore[method-assign]
    assert simulated.errors()[0] < 0.2


def test_nothing_is_predicted_before_there_are_enough_samples() -> None:
    simulated = world()
    simulated.serve(SAMPLES_MIN - 1)
    assert simulated.predictions() == {}
    simulated.serve(1)
    assert simulated.predictions().keys() == {0, 1, 2, 3}


def test_failures_teach_nothing() -> None:
    simulated = world()
    for status in (500, 503, 429, 0):
        simulated.serve(100, status=status)
    assert simulated.predictions() == {}


def test_a_stuck_response_does_not_spoil_the_model() -> None:
    simulated = world(noise=0.05)
    simulated.serve(500)
    before = simulated.errors()[0]
    request = simulated.asked()
    (endpoint, *_) = simulated.endpoints
    simulated.producer.picked(request, Decision(endpoint, (), "default"))
    simulated.producer.finished(request, endpoint, Finished(200, 600.0, 601.0, Usage(10, 100), 0))
    assert simulated.errors()[0] < before + 0.1


def test_what_another_endpoint_served_teaches_nothing() -> None:
    simulated = world()
    for _ in range(100):
        request = simulated.asked()
        first, second, *_ = simulated.endpoints
        simulated.producer.picked(request, Decision(first, (), "default"))
        simulated.producer.finished(request, second, Finished(200, 0.1, 1.0, Usage(10, 100), 0))
    assert simulated.predictions() == {}


@pytest.mark.parametrize("ttft_s", [-1.0, 0.0, float("nan"), float("inf")])
def test_times_that_are_none_teach_nothing(ttft_s: float) -> None:
    simulated = world()
    for _ in range(100):
        request = simulated.asked()
        (endpoint, *_) = simulated.endpoints
        simulated.producer.picked(request, Decision(endpoint, (), "default"))
        simulated.producer.finished(request, endpoint, Finished(200, ttft_s, 1.0, None, 0))
    assert simulated.predictions() == {}


@pytest.mark.parametrize("reading", [float("nan"), float("inf"), 1e300, -5.0])
def test_readings_that_are_none_teach_nothing(reading: float) -> None:
    simulated = world()
    simulated.serve(200)
    busy = simulated.move
    simulated.move = lambda: [setattr(endpoint, "running", reading) for endpoint in simulated.endpoints] and None  # type: ignore[method-assign]
    simulated.serve(200)
    simulated.move = busy  # type: ignore[method-assign]
    assert max(simulated.errors()) < 0.001


def test_predictions_stay_within_reason_whatever_the_load() -> None:
    simulated = world()
    simulated.serve(200)
    wild, idle, *_ = simulated.endpoints
    wild.waiting = wild.running = 1e9
    idle.waiting = idle.running = -1e9
    found = simulated.predictions()
    assert (found[wild.slot].ttft_s, found[wild.slot].tpot_s) == (TTFT_MAX_S, TPOT_MAX_S)
    assert found[idle.slot].ttft_s == TTFT_MIN_S


def test_an_endpoint_that_takes_over_a_slot_starts_as_one_of_the_pool() -> None:
    simulated = world(slower={0: 3.0})
    simulated.serve(1_000)
    gone, other, *_ = simulated.endpoints
    for endpoint in (gone, other):
        endpoint.waiting = endpoint.running = endpoint.kv_usage = endpoint.inflight_tokens = 0
    request = llm_request(stream=True, prompt_tokens=1000)
    simulated.producer.produce(request, Snapshot.of([gone, other]))
    slow = request.attributes["latency-prediction"]
    assert slow[gone.slot].ttft_s > 1.5 * slow[other.slot].ttft_s
    simulated.producer.removed(gone)
    simulated.producer.produce(request, Snapshot.of([gone, other]))
    fresh = request.attributes["latency-prediction"]
    assert fresh[gone.slot].ttft_s < 0.75 * slow[gone.slot].ttft_s
    assert fresh[other.slot] == slow[other.slot]


# What is streamed and what comes whole


def test_a_response_that_is_not_streamed_is_another_matter() -> None:
    simulated = world()
    simulated.serve(100)
    assert simulated.predictions(stream="") == {}, "the first byte of a whole response comes at its end"
    simulated.ttft_s = lambda endpoint, uncached: 10 + linear_ttft_s(endpoint, uncached)
    simulated.serve(100, stream=False)
    whole, streamed = simulated.predictions(stream=""), simulated.predictions()
    assert all(prediction.ttft_s > 9 for prediction in whole.values())
    assert all(prediction.ttft_s < 9 for prediction in streamed.values())
    assert {prediction.tpot_s for prediction in whole.values()} == {0.0}
    asked = simulated.predictions(stream="", x_slo_tpot_ms="50")
    assert all(prediction.tpot_s > 0 for prediction in asked.values()), "asked for"


# Headroom


@pytest.mark.parametrize(
    ("parameters", "headers", "ttft_slo_s", "tpot_slo_s"),
    [
        ({}, {"x_llm_d_slo_ttft_ms": "2000", "x_llm_d_slo_tpot_ms": "30"}, 2.0, 0.03),
        ({}, {"x_slo_ttft_ms": "2000", "x_slo_tpot_ms": "30"}, 2.0, 0.03),
        ({}, {"x_llm_d_slo_ttft_ms": "500", "x_slo_ttft_ms": "2000", "x_slo_tpot_ms": "12.5"}, 0.5, 0.0125),
        ({"sloBufferFactor": 0.5}, {"x_slo_ttft_ms": "2000", "x_slo_tpot_ms": "30"}, 1.0, 0.015),
        # none at all: the less it is predicted to take, the better
        ({}, {}, 0.0, 0.0),
        ({}, {"x_slo_ttft_ms": "soon", "x_slo_tpot_ms": "-1"}, 0.0, 0.0),
        ({}, {"x_slo_ttft_ms": "nan", "x_slo_tpot_ms": "inf"}, 0.0, 0.0),
    ],
)
def test_headroom_is_the_objective_less_the_prediction(
    parameters: dict[str, object], headers: dict[str, str], ttft_slo_s: float, tpot_slo_s: float
) -> None:
    simulated = world(parameters)
    simulated.serve(100)
    found = simulated.predictions(**headers)
    assert len(found) == 4
    for prediction in found.values():
        assert prediction.ttft_headroom_s == pytest.approx(ttft_slo_s - prediction.ttft_s)
        assert prediction.tpot_headroom_s == pytest.approx(tpot_slo_s - prediction.tpot_s)


@pytest.mark.parametrize(
    ("headers", "neutral"), [({"x_slo_ttft_ms": "2000"}, "tpot_headroom_s"), ({"x_slo_tpot_ms": "30"}, "ttft_headroom_s")]
)
def test_with_one_objective_the_other_headroom_says_nothing(headers: dict[str, str], neutral: str) -> None:
    simulated = world()
    simulated.serve(100)
    found = simulated.predictions(**headers)
    assert {getattr(prediction, neutral) for prediction in found.values()} == {0.0}
    other = "ttft_headroom_s" if neutral.startswith("tpot") else "tpot_headroom_s"
    assert len({getattr(prediction, other) for prediction in found.values()}) == 4


# Roles


def test_stages_are_learned_where_they_run() -> None:
    """The prompt's time belongs to the endpoint that prefilled, the output's to the one that decoded."""
    simulated = world({"endpointRoleLabel": "role"}, size=2)
    prefill, decode = simulated.endpoints
    prefill.labels, decode.labels = {"role": "prefill"}, {"role": "decode"}
    for _ in range(100):
        simulated.move()
        request = simulated.asked()
        ttft_s, tpot_s = simulated.truth_s(request, prefill)[0], simulated.truth_s(request, decode)[1]
        simulated.producer.picked(request, Decision(decode, (), "decode", {"prefill": prefill}))
        simulated.producer.finished(request, decode, Finished(200, ttft_s, ttft_s + 99 * tpot_s, Usage(10, 100), 0))
    simulated.move()
    request = simulated.asked()
    simulated.producer.produce(request, Snapshot.of(simulated.endpoints))
    found = request.attributes["latency-prediction"]
    assert found[prefill.slot].ttft_s == pytest.approx(simulated.truth_s(request, prefill)[0], rel=0.01)
    assert found[decode.slot].tpot_s == pytest.approx(simulated.truth_s(request, decode)[1], rel=0.01)
    assert (found[prefill.slot].tpot_s, found[prefill.slot].tpot_headroom_s) == (0.0, 0.0)
    assert (found[decode.slot].ttft_s, found[decode.slot].ttft_headroom_s) == (0.0, 0.0)


def test_more_roles_than_there_may_be_share_a_model() -> None:
    simulated = world({"endpointRoleLabel": "role"}, size=40)
    for endpoint in simulated.endpoints:
        endpoint.labels = {"role": f"role-{endpoint.slot}"}
    simulated.serve(2_000)
    assert simulated.predictions().keys() == set(range(40))


# Parameters


def test_predictions_can_be_left_out_while_learning_goes_on() -> None:
    simulated = world({"predictInProduce": False})
    simulated.serve(100)
    assert simulated.predictions() == {}
    simulated.producer.predict_in_produce = True
    assert len(simulated.predictions()) == 4


def test_what_is_cached_is_of_the_producer_that_is_named() -> None:
    simulated = world({"prefixMatchInfoProducerName": "precise"})
    simulated.serve(200)  # of no such producer: all of a prompt counts, which the world does not bear out
    (endpoint, *_) = simulated.endpoints
    with_cache = llm_request(stream=True, prompt_tokens=8000, attributes={"precise": PrefixMatch([], [], 8000, {endpoint.slot: 8000})})
    without = llm_request(stream=True, prompt_tokens=8000, prefix=PrefixMatch([], [], 8000, {endpoint.slot: 8000}))
    for request in (with_cache, without):
        simulated.producer.produce(request, Snapshot.of([endpoint]))
    saved_s = without.attributes["latency-prediction"][0].ttft_s - with_cache.attributes["latency-prediction"][0].ttft_s
    assert saved_s > 0.3


def test_every_parameter_is_accepted_and_what_is_not_known_refused() -> None:
    made = msgspec.convert(
        {
            "sloBufferFactor": 0.9, "contextTTL": "5m", "streamingMode": True, "predictInProduce": True, "endpointRoleLabel": "role",
            "useEncoderCacheFeatures": True, "prefixMatchInfoProducerName": "p", "samplingMean": 1000,
            "maxDecodeTokenSamplesForPrediction": 0,
        },
        PredictedLatencyProducer,
    )  # fmt: skip
    assert made.produces == ("latency-prediction",)
    for wrong in ({"sloBufferFactor": 0}, {"contextTTL": "five minutes"}, {"contextTtl": "5m"}, {"predictionServerURL": "http://x"}):
        with pytest.raises(msgspec.ValidationError):
            msgspec.convert(wrong, PredictedLatencyProducer)
