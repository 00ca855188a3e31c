"""When a wait ends: over a change of configuration, with endpoints that go, and what it costs those that go on waiting."""

from __future__ import annotations

import pytest

from epp.admission.deadlines import LOOKS_MAX
from epp.admission.settings import BandSettings
from tests.flow_world import World


def turns(world: World, seconds: int) -> int:
    """Timers that went off while nothing happened."""
    gone_off = 0
    for _ in range(10 * seconds):
        world.clock.advance(0.1)
        gone_off += world.timers.run()
    return gone_off


def test_a_new_configuration_gives_nobody_more_time() -> None:
    world = World(1, each=1, ttl_s=60.0)
    world.ask("running")
    world.ask("r")
    for _ in range(2):
        assert world.run(29.0) == []
        world.flow.use(world.flow.settings, world.detector)
    assert world.run(2.1) == ["r"]
    assert world.outcomes() == {"Dispatched": 1, "EvictedTTL": 1}


def test_a_shorter_time_by_a_new_configuration_counts_from_when_they_came() -> None:
    world = World(1, each=1, ttl_s=60.0)
    world.ask("running")
    world.ask("r")
    world.run(20.0)
    world.flow.use(type(world.flow.settings)(ttl_s=15.0), world.detector)
    assert world.run() == ["r"]


def test_a_short_time_without_endpoints_costs_those_that_wait_for_busy_ones_nothing() -> None:
    world = World(1, each=1, ttl_s=600.0, no_endpoints_ttl_s=0.2, bands=(BandSettings(requests_max=0),))
    world.ask("running")
    for number in range(1_000):
        world.ask(f"r{number}")
    turns(world, 1)
    assert turns(world, 30) == 0
    assert world.flow.requests == 1_000


def test_it_counts_at_once_when_they_go_though_and_for_each_in_turn() -> None:
    world = World(1, each=1, ttl_s=600.0, no_endpoints_ttl_s=2.0)
    world.ask("running")
    world.ask("a")
    world.ask("b")
    world.run(100.0)
    world.pool.endpoints = []
    world.flow.changed()
    assert world.run() == []
    world.run(1.0)
    world.ask("late")
    assert world.run(0.9) == []
    assert world.run(0.2) == ["a", "b"]
    assert world.run(0.8) == []
    assert world.run(0.2) == ["late"]
    assert world.outcomes() == {"Dispatched": 1, "EvictedNoEndpoints": 3}


def test_who_is_out_of_time_in_two_ways_is_told_once() -> None:
    world = World(1, ttl_s=600.0, no_endpoints_ttl_s=5.0)
    world.pool.endpoints = []
    world.ask("r", headers={"x-llm-d-request-ttl": "5s"})
    assert world.run(5.0) == ["r"]
    assert world.run(60.0) == []
    assert sum(world.outcomes().values()) == 1


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


@pytest.mark.parametrize("empty", [False, True])
def test_many_at_once_leave_the_loop_to_others_in_between(*, empty: bool) -> None:
    world = World(1, each=1, ttl_s=10.0, no_endpoints_ttl_s=10.0)
    if empty:
        world.pool.endpoints = []
    else:
        world.ask("running")
    for number in range(LOOKS_MAX + 10):
        world.ask(f"r{number}")
    world.run(1.0)
    world.clock.advance(10.0)
    at_a_time = [len(world.run()) for _ in range(5)]
    assert max(at_a_time) <= LOOKS_MAX
    assert sum(at_a_time) == LOOKS_MAX + 10


def test_without_an_end_for_those_that_wait_for_endpoints() -> None:
    world = World(1, each=1, ttl_s=10.0, no_endpoints_ttl_s=0.0)
    world.pool.endpoints = []
    world.ask("r")
    assert world.run(100.0) == []
    world.all[0].inflight_requests = 1
    world.pool.endpoints = list(world.all)
    world.flow.changed()
    assert world.run() == []
    assert world.run(9.9) == []
    assert world.run(0.2) == ["r"], "all its time from when they came back"


def test_who_left_is_not_kept_in_line() -> None:
    world = World(2, each=1)
    for endpoint in world.all:
        endpoint.inflight_requests = 1
    world.ask("stays")
    for number in range(3_000):
        wait = world.ask("r", subset=(f"pod-{number % 2 + 1}",))
        assert wait is not None
        wait.cancel()
    assert len(world.flow._deadlines) < 200
    assert len(world.flow._deadlines._lines) <= 3
