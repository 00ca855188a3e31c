"""The parts of flow control that stand by themselves: the ledger, drain rates, settings, metric families, the predicted wait."""

from __future__ import annotations

import random

import msgspec
import pytest

from epp.admission.bands import Drain
from epp.admission.families import flow_families
from epp.admission.ledger import Ledger
from epp.admission.series import SERIES_MAX
from epp.admission.settings import BandSettings, settings_of
from epp.clock import VirtualClock
from epp.config import schema
from epp.observe import text
from epp.plugins.base import Context, Finished, Plugin
from epp.plugins.detectors.concurrency import ConcurrencyDetector
from epp.plugins.detectors.predicted_wait import PredictedWaitDetector
from epp.plugins.detectors.utilization import UtilizationDetector
from epp.plugins.flow_control.policies import (
    EdfOrderingPolicy,
    FcfsOrderingPolicy,
    GlobalStrictFairnessPolicy,
    PriorityHoldbackPolicy,
    ProgramAwareFairness,
    RoundRobinFairnessPolicy,
)
from epp.types import Endpoint
from tests.builders import llm_request, pool_of
from tests.flow_world import World

# the ledger


def test_service_is_halved_every_half_life() -> None:
    ledger = Ledger(60.0, 0.0)
    ledger.add("a", 1_000, 0.0)
    ledger.add("b", 1_000, 60.0)
    left = {name: tokens for name, tokens, _ in ledger.tokens(120.0)}
    assert left == pytest.approx({"a": 250.0, "b": 500.0})
    assert ledger.service("b") == pytest.approx(2 * ledger.service("a"))


def test_decay_by_the_second_where_there_is_no_half_life() -> None:
    ledger = Ledger(0.0, 0.0, decay_per_s=0.5)
    ledger.add("a", 100, 0.0)
    assert [round(left, 6) for _, left, _ in ledger.tokens(2.0)] == [25.0]
    still = Ledger(0.0, 0.0)
    still.add("a", 100, 0.0)
    assert [left for _, left, _ in still.tokens(1e9)] == [100.0]


def test_numbers_stay_small_for_ever() -> None:
    ledger = Ledger(1.0, 0.0)
    for second in range(0, 2_000, 10):
        ledger.add("a", 10, float(second))
        ledger.add("b", 20, float(second))
    assert ledger.rebased > 0
    assert ledger.service("b") == pytest.approx(2 * ledger.service("a"))
    assert ledger.service("b") < 1e50


def test_tenants_are_bounded_and_the_idle_forgotten() -> None:
    ledger = Ledger(60.0, 0.0, tenants_max=3, idle_max_s=100.0, sweep_s=10.0)
    for number in range(5):
        ledger.add(f"t{number}", 1, float(number))
    assert [name for name, _, _ in ledger.tokens(5.0)] == ["t2", "t3", "t4"]
    ledger.add("t2", 1, 103.9)
    assert [name for name, _, _ in ledger.tokens(104.0)] == ["t4", "t2"]


def test_jain() -> None:
    ledger = Ledger(0.0, 0.0)
    assert ledger.jain(0.0, 60.0) == 1.0
    for name, tokens in (("a", 300), ("b", 100), ("c", 0)):
        ledger.add(name, tokens, 0.0)
    assert ledger.jain(1.0, 60.0) == pytest.approx(400**2 / (3 * (300**2 + 100**2)))
    ledger.add("d", 50, 100.0)
    assert ledger.jain(100.0, 60.0) == 1.0, "the others were not seen for long"


# drain rates


def test_a_drain_rate_is_right_from_the_first_seconds_and_fades() -> None:
    drain = Drain()
    assert drain.per_s(5.0) == 0.0
    for number in range(20):
        drain.add(100.0 + number / 10)
    assert drain.per_s(102.0) == pytest.approx(10.0, rel=0.1)
    assert drain.per_s(112.0) < 0.6 * drain.per_s(102.0)


# settings


def test_settings_of_a_configuration() -> None:
    fairness, ordering, limit = RoundRobinFairnessPolicy(), EdfOrderingPolicy(), PriorityHoldbackPolicy(min_ceiling=0.2)
    plugins: dict[str, Plugin] = {"turns": fairness, "edf": ordering, "hold": limit}
    config = schema.FlowControl(
        bytes_max=7,
        requests_max=8,
        default_request_ttl_s=9.0,
        no_endpoint_request_ttl_s=10.0,
        default_negative_priority_band=schema.PriorityBand(requests_max=3, ordering_policy="edf"),
        priority_bands=(schema.PriorityBand(priority=5, bytes_max=6, fairness_policy="turns"),),
        usage_limit_policy="hold",
        enable_eviction=True,
    )
    made = settings_of(config, plugins)
    assert (made.size_bytes_max, made.requests_max, made.ttl_s, made.no_endpoints_ttl_s, made.eviction) == (7, 8, 9.0, 10.0, True)
    assert made.usage_limit is limit
    assert made.band(5).fairness is fairness
    assert (made.band(5).size_bytes_max, made.band(5).requests_max, made.band(5).ttl_s) == (6, 5_000, None)
    assert (made.band(-7).priority, made.band(-7).requests_max, made.band(-7).ordering) == (-7, 3, ordering)
    assert isinstance(made.band(1).ordering, FcfsOrderingPolicy)
    assert isinstance(made.band(1).fairness, GlobalStrictFairnessPolicy)


def test_a_fairness_policy_nobody_knows_is_a_fault() -> None:
    with pytest.raises(ValueError, match="knows no fairness policy of the type edf-ordering-policy"):
        World(bands=(BandSettings(fairness=EdfOrderingPolicy()),))


# metric families


def exposed(world: World) -> dict[str, str]:
    """Sample -> value."""
    written = "".join(text.plain(family) for family in flow_families(world.flow, world.clock.now_s()))
    return {line.rpartition(" ")[0]: line.rpartition(" ")[2] for line in written.splitlines() if not line.startswith("#")}


def test_families() -> None:
    bands = (BandSettings(requests_max=10, size_bytes_max=1_000, fairness=ProgramAwareFairness()),)
    world = World(1, each=1, requests_max=20, size_bytes_max=500, eviction=True, bands=bands)
    world.ask("running", model="m", target_model="t", prompt_tokens=40)
    world.ask("r", model="m", target_model="t", fairness_id="a", body_bytes=100)
    world.run()
    found = exposed(world)
    flow = 'fairness_id="a",priority="0",inference_pool="default",model_name="m",target_model_name="t"'
    prefix = "llm_d_epp_flow_control_"
    assert found[f"{prefix}queue_size{{{flow}}}"] == "1"
    assert found[f"inference_extension_flow_control_queue_size{{{flow}}}"] == "1"
    assert found[f"{prefix}queue_bytes{{{flow}}}"] == "100"
    default = 'fairness_id="default-flow",priority="0",outcome="Dispatched",inference_pool="default",model_name="m",target_model_name="t"'
    assert found[f"{prefix}request_queue_duration_seconds_count{{{default}}}"] == "1"
    assert found[f'{prefix}requests_total{{outcome="Dispatched",priority="0",inference_pool="default"}}'] == "1"
    assert found[f'{prefix}pool_saturation{{inference_pool="default",stage="decode"}}'] == "1"
    assert found[f'{prefix}pool_saturation{{inference_pool="default",stage="effective"}}'] == "1"
    assert found['inference_extension_flow_control_pool_saturation{inference_pool="default"}'] == "1"
    assert found[f'{prefix}capacity_utilization_requests{{priority="0",inference_pool="default"}}'] == "0.1"
    assert found[f'{prefix}capacity_utilization_bytes{{priority="0",inference_pool="default"}}'] == "0.1"
    assert found[f'{prefix}global_capacity_utilization_requests{{inference_pool="default"}}'] == "0.05"
    assert found[f'{prefix}global_capacity_utilization_bytes{{inference_pool="default"}}'] == "0.2"
    assert found[f'{prefix}revocations_total{{outcome="confirmed",inference_pool="default"}}'] == "0"
    assert found[f"{prefix}dispatch_cycle_duration_seconds_count"] == "1"
    assert found['llm_d_epp_program_aware_attained_service_tokens{program_id="default-flow"}'] == "40"
    assert found["llm_d_epp_program_aware_jains_fairness_index"] == "1"
    assert found["epp_flow_fairness_index"] == "1"
    assert found['epp_flow_wait_seconds{fairness_id="default-flow"}'] == "0"


def test_no_global_capacity_no_series_of_it_and_stale_endpoints_where_the_detector_counts_them() -> None:
    world = World(2)
    detector = UtilizationDetector()
    detector.bind(Context(world.clock, random.Random(1), {}))
    world.flow.use(world.flow.settings, detector)
    world.ask("r")
    found = exposed(world)
    assert not any("global_capacity" in sample for sample in found)
    assert found['llm_d_epp_flow_control_stale_endpoints{detector="utilization-detector"}'] == "2"


def test_label_sets_are_bounded() -> None:
    world = World(1, each=10 * SERIES_MAX)
    for number in range(SERIES_MAX + 50):
        world.ask(f"r{number}", fairness_id=f"f{number}")
    assert len(world.flow.counts.series) == SERIES_MAX + 1
    assert world.flow.counts.limit_hits["metric_labels"] == 50


# detectors: what one more adds


@pytest.mark.parametrize("mode", ["requests", "tokens", "hybrid"])
def test_what_a_request_adds_is_what_the_concurrency_detector_sees_afterwards(mode: str) -> None:
    made = msgspec.convert({"concurrencyMode": mode, "maxConcurrency": 10, "maxTokenConcurrency": 1_000}, ConcurrencyDetector)
    pool = pool_of({"inflight_requests": 2, "inflight_tokens": 100}, {"inflight_requests": 5, "inflight_tokens": 700}, {})
    saturation, by_request, by_token = made.level(pool)
    assert saturation == made.saturation(pool)
    pool[0].inflight_requests += 1
    pool[0].inflight_tokens += 200
    predicted = saturation + by_request + 200 * by_token
    assert made.saturation(pool) <= predicted + 1e-12
    if mode != "hybrid":
        assert made.saturation(pool) == pytest.approx(predicted)


def test_what_a_request_adds_to_the_utilization_detector_s_at_most() -> None:
    made = UtilizationDetector()
    made.bind(Context(VirtualClock(1_000.0), random.Random(1), {}))
    fresh = {"scraped_at_s": 1_000.0, "kv_capacity_tokens": 10_000}
    pool = pool_of({**fresh, "waiting": 2.0}, {**fresh, "kv_usage": 0.5})
    saturation, by_request, by_token = made.level(pool)
    for endpoint in pool:
        endpoint.sent_requests, endpoint.sent_tokens = 1, 400
    assert made.saturation(pool) <= saturation + 2 * by_request + 800 * by_token
    assert (made.stale(pool), made.stale(pool_of({}, fresh))) == (0, 1)


def predicted(**parameters: object) -> tuple[PredictedWaitDetector, VirtualClock]:
    clock = VirtualClock(1_000.0)
    made = msgspec.convert(parameters, PredictedWaitDetector)
    made.bind(Context(clock, random.Random(1), {made.name: made}))
    return made, clock


def with_rate(endpoint: Endpoint, tokens_per_s: float) -> None:
    endpoint.capacity.prefill_tokens_per_s = tokens_per_s


def test_the_pool_is_full_when_the_endpoint_with_the_shortest_wait_is() -> None:
    detector, _ = predicted(maxWait="500ms")
    pool = pool_of({"inflight_tokens": 4_000}, {"inflight_tokens": 1_000})
    for endpoint in pool:
        with_rate(endpoint, 4_000)
    assert detector.saturation(pool) == pytest.approx(0.75), "half of the room at the second one is left"
    with_rate(pool[0], 40_000)
    assert detector.saturation(pool) == pytest.approx(0.35)
    with_rate(pool[0], 4_000)
    pool[1].inflight_tokens = 3_000
    assert detector.saturation(pool) == pytest.approx(1.5), "1 s and 0.75 s: the shorter one decides"


def test_the_kv_cache_counts_in_its_last_tenth() -> None:
    detector, _ = predicted(kvCacheUtilThreshold=0.9)
    (endpoint,) = pool_of({"kv_usage": 0.8})
    assert detector.saturation([endpoint]) == 0.0
    endpoint.kv_usage = 0.855
    assert detector.saturation([endpoint]) == pytest.approx(0.5)
    endpoint.kv_usage = 0.99
    assert detector.saturation([endpoint]) == pytest.approx(2.0)


def test_an_endpoint_nothing_is_known_of_is_as_fast_as_the_others_or_as_configured() -> None:
    detector, _ = predicted(maxWait="1s", initialPrefillTokensPerSecond=1_000)
    pool = pool_of({"inflight_tokens": 500}, {"inflight_tokens": 5_000})
    assert detector.saturation(pool[:1]) == pytest.approx(0.5)
    assert detector.saturation(pool) == pytest.approx(0.75)
    with_rate(pool[1], 10_000)
    assert detector.saturation(pool) == pytest.approx((0.05 + 0.5) / 2)


def test_what_was_sent_fills_the_room_there_is() -> None:
    detector, _ = predicted(maxWait="1s")
    pool = pool_of({"inflight_tokens": 500}, {"inflight_tokens": 900}, {"inflight_tokens": 9_000})
    for endpoint in pool:
        with_rate(endpoint, 1_000)
    saturation, by_request, by_token = detector.level(pool)
    assert saturation + 600 * by_token == pytest.approx(1.0), "500 and 100 tokens fit"
    assert by_request > 0
    for endpoint in pool:
        endpoint.inflight_tokens = 5_000
    assert detector.level(pool) == (5.0, 0.0, 0.0)
    assert detector.level([]) == (1.0, 0.0, 0.0)


def test_a_queue_inside_the_engine_takes_as_long_as_requests_take_to_end_there() -> None:
    detector, clock = predicted(maxWait="1s")
    (endpoint,) = pool_of({"inflight_requests": 9, "waiting": 4.0})
    assert detector.saturation([endpoint]) == pytest.approx(0.2), "nothing ended yet"
    for _ in range(200):
        clock.advance(0.5)
        detector.finished(llm_request(), endpoint, Finished(200, 0.1, 1.0, None, 0))
    assert detector.saturation([endpoint]) == pytest.approx(2.0)
    detector.removed(endpoint)
    assert detector.saturation([endpoint]) == pytest.approx(0.2)


def test_time_without_work_is_no_sample() -> None:
    detector, clock = predicted(maxWait="1s")
    (endpoint,) = pool_of({"inflight_requests": 0, "waiting": 4.0})
    for _ in range(5):
        clock.advance(30.0)
        detector.finished(llm_request(), endpoint, Finished(200, 0.1, 1.0, None, 0))
    assert detector.saturation([endpoint]) == pytest.approx(0.2)


class Oracle(Plugin):
    """Knows better."""

    type = "oracle"

    def wait_s(self, endpoint: Endpoint) -> float:
        return 0.1 * (endpoint.slot + 1)


def test_a_plugin_that_predicts_waits_is_asked() -> None:
    oracle = Oracle()
    context = Context(VirtualClock(), random.Random(1), {"oracle": oracle})
    pool = pool_of({"inflight_tokens": 10**6}, {"inflight_tokens": 10**6})
    for parameters in ({"maxWait": "1s"}, {"maxWait": "1s", "waitPluginName": "oracle"}):
        detector = msgspec.convert(parameters, PredictedWaitDetector)
        detector.bind(context)
        assert detector.saturation(pool) == pytest.approx(0.15), "the mean of 0.1 and 0.2"
    with pytest.raises(ValueError, match="waitPluginName: no plugin is named 'nobody'"):
        msgspec.convert({"waitPluginName": "nobody"}, PredictedWaitDetector).bind(context)
    with pytest.raises(msgspec.ValidationError, match="maxWait"):
        msgspec.convert({"maxWait": "0s"}, PredictedWaitDetector)


def test_a_burst_onto_a_cold_pool_is_let_in_by_its_tokens() -> None:
    """5 000 requests at once: what is charged decides, no metric has moved; none is lost."""
    detector, _ = predicted(maxWait="1s", initialPrefillTokensPerSecond=10_000)
    world = World(4, detector=detector, bands=(BandSettings(requests_max=0),), ttl_s=0.0)
    passed = [f"r{number}" for number in range(5_000) if world.ask(f"r{number}", prompt_tokens=1_000) is None]
    assert 38 <= len(passed) <= 40, "4 endpoints x 1 s x 10 000 tokens/s"
    assert world.flow.requests == 5_000 - len(passed)
    for name in passed:
        world.end(name)
    served = len(passed)
    while woken := world.run(0.001):
        served += len(woken)
        for name in woken:
            world.end(name)
    assert (served, world.flow.requests) == (5_000, 0)
