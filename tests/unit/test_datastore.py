"""The pool: what comes, stays and goes; who is ready; readings; and a request's charge, given back exactly once."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from epp.clock import VirtualClock
from epp.datastore import Datastore, Reading, Ticket
from epp.types import Endpoint
from tests.builders import spec


def datastore(count: int = 0, **how: int) -> Datastore:
    made = Datastore(VirtualClock(1000.0), **how)  # type: ignore[arg-type]
    made.apply([spec(number + 1) for number in range(count)])
    return made


def names(endpoints: object) -> list[str]:
    return [endpoint.name for endpoint in endpoints]  # type: ignore[attr-defined]


# Membership


def test_apply_makes_the_pool_exactly_the_specs_and_tells_who_came_and_went() -> None:
    pool = datastore()
    came: list[str] = []
    went: list[str] = []
    pool.subscribe(added=lambda e: came.append(e.name), removed=lambda e: went.append(e.name))
    pool.apply([spec(1), spec(2)])
    pool.apply([spec(2), spec(3)])
    assert (came, went) == (["pod-1", "pod-2", "pod-3"], ["pod-1"])
    assert names(pool.endpoints.values()) == ["pod-2", "pod-3"]
    assert sorted(pool.by_destination) == ["10.0.0.2:8000", "10.0.0.3:8000"]
    assert names(pool.ready.endpoints) == ["pod-2", "pod-3"]


def test_a_subscriber_is_told_of_those_already_there() -> None:
    pool = datastore(2)
    came: list[str] = []
    pool.subscribe(added=lambda e: came.append(e.name))
    assert came == ["pod-1", "pod-2"]


def test_a_subscription_can_be_undone_also_while_subscribers_are_told() -> None:
    pool = datastore()
    told: list[str] = []
    undone: list[Callable[[], None]] = []

    def first(endpoint: Endpoint) -> None:
        told.append(f"first {endpoint.name}")
        undone[0]()

    undone.append(pool.subscribe(added=first, removed=first))
    pool.subscribe(added=lambda e: told.append(f"second {e.name}"))
    pool.apply([spec(1)])
    pool.apply([spec(2)])
    assert told == ["first pod-1", "second pod-1", "second pod-2"]
    undone[0]()
    assert (len(pool._added), len(pool._removed)) == (1, 0)


def test_subscribers_see_the_pool_as_it_is_after_the_change() -> None:
    pool = datastore(2)
    seen: list[list[str]] = []
    pool.subscribe(removed=lambda _: seen.append(names(pool.ready.endpoints)))
    pool.apply([spec(2)])
    assert seen == [["pod-2"]]


def test_an_endpoint_that_stays_keeps_its_load_and_slot_though_it_is_relabelled() -> None:
    pool = datastore(2)
    first = next(iter(pool.endpoints.values()))
    first.waiting = 7.0
    ticket = Ticket(first, 10)
    pool.apply([spec(2), spec(1)._replace(labels={"a": "b"})])
    (same,) = [e for e in pool.endpoints.values() if e.name == "pod-1"]
    assert same is first
    assert (same.waiting, same.inflight_requests, same.slot, same.labels) == (7.0, 1, 0, {"a": "b"})
    ticket.release()


def test_an_address_given_to_another_pod_is_another_endpoint() -> None:
    pool = datastore(2)
    first = next(iter(pool.endpoints.values()))
    first.waiting = 7.0
    gone: list[str] = []
    pool.subscribe(removed=lambda endpoint: gone.append(endpoint.name))
    pool.apply([spec(2), spec(1)._replace(name="successor")])
    (successor,) = [e for e in pool.endpoints.values() if e.name == "successor"]
    assert gone == ["pod-1"]
    assert successor is not first
    assert (successor.waiting, pool.by_destination[successor.destination]) == (0.0, successor)


def test_a_draining_endpoint_gets_nothing_even_if_nobody_else_is_there() -> None:
    pool = datastore(2)
    pool.apply([spec(1)._replace(draining=True), spec(2)])
    assert names(pool.ready.endpoints) == ["pod-2"]
    pool.apply([spec(1)._replace(draining=True)])
    assert names(pool.ready.endpoints) == []
    pool.apply([spec(1)])
    assert names(pool.ready.endpoints) == ["pod-1"]


def test_an_endpoint_that_returns_is_a_new_one() -> None:
    pool = datastore(1)
    (before,) = pool.endpoints.values()
    ticket = Ticket(before, 10)
    pool.apply([])
    pool.apply([spec(1)])
    (after,) = pool.endpoints.values()
    assert after is not before
    ticket.release()
    assert (after.inflight_requests, after.inflight_tokens) == (0, 0)


def test_too_many_endpoints_change_nothing() -> None:
    pool = datastore(2, endpoints_max=2)
    before = pool.ready
    with pytest.raises(ValueError, match="3 endpoints, the limit is 2"):
        pool.apply([spec(1), spec(2), spec(3)])
    assert pool.ready is before
    assert names(pool.endpoints.values()) == ["pod-1", "pod-2"]


@settings(deadline=None, max_examples=100)
@given(st.lists(st.sets(st.integers(1, 8), max_size=8), max_size=12), st.lists(st.booleans(), min_size=12, max_size=12))
def test_slots_are_unique_among_the_living_and_reused_only_once_freed(generations: list[set[int]], frees: list[bool]) -> None:
    pool = datastore()
    waiting: list[int] = []
    pool.subscribe(removed=lambda e: waiting.append(e.slot))
    for wanted, free in zip(generations, frees, strict=False):
        pool.apply([spec(number) for number in sorted(wanted)])
        slots = [e.slot for e in pool.endpoints.values()]
        assert len(set(slots)) == len(slots)
        assert not set(slots) & set(waiting), "a slot that still has traces was given away"
        assert pool.ready.mask == sum(1 << slot for slot in slots)
        if free:
            for slot in waiting:
                pool.free_slot(slot)
            waiting.clear()
    assert pool._slots_made <= 8 * 13


def test_freed_slots_are_taken_lowest_first() -> None:
    pool = datastore(4)
    pool.apply([spec(4)])
    for slot in (2, 0, 1):
        pool.free_slot(slot)
    pool.apply([spec(4), spec(5), spec(6)])
    assert [e.slot for e in pool.endpoints.values()] == [3, 0, 1]


# Health


def test_the_ready_are_the_healthy_and_everyone_when_nobody_is() -> None:
    pool = datastore(3)
    first, second, third = pool.endpoints.values()
    pool.set_healthy(second, healthy=False)
    assert pool.ready.endpoints == (first, third)
    pool.set_healthy(first, healthy=False)
    pool.set_healthy(third, healthy=False)
    assert pool.ready.endpoints == (first, second, third)
    pool.set_healthy(second, healthy=True)
    assert pool.ready.endpoints == (second,)
    assert pool.ready.mask == 1 << second.slot


def test_a_snapshot_in_hand_does_not_change() -> None:
    pool = datastore(2)
    before = pool.ready
    pool.apply([spec(1)])
    assert names(before.endpoints) == ["pod-1", "pod-2"]
    assert before.mask == 0b11


def test_health_that_does_not_change_rebuilds_nothing() -> None:
    pool = datastore(2)
    before = pool.ready
    pool.set_healthy(next(iter(pool.endpoints.values())), healthy=True)
    assert pool.ready is before


# Readings


def read(pool: Datastore, endpoint: Endpoint, reading: Reading, requests: int = 0, tokens: int = 0) -> None:
    pool.record_reading(endpoint, reading, sent_requests=requests, sent_tokens=tokens)


def test_a_reading_replaces_what_it_tells_and_nothing_else() -> None:
    pool = datastore(1)
    (endpoint,) = pool.endpoints.values()
    read(pool, endpoint, Reading(waiting=1.0, running=2.0, kv_usage=0.5, kv_block_tokens=16, kv_blocks=100))
    read(pool, endpoint, Reading(running=3.0))
    assert (endpoint.waiting, endpoint.running, endpoint.kv_usage, endpoint.kv_capacity_tokens) == (1.0, 3.0, 0.5, 1600)
    read(pool, endpoint, Reading(waiting=0.0, kv_blocks=200))
    assert (endpoint.waiting, endpoint.kv_capacity_tokens) == (0.0, 1600)


def test_what_was_sent_before_the_scrape_was_asked_is_in_it_what_came_after_is_not() -> None:
    pool = datastore(1)
    (endpoint,) = pool.endpoints.values()
    Ticket(endpoint, 100)
    Ticket(endpoint, 50)
    asked_at = (endpoint.sent_requests, endpoint.sent_tokens)
    Ticket(endpoint, 7)
    read(pool, endpoint, Reading(running=2.0), *asked_at)
    assert (endpoint.sent_requests, endpoint.sent_tokens) == (1, 7)
    assert endpoint.running_estimate == 3.0
    read(pool, endpoint, Reading(running=3.0), 9, 9_999)
    assert (endpoint.sent_requests, endpoint.sent_tokens) == (0, 0)


def test_a_reading_heals_and_is_dated() -> None:
    clock = VirtualClock(50.0)
    pool = Datastore(clock)
    pool.apply([spec(1), spec(2)])
    first, second = pool.endpoints.values()
    assert pool.staleness_s(first) == float("inf")
    pool.set_healthy(first, healthy=False)
    first.scrape_failures = 4
    read(pool, first, Reading(waiting=0.0))
    assert pool.ready.endpoints == (first, second)
    assert first.scrape_failures == 0
    clock.advance(3.0)
    assert pool.staleness_s(first) == 3.0


# Tickets


def test_a_ticket_charges_its_endpoint_until_it_is_released() -> None:
    pool = datastore(1)
    (endpoint,) = pool.endpoints.values()
    ticket = Ticket(endpoint, 100)
    assert (endpoint.inflight_requests, endpoint.inflight_tokens, endpoint.sent_requests, endpoint.sent_tokens) == (1, 100, 1, 100)
    ticket.first_token()
    assert (endpoint.inflight_requests, endpoint.inflight_tokens) == (1, 0)
    ticket.release()
    ticket.release()
    ticket.first_token()
    assert (endpoint.inflight_requests, endpoint.inflight_tokens) == (0, 0)
    assert (endpoint.sent_requests, endpoint.picks_total) == (1, 1)


def test_a_released_ticket_does_not_move() -> None:
    pool = datastore(2)
    first, second = pool.endpoints.values()
    ticket = Ticket(first, 100)
    ticket.release()
    ticket.move(second)
    assert [(e.inflight_requests, e.inflight_tokens) for e in (first, second)] == [(0, 0), (0, 0)]


STEPS = st.lists(
    st.tuples(st.sampled_from(["charge", "first_token", "release", "move"]), st.integers(0, 5), st.integers(0, 2)), max_size=40
)


@settings(deadline=None, max_examples=200)
@given(STEPS)
def test_charges_are_the_sum_of_open_tickets_and_every_change_is_told(steps: list[tuple[str, int, int]]) -> None:
    pool = datastore(3)
    endpoints = list(pool.endpoints.values())
    tickets: list[Ticket] = []
    expected: dict[int, tuple[int, int]] = {}  # ticket -> endpoint, tokens
    count = pool.changes.count
    for action, which, where in steps:
        before = [(e.inflight_requests, e.inflight_tokens) for e in endpoints]
        number = which % len(tickets) if tickets else 0
        if action == "charge":
            tickets.append(Ticket(endpoints[where], 10 * (which + 1)))
            expected[len(tickets) - 1] = (where, 10 * (which + 1))
        elif tickets and action == "first_token":
            tickets[number].first_token()
            if number in expected:
                expected[number] = (expected[number][0], 0)
        elif tickets and action == "release":
            tickets[number].release()
            expected.pop(number, None)
        elif tickets:
            tickets[number].move(endpoints[where])
            if number in expected:
                expected[number] = (where, expected[number][1])
        after = [(e.inflight_requests, e.inflight_tokens) for e in endpoints]
        for at in range(3):
            mine = [tokens for endpoint, tokens in expected.values() if endpoint == at]
            assert after[at] == (len(mine), sum(mine))
        changed = {endpoints[at].slot for at in range(3) if before[at] != after[at]}
        assert changed <= set(pool.changes.since(count) or ())
        count = pool.changes.count
    for ticket in tickets:
        ticket.release()
    assert [(e.inflight_requests, e.inflight_tokens) for e in endpoints] == [(0, 0)] * 3


def test_a_reading_fades_into_our_own_count_while_the_engine_is_silent() -> None:
    clock = VirtualClock(1000.0)
    pool = Datastore(clock)
    pool.apply([spec(1)])
    (endpoint,) = pool.endpoints.values()
    pool.record_reading(endpoint, Reading(waiting=8.0, running=4.0, kv_usage=0.8), sent_requests=0, sent_tokens=0)
    tickets = [Ticket(endpoint, 10), Ticket(endpoint, 10)]
    for age_s, trusted in ((1.0, 1.0), (2.0, 1.0), (6.0, 0.5), (10.0, 0.0), (100.0, 0.0)):
        clock.advance(1000.0 + age_s - clock.now_s())
        seen = pool.changes.count
        before = endpoint.trusted
        pool.record_silence(endpoint)
        assert endpoint.trusted == trusted
        assert (pool.changes.count > seen) is (trusted != before), "scores are computed anew only when it changed"
        # 8 waiting and 2 sent since, against 2 in flight; all of those count as waiting once nothing else is known
        assert endpoint.waiting_estimate == pytest.approx(10 * trusted + 2 * (1 - trusted))
        assert endpoint.running_estimate == pytest.approx(4 * trusted + 2 * (1 - trusted))
    for ticket in tickets:
        ticket.release()
    assert (endpoint.waiting_estimate, endpoint.running_estimate) == (0.0, 0.0), "a queue of long ago repels nobody"
    pool.record_reading(endpoint, Reading(waiting=1.0), sent_requests=9, sent_tokens=0)
    assert (endpoint.trusted, endpoint.waiting_estimate) == (1.0, 1.0)


def test_who_waits_for_room_is_told_of_silence_and_of_answers_without_metrics() -> None:
    pool = Datastore(VirtualClock(1000.0))
    pool.apply([spec(1)])
    (endpoint,) = pool.endpoints.values()
    told = []
    pool.noticed = lambda: told.append(endpoint.trusted)
    pool.record_silence(endpoint)
    pool.record_answer(endpoint)
    pool.record_answer(endpoint)
    assert len(told) >= 3, "a wait that time alone shortens is looked at again"
