"""A copy of the API server's objects: whole, in order, never emptied by an error; and patience with a server that is ill."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import random
from collections.abc import Sequence
from typing import Any

import httpx2
import pytest

from epp.sources.kubernetes.kinds import Kind
from epp.sources.kubernetes.objects import Pod, read_pod
from epp.sources.kubernetes.reflector import (
    ABSENT_BELIEVED_S,
    ABSENT_S,
    DELAY_MAX_S,
    DELAY_MIN_S,
    FAULTS_TOLD_MAX,
    PAGE,
    RESYNC_S,
    SILENCE_S,
    STEADY_S,
    WATCH_MAX_S,
    WATCH_MIN_S,
    Reflector,
)
from tests.kubernetes.scripted_api import Answer, Script, bookmark, event, expired, listing, pod, status, watching

PODS = "/api/v1/namespaces/llm/pods"
KINDS = [Kind("pods", PODS, read_pod)]
TWO_KINDS = [Kind("things.new", "/apis/new/v1/things", read_pod), Kind("things.old", "/apis/old/v1/things", read_pod)]
NOT_FOUND = status(404, "NotFound", "the server could not find the requested resource")
FORBIDDEN = status(403, "Forbidden", 'pods is forbidden: User "epp" cannot do that')


ONE_KIND = TWO_KINDS[:1]


def discovered(*names: str, version: str = "new/v1") -> Answer:
    body = {"kind": "APIResourceList", "groupVersion": version, "resources": [{"name": name, "kind": "X"} for name in names]}
    return Answer(parts=[json.dumps(body).encode()])


THERE = (listing(pod("a")), watching(expired()))


class Watched:
    """A reflector at a script, and what it did."""

    def __init__(self, *answers: Answer | Exception, kinds: Sequence[Kind] = KINDS, objects_max: int = 20_000, **params: str) -> None:
        self.script = Script(*answers)
        self.slept: list[float] = []
        self.changes = self.heard = 0
        self.limits: list[str] = []
        self.reflector: Reflector[Pod] = Reflector(
            self.script.api,
            kinds,
            clock=self.script.clock,
            sleep=self._sleep,
            rng=random.Random(7),
            params=params,
            changed=self._changed,
            seen=self._seen,
            limit_hit=self.limits.append,
            namespace="llm",
            objects_max=objects_max,
        )

    @property
    def names(self) -> list[str]:
        return sorted(name for _, name in self.reflector.objects)

    async def steps(self, count: int) -> list[float]:
        """The delays after each."""
        delays = []
        for _ in range(count):
            delays.append(await self.reflector.step())
            self.script.clock.advance(delays[-1])
        return delays

    async def _sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.script.clock.advance(seconds)
        await asyncio.sleep(0)

    def _changed(self) -> None:
        self.changes += 1

    def _seen(self) -> None:
        self.heard += 1


def told(caplog: pytest.LogCaptureFixture, level: int = logging.WARNING) -> list[str]:
    return [
        record.getMessage() + ": " + record.__dict__.get("fields", {}).get("reason", "")
        for record in caplog.records
        if record.levelno >= level
    ]


class TestListAndWatch:
    async def test_a_list_then_a_watch_from_its_version(self) -> None:
        w = Watched(
            listing(pod("a"), pod("b"), version="10"),
            watching(event("ADDED", pod("c", 11)), event("MODIFIED", pod("a", 12, x="y")), event("DELETED", pod("b", 13)), bookmark("20")),
            watching(),
            labelSelector="app=vllm",
        )
        assert await w.steps(2) == [0.0, 0.0]
        assert w.names == ["a", "c"]
        assert w.reflector.objects["llm", "a"].labels == {"x": "y"}
        assert w.script.asked == ["list", "watch 10", "watch 20"]
        assert (w.changes, w.reflector.events_total, w.reflector.relists_total, w.reflector.errors_total) == (4, 3, 1, 0)
        first, second, _ = (request.url for request in w.script.requests)
        assert first.path == second.path == PODS
        assert dict(first.params) == {"labelSelector": "app=vllm", "limit": str(PAGE)}
        assert second.params["labelSelector"] == "app=vllm"
        assert second.params["allowWatchBookmarks"] == "true"
        assert WATCH_MIN_S <= int(second.params["timeoutSeconds"]) <= WATCH_MAX_S

    async def test_watches_are_of_different_lengths(self) -> None:
        w = Watched(listing(), *(watching(ends_after_s=100) for _ in range(20)))
        await w.steps(20)
        assert len({request.url.params["timeoutSeconds"] for request in w.script.requests[1:]}) > 10

    async def test_pages(self) -> None:
        pages = [
            listing(*(pod(f"p{n}-{i}") for i in range(PAGE)), version="10", next_page=f"token{n + 1}" if n < 9 else "") for n in range(10)
        ]
        w = Watched(*pages, watching())
        await w.steps(1)
        assert len(w.names) == 10 * PAGE
        assert w.script.asked == ["list", *(f"list token{n}" for n in range(1, 10)), "watch 10"]
        assert w.changes == 1  # of them all together

    async def test_pages_that_grew_too_old_are_asked_for_anew(self) -> None:
        w = Watched(
            listing(pod("a"), version="10", next_page="t"),
            status(410, "Expired"),
            listing(pod("b"), version="30"),
            watching(),
            labelSelector="x",
        )
        assert 0 < (await w.steps(1))[0] <= DELAY_MIN_S
        assert w.names == []
        assert not w.reflector.synced
        await w.steps(1)
        assert w.names == ["b"]
        assert w.script.asked == ["list", "list t", "list", "watch 30"]

    async def test_events_in_one_piece_or_byte_by_byte_are_the_same(self) -> None:
        lines = b"".join(event("ADDED", pod(f"p{n}", 11 + n)) for n in range(5)) + event("DELETED", pod("p0", 20))
        whole = Watched(listing(), watching(lines))
        bytewise = Watched(listing(), watching(*(lines[i : i + 1] for i in range(len(lines)))))
        for w in (whole, bytewise):
            await w.steps(1)
            assert w.names == ["p1", "p2", "p3", "p4"]
            assert w.reflector.events_total == 6

    async def test_what_changes_nothing_here_tells_nobody(self) -> None:
        w = Watched(
            listing(pod("a")), watching(event("MODIFIED", pod("a", 11)), event("MODIFIED", pod("a", 12)), event("DELETED", pod("b", 13)))
        )
        await w.steps(1)
        assert w.reflector.events_total == 3
        assert w.changes == 1

    async def test_order_is_kept(self) -> None:
        events = [event("DELETED" if n % 3 == 2 else "MODIFIED", pod("a", 11 + n, n=str(n))) for n in range(300)]
        w = Watched(listing(), watching(b"".join(events[:-2])))
        await w.steps(1)
        assert w.reflector.objects["llm", "a"].labels == {"n": "297"}

    async def test_when_the_server_was_heard(self) -> None:
        w = Watched(listing(), watching(30, event("ADDED", pod("a", 11)), 20, bookmark("12"), ends_after_s=200))
        clock = w.script.clock
        assert w.reflector.as_of_s == float("-inf")
        await w.steps(1)
        assert clock.now_s() == 1250
        assert w.reflector.as_of_s == 1050
        assert w.heard == 4


class TestListingAgain:
    async def test_a_version_too_old_in_the_stream(self) -> None:
        w = Watched(
            listing(pod("a"), pod("b")), watching(20, expired(), ends_after_s=0), listing(pod("b"), pod("c"), version="50"), watching()
        )
        delays = await w.steps(2)
        assert 0 < delays[0] <= DELAY_MIN_S
        assert w.names == ["b", "c"]  # a deletion nobody told of is seen
        assert w.script.asked == ["list", "watch 10", "list", "watch 50"]
        assert w.reflector.errors_total == 0

    async def test_a_version_too_old_as_an_answer(self, caplog: pytest.LogCaptureFixture) -> None:
        w = Watched(listing(pod("a")), status(410, "Gone"), listing(version="50"), watching())
        await w.steps(2)
        assert w.names == []
        assert w.script.asked == ["list", "watch 10", "list", "watch 50"]
        assert told(caplog) == []

    async def test_a_server_that_says_it_always_is_not_asked_without_end(self) -> None:
        answers = [each for _ in range(12) for each in (listing(pod("a")), watching(expired(), ends_after_s=0))]
        w = Watched(*answers)
        delays = await w.steps(12)
        assert all(DELAY_MIN_S * 2**n / 2 <= delay <= DELAY_MIN_S * 2**n for n, delay in enumerate(delays[:7]))
        assert all(DELAY_MAX_S / 2 <= delay <= DELAY_MAX_S for delay in delays[8:])
        assert w.names == ["a"]

    async def test_the_old_copy_stays_until_the_new_list_is_whole(self) -> None:
        seen_while_listing: list[list[str]] = []
        w = Watched(listing(pod("a"), pod("b")), watching(expired()))
        await w.steps(1)
        page = listing(pod("a"), version="50", next_page="t")
        w.script.answers = [
            page,
            Answer(parts=[lambda: seen_while_listing.append(w.names), *listing(pod("c"), version="50").parts]),
            watching(),
        ]
        await w.steps(1)
        assert seen_while_listing == [["a", "b"]]
        assert w.names == ["a", "c"]

    async def test_a_change_while_the_pages_come_is_in_the_watch(self) -> None:
        w = Watched(
            listing(pod("a"), version="10", next_page="t"),
            listing(pod("b"), version="10"),
            watching(event("DELETED", pod("a", 11)), event("MODIFIED", pod("b", 12, x="y"))),
        )
        await w.steps(1)
        assert {name: value.labels for (_, name), value in w.reflector.objects.items()} == {"b": {"x": "y"}}

    async def test_now_and_then_whatever_the_watch_says(self) -> None:
        w = Watched(listing(pod("a")), *(watching(ends_after_s=600) for _ in range(6)), listing(pod("b"), version="90"), watching())
        await w.steps(7)
        assert w.names == ["b"]
        assert w.script.asked == ["list", *["watch 10"] * 6, "list", "watch 90"]
        assert w.script.clock.now_s() >= 1_000 + RESYNC_S

    async def test_what_is_the_same_stays_the_same_object(self) -> None:
        w = Watched(listing(pod("a")), watching(expired()), listing(pod("a", 2), pod("b"), version="50"), watching())
        await w.steps(1)
        before = w.reflector.objects["llm", "a"]
        await w.steps(1)
        assert w.reflector.objects["llm", "a"] is before

    @pytest.mark.parametrize("line", [b"<html>\n", b'{"type": 1}\n', b'{"type": "ADDED", "object": 5}\n', event("MODIFIED", [1])])
    async def test_a_line_that_is_no_event(self, line: bytes) -> None:
        w = Watched(listing(pod("a")), watching(line), listing(pod("b"), version="50"), watching())
        await w.steps(2)
        assert w.names == ["b"]
        assert w.reflector.errors_total == 1

    @pytest.mark.parametrize("body", [b"", b"<html>", b"[]", b'{"items": 5}', b'{"metadata": {}, "items": []}'])
    async def test_an_answer_that_is_no_list(self, body: bytes) -> None:
        w = Watched(listing(pod("a")), watching(expired()), Answer(parts=[body]))
        await w.steps(2)
        assert w.names == ["a"]
        assert w.reflector.errors_total == 1

    async def test_other_selectors(self) -> None:
        w = Watched(listing(pod("a")), watching(), listing(pod("b"), version="50"), watching())
        await w.steps(1)
        w.reflector.use({"labelSelector": "app=other"})
        assert w.names == ["a"]
        await w.steps(1)
        assert w.names == ["b"]
        assert [request.url.params.get("labelSelector") for request in w.script.requests] == [None, None, "app=other", "app=other"]


class TestFailures:
    @pytest.mark.parametrize(
        "fault", [httpx2.ReadError("reset"), httpx2.RemoteProtocolError("cut"), ConnectionResetError(104, "reset"), b'{"type": "AD']
    )
    async def test_a_cut_watch_goes_on_where_it_was(self, fault: Any) -> None:
        cut = Answer(parts=[event("ADDED", pod("b", 11)), fault])
        w = Watched(listing(pod("a")), cut, watching(event("ADDED", pod("c", 12))))
        delays = await w.steps(2)
        assert 0 < delays[0] <= DELAY_MIN_S
        assert w.names == ["a", "b", "c"]
        assert w.script.asked == ["list", "watch 10", "watch 11"]
        assert w.reflector.errors_total == 1

    async def test_a_cut_after_a_good_while_is_ordinary(self, caplog: pytest.LogCaptureFixture) -> None:
        w = Watched(listing(), Answer(parts=[240, httpx2.ReadError("reset")]), Answer(parts=[240, httpx2.ReadError("reset")]), watching())
        assert all(delay <= DELAY_MIN_S for delay in await w.steps(3))
        assert told(caplog) == []
        assert w.reflector.errors_total == 0

    async def test_a_watch_that_fell_silent_goes_on_where_it_was(self) -> None:
        silent = Answer(parts=[bookmark("15"), SILENCE_S, httpx2.ReadTimeout("")])
        w = Watched(listing(pod("a")), silent, watching())
        await w.steps(2)
        assert w.script.asked == ["list", "watch 10", "watch 15"]
        assert [request.extensions["timeout"]["read"] for request in w.script.requests[1:]] == [SILENCE_S] * 2

    async def test_a_storm_of_cuts_costs_ever_fewer_requests_and_no_object(self) -> None:
        w = Watched(
            listing(*(pod(f"p{n}") for n in range(100))), *(Answer(parts=[httpx2.ReadError("reset")]) for _ in range(200)), watching()
        )
        started_s = w.script.clock.now_s()
        await w.steps(200)
        assert len(w.names) == 100
        assert w.script.clock.now_s() - started_s > 190 * DELAY_MAX_S / 2
        assert set(w.script.asked[1:]) == {"watch 10"}
        assert await w.steps(1) == [0.0]
        assert w.reflector.relists_total == 1

    async def test_watches_that_end_at_once_wait_too(self) -> None:
        w = Watched(listing(), *(watching(ends_after_s=STEADY_S / 20) for _ in range(10)))
        delays = await w.steps(10)
        assert delays == sorted(delays)
        assert delays[-1] >= DELAY_MAX_S / 2

    async def test_a_watch_that_holds_makes_up_for_failures(self) -> None:
        refused = httpx2.ConnectError("refused")
        w = Watched(*[refused] * 6, listing(), watching(ends_after_s=STEADY_S), refused)
        delays = await w.steps(8)
        assert delays[5] > 8 * DELAY_MIN_S / 2
        assert delays[6] == 0.0
        assert delays[7] <= DELAY_MIN_S

    @pytest.mark.parametrize(
        "failure",
        [
            httpx2.ConnectError("refused"),
            httpx2.ConnectTimeout(""),
            OSError(101, "Network is unreachable"),
            status(401, "Unauthorized"),
            FORBIDDEN,
            status(429, "TooManyRequests"),
            status(500, "InternalError"),
            status(503, "ServiceUnavailable"),
            status(504, "Timeout", "Too large resource version"),
            Answer(502, [b"<html>bad gateway</html>"]),
            Answer(302, [b""], {"location": "http://elsewhere"}),
        ],
        ids=lambda failure: repr(failure)[:40],
    )
    async def test_no_error_empties_the_copy(self, failure: Answer | Exception) -> None:
        w = Watched(listing(pod("a"), pod("b")), watching(expired()), *[failure] * 50)
        await w.steps(51)
        assert w.names == ["a", "b"]
        assert w.reflector.errors_total == 50
        assert w.changes == 1
        w.script.answers = [listing(pod("b"), version="80"), watching()]
        await w.steps(1)
        assert w.names == ["b"]

    async def test_the_server_is_left_alone_for_as_long_as_it_asks(self) -> None:
        w = Watched(
            *[status(429, "TooManyRequests", retry_after="7")] * 3, status(503, retry_after="3600"), status(503, retry_after="soon")
        )
        delays = await w.steps(5)
        assert delays[:4] == [7.0, 7.0, 7.0, DELAY_MAX_S]
        assert delays[4] < 7

    async def test_delays_of_two_pickers_differ(self) -> None:
        one, other = Watched(), Watched()
        other.reflector._rng = random.Random(8)
        assert await one.steps(5) != await other.steps(5)

    async def test_a_busy_server_is_asked_for_the_watch_again_and_in_the_end_for_a_list(self) -> None:
        w = Watched(listing(pod("a")), *[status(500, "InternalError")] * 4, listing(pod("b"), version="50"), watching())
        await w.steps(5)
        assert w.script.asked == ["list", *["watch 10"] * 4, "list", "watch 50"]
        assert w.names == ["b"]

    async def test_a_slow_list_is_an_error_and_the_copy_stays(self) -> None:
        w = Watched(
            listing(pod("a")),
            watching(expired()),
            Answer(parts=[b'{"items": [', httpx2.ReadTimeout("")]),
            listing(version="50"),
            watching(),
        )
        await w.steps(2)
        assert w.names == ["a"]
        assert w.reflector.errors_total == 1
        await w.steps(1)
        assert w.names == []

    async def test_a_failure_is_told_once_and_so_is_its_end(self, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.INFO, "epp")
        w = Watched(*[httpx2.ConnectError("refused")] * 5, listing(), watching())
        await w.steps(6)
        assert [record.getMessage() for record in caplog.records if record.name.startswith("epp")] == [
            "watching Kubernetes fails; the last view stays and it is tried again",
            "watching Kubernetes works again",
        ]
        assert told(caplog) == ["watching Kubernetes fails; the last view stays and it is tried again: ConnectError: refused"]


class TestPermissions:
    async def test_what_is_missing_is_said_once_and_exactly(self, caplog: pytest.LogCaptureFixture) -> None:
        w = Watched(*[FORBIDDEN] * 10)
        delays = await w.steps(10)
        assert delays[-1] >= DELAY_MAX_S / 2
        (line,) = told(caplog)
        assert "tried again: not allowed to list pods in the namespace llm: a Role must allow get, list and watch on it" in line
        assert not w.reflector.synced

    async def test_watching_forbidden_and_listing_not_is_polling(self, caplog: pytest.LogCaptureFixture) -> None:
        w = Watched(*(each for n in range(4) for each in (listing(pod(f"p{n}"), version=str(n + 10)), FORBIDDEN)))
        await w.steps(4)
        assert w.names == ["p3"]
        assert w.script.asked == ["list", "watch 10", "list", "watch 11", "list", "watch 12", "list", "watch 13"]
        (line,) = told(caplog)
        assert "not allowed to watch pods in the namespace llm" in line


def faulty(name: str = "bad", version: str = "4") -> dict[str, Any]:
    return {"metadata": {"name": name, "namespace": "llm", "resourceVersion": version, "labels": ["x"]}}


class TestFaultyObjects:
    async def test_one_is_left_out_and_told_once(self, caplog: pytest.LogCaptureFixture) -> None:
        w = Watched(
            listing(pod("a"), faulty(), pod("b")), watching(expired()), listing(pod("a"), faulty(), pod("b"), version="50"), watching()
        )
        await w.steps(2)
        assert w.names == ["a", "b"]
        (record,) = [record for record in caplog.records if record.levelno == logging.WARNING]
        assert record.__dict__["fields"]["object"] == "llm/bad"

    async def test_one_that_becomes_faulty_goes_and_comes_back_whole(self) -> None:
        w = Watched(
            listing(pod("a"), pod("b")),
            watching(event("MODIFIED", faulty("a", "11"))),
            watching(event("MODIFIED", pod("a", 12))),
            watching(),
        )
        await w.steps(1)
        assert w.names == ["b"]
        await w.steps(2)
        assert w.names == ["a", "b"]
        assert w.script.asked == ["list", "watch 10", "watch 11", "watch 12"]

    async def test_one_that_is_deleted_is_no_fault(self) -> None:
        w = Watched(listing(pod("a")), watching(event("DELETED", faulty("a", "11"))), watching())
        await w.steps(2)
        assert w.names == []
        assert w.reflector.errors_total == 0

    async def test_what_was_told_is_forgotten_at_a_limit(self) -> None:
        w = Watched(listing(*(faulty(f"bad{n}") for n in range(FAULTS_TOLD_MAX + 3))), watching())
        await w.steps(1)
        assert len(w.reflector._faults_told) == 3


class TestLimits:
    async def test_a_list_of_too_many_is_an_error(self, caplog: pytest.LogCaptureFixture) -> None:
        w = Watched(listing(pod("a")), watching(expired()), listing(*(pod(f"p{n}") for n in range(4)), version="50"), objects_max=3)
        await w.steps(2)
        assert w.names == ["a"]
        assert w.limits == ["kubernetes_objects"]
        assert "more than 3 objects" in told(caplog)[0]

    async def test_one_too_many_by_and_by_is_left_out(self) -> None:
        events = [
            event("ADDED", pod("c", 11)),
            event("ADDED", pod("d", 12)),
            event("MODIFIED", pod("c", 13, x="y")),
            event("DELETED", pod("a", 14)),
        ]
        w = Watched(listing(pod("a"), pod("b")), watching(*events, event("ADDED", pod("e", 15))), objects_max=3)
        await w.steps(1)
        assert w.names == ["b", "c", "e"]
        assert w.limits == ["kubernetes_objects"]


class TestKindsTheServerLacks:
    async def test_none_is_no_error_and_looked_for_again_after_minutes(self, caplog: pytest.LogCaptureFixture) -> None:
        w = Watched(NOT_FOUND, NOT_FOUND, NOT_FOUND, NOT_FOUND, listing(pod("a")), watching(), kinds=TWO_KINDS)
        delays = await w.steps(2)
        assert all(ABSENT_S / 2 <= delay <= ABSENT_S for delay in delays)
        assert w.reflector.synced
        assert w.reflector.absent
        assert w.reflector.errors_total == 0
        assert told(caplog) == ["the API server has no things.new nor things.old; they are looked for again every few minutes: "]
        await w.steps(1)
        assert not w.reflector.absent
        assert w.names == ["a"]
        assert w.reflector.kind is TWO_KINDS[0]

    async def test_the_older_group_where_the_newer_is_not(self) -> None:
        w = Watched(NOT_FOUND, listing(pod("old")), watching(), NOT_FOUND, listing(pod("old")), watching(), kinds=TWO_KINDS)
        await w.steps(2)
        assert w.names == ["old"]
        assert [request.url.path for request in w.script.requests[:3]] == [TWO_KINDS[0].path, TWO_KINDS[1].path, TWO_KINDS[1].path]
        w.script.answers = [listing(pod("new")), watching()]
        await w.steps(1)
        assert w.names == ["new"]
        assert w.reflector.kind is TWO_KINDS[0]

    async def test_a_role_that_names_the_older_group_alone(self, caplog: pytest.LogCaptureFixture) -> None:
        answers = [each for _ in range(3) for each in (FORBIDDEN, listing(pod("old")), watching())]
        w = Watched(*answers, kinds=TWO_KINDS)
        await w.steps(3)
        assert w.names == ["old"]
        (line,) = told(caplog)
        assert "not allowed to list things.new" in line
        assert "things.old is used" in line

    async def test_forbidden_and_absent_is_forbidden(self, caplog: pytest.LogCaptureFixture) -> None:
        w = Watched(FORBIDDEN, NOT_FOUND, kinds=TWO_KINDS)
        await w.steps(1)
        assert not w.reflector.synced
        assert "not allowed to list things.new" in told(caplog)[0]
        assert [record.__dict__["fields"]["kind"] for record in caplog.records if "fields" in record.__dict__] == ["things.new"]

    async def test_a_server_that_does_not_know_its_kinds_yet_is_not_believed(self) -> None:
        w = Watched(listing(pod("a")), watching(expired()), NOT_FOUND, NOT_FOUND, NOT_FOUND, listing(pod("a"), version="50"), watching())
        await w.steps(5)
        assert w.names == ["a"]
        assert w.changes == 1
        assert w.reflector.errors_total == 3

    async def test_nor_is_the_older_group_taken_for_the_newer_at_once(self) -> None:
        w = Watched(listing(pod("new")), watching(expired()), NOT_FOUND, NOT_FOUND, kinds=TWO_KINDS)
        await w.steps(3)
        assert w.names == ["new"]
        assert {request.url.path for request in w.script.requests} == {TWO_KINDS[0].path}

    async def test_one_that_was_taken_away_is_gone_after_a_while(self) -> None:
        w = Watched(*THERE, kinds=ONE_KIND)
        await w.steps(1)
        started_s = w.script.clock.now_s()
        while not w.reflector.absent:
            w.script.answers = [NOT_FOUND, discovered("others")]
            (delay,) = await w.steps(1)
        assert w.names == []
        assert w.script.clock.now_s() - started_s > ABSENT_BELIEVED_S
        assert w.changes == 2
        assert w.script.requests[-1].url.path == "/apis/new/v1"
        assert DELAY_MAX_S / 2 <= delay <= DELAY_MAX_S  # it is missed: looked for sooner than what never was there
        w.script.answers = [NOT_FOUND, NOT_FOUND]
        assert all(DELAY_MAX_S / 2 <= delay <= DELAY_MAX_S for delay in await w.steps(2))
        w.script.answers = [listing(pod("a"), version="60"), watching()]
        assert await w.steps(1) == [0.0]
        assert w.names == ["a"]

    @pytest.mark.parametrize(
        "discovery",
        [
            Answer(404, [b"default backend - 404"]),
            NOT_FOUND,
            status(503),
            httpx2.ConnectError("refused"),
            discovered("things", "others"),
            discovered("others", version="old/v1"),
            Answer(parts=[b"{}"]),
            Answer(parts=[b'{"groupVersion": "new/v1"}']),
            Answer(parts=[b'{"groupVersion": "new/v1", "resources": [{"name": "\xff"}]}']),
        ],
    )
    async def test_whoever_answers_404_has_to_know_the_group(self, discovery: Answer | Exception) -> None:
        w = Watched(*THERE, kinds=ONE_KIND)
        await w.steps(1)
        for _ in range(20):
            w.script.answers = [NOT_FOUND, discovery]
            await w.steps(1)
        assert {request.url.path for request in w.script.requests[-2:]} == {ONE_KIND[0].path, "/apis/new/v1"}
        assert w.names == ["a"]
        assert not w.reflector.absent
        assert w.changes == 1
        w.script.answers = [listing(pod("b"), version="60"), watching()]
        assert (await w.steps(1))[0] <= DELAY_MAX_S
        assert w.names == ["b"]

    async def test_every_server_has_pods(self) -> None:
        w = Watched(listing(pod("a")), watching(expired()), *[NOT_FOUND] * 100)
        delays = await w.steps(60)
        assert w.script.clock.now_s() > 1_000 + 10 * ABSENT_BELIEVED_S
        assert max(delays) <= DELAY_MAX_S
        assert w.names == ["a"]
        assert not w.reflector.absent
        assert set(w.script.asked) == {"list", "watch 10"}
        starting = Watched(*[NOT_FOUND] * 5)
        await starting.steps(5)
        assert not starting.reflector.synced

    async def test_a_role_for_the_newer_group_taken_away_leaves_what_is_there(self, caplog: pytest.LogCaptureFixture) -> None:
        w = Watched(listing(pod("a"), pod("b")), watching(expired()), *[FORBIDDEN] * 20, kinds=TWO_KINDS)
        await w.steps(21)
        assert w.names == ["a", "b"]
        assert w.reflector.kind is TWO_KINDS[0]
        assert {request.url.path for request in w.script.requests} == {TWO_KINDS[0].path}
        (line,) = told(caplog)
        assert "the last view stays and it is tried again: not allowed to list things.new" in line

    async def test_a_newer_group_that_was_just_installed_takes_nothing_away(self, caplog: pytest.LogCaptureFixture) -> None:
        w = Watched(NOT_FOUND, listing(pod("old1")), watching(), kinds=TWO_KINDS)
        await w.steps(1)
        w.script.answers = [each for _ in range(3) for each in (listing(), listing(pod("old1")), watching())]
        await w.steps(3)
        assert w.names == ["old1"]
        assert w.reflector.kind is TWO_KINDS[1]
        assert w.changes == 1
        assert told(caplog) == ["there is nothing in things.new yet; things.old is used: "]
        w.script.answers = [listing(pod("new1"), version="40"), watching()]  # moved
        await w.steps(1)
        assert w.names == ["new1"]
        assert w.script.asked[-2:] == ["list", "watch 40"]
        assert w.script.requests[-1].url.path == TWO_KINDS[0].path

    async def test_and_counts_when_the_older_has_nothing_either(self) -> None:
        w = Watched(NOT_FOUND, listing(pod("old1")), watching(), listing(version="40"), listing(), watching(), kinds=TWO_KINDS)
        await w.steps(2)
        assert w.names == []
        assert w.reflector.kind is TWO_KINDS[0]
        assert w.script.asked[-1] == "watch 40"
        w.script.answers = [watching(event("DELETED", pod("new1", 41))), listing(version="50"), watching()]
        w.script.clock.advance(RESYNC_S)
        await w.steps(2)
        assert w.script.requests[-1].url.path == TWO_KINDS[0].path  # one that was emptied is not looked past

    @pytest.mark.parametrize("trouble", [FORBIDDEN, NOT_FOUND, status(500), httpx2.ReadError("reset")])
    async def test_nor_while_the_older_can_not_be_listed(self, trouble: Answer | Exception) -> None:
        w = Watched(NOT_FOUND, listing(pod("old1")), watching(), listing(version="40"), trouble, kinds=TWO_KINDS)
        await w.steps(2)
        assert w.names == ["old1"]
        assert w.reflector.kind is TWO_KINDS[1]
        assert w.reflector.errors_total == 1


DEEP = b"[" * 30_000
BAD_BYTE = json.dumps({"type": "MODIFIED", "object": pod("a", 11, app="?")}).encode().replace(b"?", b"\xff") + b"\n"


class TestWhatIsNoText:
    """An answer may be any bytes: none of them ends the watch."""

    @pytest.mark.parametrize(
        "line",
        [
            b'{"type": "\xff", "object": {}}\n',
            b'{"type": "ERROR", "object": {"message": "\xff"}}\n',
            b'{"type": "BOOKMARK", "object": {"metadata": {"resourceVersion": "\xff"}}}\n',
            b'{"type": "DELETED", "object": {"metadata": {"name": "\xff"}}}\n',
            b'{"type": "MODIFIED", "object": {"metadata": {"name": "\xff"}}}\n',
            b'{"type": "MODIFIED", "object": {"metadata": {"name": "a"}, "x": ' + DEEP + b"\n",
        ],
        ids=["type", "error", "bookmark", "deleted", "modified", "deep"],
    )
    async def test_a_line(self, line: bytes) -> None:
        w = Watched(listing(pod("a")), watching(line), listing(pod("b"), version="50"), watching())
        await w.steps(1)
        assert w.names == ["a"]
        await w.steps(1)
        assert w.names == ["b"]
        assert w.reflector.errors_total == 1

    async def test_an_object_in_a_line_that_is_well_otherwise_is_left_out(self, caplog: pytest.LogCaptureFixture) -> None:
        w = Watched(listing(pod("a"), pod("b")), watching(BAD_BYTE, event("MODIFIED", pod("b", 12, x="y"))), watching())
        await w.steps(1)
        assert w.names == ["b"]
        assert w.reflector.objects["llm", "b"].labels == {"x": "y"}
        (record,) = [record for record in caplog.records if record.levelno == logging.WARNING]
        assert record.__dict__["fields"]["object"] == "llm/a"

    async def test_an_object_of_a_list(self) -> None:
        page = listing(pod("a", app="?"), pod("b"))
        w = Watched(Answer(parts=[page.parts[0].replace(b"?", b"\xff")]), watching())
        await w.steps(1)
        assert w.names == ["b"]

    @pytest.mark.parametrize(
        "body", [b'{"metadata": {"resourceVersion": "\xff"}}', b'{"items": [' + DEEP, b'{"x": ' + DEEP], ids=["version", "items", "other"]
    )
    async def test_a_list(self, body: bytes) -> None:
        w = Watched(listing(pod("a")), watching(expired()), Answer(parts=[body]))
        await w.steps(2)
        assert w.names == ["a"]
        assert w.reflector.errors_total == 1

    @pytest.mark.parametrize("body", [b'{"message": "\xff"}', b'{"x": ' + DEEP], ids=["byte", "deep"])
    async def test_what_is_said_of_an_error(self, body: bytes) -> None:
        w = Watched(listing(pod("a")), Answer(500, [body]), Answer(400, [body]), Answer(400, [body]))
        await w.steps(3)
        assert w.names == ["a"]
        assert w.reflector.errors_total == 3


class TestRunning:
    async def test_the_loop_is_steps_and_waits(self) -> None:
        w = Watched(httpx2.ConnectError("refused"), listing(pod("a")), watching(), Answer(parts=[asyncio.Event()]))
        task = asyncio.ensure_future(w.reflector.run())
        while len(w.script.requests) < 4:  # noqa: ASYNC110 - nothing but turns of the loop
            await asyncio.sleep(0)
        assert len(w.slept) == 1
        assert w.names == ["a"]
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        assert task.cancelled()
        w.script.answers = [watching(event("ADDED", pod("b", 11)))]
        await w.steps(1)
        assert w.names == ["a", "b"]

    async def test_whatever_goes_wrong_it_goes_on(self, caplog: pytest.LogCaptureFixture) -> None:
        """Also what nobody thought of."""
        bugs = [ZeroDivisionError() for _ in range(10)]
        w = Watched(listing(pod("a")), watching(), *bugs, listing(pod("b"), version="50"), Answer(parts=[asyncio.Event()]))
        task = asyncio.ensure_future(w.reflector.run())
        while len(w.script.requests) < 14 and not task.done():  # noqa: ASYNC110 - nothing but turns of the loop
            await asyncio.sleep(0)
        assert not task.done()
        assert w.names == ["b"]
        assert w.reflector.errors_total == 10
        assert len(w.slept) == 10
        assert w.slept[0] <= DELAY_MIN_S
        assert DELAY_MAX_S / 2 <= w.slept[-1] <= DELAY_MAX_S
        assert sum("unexpectedly" in record.getMessage() for record in caplog.records) == 10
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task

    def test_it_says_what_it_is(self) -> None:
        assert repr(Watched().reflector) == "<Reflector pods objects=0 synced=False failures=0>"
