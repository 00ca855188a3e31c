"""Flow control: who passes and who waits, judged over the candidates each request has, and what a pump costs."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from epp.admission.control import DISPATCHES_MAX, FlowControl
from epp.admission.saturation import GROUPS_MAX, UNCHARGED_MAX_S
from epp.admission.settings import Settings
from epp.plugins.detectors.concurrency import ConcurrencyDetector
from epp.types import Endpoint
from tests.builders import Stream, chat, core, kinds, request_body, request_headers
from tests.flow_world import Timers, World


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


# faults, and what people see of it


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
