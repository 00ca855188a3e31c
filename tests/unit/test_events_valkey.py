"""What is to be shared, without a server: limits, addresses, and what happens where the client is not installed."""

from __future__ import annotations

import asyncio
import random
import sys

import pytest

from epp.errors import StartError
from epp.events.settings import BackendSettings
from epp.events.shared import FRAME_BYTES_MAX, FRAME_COSTS_BYTES, NUMBER_MAX, Budget, Shared
from epp.events.valkey import Backend


def shared(bytes_max: int = 1 << 20) -> tuple[Shared, Budget, list[Shared]]:
    budget, news = Budget(bytes_max), list[Shared]()
    return Shared("x", budget, news.append), budget, news


# What waits


def test_a_slice_is_frames_that_follow_one_another() -> None:
    made, budget, news = shared()
    for number in (0, 1, 2, 5, 6):
        made.offer(number, b"%d" % number, 7.5)
    assert len(news) == 5
    first = made.slice(1 << 20, 100)
    assert first is not None
    assert first.arguments == [0, 1, 0, 7_500, 10_000, 0, b"0", b"1", b"2"]
    made.written(first, 7_500)
    second = made.slice(1 << 20, 1)
    assert second is not None
    assert second.arguments == [7_500, 0, 0, 7_500, 10_000, 5, b"5"]
    made.written(second, 7_500)
    assert len(made) == budget.frames_waiting == 1


def test_what_was_not_sent_goes_again_in_order() -> None:
    made, budget, news = shared()
    made.offer(0, b"a", 1.0)
    made.offer(1, b"b", 1.0)
    part = made.slice(1 << 20, 100)
    assert part is not None
    made.offer(2, b"c", 1.0)
    del news[:]
    made.unsent(part)
    assert news == [made]
    again = made.slice(1 << 20, 100)
    assert again is not None
    assert again.arguments[5:] == [0, b"a", b"b", b"c"]
    assert budget.frames_waiting == 3


def test_over_the_limit_the_oldest_go_and_are_counted() -> None:
    made, budget, _ = shared(3 * (10 + FRAME_COSTS_BYTES))
    for number in range(10):
        made.offer(number, b"%010d" % number, 1.0)
        assert budget.bytes_used <= budget.bytes_max
    assert budget.frames_dropped == 7
    part = made.slice(1 << 20, 100)
    assert part is not None
    assert part.arguments[5] == 7
    other = Shared("y", budget, lambda _: None)
    other.offer(0, b"0123456789", 1.0)
    assert (len(other), budget.frames_dropped) == (0, 8), "what is on its way counts, and is nobody else's to drop"
    made.refused(part)
    assert budget.bytes_used == budget.frames_waiting == 0


@pytest.mark.parametrize(("number", "size"), [(0, FRAME_BYTES_MAX + 1), (NUMBER_MAX + 1, 1)])
def test_what_is_too_long_or_has_no_place_there_is_not_shared(number: int, size: int) -> None:
    made, budget, news = shared()
    made.offer(number, bytes(size), 1.0)
    assert (len(made), budget.frames_dropped, budget.bytes_used, news) == (0, 1, 0, [])


def test_streams_of_long_frames_are_kept_shorter() -> None:
    made, _, _ = shared(1 << 30)
    for number in range(300):
        made.offer(number, bytes(200 << 10), 1.0)
    part = made.slice(1, 1)
    assert part is not None
    assert 300 <= int(part.arguments[4]) <= 400


def test_after_a_restart_nothing_of_the_process_before_goes() -> None:
    made, budget, _ = shared()
    made.offer(5, b"old", 1.0)
    flying = made.slice(1 << 20, 100)
    assert flying is not None
    made.met(50)
    made.offer(6, b"old too", 1.0)
    made.restarted()
    made.unsent(flying)
    assert (made.epoch, made.ended, len(made), budget.frames_waiting) == (0, 50, 0, 0)
    made.offer(0, b"new", 1.0)
    part = made.slice(1 << 20, 100)
    assert part is not None
    assert part.arguments == [0, 1, 50, 1_000, 10_000, 0, b"new"]
    made.close()
    made.written(part, 51)
    made.offer(1, b"after", 1.0)
    assert (budget.bytes_used, budget.frames_waiting, made.epoch) == (0, 0, 0)


def test_where_the_process_is_in_doubt_the_frame_before_goes_too_for_others_have_it() -> None:
    made, _, _ = shared()
    for number, epoch in ((3, 40), (4, 0)):
        made.offer(number, b"%d" % number, 1.0)
        part = made.slice(1 << 20, 100)
        assert part is not None
        made.written(part, epoch)
    assert (made.epoch, made.ended) == (0, 40)
    made.offer(5, b"5", 1.0)
    part = made.slice(1 << 20, 100)
    assert part is not None
    assert part.arguments == [0, 0, 40, 1_000, 10_000, 4, b"4", b"5"]
    assert [frame.number for frame in part.frames] == [5]


# Addresses


@pytest.mark.parametrize(
    ("address", "url", "shown"),
    [
        ("redis://127.0.0.1:6379", "redis://127.0.0.1:6379", "redis://127.0.0.1:6379"),
        ("10.0.0.1:7000", "redis://10.0.0.1:7000", "redis://10.0.0.1:7000"),
        ("valkey://me:hunter2@[::1]:1/2", "redis://me:hunter2@[::1]:1/2", "redis://[::1]:1"),
        ("valkeys://:hunter2@cache.example", "rediss://:hunter2@cache.example", "rediss://cache.example:6379"),
        ("rediss://cache.example:6380?ssl_cert_reqs=none", "rediss://cache.example:6380?ssl_cert_reqs=none", "rediss://cache.example:6380"),
    ],
)
def test_addresses(address: str, url: str, shown: str) -> None:
    settings = BackendSettings(url=address)
    assert (settings.url, settings.shown) == (url, shown)
    assert "hunter2" not in repr(settings)


@pytest.mark.parametrize(
    "address", ["", "http://me:hunter2@host", "redis://", "redis://me:hunter2@host:99999", "redis://me:hunter2@host:x", "redis://:1"]
)
def test_what_is_no_address_is_refused_without_quoting_it(address: str) -> None:
    with pytest.raises(ValueError, match="the address") as raised:
        BackendSettings(url=address)
    assert "hunter2" not in str(raised.value)


def test_an_option_that_does_not_exist_stops_the_start_without_quoting_it() -> None:
    backend = Backend(BackendSettings(url="redis://me:hunter2@host?nonsense=1"), sleep=asyncio.sleep, rng=random.Random(1))
    with pytest.raises(StartError, match=r"redis://host:6379") as raised:
        backend.start()
    assert "hunter2" not in str(raised.value)


def test_without_the_client_the_start_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "redis.asyncio", None)
    backend = Backend(BackendSettings(url="redis://host"), sleep=asyncio.sleep, rng=random.Random(1))
    with pytest.raises(StartError, match=r"\[valkey\]"):
        backend.start()
