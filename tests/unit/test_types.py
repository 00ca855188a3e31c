"""Addresses, snapshots, decisions, and what an endpoint's load is estimated to be between two scrapes."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from epp.types import Address, Changes, Decision, Snapshot
from tests.builders import pool_of


@pytest.mark.parametrize(
    ("text", "host", "port", "written"),
    [
        ("10.0.0.1:8000", "10.0.0.1", 8000, "10.0.0.1:8000"),
        (" 10.0.0.1:1 ", "10.0.0.1", 1, "10.0.0.1:1"),
        ("10.0.0.1:65535", "10.0.0.1", 65535, "10.0.0.1:65535"),
        ("[::1]:80", "::1", 80, "[::1]:80"),
        ("[2001:DB8:0:0::1]:8000", "2001:db8::1", 8000, "[2001:db8::1]:8000"),
    ],
)
def test_an_address_as_written_and_as_the_destination_header_wants_it(text: str, host: str, port: int, written: str) -> None:
    address = Address.parse(text)
    assert address == (host, port)
    assert str(address) == written
    assert Address.parse(written) == address


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "not HOST:PORT"),
        ("10.0.0.1", "not HOST:PORT"),
        ("::1", "in brackets"),
        ("2001:db8::1:8000", "in brackets"),
        ("localhost:80", "not an IP address"),
        ("10.0.0:80", "not an IP address"),
        ("010.0.0.1:80", "not an IP address"),
        (":80", "not an IP address"),
        ("[]:80", "not an IP address"),
        ("http://10.0.0.1:80", "in brackets"),
        ("10.0.0.1:0", "1 to 65535"),
        ("10.0.0.1:65536", "1 to 65535"),
        ("10.0.0.1:", "1 to 65535"),
        ("10.0.0.1:-1", "1 to 65535"),
        ("10.0.0.1:+1", "1 to 65535"),
        ("10.0.0.1:٨", "1 to 65535"),
        ("10.0.0.1: 8", "1 to 65535"),
    ],
)
def test_what_is_no_address_is_said_so(text: str, fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        Address.parse(text)


@settings(deadline=None, max_examples=300)
@given(st.text(max_size=30) | st.from_regex(r"\[?[0-9a-f.:]{1,20}\]?:[0-9]{1,7}", fullmatch=True))
def test_any_text_is_an_address_or_a_value_error(text: str) -> None:
    try:
        address = Address.parse(text)
    except ValueError:
        return
    assert 1 <= address.port <= 65535
    assert Address.parse(str(address)) == address


@settings(deadline=None, max_examples=100)
@given(st.ip_addresses(), st.integers(1, 65535))
def test_every_ip_address_can_be_written_and_read(ip: object, port: int) -> None:
    address = Address(str(ip), port)
    if "%" not in str(ip):
        assert Address.parse(str(address)) == address


def test_a_snapshot_knows_its_endpoints_by_slot() -> None:
    first, second, third = pool_of({}, {}, {})
    snapshot = Snapshot.of([third, first])
    assert snapshot.endpoints == (third, first)
    assert snapshot.mask == 0b101
    assert snapshot.by_slot == {2: 0, 0: 1}
    assert second.slot not in snapshot.by_slot
    assert Snapshot.of(()) == ((), 0, {})


def test_a_decision_names_its_fallbacks_in_order() -> None:
    first, second, third = pool_of({}, {}, {})
    assert Decision(first, (), "default").destination == "10.0.0.1:8000"
    assert Decision(first, (third, second), "default").destination == "10.0.0.1:8000,10.0.0.3:8000,10.0.0.2:8000"


@pytest.mark.parametrize(
    ("state", "waiting", "running", "kv_usage"),
    [
        ({}, 0.0, 0.0, 0.0),
        ({"sent_requests": 3}, 0.0, 3.0, 0.0),
        ({"waiting": 2.0, "running": 7.0, "sent_requests": 3}, 5.0, 7.0, 0.0),
        ({"running": 7.0, "sent_requests": 3}, 0.0, 10.0, 0.0),
        ({"kv_usage": 0.5, "sent_tokens": 10_000}, 0.0, 0.0, 0.5),
        ({"kv_usage": 0.5, "sent_tokens": 100, "kv_capacity_tokens": 400}, 0.0, 0.0, 0.75),
        ({"kv_usage": 0.5, "sent_tokens": 1_000, "kv_capacity_tokens": 400}, 0.0, 0.0, 1.0),
    ],
)
def test_what_was_sent_since_the_last_reading_counts(state: dict[str, float], waiting: float, running: float, kv_usage: float) -> None:
    (endpoint,) = pool_of(state)
    assert (endpoint.waiting_estimate, endpoint.running_estimate, endpoint.kv_usage_estimate) == (waiting, running, kv_usage)


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(0, 9), max_size=40), st.integers(0, 40))
def test_changes_tell_all_that_changed_since_or_that_they_can_not(slots: list[int], seen: int) -> None:
    changes = Changes()
    for slot in slots[:seen]:
        changes.add(slot)
    count = changes.count
    for slot in slots[seen:]:
        changes.add(slot)
    new = slots[seen:]
    assert list(changes.since(count) or ()) == new


def test_changes_do_not_grow_and_do_not_lie_about_what_is_long_ago() -> None:
    changes = Changes()
    for number in range(5 * Changes.LOG_MAX):
        before = changes.count
        changes.add(number)
        assert list(changes.since(before) or ()) == [number]
        old = max(0, before - 10)
        told = changes.since(old)
        assert told is None or list(told) == list(range(old, number + 1))
    assert len(changes._log) <= Changes.LOG_MAX
    assert changes.since(0) is None
