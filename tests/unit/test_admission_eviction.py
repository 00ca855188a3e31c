"""Running requests that give way: who, how many, and when again."""

from __future__ import annotations

import pytest

from epp.admission.eviction import CONFIRM_S, GRACE_LEADING_S, GRACE_S
from epp.admission.refusals import EvictedError
from epp.admission.settings import BandSettings
from epp.plugins.detectors.utilization import UtilizationDetector
from epp.plugins.flow_control.policies import StaticUsageLimitPolicy
from tests.flow_world import World

BANDS = tuple(BandSettings(priority=priority) for priority in (5, 0, -1, -2))


def busy(*, each: int = 4, **more: object) -> World:
    """Full: two sheddable ones of each kind of priority, the rest normal."""
    world = World(1, each=each, eviction=True, bands=BANDS, **more)
    for name, priority in (("normal", 0), ("low-old", -1), ("lower", -2), ("low-new", -1)):
        assert world.ask(name, priority=priority) is None
        world.clock.advance(1.0)
    return world


def evicted(world: World) -> list[str]:
    return [request.id for request in world.evicted]


def test_nobody_gives_way_unless_asked_to() -> None:
    world = World(1, each=1, bands=BANDS)
    world.ask("low", priority=-1)
    world.ask("high", priority=5)
    world.run()
    assert world.flow.evictor is None
    assert evicted(world) == []


def test_the_lowest_priority_gives_way_first_then_the_newest() -> None:
    world = busy()
    world.ask("high", priority=5)
    world.run()
    assert evicted(world) == ["lower"], "exactly at the ceiling: one"
    assert world.run(1.0) == []
    assert evicted(world) == ["lower"], "stop and wait"
    world.end("lower")
    assert world.run() == ["high"]
    assert world.flow.evictor is not None
    assert world.flow.evictor.confirmed == 1
    assert world.flow.evictor.issued == {(5, "default"): 1}
    world.ask("high2", priority=5)
    world.run(GRACE_LEADING_S / 2)
    assert evicted(world) == ["lower"], "the detector has not had its time"
    world.run(GRACE_LEADING_S)
    world.run()
    assert evicted(world) == ["lower", "low-new"]


def test_at_most_two_at_a_time() -> None:
    world = busy()
    world.all[0].inflight_requests = 12
    world.ask("high", priority=5)
    world.run()
    assert evicted(world) == ["lower", "low-new"]


def test_of_those_sent_at_the_same_time_the_last_gives_way() -> None:
    world = World(1, each=2, eviction=True, bands=BANDS)
    world.ask("first", priority=-1)
    world.ask("second", priority=-1)
    world.ask("high", priority=5)
    world.run()
    assert evicted(world) == ["second"]


def test_only_a_higher_priority_makes_room() -> None:
    world = busy()
    world.ask("same", priority=-1)
    world.run()
    assert evicted(world) == ["lower"], "-2 for -1"
    other = World(1, each=1, eviction=True, bands=BANDS)
    other.ask("low", priority=-1)
    other.ask("also low", priority=-1)
    other.run()
    assert evicted(other) == []


def test_normal_requests_never_give_way() -> None:
    world = World(1, each=1, eviction=True, bands=BANDS)
    world.ask("normal", priority=0)
    world.ask("high", priority=5)
    world.run()
    assert evicted(world) == []


def test_requests_elsewhere_are_left_alone() -> None:
    world = World(2, each=1, eviction=True, bands=BANDS)
    world.ask("elsewhere", priority=-2, subset=("pod-1",))
    world.all[1].inflight_requests = 1
    assert world.where["elsewhere"] is world.all[0]
    world.ask("high", priority=5, subset=("pod-2",))
    world.run()
    assert evicted(world) == []


def test_one_that_does_not_end_is_given_up() -> None:
    world = busy()
    world.ask("high", priority=5)
    world.run()
    evictor = world.flow.evictor
    assert evictor is not None
    assert evictor.pending == pytest.approx(0.25)
    world.run(CONFIRM_S - 0.5)
    assert evicted(world) == ["lower"]
    for _ in range(4):
        world.run(0.5)
    assert evicted(world) == ["lower", "low-new"]
    assert (evictor.timed_out, evictor.confirmed) == (1, 0)
    world.end("lower")
    assert (evictor.timed_out, evictor.confirmed) == (1, 0), "one outcome each"


def test_metrics_take_longer_to_tell_than_our_own_count() -> None:
    assert busy().flow.evictor.grace_s == GRACE_LEADING_S  # type: ignore[union-attr]
    world = busy()
    detector = UtilizationDetector()
    detector.__dict__["_clock"] = world.clock
    world.flow.use(world.flow.settings, detector)
    assert world.flow.evictor.grace_s == GRACE_S  # type: ignore[union-attr]


def test_what_ended_is_not_kept() -> None:
    world = World(1, each=10_000, eviction=True, bands=BANDS)
    for number in range(2_000):
        world.ask(f"r{number}", priority=-1)
        world.end(f"r{number}")
    assert world.flow.evictor is not None
    assert len(world.flow.evictor) == 0
    assert len(world.flow.evictor._heap) < 200


def test_what_it_is_told() -> None:
    error = EvictedError()
    assert (error.http_status, error.dropped_reason, error.message) == (429, "evicted", "request evicted by flow control")


def test_what_one_request_frees_is_its_share_of_where_it_runs() -> None:
    world = World(2, each=4, eviction=True, bands=BANDS, usage_limit=StaticUsageLimitPolicy(threshold=0.8))
    for number in range(7):
        assert world.ask(str(number), priority=-1) is None
    assert [e.inflight_requests for e in world.all] == [4, 3]
    assert world.ask("urgent", priority=5, subset=(world.all[0].name,)) is not None
    world.run()
    assert len(world.evicted) == 1, "a quarter of that endpoint, where a fifth is too much; not a seventh"
