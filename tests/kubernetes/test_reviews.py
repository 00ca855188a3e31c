"""Who may read the metrics port: what the API server is asked, how often, and what is answered when it can't be."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import logging
from collections.abc import AsyncIterator, Callable
from http import HTTPStatus
from typing import Any, cast

import pytest

from epp.clock import VirtualClock
from epp.sources.kubernetes.api import Api, ApiError, ApiUnreachableError
from epp.sources.kubernetes.reviews import (
    ACCESS_REVIEWS,
    ALLOWED_S,
    AT_ONCE_MAX,
    BURST,
    DENIED_S,
    PER_S,
    REMEMBERED_MAX,
    STANDS_S,
    TOKEN_CHARS_MAX,
    TOKEN_REVIEWS,
    Reviewer,
)
from tests.kubernetes.fake_access import User
from tests.kubernetes.fake_api import FakeApi

SCRAPER = "eyJhbGciOi.scraper.c2lnbmF0dXJl"
LOGGER = "epp.kubernetes.reviews"
USER = {
    "username": "system:serviceaccount:monitoring:prometheus",
    "uid": "7",
    "groups": ["system:serviceaccounts", "system:authenticated"],
    "extra": {"authentication.kubernetes.io/pod-name": ["prometheus-0"]},
}


class Reviews:
    """The two endpoints of an API server that a reviewer posts to: a table of tokens and a table of rules."""

    def __init__(self) -> None:
        self.users: dict[str, dict[str, Any]] = {SCRAPER: USER}
        self.rules = {(USER["username"], "get", "/metrics")}
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.fault: Callable[[str], Exception | None] = lambda _path: None
        self.answer: bytes | None = None
        self.gate = asyncio.Event()
        self.gate.set()

    async def post(self, path: str, body: bytes, *, timeout_s: float) -> bytes:
        asked = json.loads(body)
        self.asked.append((path, asked))
        await self.gate.wait()
        if (fault := self.fault(path)) is not None:
            raise fault
        if self.answer is not None:
            return self.answer
        spec = asked["spec"]
        if path == TOKEN_REVIEWS:
            assert (asked["apiVersion"], asked["kind"]) == ("authentication.k8s.io/v1", "TokenReview")
            user = self.users.get(spec["token"])
            status: dict[str, Any] = {"authenticated": True, "user": user} if user else {"user": {}, "error": "invalid bearer token"}
        else:
            assert (path, asked["apiVersion"], asked["kind"]) == (ACCESS_REVIEWS, "authorization.k8s.io/v1", "SubjectAccessReview")
            about = spec["nonResourceAttributes"]
            status = {"allowed": (spec["user"], about["verb"], about["path"]) in self.rules}
        return json.dumps({"kind": asked["kind"], "metadata": {"creationTimestamp": None}, "spec": spec, "status": status}).encode()

    @property
    def count(self) -> int:
        return sum(path == TOKEN_REVIEWS for path, _ in self.asked)


class Rig:
    def __init__(self) -> None:
        self.server, self.clock, self.limits = Reviews(), VirtualClock(500.0), list[str]()
        self.reviewer = Reviewer(cast("Api", self.server), self.clock, limit_hit=self.limits.append)

    async def status(self, token: str = SCRAPER, verb: str = "get", path: str = "/metrics") -> int:
        return int((await self.reviewer.allowed(token, verb, path)).status)

    def pass_(self, seconds: float) -> None:
        self.clock.advance(seconds)


@pytest.fixture
async def rig() -> Rig:
    return Rig()


async def test_a_token_is_reviewed_and_its_owner_is_asked_for(rig: Rig) -> None:
    assert await rig.status() == 200
    (_, review), (_, access) = rig.server.asked
    assert review["spec"] == {"token": SCRAPER}
    assert access["spec"] == {
        "user": USER["username"],
        "uid": "7",
        "groups": USER["groups"],
        "extra": USER["extra"],
        "nonResourceAttributes": {"path": "/metrics", "verb": "get"},
    }


@pytest.mark.parametrize(
    ("token", "verb", "path", "status", "asked"),
    [
        ("", "get", "/metrics", 401, 0),
        ("nobody's", "get", "/metrics", 401, 1),
        (SCRAPER, "post", "/metrics", 403, 2),
        (SCRAPER, "get", "/debug/endpoints", 403, 2),
        (SCRAPER, "get", "/metrics/", 403, 2),
        ("x" * (TOKEN_CHARS_MAX + 1), "get", "/metrics", 401, 0),
        ("t\udcffken", "get", "/metrics", 401, 0),
        ("to\0ken", "get", "/metrics", 401, 0),
        ("tökén", "get", "/metrics", 401, 0),
    ],
)
async def test_who_is_not_let_in(token: str, verb: str, path: str, status: int, asked: int) -> None:
    rig = Rig()
    verdict = await rig.reviewer.allowed(token, verb, path)
    assert (verdict.status, len(rig.server.asked)) == (status, asked)
    assert verdict.message
    assert not token or token not in verdict.message
    assert USER["username"] not in verdict.message


async def test_an_answer_without_a_name_authenticates_nobody(rig: Rig) -> None:
    for user in (None, {}, {"username": ""}):
        rig.server.answer = json.dumps({"status": {"authenticated": True, "user": user}}).encode()
        assert await rig.status() == 401
        rig.pass_(DENIED_S)


# Remembering


async def test_what_is_allowed_is_asked_once_a_minute_and_what_is_not_once_in_ten_seconds(rig: Rig) -> None:
    for token, remembered_s, status in ((SCRAPER, ALLOWED_S, 200), ("nobody's", DENIED_S, 401)):
        before = rig.server.count
        for _ in range(5):
            assert await rig.status(token) == status
        rig.pass_(remembered_s - 0.1)
        assert await rig.status(token) == status
        assert rig.server.count == before + 1
        rig.pass_(0.1)
        assert await rig.status(token) == status
        assert rig.server.count == before + 2


async def test_verb_and_path_are_part_of_what_is_remembered(rig: Rig) -> None:
    assert [await rig.status(path=path) for path in ("/metrics", "/drain", "/metrics")] == [200, 403, 200]
    assert [await rig.status(verb=verb) for verb in ("get", "post", "get")] == [200, 403, 200]
    assert rig.server.count == 3


async def test_a_right_taken_away_or_given_is_seen_when_the_verdict_runs_out(rig: Rig) -> None:
    assert await rig.status() == 200
    rig.server.rules.clear()
    rig.pass_(ALLOWED_S)
    assert await rig.status() == 403
    rig.server.fault = lambda _path: ApiUnreachableError("refused")
    rig.pass_(DENIED_S)
    assert await rig.status() == 503, "what was allowed before it was denied stands no more"
    rig.server.fault = lambda _path: None
    rig.server.rules.add((USER["username"], "get", "/metrics"))
    assert await rig.status() == 200


async def test_the_token_is_kept_nowhere(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    rig.server.fault = lambda path: ApiError(403, "Forbidden", "no") if path == ACCESS_REVIEWS else None
    with caplog.at_level(logging.DEBUG):
        await rig.status()
        rig.server.fault = lambda _path: None
        await rig.status()
        await rig.status("nobody's")
    assert caplog.records
    assert SCRAPER not in caplog.text + "".join(str(vars(record)) for record in caplog.records)
    kept = [rig.reviewer.__dict__]
    seen: set[int] = set()
    while kept:
        each = kept.pop()
        if id(each) in seen or isinstance(each, Reviews):
            continue
        seen.add(id(each))
        if isinstance(each, str | bytes):
            assert SCRAPER not in (each if isinstance(each, str) else each.decode("latin-1"))
        elif isinstance(each, dict | list | tuple | set):
            kept += gc.get_referents(each)


async def test_memory_is_bounded_and_the_good_are_not_pushed_out_by_the_bad(rig: Rig) -> None:
    assert await rig.status() == 200
    for n in range(2 * REMEMBERED_MAX):
        rig.pass_(1 / PER_S / 1_000)
        await rig.status(f"made-up-{n}")
    assert len(rig.reviewer._denied) <= REMEMBERED_MAX
    asked = rig.server.count
    assert await rig.status() == 200
    assert rig.server.count == asked


async def test_no_more_are_remembered_than_the_limit_of_either_kind(rig: Rig) -> None:
    for n in range(REMEMBERED_MAX + 10):
        rig.server.users[f"good-{n}"] = USER
        assert await rig.status(f"good-{n}") == 200
        assert await rig.status(f"bad-{n}") == 401
        rig.pass_(2 / PER_S)
    assert (len(rig.reviewer._allowed), len(rig.reviewer._denied)) == (REMEMBERED_MAX, REMEMBERED_MAX)


# Many at once


async def test_many_with_one_token_are_one_review(rig: Rig) -> None:
    rig.server.gate.clear()
    asking = [asyncio.ensure_future(rig.status()) for _ in range(200)]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    rig.server.gate.set()
    assert await asyncio.gather(*asking) == [200] * 200
    assert rig.server.count == 1
    assert rig.limits == []


async def test_a_failure_is_shared_too(rig: Rig) -> None:
    rig.server.gate.clear()
    rig.server.fault = lambda _path: ApiUnreachableError("refused")
    asking = [asyncio.ensure_future(rig.status()) for _ in range(50)]
    await asyncio.sleep(0)
    rig.server.gate.set()
    assert await asyncio.gather(*asking) == [503] * 50
    assert rig.server.count == 1


async def test_who_asked_first_may_leave_without_taking_the_others_along(rig: Rig) -> None:
    rig.server.gate.clear()
    first, *others = [asyncio.ensure_future(rig.status()) for _ in range(5)]
    for _ in range(3):
        await asyncio.sleep(0)
    first.cancel()
    others[0].cancel()
    for _ in range(3):
        await asyncio.sleep(0)
    rig.server.gate.set()
    async with asyncio.timeout(10):
        found = await asyncio.gather(first, *others, return_exceptions=True)
    assert [isinstance(each, asyncio.CancelledError) for each in found] == [True, True, False, False, False]
    assert found[2:] == [200] * 3
    assert rig.server.count == 2
    assert not rig.reviewer._running


async def test_a_flood_of_tokens_is_not_passed_on(rig: Rig) -> None:
    assert await rig.status() == 200
    rig.server.gate.clear()
    flood = [asyncio.ensure_future(rig.status(f"made-up-{n}")) for n in range(500)]
    for _ in range(3):
        await asyncio.sleep(0)
    assert len(rig.reviewer._running) == AT_ONCE_MAX
    assert await rig.status() == 200, "the good are let in"
    rig.server.gate.set()
    found = await asyncio.gather(*flood)
    assert (found.count(401), found.count(429)) == (AT_ONCE_MAX, 500 - AT_ONCE_MAX)
    assert rig.limits == ["reviews"] * (500 - AT_ONCE_MAX)


async def test_reviews_have_a_rate_but_not_those_of_the_good(rig: Rig) -> None:
    assert await rig.status() == 200
    found = [await rig.status(f"made-up-{n}") for n in range(200)]
    assert found.count(401) == BURST - 1
    rig.pass_(1.0)
    found = [await rig.status(f"new-{n}") for n in range(200)]
    assert found.count(401) == PER_S
    assert await rig.status("another") == 429
    rig.clock.advance(ALLOWED_S)
    for n in range(200):
        await rig.status(f"more-{n}")
    asked = rig.server.count
    assert await rig.status() == 200
    assert rig.server.count == asked + 1


# The API server does not help


async def test_what_was_allowed_stands_for_a_while_when_the_api_server_can_not_be_reached(
    rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    assert await rig.status() == 200
    rig.server.fault = lambda _path: ApiUnreachableError("ConnectError: refused")
    rig.pass_(ALLOWED_S)
    with caplog.at_level(logging.INFO, LOGGER):
        assert await rig.status() == 200
        assert await rig.status("new") == 503
        rig.pass_(STANDS_S - ALLOWED_S - 0.1)
        assert await rig.status() == 200
        rig.pass_(0.1)
        assert await rig.status() == 503
        assert len(caplog.records) == 1, "said once"
        rig.server.fault = lambda _path: None
        assert await rig.status() == 200
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]


@pytest.mark.parametrize(
    ("path", "kind"), [(TOKEN_REVIEWS, "tokenreviews.authentication"), (ACCESS_REVIEWS, "subjectaccessreviews.authorization")]
)
async def test_what_rbac_lacks_is_said_once(rig: Rig, path: str, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    rig.server.fault = lambda at: ApiError(403, "Forbidden", f"User x can't create {SCRAPER}") if at == path else None
    with caplog.at_level(logging.WARNING, LOGGER):
        verdict = await rig.reviewer.allowed(SCRAPER, "get", "/metrics")
        assert verdict.status == HTTPStatus.INTERNAL_SERVER_ERROR
        assert "log" in verdict.message
        assert await rig.status() == 500, "not remembered"
    (record,) = caplog.records
    reason = record.fields["reason"]  # type: ignore[attr-defined]
    assert f"create {kind}.k8s.io" in reason
    assert "system:auth-delegator" in reason


@pytest.mark.parametrize(("status", "answered"), [(401, 500), (404, 500), (422, 500), (429, 503), (500, 503), (503, 503)])
async def test_errors_of_the_api_server(rig: Rig, status: int, answered: int) -> None:
    rig.server.fault = lambda _path: ApiError(status, "Whatever", "")
    assert await rig.status() == answered
    rig.server.fault = lambda _path: None
    assert await rig.status() == 200


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"{}",
        b'{"status": 7}',
        b"<html>",
        b'{"status": {"authenticated": "yes"}}',
        b'{"status": null}',
        b'{"status": {"user": {"username": "\xff"}}}',
        b'{"x": ' + b"[" * 30_000,
    ],
)
async def test_answers_that_say_nothing_let_nobody_in(rig: Rig, answer: bytes) -> None:
    rig.server.answer = answer
    assert await rig.status() == 503


# Before an API server


PICKER, PROMETHEUS = User.service_account("prod", "epp"), User.service_account("monitoring", "prometheus")


@contextlib.asynccontextmanager
async def before(*, delegator: bool = True) -> AsyncIterator[tuple[FakeApi, Reviewer, VirtualClock]]:
    async with FakeApi(tokens={"epp": PICKER, SCRAPER: PROMETHEUS}, rbac=True) as server:
        if delegator:
            server.grant(PICKER.name, {"create"}, resources={"tokenreviews"}, group="authentication.k8s.io")
            server.grant(PICKER.name, {"create"}, resources={"subjectaccessreviews"}, group="authorization.k8s.io")
        api, clock = Api.at(server.url, token="epp"), VirtualClock()
        try:
            yield server, Reviewer(api, clock), clock
        finally:
            await api.close()


async def test_rbac_decides_by_verb_and_path() -> None:
    async with before() as (server, reviewer, clock):
        assert (await reviewer.allowed(SCRAPER, "get", "/metrics")).status == 403
        server.grant(PROMETHEUS.name, {"get"}, paths={"/metrics"})
        assert (await reviewer.allowed(SCRAPER, "get", "/metrics")).status == 403, "remembered"
        clock.advance(DENIED_S)
        assert (await reviewer.allowed(SCRAPER, "get", "/metrics")).status == 200
        assert (await reviewer.allowed(SCRAPER, "post", "/metrics")).status == 403
        assert (await reviewer.allowed(SCRAPER, "get", "/debug/endpoints")).status == 403
        assert (await reviewer.allowed("made-up", "get", "/metrics")).status == 401
        assert server.asked(TOKEN_REVIEWS) == 5


async def test_a_picker_that_may_not_review_says_so(caplog: pytest.LogCaptureFixture) -> None:
    async with before(delegator=False) as (_server, reviewer, _clock):
        with caplog.at_level(logging.WARNING, LOGGER):
            assert (await reviewer.allowed(SCRAPER, "get", "/metrics")).status == 500
    (record,) = caplog.records
    assert "may not create tokenreviews.authentication.k8s.io" in record.fields["reason"]  # type: ignore[attr-defined]
    assert SCRAPER not in str(vars(record))


async def test_an_api_server_that_went_away() -> None:
    async with before() as (server, reviewer, clock):
        server.grant(PROMETHEUS.name, {"get"}, paths={"/metrics"})
        assert (await reviewer.allowed(SCRAPER, "get", "/metrics")).status == 200
        await server.stop()
        clock.advance(ALLOWED_S)
        assert (await reviewer.allowed(SCRAPER, "get", "/metrics")).status == 200
        assert (await reviewer.allowed("another", "get", "/metrics")).status == 503
