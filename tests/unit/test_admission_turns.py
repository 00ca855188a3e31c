"""Flow control: whose turn it is: priorities, orders, flows, ceilings, and all of it over a change of configuration."""

from __future__ import annotations

from math import inf
from typing import Any

import pytest

from epp.admission.settings import BandSettings, Settings
from epp.errors import EppError
from epp.plugins.flow_control.policies import (
    EdfOrderingPolicy,
    PriorityHoldbackPolicy,
    ProgramAwareFairness,
    RoundRobinFairnessPolicy,
    SloDeadlineOrderingPolicy,
    SoftReflectiveCeilingPolicy,
)
from epp.types import LLMRequest, Usage
from tests.flow_world import World, error_of

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


class Odd:
    """A third party's ordering policy."""

    def order(self, request: LLMRequest, _received_s: float, _queued_s: float, _ttl_s: float) -> float:
        if request.id == "broken":
            raise KeyError(request.id)
        return float(request.id)


@pytest.mark.parametrize(("name", "order"), [("5", 5.0), ("nan", inf), ("broken", 2.0)])
def test_an_ordering_policy_that_fails_or_gives_no_number_is_made_up_for(name: str, order: float) -> None:
    band = World(bands=(BandSettings(ordering=Odd()),)).flow.bands.of(0, 1_000.0)
    assert band.order(LLMRequest(id=name, path="/", headers={}), 1.0, 2.0, 3.0) == order


def test_nobody_is_lost_by_one_that_fails_now_or_in_a_new_configuration() -> None:
    world = World(1, each=1, ttl_s=60.0)
    for name in ("5", "broken", "3"):
        world.ask(name)
    world.flow.use(Settings(ttl_s=60.0, bands=(BandSettings(ordering=Odd()),)), world.detector)
    assert world.ask("1") is not None
    served = []
    world.end("5")
    for _ in range(3):
        served += world.run()
        world.end(served[-1])
    assert sorted(served) == ["1", "3", "broken"]


def test_a_configuration_that_can_t_be_used_changes_nothing() -> None:
    world = World(1, each=1, ttl_s=60.0)
    world.ask("running")
    world.ask("waits")
    with pytest.raises(ValueError, match="fairness"):
        world.flow.use(Settings(ttl_s=1.0, default_band=BandSettings(fairness=EdfOrderingPolicy())), world.detector)
    world.run(2.0)
    assert world.flow.requests == 1, "the old time counts"
    world.end("running")
    assert world.run() == ["waits"]


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
