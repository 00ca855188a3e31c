"""Flow control: how waits end and what they are told who get no further: no endpoints, no room, no time, a client that left, a shutdown."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from epp.admission.refusals import Outcome
from epp.admission.settings import BandSettings
from epp.errors import BadRequestError, ShuttingDownError
from epp.plugins.flow_control.policies import (
    RoundRobinFairnessPolicy,
)
from tests.flow_world import World, error_of, told

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


# all of them


def test_every_outcome_is_one_of_the_reference_picker_s() -> None:
    assert [str(outcome) for outcome in Outcome] == [
        "Dispatched", "RejectedCapacity", "RejectedNoEndpoints", "RejectedOther", "EvictedTTL", "EvictedNoEndpoints",
        "EvictedContextCancelled", "EvictedOther",
    ]  # fmt: skip
