"""Flow control, rule by rule: who passes, who waits, how each wait ends, and what is told to those who get no further."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from epp.admission.control import DISPATCHES_MAX, FlowControl
from epp.admission.refusals import Outcome
from epp.admission.saturation import GROUPS_MAX, UNCHARGED_MAX_S
from epp.admission.settings import BandSettings, Settings
from epp.errors import BadRequestError, EppError, ShuttingDownError
from epp.plugins.detectors.concurrency import ConcurrencyDetector
from epp.plugins.flow_control.policies import (
    EdfOrderingPolicy,
    PriorityHoldbackPolicy,
    ProgramAwareFairness,
    RoundRobinFairnessPolicy,
    SloDeadlineOrderingPolicy,
    SoftReflectiveCeilingPolicy,
)
from epp.types import Endpoint, Usage
from tests.builders import Stream, chat, core, kinds, request_body, request_headers
from tests.flow_world import Timers, World


def error_of(world: World, name: str, **fields: object) -> EppError:
    with pytest.raises(EppError) as raised:
        world.ask(name, **fields)
    return raised.value


def told(error: EppError | None) -> tuple[int, str, bool]:
    assert error is not None
    return error.http_status, error.dropped_reason, 1 <= getattr(error, "retry_after_s", 0) <= 60


def test_a_request_passes_while_there_is_room_and_waits_when_there_is_none() -> None:
    world = World(2, each=2)
    assert [world.ask(f"r{i}") for i in range(4)] == [None] * 4
    assert world.ask("late") is not None
    assert world.run() == []
    assert (world.flow.requests, world.outcomes()) == (1, {"Dispatched": 4})
    world.end("r2")
    assert world.woken == [], "a wait is never over from within an event"
    assert world.run() == ["late"]
    assert (world.flow.requests, world.outcomes()) == (0, {"Dispatched": 5})
    assert world.run(1_000.0) == []


def test_six_sixths_are_full() -> None:
    world = World(2, each=3)
    assert [world.ask(f"r{i}") is None for i in range(7)] == [True] * 6 + [False]


def test_one_pump_per_loop_iteration_however_many_events() -> None:
    world = World(1, each=1)
    world.ask("first")
    world.ask("second")
    world.run()
    cycles = world.flow.counts.cycle_s.count
    for _ in range(100):
        world.flow.changed()
        world.flow.first_token(world.requests["first"], world.all[0], 0.1)
    assert world.timers.run() == 1
    assert world.flow.counts.cycle_s.count == cycles + 1


def test_nothing_is_scheduled_while_nothing_happens() -> None:
    world = World(1, each=1, ttl_s=0.0, no_endpoints_ttl_s=0.0)
    world.ask("first")
    world.ask("second")
    while world.timers.run():
        pass
    assert world.timers.pending == 0, "no polling"
    world.flow.changed()
    assert world.timers.pending == 1


def test_without_anyone_waiting_events_cost_no_pump() -> None:
    world = World(1, each=5)
    world.ask("only")
    world.end("only")
    assert world.timers.pending == 0


def test_a_burst_can_not_pass_before_it_is_charged() -> None:
    """Those let through in one pump count until the director has charged them."""
    world = World(2, each=5)
    for number in range(10):
        world.ask(f"first-{number}")
    for number in range(30):
        world.ask(f"then-{number}")
    for number in range(10):
        world.end(f"first-{number}")
    world.timers.run()
    assert len(world.woken) == 10, "as many as there is room for, though none is charged yet"
    world.flow.changed()
    world.timers.run()
    assert len(world.woken) == 10
    for name in list(world.woken):
        world.route(name)
    world.timers.run()
    assert len(world.woken) == 10


class Crude:
    """A third party's detector: it says how full, and nothing of what a request adds."""

    def __init__(self) -> None:
        self.full = 1.0

    def saturation(self, _endpoints: Sequence[Endpoint]) -> float:
        return self.full


def test_a_detector_that_says_no_more_lets_one_uncharged_request_through_at_a_time() -> None:
    crude = Crude()
    world = World(3, detector=crude)
    for number in range(4):
        world.ask(f"r{number}")
    crude.full = 0.5
    world.flow.changed()
    assert world.run() == ["r0"]
    assert world.run() == ["r1"], "routed: the next one may"
    assert [world.run(), world.run(), world.run()] == [["r2"], ["r3"], []]


def test_a_request_never_routed_does_not_count_for_ever() -> None:
    crude = Crude()
    world = World(1, detector=crude)
    world.ask("lost")
    world.ask("next")
    crude.full = 0.0
    world.flow.changed()
    world.timers.run()
    assert world.woken == ["lost"]
    assert world.run(UNCHARGED_MAX_S - 0.1) == []
    assert world.run(0.2) == ["next"]
    assert world.flow.saturation.lapsed == 1


def test_a_pump_ends_so_that_others_get_the_loop() -> None:
    world = World(1, each=1)
    world.ask("first")
    for number in range(DISPATCHES_MAX + 10):
        world.ask(f"r{number}")
    world.run()
    world.detector.max_concurrency = 10_000  # type: ignore[attr-defined]
    world.end("first")
    assert len(world.run()) == DISPATCHES_MAX
    assert len(world.run()) == 10


# priorities


def test_the_highest_priority_goes_first_whenever_it_came() -> None:
    world = World(1, each=1)
    world.ask("running")
    for name, priority in (("low", -5), ("mid", 0), ("high", 7), ("mid2", 0), ("high2", 7)):
        world.ask(name, priority=priority)
    order = []
    running = "running"
    for _ in range(5):
        world.end(running)
        (running,) = world.run()
        order.append(running)
    assert order == ["high", "high2", "mid", "mid2", "low"]


def test_a_newcomer_does_not_pass_those_of_its_priority_or_above_but_those_below() -> None:
    world = World(1, each=1)
    world.ask("running")
    world.ask("low", priority=-1)
    world.run()
    world.end("running")  # a pump is due, it has not come
    assert world.ask("same", priority=-1) is not None
    assert world.ask("above", priority=3) is None
    assert world.run() == []
    world.end("above")
    assert world.run() == ["low"]


@pytest.mark.parametrize(
    ("priority", "band"),
    [(0, 0), (3, 3), (-2, -2)],
)
def test_a_priority_without_a_band_gets_one_of_the_template(priority: int, band: int) -> None:
    settings: dict[str, Any] = {
        "default_band": BandSettings(requests_max=11),
        "default_negative_band": BandSettings(requests_max=22),
        "bands": (BandSettings(priority=9, requests_max=33),),
    }
    world = World(**settings)
    world.ask("r", priority=priority)
    found = {each.priority: each.settings.requests_max for each in world.flow.bands.all}
    assert found == {9: 33, 0: 11, band: 22 if band < 0 else 11}


def test_past_the_limit_of_bands_a_priority_joins_its_neighbour_below_on_its_side(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("epp.admission.bands.BANDS_MAX", 5)
    world = World(bands=tuple(BandSettings(priority=p) for p in (10, 5, -5, -10)))
    bands = world.flow.bands
    now_s = world.clock.now_s()
    joined = {p: bands.of(p, now_s).priority for p in (12, 7, 3, 0, -3, -7, -20)}
    assert joined == {12: 10, 7: 5, 3: 0, 0: 0, -3: -5, -7: -10, -20: -10}
    assert len(bands.all) == 5


def test_where_no_negative_band_can_be_had_the_lowest_takes_negative_priorities(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("epp.admission.bands.BANDS_MAX", 2)
    world = World(bands=(BandSettings(priority=10),))
    assert world.flow.bands.of(-1, 0.0).priority == 0


def test_bands_of_objectives_are_there_before_their_requests_and_go_when_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(bands=(BandSettings(priority=4),))
    world.flow.provision([7, -1, 7])
    assert world.flow.bands.priorities == (7, 4, 0, -1)
    world.clock.advance(601.0)
    world.flow.provision([8])
    assert world.flow.bands.priorities == (8, 4, 0), "configured ones stay"


# candidates


def test_a_full_subset_holds_nobody_who_may_go_elsewhere() -> None:
    world = World(2, each=1)
    world.all[0].inflight_requests = 1
    assert world.ask("here", subset=("pod-1",)) is not None
    assert world.ask("there", subset=("pod-2",)) is None
    assert world.where["there"] is not None
    world.ask("here2", subset=("pod-1",), priority=5)
    world.run()
    world.all[0].inflight_requests = 0
    world.flow.changed()
    assert world.run() == ["here2"]


def test_a_model_that_only_some_serve_is_judged_over_those() -> None:
    world = World(2, each=1)
    world.pool.serving = {"a": ["pod-1"], "b": ["pod-2"]}
    world.all[0].inflight_requests = 1
    assert world.ask("a", target_model="a") is not None
    assert world.ask("b", target_model="b") is None


def test_models_that_all_serve_are_one_group() -> None:
    world = World(1, each=1)
    world.ask("running")
    for number in range(5):
        world.ask(f"r{number}", target_model=f"m{number}")
    assert len(world.flow.saturation.queued()) == 1


def test_past_the_limit_groups_are_judged_over_the_whole_pool() -> None:
    world = World(GROUPS_MAX + 5, each=1)
    for endpoint in world.all:
        endpoint.inflight_requests = 1
    for number in range(GROUPS_MAX + 5):
        assert world.ask(f"r{number}", subset=(f"pod-{number + 1}",)) is not None
    assert len(world.flow.saturation) <= GROUPS_MAX + 1
    assert world.flow.saturation.groups_overflowed == 5
    for endpoint in world.all:
        endpoint.inflight_requests = 0
    world.flow.changed()
    assert len(world.run()) == GROUPS_MAX + 5


ROLE = "llm-d.ai/role"


def roles(world: World, *names: str) -> None:
    for endpoint, role in zip(world.all, names, strict=True):
        endpoint.labels = {ROLE: role} if role else {}


def test_the_fuller_stage_counts_and_roles_nobody_knows_do_not() -> None:
    world = World(4, each=1)
    roles(world, "prefill", "decode", "encode", "new-role")
    world.all[2].inflight_requests = world.all[3].inflight_requests = 50
    assert world.ask("r", target_model="x") is None
    world.all[0].inflight_requests = 1
    world.all[1].inflight_requests = 0
    assert world.ask("held") is not None
    assert world.flow.saturation.by_stage["", "prefill"] == 1.0
    assert world.flow.saturation.by_stage["", "decode"] == 0.0
    assert world.flow.saturation.by_stage["", "effective"] == 1.0


def test_a_request_that_needs_one_stage_is_not_held_by_the_other() -> None:
    world = World(2, each=1)
    roles(world, "prefill", "decode")
    world.flow.saturation._stages_of = lambda request: 2 if request.target_model == "short" else 3
    world.all[0].inflight_requests = 1
    assert world.ask("long", target_model="long") is not None
    assert world.ask("short", target_model="short") is None


# an empty pool


def test_an_empty_pool_holds_requests_and_lets_them_go_when_it_fills() -> None:
    world = World(2, each=2)
    world.pool.endpoints = []
    waits = [world.ask(f"r{number}") for number in range(3)]
    assert all(waits)
    assert world.run(30.0) == []
    world.pool.endpoints = world.all
    world.flow.changed()
    assert world.run() == ["r0", "r1", "r2"]


def test_a_wait_for_endpoints_has_its_own_end() -> None:
    world = World(1, ttl_s=60.0, no_endpoints_ttl_s=5.0)
    world.pool.endpoints = []
    world.ask("r")
    assert world.run(4.9) == []
    assert world.run(0.2) == ["r"]
    assert told(world.waits["r"].error) == (503, "rejected-no-endpoints", True)
    assert world.outcomes() == {"EvictedNoEndpoints": 1}


def test_time_starts_anew_when_endpoints_come_or_go() -> None:
    world = World(1, each=1, ttl_s=10.0, no_endpoints_ttl_s=5.0)
    world.ask("running")
    world.ask("r")
    assert world.run(8.0) == []
    world.pool.endpoints = []
    world.flow.changed()
    assert world.run() == []
    assert world.run(4.0) == [], "12 s in all: the saturation budget counts no more"
    world.pool.endpoints = world.all
    world.flow.changed()
    world.run()
    assert world.run(9.0) == []
    assert world.run(1.5) == ["r"]
    assert told(world.waits["r"].error) == (429, "rejected-ttl-expired", True)


def test_a_subset_nobody_is_in_and_an_unknown_model_are_the_director_s_to_refuse() -> None:
    world = World(1)
    assert world.ask("subset", subset=("pod-9",)) is None
    assert world.ask("model", target_model="unknown") is None
    world.pool.serving = {"a": []}
    assert world.ask("scaled to zero", target_model="a") is not None


def test_a_full_queue_before_an_empty_pool() -> None:
    world = World(1, requests_max=1)
    world.pool.endpoints = []
    world.ask("r")
    assert told(error_of(world, "more")) == (503, "rejected-no-endpoints", True)
    assert told(error_of(world, "now", headers={"x-llm-d-request-ttl": "0"})) == (503, "rejected-no-endpoints", True)
    assert world.outcomes() == {"RejectedNoEndpoints": 2}


# capacity


def full_world(**band: int) -> World:
    world = World(1, each=1, bands=(replace(BandSettings(), **band),))  # type: ignore[arg-type]
    world.ask("running")
    return world


@pytest.mark.parametrize(
    ("settings", "fits", "too_many"),
    [
        ({"requests_max": 2}, 2, {}),
        ({"size_bytes_max": 250}, 2, {}),
        ({"bands": (BandSettings(requests_max=2),)}, 2, {}),
        ({"bands": (BandSettings(size_bytes_max=299),)}, 2, {}),
        ({"bands": (BandSettings(flow_requests_max=2),)}, 2, {"fairness_id": "a"}),
        ({"bands": (BandSettings(flow_size_bytes_max=200),)}, 2, {"fairness_id": "a"}),
    ],
)
def test_capacity_by_requests_and_bytes_globally_by_band_and_by_flow(settings: dict[str, Any], fits: int, too_many: dict[str, Any]) -> None:
    world = World(1, each=1, **settings)
    world.ask("running")
    for number in range(fits):
        assert world.ask(f"r{number}", body_bytes=100, fairness_id="a") is not None
    error = error_of(world, "more", body_bytes=100, **too_many)
    assert told(error) == (429, "rejected-saturated", True)
    assert world.outcomes() == {"Dispatched": 1, "RejectedCapacity": 1}
    world.waits["r0"].cancel()
    assert world.ask("now", body_bytes=100, **too_many) is not None


def test_a_flow_s_limit_leaves_room_for_others() -> None:
    world = full_world(flow_requests_max=1)
    world.ask("a", fairness_id="a")
    assert error_of(world, "a2", fairness_id="a").http_status == 429
    assert world.ask("b", fairness_id="b") is not None


def test_who_passes_needs_no_room_in_the_queue() -> None:
    world = World(2, each=1, requests_max=1)
    world.all[0].inflight_requests = 1
    world.ask("held", subset=("pod-1",))
    assert world.ask("free", subset=("pod-2",)) is None


def test_retry_after_is_what_the_queue_takes_to_drain() -> None:
    world = World(1, each=1, requests_max=40)
    world.ask("running")
    running = "running"
    for number in range(200):  # two a second
        world.ask(f"r{number}")
        world.run(0.25)
        world.end(running)
        (running,) = world.run(0.25)
    for number in range(40):
        world.ask(f"w{number}")
    error = error_of(world, "more")
    assert 18 <= error.retry_after_s <= 23, "41 requests at two a second"  # type: ignore[attr-defined]


def test_retry_after_is_bounded() -> None:
    stuck = World(1, each=1, requests_max=1)
    stuck.all[0].inflight_requests = 1
    stuck.ask("waits")
    assert error_of(stuck, "more").retry_after_s == 60, "nothing ever left"  # type: ignore[attr-defined]
    quick = World(1, each=1, requests_max=1)
    for number in range(500):
        quick.ask(f"r{number}")
        quick.end(f"r{number}")
        quick.clock.advance(0.01)
    quick.all[0].inflight_requests = 1
    quick.ask("waits")
    assert error_of(quick, "more").retry_after_s == 1  # type: ignore[attr-defined]


# time to live


def test_a_wait_ends_with_its_time() -> None:
    world = World(1, each=1, ttl_s=10.0, bands=(BandSettings(priority=1, ttl_s=3.0), BandSettings(priority=2, ttl_s=0.0)))
    world.ask("running")
    world.ask("common")
    world.ask("band", priority=1)
    world.ask("for ever", priority=2)
    world.ask("own", headers={"x-llm-d-request-ttl": "1500ms"})
    world.ask("alias", headers={"x-gateway-request-ttl": "2"})
    ended = {}
    for _ in range(24):
        for name in world.run(0.5):
            ended[name] = world.clock.now_s() - 1_000.0
    assert ended == {"own": 1.5, "alias": 2.0, "band": 3.0, "common": 10.0}
    assert told(world.waits["own"].error) == (429, "rejected-ttl-expired", True)
    assert str(world.waits["own"].error).startswith("request timed out in queue: ")
    assert world.outcomes() == {"Dispatched": 1, "EvictedTTL": 4}
    assert world.flow.requests == 1


def test_a_request_that_may_not_wait_is_told_so() -> None:
    world = World(1, each=1)
    headers = {"x-llm-d-request-ttl": "0s"}
    assert world.ask("passes", headers=headers) is None
    assert told(error_of(world, "r", headers=headers)) == (429, "rejected-ttl-expired", True)
    assert world.outcomes() == {"Dispatched": 1, "RejectedOther": 1}


@pytest.mark.parametrize("written", ["soon", "-1s", "1 s", "nan", "1e3", "٣", "1.2.3", "s"])
def test_a_time_that_is_none_is_a_bad_request(written: str) -> None:
    world = World(1)
    assert isinstance(error_of(world, "r", headers={"x-llm-d-request-ttl": written}), BadRequestError)
    assert world.flow.requests == 0


def test_a_given_time_counts_from_arrival_whatever_happens_to_the_pool() -> None:
    world = World(1, each=1, ttl_s=60.0, no_endpoints_ttl_s=60.0)
    world.ask("running")
    world.ask("r", headers={"x-llm-d-request-ttl": "5s"})
    world.run(3.0)
    world.pool.endpoints = []
    world.flow.changed()
    assert world.run() == []
    assert world.run(2.1) == ["r"]


# leaving


def test_a_client_that_leaves_is_gone_at_once() -> None:
    world = World(1, each=1)
    world.ask("running")
    world.ask("r", body_bytes=7)
    wait = world.waits["r"]
    assert wait.arrival is not None
    wait.cancel()
    wait.cancel()
    assert (world.flow.requests, world.flow.size_bytes, wait.arrival) == (0, 0, None)
    world.end("running")
    assert world.run(100.0) == []
    assert world.outcomes() == {"Dispatched": 1, "EvictedContextCancelled": 1}


def test_a_client_that_leaves_between_its_turn_and_its_endpoint_gives_its_place_back() -> None:
    world = World(1, each=1)
    world.ask("running")
    world.ask("r")
    world.ask("next")
    world.end("running")
    world.timers.run()
    assert world.woken == ["r"]
    world.waits["r"].cancel()
    world.timers.run()
    assert world.woken == ["r", "next"]


def test_what_left_is_not_kept() -> None:
    """100 000 that come and go leave nothing behind, though nothing is ever served."""
    world = World(1, each=1, bands=(BandSettings(fairness=RoundRobinFairnessPolicy(), requests_max=0),))
    world.ask("running")
    world.ask("stays", fairness_id="stays")
    for number in range(5_000):
        wait = world.ask("r", fairness_id=f"f{number % 50}")
        assert wait is not None
        wait.cancel()
    band = world.flow.bands.all[0]
    (backlog,) = band.backlogs.values()
    assert len(world.flow._deadlines) < 200
    assert len(backlog._order) < 200  # type: ignore[attr-defined]
    assert list(band.flows) == ["stays"]


def test_what_was_let_through_is_not_kept() -> None:
    world = World(1, each=1)
    world.ask("running")
    world.ask("r")
    world.end("running")
    world.run()
    wait = world.waits["r"]
    assert wait.arrival is None
    assert wait.charge is not None
    assert wait.charge.request is None


# shutdown


def test_closing_by_rejecting() -> None:
    world = World(1, each=1)
    world.ask("running")
    world.ask("r")
    done: list[bool] = []
    world.flow.close("reject", lambda: done.append(True))
    assert world.woken == ["r"]
    assert isinstance(world.waits["r"].error, ShuttingDownError)
    assert world.waits["r"].error.dropped_reason == "rejected-shutting-down"
    assert done == [True]
    assert isinstance(error_of(world, "late"), ShuttingDownError)
    world.end("running")
    assert world.ask("passes") is None, "who need not wait is served"
    assert world.outcomes() == {"Dispatched": 2, "EvictedOther": 1, "RejectedOther": 1}


def test_closing_by_draining() -> None:
    world = World(1, each=1)
    world.ask("running")
    world.ask("r")
    done: list[bool] = []
    world.flow.close("drain", lambda: done.append(True))
    assert (world.woken, done) == ([], [])
    assert isinstance(error_of(world, "late"), ShuttingDownError)
    world.end("running")
    assert world.run() == ["r"]
    assert done == [True]


def test_closing_with_nobody_waiting() -> None:
    done: list[bool] = []
    World().flow.close("drain", lambda: done.append(True))
    assert done == [True]


# order and fairness


def serve(world: World, running: str, number: int) -> list[str]:
    order = []
    for _ in range(number):
        world.end(running)
        (running,) = world.run(0.01)
        order.append(running)
    return order


def test_orders() -> None:
    for policy, expected in (
        (EdfOrderingPolicy(), ["b", "c", "a", "d"]),
        (SloDeadlineOrderingPolicy(), ["c", "d", "a", "b"]),
    ):
        world = World(1, each=1, ttl_s=50.0, bands=(BandSettings(ordering=policy),))
        world.ask("running")
        world.ask("a", headers={"x-llm-d-request-ttl": "30s"})
        world.ask("b", headers={"x-llm-d-request-ttl": "10s", "x-llm-d-slo-ttft-ms": "never"})
        world.ask("c", headers={"x-llm-d-request-ttl": "20s", "x-slo-ttft-ms": "200"})
        world.ask("d", headers={"x-slo-ttft-ms": "300"})
        assert serve(world, "running", 4) == expected


def test_flows_take_turns() -> None:
    world = World(1, each=1, bands=(BandSettings(fairness=RoundRobinFairnessPolicy()),))
    world.ask("running")
    for name in ("a1", "a2", "a3", "a4", "b1", "b2", "c1"):
        world.ask(name, fairness_id=name[0])
    assert serve(world, "running", 7) == ["a1", "b1", "c1", "a2", "b2", "a3", "a4"]


def test_flows_take_turns_over_groups_too() -> None:
    world = World(2, each=1, bands=(BandSettings(fairness=RoundRobinFairnessPolicy()),))
    world.pool.serving = {"m": ["pod-1", "pod-2"], "n": ["pod-1"]}
    for endpoint in world.all:
        endpoint.inflight_requests = 1
    for name, model in (("a1", "m"), ("a2", "n"), ("a3", "m"), ("b1", "n"), ("b2", "m")):
        world.ask(name, fairness_id=name[0], target_model=model)
    order: list[str] = []
    for _ in range(5):
        world.all[0].inflight_requests = 0
        world.flow.changed()
        world.timers.run()
        order += world.woken[len(order) :]
        world.flow.routed(world.requests[order[-1]], None)
        world.all[0].inflight_requests = 1
    assert len(order) == 5
    assert [name[0] for name in order[:4]] == ["a", "b", "a", "b"]


def test_least_attained_service_first() -> None:
    policy = ProgramAwareFairness(las_weight_service=1.0, las_weight_head_wait=0.0)
    world = World(1, each=1, bands=(BandSettings(fairness=policy),))
    world.ask("running", fairness_id="rich", prompt_tokens=100)
    for name in ("rich1", "rich2", "poor1", "poor2"):
        world.ask(name, fairness_id=name[:4], prompt_tokens=100)
        world.clock.advance(0.001)
    world.end("running", Usage(prompt_tokens=100, completion_tokens=1_000))
    assert world.run() == ["poor1"]
    world.end("poor1", Usage(prompt_tokens=100, completion_tokens=10))
    assert world.run() == ["poor2"]
    tokens = {name: round(left) for name, left, _ in world.flow.service.of_policies[policy.name].tokens(world.clock.now_s())}
    assert tokens["poor"] == 100 + 20 + 100
    assert tokens["rich"] == 100 + 2_000


def test_waiting_counts_in_program_aware_fairness() -> None:
    policy = ProgramAwareFairness(las_weight_service=0.2, las_weight_head_wait=0.8)
    world = World(1, each=1, bands=(BandSettings(fairness=policy),))
    world.ask("running", fairness_id="rich", prompt_tokens=100)
    world.ask("rich1", fairness_id="rich")
    world.clock.advance(5.0)
    world.ask("poor1", fairness_id="poor")
    world.end("running")
    assert world.run() == ["rich1"]


def test_what_a_tenant_was_served_is_known() -> None:
    world = World(4, each=4)
    for tenant in ("a", "b"):
        world.ask(tenant, fairness_id=tenant, prompt_tokens=50)
        world.end(tenant, Usage(prompt_tokens=60, completion_tokens=40))
    served = {name: round(left) for name, left, _ in world.flow.service.tokens.tokens(world.clock.now_s())}
    assert served == {"a": 100, "b": 100}
    assert world.flow.service.tokens.jain(world.clock.now_s(), 60.0) == pytest.approx(1.0)
    world.ask("more", fairness_id="a", prompt_tokens=300)
    assert world.flow.service.tokens.jain(world.clock.now_s(), 60.0) == pytest.approx(500**2 / (2 * (400**2 + 100**2)))


# ceilings


def test_lower_bands_are_held_back_before_higher_ones() -> None:
    policy = PriorityHoldbackPolicy(min_ceiling=0.5)
    world = World(1, each=10, usage_limit=policy, bands=tuple(BandSettings(priority=p) for p in (1, 0, -1)))
    world.all[0].inflight_requests = 5
    assert world.ask("low", priority=-1) is not None
    assert world.ask("mid", priority=0) is None
    world.all[0].inflight_requests = 8
    world.flow.changed()
    world.run()
    assert world.ask("mid2", priority=0) is not None
    assert world.ask("high", priority=1) is None
    world.all[0].inflight_requests = 4
    world.flow.changed()
    assert world.run() == ["mid2"]
    world.all[0].inflight_requests = 4
    world.flow.changed()
    assert world.run() == ["low"]


def test_a_soft_ceiling_opens_by_time_alone() -> None:
    world = World(1, each=100, usage_limit=SoftReflectiveCeilingPolicy(), bands=(BandSettings(priority=1), BandSettings()))
    world.all[0].inflight_requests = 78
    world.run(0.0003)
    assert world.ask("opened") is None, "the first tick"
    world.run(0.001)
    assert world.ask("a") is not None, "s 0.79: one tick in 4"
    assert world.ask("b") is not None
    assert world.ask("high", priority=1) is None
    woken = [world.clock.now_s() - 1_000.0 for _ in range(40) if world.run(0.0005)]
    assert world.woken == ["a", "b"]
    assert len(woken) == 1, "together"
    assert 0.004 <= woken[0] <= 0.005


# configuration


def test_a_new_configuration_keeps_who_waits() -> None:
    world = World(1, each=1)
    world.ask("running")
    for name, priority, flow in (("a1", 0, "a"), ("a2", 0, "a"), ("b1", 0, "b"), ("low", -3, "a")):
        world.ask(name, priority=priority, fairness_id=flow, body_bytes=10)
    bands = (BandSettings(fairness=RoundRobinFairnessPolicy(), requests_max=1),)
    world.flow.use(Settings(bands=bands, ttl_s=5.0), world.detector)  # type: ignore[arg-type]
    assert (world.flow.requests, world.flow.size_bytes) == (4, 40)
    assert error_of(world, "more").http_status == 429
    assert serve(world, "running", 3) == ["a1", "b1", "a2"]
    assert world.run(5.0) == ["low"]
    assert isinstance(world.waits["low"].error, EppError)
    assert world.flow.requests == 0


def test_a_pump_that_fails_is_tried_again_later_and_loses_nobody() -> None:
    crude = Crude()
    world = World(1, detector=crude)
    world.ask("a")
    world.run()

    def broken(_endpoints: Sequence[Endpoint]) -> float:
        raise ZeroDivisionError

    good = crude.saturation
    crude.saturation = broken  # type: ignore[method-assign]
    world.flow.use(world.flow.settings, crude)
    with pytest.raises(ZeroDivisionError):
        world.timers.run()
    assert world.timers.run() == 0, "not at once"
    crude.saturation = good  # type: ignore[method-assign]
    crude.full = 0.0
    assert world.run(1.0) == ["a"]


def test_what_is_shown() -> None:
    world = World(1, each=1)
    world.ask("running")
    world.ask("r", body_bytes=5)
    state = world.flow.state()
    assert (state["queued"], state["queued_bytes"]) == (1, 5)
    assert state["groups"] == [{"pool": "", "model": "", "endpoints": 1, "queued": 1, "saturation": 1.0}]
    assert [band["queued"] for band in state["bands"]] == [1]


def test_every_outcome_is_one_of_the_reference_picker_s() -> None:
    assert [str(outcome) for outcome in Outcome] == [
        "Dispatched", "RejectedCapacity", "RejectedNoEndpoints", "RejectedOther", "EvictedTTL", "EvictedNoEndpoints",
        "EvictedContextCancelled", "EvictedOther",
    ]  # fmt: skip


# the way in: a session, its director, and this


def test_a_session_s_request_waits_and_is_answered_when_its_turn_comes() -> None:
    world = core(1)
    timers = Timers(world.clock)
    detector = ConcurrencyDetector(max_concurrency=1)
    flow = FlowControl(Settings(), world.director.candidates, world.clock, timers.call_at, detector=detector)
    world.director.stages = (flow,)
    (endpoint,) = world.datastore.endpoints.values()
    endpoint.inflight_requests = 1
    streams, told = [Stream(world.session()) for _ in range(3)], [0, 0, 0]
    for number, stream in enumerate(streams):

        def notify(number: int = number) -> None:
            told[number] += 1

        stream.session.notify = notify
        stream.send(request_headers(), request_body(chat(), end_of_stream=True))
    assert flow.requests == 3
    streams[0].close()
    assert flow.requests == 2
    endpoint.inflight_requests = 0
    flow.changed()
    timers.run()
    assert told == [0, 1, 0]
    assert kinds(streams[1].resume()) == ["request_headers", "request_body"]
    world.clock.advance(60.0)
    timers.run()
    assert told == [0, 1, 1]
    assert kinds(streams[2].resume()) == ["immediate_response"]
    assert streams[2].got[-1].immediate_response.status.code == 429
    assert world.errors("m") == {"ResourceExhausted": 1}
    assert flow.requests == 0


# what keeps queues honest


def test_a_flow_that_asks_one_by_one_does_not_go_before_those_that_wait() -> None:
    world = World(1, each=1, bands=(BandSettings(fairness=RoundRobinFairnessPolicy()),))
    world.ask("running")
    for name in ("a1", "b1", "a2", "b2", "a3"):
        world.ask(name, fairness_id=name[0])
    running, order = "running", []
    for number in range(6):
        if "c" not in world.flow.bands.all[0].flows:
            world.ask(f"c{number}", fairness_id="c")
        world.end(running)
        (running,) = world.run(0.01)
        order.append(running[0])
    assert order == ["a", "b", "c", "a", "b", "c"]


class Inverted:
    """A ceiling for the high that is lower than the one for the low."""

    def ceiling(self, position: int, _priorities: tuple[int, ...], _saturation: float, _now_s: float) -> float:
        return (0.5, 1.0)[position]


def test_a_lower_band_never_goes_before_a_higher_one_that_is_held_back() -> None:
    world = World(1, each=10, usage_limit=Inverted(), bands=(BandSettings(priority=1), BandSettings()))
    world.all[0].inflight_requests = 10
    world.ask("high", priority=1)
    world.ask("low")
    world.all[0].inflight_requests = 7
    world.flow.changed()
    assert world.run() == []
    world.all[0].inflight_requests = 4
    world.flow.changed()
    assert world.run() == ["high", "low"]


def test_a_shorter_time_is_kept_though_a_longer_one_was_in_force_before() -> None:
    world = World(1, each=1, ttl_s=10.0, no_endpoints_ttl_s=100.0)
    world.pool.endpoints = []
    world.ask("r")
    assert world.run(12.0) == []
    world.run(3.0)
    world.all[0].inflight_requests = 1
    world.pool.endpoints = world.all
    world.flow.changed()
    assert world.run() == []
    assert world.run(9.9) == []
    assert world.run(0.2) == ["r"]
    assert world.outcomes() == {"EvictedTTL": 1}


def test_those_that_left_a_lane_others_stay_in_are_swept_out() -> None:
    world = World(1, each=1, ttl_s=0.0, no_endpoints_ttl_s=0.0)
    world.ask("running")
    world.ask("stays")
    for _ in range(2_000):
        wait = world.ask("r")
        assert wait is not None
        wait.cancel()
    assert len(world.waits["stays"].lane._heap) < 200
    world.end("running")
    assert world.run() == ["stays"]


def test_a_flow_whose_urgent_request_left_stands_where_its_next_one_puts_it() -> None:
    """Its head is now one that waits longer: with ten flows ranks are not all worked out anew each time."""
    policy = ProgramAwareFairness(las_weight_service=0.0, las_weight_head_wait=1.0)
    world = World(1, each=1, ttl_s=500.0, bands=(BandSettings(fairness=policy, ordering=EdfOrderingPolicy()),))
    world.ask("running")
    world.ask("oldest", fairness_id="f")
    for number in range(10):
        world.clock.advance(1.0)
        world.ask(f"g{number}", fairness_id=f"g{number}")
    world.clock.advance(1.0)
    urgent = world.ask("urgent", fairness_id="f", headers={"x-llm-d-request-ttl": "100s"})
    world.end("running")
    assert world.run() == ["g0"], "flow f is judged by its urgent head, the newest of all"
    assert urgent is not None
    urgent.cancel()
    world.end("g0")
    assert world.run() == ["oldest"]
    (backlog,) = world.flow.bands.all[0].backlogs.values()
    assert len(backlog._order) <= 11  # type: ignore[attr-defined]
