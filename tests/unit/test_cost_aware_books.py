"""cost-aware-scorer's books: what it keeps of endpoints and adapters that are gone, and of prompts nobody tells about."""

from __future__ import annotations

import pytest

from epp.clock import VirtualClock
from epp.datastore import Datastore, Reading
from epp.plugins import cost_history, cost_lanes
from epp.plugins.base import Context, Finished
from epp.plugins.cost_lanes import Lanes
from epp.plugins.scorers.cost_aware import CostAwareScorer
from epp.types import Address, Decision, Endpoint, EndpointSpec, LLMRequest, PrefixMatch
from tests.builders import PATH


class World:
    """A pool, its clock and one scorer, without a director."""

    def __init__(self, count: int) -> None:
        self.clock = VirtualClock(1_000.0)
        self.datastore = Datastore(self.clock)
        self.scorer = CostAwareScorer()
        self.scorer.bind(Context(self.clock, None, {}))  # type: ignore[arg-type]
        self.datastore.subscribe(removed=self.scorer.removed)
        self.apply(range(count))

    def apply(self, numbers: range) -> None:
        self.datastore.apply([EndpointSpec(f"pod-{number}", Address(f"10.0.{number >> 8}.{number & 255}", 8000)) for number in numbers])

    @property
    def lanes(self) -> Lanes:
        found: Lanes = self.scorer.__dict__["lanes"]
        return found

    def endpoints(self) -> tuple[Endpoint, ...]:
        return self.datastore.ready.endpoints

    def pick(self, endpoint: Endpoint, tokens: int, *, stream: bool = True, prefill: Endpoint | None = None) -> LLMRequest:
        request = LLMRequest(id="r", path=PATH, headers={})
        request.prompt_tokens, request.stream = tokens, stream
        self.scorer.picked(request, Decision(endpoint, (), "default", {"prefill": prefill} if prefill else {}))
        return request

    def waits_s(self) -> list[float]:
        request = LLMRequest(id="r", path=PATH, headers={})
        request.prompt_tokens = 1
        return [(1 / score - 1) / (1 + self.scorer.doubt) for score in self.scorer.score(request, self.endpoints())]

    def name(self, endpoint: Endpoint, *adapters: str) -> None:
        self.clock.advance(0.01)
        reading = Reading(adapters_active=frozenset(adapters), adapters_waiting=frozenset(), adapters_max=4)
        self.datastore.record_reading(endpoint, reading, sent_requests=0, sent_tokens=0)
        self.waits_s()


def test_names_of_adapters_go_with_the_last_endpoint_that_had_them() -> None:
    world = World(3)
    one, two, _ = world.endpoints()
    world.name(one, "red", "green")
    world.name(two, "green", "blue")
    assert world.lanes.adapters == {"red", "green", "blue"}
    world.apply(range(1, 3))
    assert world.lanes.adapters == {"green", "blue"}


def test_names_of_adapters_are_bounded_over_endpoints_that_come_and_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost_lanes, "ADAPTERS_MAX", 20)
    world = World(1)
    for number in range(1, 100):
        world.name(world.endpoints()[0], *(f"adapter-{number}-{i}" for i in range(5)))
        world.apply(range(number, number + 1))
    assert len(world.lanes.adapters) <= 5
    crowd = World(50)
    for number, endpoint in enumerate(crowd.endpoints()):
        crowd.name(endpoint, *(f"adapter-{number}-{i}" for i in range(5)))
    assert 20 <= len(crowd.lanes.adapters) < 25, "what is there when the limit is reached, and the last reading whole"


def test_each_silent_prompt_is_through_in_its_own_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost_history, "PRICE", 0.0)
    world = World(3)
    for endpoint, tokens in zip(world.endpoints(), (10_000, 20_000, 30_000), strict=True):  # 1, 2 and 3 s
        world.pick(endpoint, tokens, stream=False)
    assert world.waits_s() == pytest.approx([1.0, 2.0, 3.0], abs=0.01)
    world.clock.advance(1.5)
    assert world.waits_s() == pytest.approx([0.0, 0.5, 1.5], abs=0.01)
    assert [len(world.lanes.by_slot[e.slot].queue) for e in world.endpoints()] == [0, 1, 1]
    world.pick(world.endpoints()[0], 5_000, stream=False)
    world.clock.advance(0.6)
    assert world.waits_s() == pytest.approx([0.0, 0.0, 0.9], abs=0.11)
    world.clock.advance(5.0)
    assert world.waits_s() == pytest.approx([0.0, 0.0, 0.0], abs=0.01)
    assert all(not lane.queue for lane in world.lanes.by_slot.values())


def test_silent_prompts_behind_one_another_follow_at_once() -> None:
    world = World(1)
    (endpoint,) = world.endpoints()
    for _ in range(3):
        world.pick(endpoint, 10_000, stream=False)
        world.waits_s()
    for left_s in (2.5, 1.5, 0.5):
        world.clock.advance(0.5 if left_s == 2.5 else 1.0)
        assert world.waits_s() == pytest.approx([left_s], abs=0.01)


def test_one_stall_makes_no_endpoint_slow_for_good() -> None:
    world = World(2)
    one, two = world.endpoints()
    for endpoint, took_s in ((one, 600.0), (two, 0.1)):
        request = world.pick(endpoint, 1_000)
        world.clock.advance(took_s)
        world.scorer.first_token(request, endpoint, took_s)
    stalled, other = (world.lanes.by_slot[endpoint.slot] for endpoint in (one, two))
    assert stalled.slowness == other.slowness == 1.0
    for _ in range(200):  # what goes on is no accident
        for endpoint, took_s in ((one, 0.5), (two, 0.1)):
            request = world.pick(endpoint, 1_000)
            world.clock.advance(took_s)
            world.scorer.first_token(request, endpoint, took_s)
    assert stalled.slowness > 1.3 > other.slowness


def test_a_decode_worker_the_gateway_took_in_place_of_ours_gets_the_prompt_cached_too() -> None:
    world = World(3)
    decode, prefill, other = world.endpoints()
    request = world.pick(decode, 10_000, prefill=prefill)
    world.scorer.served(request, other)
    tokens = {slot: lane.queued_tokens for slot, lane in world.lanes.by_slot.items()}
    assert tokens == {decode.slot: 0, prefill.slot: 10_000, other.slot: 1}
    alone = world.pick(decode, 10_000)
    world.scorer.served(alone, other)
    assert world.lanes.by_slot[other.slot].queued_tokens == 10_001, "without a prefill worker it computes all of it"
    for each in (request, alone):
        world.scorer.finished(each, other, Finished(200, 1.0, 2.0, None, 0))
    assert all((lane.requests, len(lane.queue), lane.context) == (0, 0, 0) for lane in world.lanes.by_slot.values())


def test_a_prompt_of_unknown_length_is_waited_for() -> None:
    """No tokens at all: what it takes if it was not cached is less than what it should take."""
    world = World(1)
    (endpoint,) = world.endpoints()
    world.pick(endpoint, 0)
    (work,) = world.lanes.by_slot[endpoint.slot].queue
    assert work.miss_s < work.seconds
    # the wait with its doubt, then one token of 100 us at an endpoint where one waits
    assert world.waits_s()[0] * 1.3 == pytest.approx(1.3 * work.seconds + 1e-4 * (1 + 0.25))


def test_what_endpoints_have_cached_that_are_no_candidates_is_no_matter() -> None:
    """A filter left them out, perhaps since before the scorer ever saw them."""
    world = World(200)
    endpoints = world.endpoints()
    request = LLMRequest(id="r", path=PATH, headers={})
    request.prompt_tokens = 1_000
    cached = {endpoint.slot: 600 for endpoint in endpoints[90:]}
    for chosen in (endpoints[:100], endpoints[50:150:2] + endpoints[:40]):
        request.prefix = PrefixMatch([1], [1_000], 1_000, cached)
        expected = [1 / (1 + (400 if endpoint.slot in cached else 1_000) * 1e-4) for endpoint in chosen]
        assert world.scorer.score(request, chosen) == pytest.approx(expected)
