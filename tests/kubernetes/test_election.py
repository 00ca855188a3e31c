"""Electors on one API server, in virtual time: who leads, when it changes hands, and what stays as it is when the server can't be reached."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Any, cast

import pytest

from epp.clock import Clock, VirtualClock
from epp.sources.kubernetes.api import Api, ApiError, ApiUnreachableError
from epp.sources.kubernetes.election import JITTER, LEASE_S, RENEW_DEADLINE_S, RETRY_S, Elector, lease_name, replica_identity
from tests.kubernetes.fake_api import FakeApi

NAME, NAMESPACE = lease_name("prod", "llama"), "prod"
LEASES = f"/apis/coordination.k8s.io/v1/namespaces/{NAMESPACE}/leases"
EPOCH = datetime(2026, 1, 31, 12, tzinfo=UTC)
LOGGER = "epp.kubernetes.election"


class Line:
    """One replica's way to the API server, which can be cut, slow, or see something happen just before a request arrives."""

    def __init__(self, api: Api, clock: VirtualClock) -> None:
        self._api = api
        self._clock = clock
        self.down = False
        self.fault: ApiError | None = None
        self.answer_s = 0.0
        self.before: Callable[[str], Awaitable[None]] | None = None
        self.sent: list[str] = []

    async def get(self, path: str, *, timeout_s: float) -> bytes:
        return await self._through("GET", self._api.get(path), timeout_s)

    async def post(self, path: str, body: bytes, *, timeout_s: float) -> bytes:
        return await self._through("POST", self._api.post(path, body), timeout_s)

    async def put(self, path: str, body: bytes, *, timeout_s: float) -> bytes:
        return await self._through("PUT", self._api.put(path, body), timeout_s)

    async def _through(self, method: str, request: Any, timeout_s: float) -> bytes:
        self.sent.append(method)
        if self.down or self.fault is not None:
            request.close()
            raise self.fault or ApiUnreachableError("ConnectError: refused")
        if self.before is not None:
            await self.before(method)
        answer = await request
        if self.answer_s > timeout_s:  # it was done, and nobody was told
            self._clock.advance(timeout_s)
            raise ApiUnreachableError(f"no answer within {timeout_s:g} s")
        self._clock.advance(self.answer_s)
        return cast("bytes", answer)


class Skewed:
    """Another machine's monotonic clock: it started elsewhere."""

    def __init__(self, clock: VirtualClock, offset_s: float) -> None:
        self._clock, self._offset_s = clock, offset_s

    def now_s(self) -> float:
        return self._clock.now_s() + self._offset_s


class Replica:
    def __init__(self, world: World, identity: str, *, skew_s: float = 0.0, **options: Any) -> None:
        self.line = Line(world.api, world.clock)
        self.told: list[bool] = []
        clock: Clock = Skewed(world.clock, skew_s)
        self.elector = Elector(
            cast("Api", self.line),
            name=NAME,
            namespace=NAMESPACE,
            identity=identity,
            clock=clock,
            rng=random.Random(identity),
            on_change=self.told.append,
            utc_now=lambda: EPOCH + timedelta(seconds=world.clock.now_s() + skew_s),
            **options,
        )

    @property
    def leading(self) -> bool:
        return self.elector.leading

    async def look(self) -> bool:
        await self.elector.once()
        return self.leading


class World:
    """An API server, a clock, and what an administrator does."""

    def __init__(self, server: FakeApi, api: Api) -> None:
        self.server, self.api, self.clock = server, api, VirtualClock(1_000.0)

    def replica(self, identity: str, **options: Any) -> Replica:
        return Replica(self, identity, **options)

    async def lease(self) -> dict[str, Any]:
        return cast("dict[str, Any]", json.loads(await self.api.get(f"{LEASES}/{NAME}")))

    async def spec(self) -> dict[str, Any]:
        return cast("dict[str, Any]", (await self.lease())["spec"])

    async def change(self, change: Callable[[dict[str, Any]], object]) -> None:
        lease = await self.lease()
        change(lease)
        await self.api.put(f"{LEASES}/{NAME}", json.dumps(lease).encode())

    async def create(self, spec: dict[str, Any]) -> None:
        metadata = {"name": NAME, "namespace": NAMESPACE}
        lease = {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": metadata, "spec": spec}
        await self.api.post(LEASES, json.dumps(lease).encode())

    async def wait(self, seconds: float, *replicas: Replica) -> None:
        """These look on, often enough to know that nothing changed, until just before the time is over."""
        end_s = self.clock.now_s() + seconds
        while (left_s := end_s - self.clock.now_s()) > RETRY_S:
            self.clock.advance(RETRY_S)
            for each in replicas:
                assert not await each.look()
        self.clock.advance(left_s)

    async def run(self, seconds: float, *replicas: Replica) -> set[str]:
        """Every replica tries as often as it wants to. Returns who led at some time."""
        end_s = self.clock.now_s() + seconds
        due = {replica: self.clock.now_s() for replica in replicas}
        led = set()
        while True:
            replica = min(due, key=lambda each: due[each])
            if due[replica] > end_s:
                self.clock.advance(max(0.0, end_s - self.clock.now_s()))
                return led
            self.clock.advance(max(0.0, due[replica] - self.clock.now_s()))
            await replica.look()
            due[replica] = self.clock.now_s() + replica.elector.pause_s()
            led |= {each.elector.identity for each in replicas if each.leading}


@contextlib.asynccontextmanager
async def world_of() -> AsyncIterator[World]:
    async with FakeApi() as server:
        api = Api.at(server.url)
        try:
            yield World(server, api)
        finally:
            await api.close()


@pytest.fixture
async def world() -> AsyncIterator[World]:
    async with world_of() as made:
        yield made


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.fields["reason"] for record in caplog.records if record.levelno == logging.WARNING]  # type: ignore[attr-defined]


# The record


async def test_the_first_to_come_creates_the_lease_as_client_go_does(world: World) -> None:
    a = world.replica("pod-a")
    assert await a.look()
    lease = await world.lease()
    assert (lease["apiVersion"], lease["kind"]) == ("coordination.k8s.io/v1", "Lease")
    now = "2026-01-31T12:16:40.000000Z"
    assert lease["spec"] == {
        "holderIdentity": "pod-a",
        "leaseDurationSeconds": 15,
        "acquireTime": now,
        "renewTime": now,
        "leaseTransitions": 0,
    }
    assert (a.told, a.elector.holder) == ([True], "pod-a")


async def test_a_renewal_is_one_put_and_changes_the_time_of_renewal_alone(world: World) -> None:
    a = world.replica("pod-a")
    await a.look()
    before = await world.spec()
    world.clock.advance(2.25)
    a.line.sent.clear()
    assert await a.look()
    after = await world.spec()
    assert a.line.sent == ["PUT"]
    assert after.pop("renewTime") == "2026-01-31T12:16:42.250000Z" != before.pop("renewTime")
    assert after == before


async def test_taking_over_is_a_transition_and_a_new_time_of_acquisition(world: World) -> None:
    a, b = world.replica("pod-a"), world.replica("pod-b")
    await a.look()
    await b.look()
    await world.wait(LEASE_S, b)
    assert await b.look()
    spec = await world.spec()
    assert (spec["holderIdentity"], spec["leaseTransitions"], spec["acquireTime"]) == ("pod-b", 1, spec["renewTime"])


async def test_what_others_wrote_into_the_lease_stays(world: World) -> None:
    a = world.replica("pod-a")
    await a.look()
    await world.change(lambda lease: lease["metadata"].update(labels={"team": "ml"}, annotations={"why": "asked"}))
    assert await a.look()
    await a.look()
    metadata = (await world.lease())["metadata"]
    assert (metadata["labels"], metadata["annotations"]) == ({"team": "ml"}, {"why": "asked"})
    assert a.told == [True], "an edit is a conflict, not a loss"


# Changing hands


async def test_a_lease_is_taken_when_it_has_not_changed_for_as_long_as_it_lasts_and_not_before(world: World) -> None:
    a, b = world.replica("pod-a"), world.replica("pod-b")
    await a.look()
    assert not await b.look()
    for _ in range(7):
        world.clock.advance(2.0)
        assert not await b.look()
    world.clock.advance(0.9)
    assert not await b.look()
    world.clock.advance(0.1)
    assert await b.look()
    assert not await a.look(), "it sees another's name"
    assert (a.told, b.told) == ([True, False], [True])


@pytest.mark.parametrize("skew_s", [-86_400.0, -30.0, 30.0, 86_400.0])
async def test_another_machines_clock_decides_nothing(world: World, skew_s: float) -> None:
    a, b = world.replica("pod-a", skew_s=skew_s), world.replica("pod-b", skew_s=-skew_s / 2)
    assert await world.run(120.0, a, b) == {"pod-a"}
    assert await world.run(LEASE_S - RETRY_S, b) == set(), "a is gone; what it last wrote still lasts"
    assert await world.run(LEASE_S, b) == {"pod-b"}


async def test_of_those_who_try_at_once_one_succeeds(world: World) -> None:
    replicas = [world.replica(f"pod-{n}") for n in range(5)]
    await asyncio.gather(*(each.look() for each in replicas))
    assert sum(each.leading for each in replicas) == 1
    (leader,) = [each for each in replicas if each.leading]
    followers = [each for each in replicas if each is not leader]
    await asyncio.gather(*(each.look() for each in followers))
    await world.wait(LEASE_S, *followers)
    await asyncio.gather(*(each.look() for each in followers))
    assert sum(each.leading for each in followers) == 1
    assert (await world.spec())["leaseTransitions"] == 1


async def test_a_put_that_comes_second_takes_nothing(world: World) -> None:
    a, b, c = (world.replica(f"pod-{name}") for name in "abc")
    for each in (a, b, c):
        await each.look()
    await world.wait(LEASE_S, b, c)

    async def faster(method: str) -> None:
        if method == "PUT":
            c.line.before = None
            assert await b.look()

    c.line.before = faster
    assert not await c.look()
    assert not await c.look()
    assert c.elector.holder == "pod-b"
    assert c.told == []


async def test_a_leader_overtaken_in_the_middle_of_a_renewal_stops_at_once(world: World) -> None:
    a = world.replica("pod-a")
    await a.look()

    async def overtaken(_method: str) -> None:
        a.line.before = None
        await world.change(lambda lease: lease["spec"].update(holderIdentity="pod-z"))

    a.line.before = overtaken
    assert not await a.look()
    assert (a.told, a.elector.holder) == ([True, False], "pod-z")


async def test_a_lease_that_was_deleted_is_made_again(world: World) -> None:
    a, b = world.replica("pod-a"), world.replica("pod-b")
    await a.look()
    await b.look()
    world.server.delete("Lease", NAMESPACE, NAME)
    assert await a.look()
    assert not await b.look()
    assert (a.told, (await world.spec())["holderIdentity"]) == ([True], "pod-a")


async def test_a_leader_restarted_under_its_name_resumes_at_once_and_under_another_waits(world: World) -> None:
    await world.replica("pod-a").look()
    world.clock.advance(3.0)
    assert not await world.replica("pod-a_2").look()
    again = world.replica("pod-a")
    assert await again.look()
    assert (await world.spec())["leaseTransitions"] == 0


# Giving back


async def test_a_released_lease_is_taken_at_the_next_look(world: World) -> None:
    a, b = world.replica("pod-a"), world.replica("pod-b")
    await a.look()
    await b.look()
    world.clock.advance(1.0)
    await a.elector.release()
    now = "2026-01-31T12:16:41.000000Z"
    assert await world.spec() == {
        "holderIdentity": "",
        "leaseDurationSeconds": 1,
        "acquireTime": now,
        "renewTime": now,
        "leaseTransitions": 0,
    }
    assert a.told == [True, False]
    assert not await a.look(), "it does not run for the office again"
    assert await b.look()
    assert (await world.spec())["leaseTransitions"] == 1


async def test_who_does_not_hold_the_lease_releases_nothing(world: World) -> None:
    a, b, c = (world.replica(f"pod-{name}") for name in "abc")
    for each in (a, b):
        await each.look()
    await world.change(lambda lease: lease["spec"].update(holderIdentity="pod-z"))
    before = await world.spec()
    for each in (a, b, c):  # a does not know yet that it lost; c never looked
        await each.elector.release()
    assert await world.spec() == before
    assert a.told == [True, False]


async def test_a_lease_edited_since_is_released_all_the_same(world: World) -> None:
    a = world.replica("pod-a")
    await a.look()
    await world.change(lambda lease: lease["metadata"].update(labels={"team": "ml"}))
    await a.elector.release()
    lease = await world.lease()
    assert (lease["spec"]["holderIdentity"], lease["metadata"]["labels"]) == ("", {"team": "ml"})


async def test_a_release_that_fails_says_so_and_ends_leadership_here(world: World, caplog: pytest.LogCaptureFixture) -> None:
    a = world.replica("pod-a")
    await a.look()
    a.line.down = True
    with caplog.at_level(logging.WARNING, LOGGER):
        await a.elector.release()
    assert a.told == [True, False]
    assert warnings(caplog) == ["ConnectError: refused"]


# The API server can't be reached


async def test_a_leader_that_is_cut_off_leads_until_it_sees_another(world: World, caplog: pytest.LogCaptureFixture) -> None:
    a, b = world.replica("pod-a"), world.replica("pod-b")
    await world.run(10.0, a, b)
    a.line.down = True
    with caplog.at_level(logging.WARNING, LOGGER):
        assert await world.run(600.0, a, b) == {"pod-a", "pod-b"}
    assert a.leading
    assert b.leading
    assert len(warnings(caplog)) == 1, "said once, not at every try"
    a.line.down = False
    assert not await a.look()
    assert b.told == [True]


async def test_an_outage_for_all_changes_nothing_nor_does_its_end(world: World) -> None:
    a, b, c = replicas = [world.replica(f"pod-{name}") for name in "abc"]
    await world.run(30.0, *replicas)
    for each in replicas:
        await each.look()  # nothing new will have been written when they look again
        each.line.down = True
    assert await world.run(3_600.0, *replicas) == {"pod-a"}
    for each in (b, c):  # they are back first
        each.line.down = False
    assert not await b.look(), "the lease is old, but for all that is known its holder was cut off too"
    assert await world.run(RETRY_S * 2, b, c) == set()
    a.line.down = False
    assert await world.run(60.0, *replicas) == {"pod-a"}
    assert a.told == [True]


async def test_a_leader_that_died_in_an_outage_is_replaced_after_it(world: World) -> None:
    a, b = world.replica("pod-a"), world.replica("pod-b")
    await world.run(30.0, a, b)
    await b.look()
    b.line.down = True
    await world.run(600.0, b)
    b.line.down = False
    assert await world.run(LEASE_S - 1.0, b) == set()
    assert await world.run(2 * RETRY_S * (1 + JITTER), b) == {"pod-b"}


@pytest.mark.parametrize("status", [500, 503, 504, 429, 401])
async def test_a_server_in_trouble_is_no_loss_of_the_lease(world: World, status: int) -> None:
    a = world.replica("pod-a")
    await a.look()
    world.server.fail(times=1, status=status, path=f"{LEASES}/{NAME}")
    assert await a.look()
    a.line.fault = ApiError(status, "Trouble", "")
    for _ in range(10):
        world.clock.advance(RENEW_DEADLINE_S)
        assert await a.look()
    assert a.elector.failures_total == 11
    a.line.fault = None
    assert await a.look()
    assert a.told == [True]


async def test_a_server_that_asks_for_time_gets_it_within_reason(world: World) -> None:
    a = world.replica("pod-a")
    await a.look()
    assert a.elector.pause_s() == RETRY_S
    for asked_s, given_s in ((1, RETRY_S), (4, 4.0), (3_600, RENEW_DEADLINE_S / 2)):
        world.server.fail(times=1, status=429, path=f"{LEASES}/{NAME}", retry_after_s=asked_s)
        await a.look()
        assert a.elector.pause_s() == given_s
    await a.look()
    assert a.elector.pause_s() == RETRY_S
    b = world.replica("pod-b")
    for asked_s, given_s in ((7, 7.0), (3_600, LEASE_S)):
        world.server.fail(times=1, status=429, path=f"{LEASES}/{NAME}", retry_after_s=asked_s)
        await b.look()
        assert b.elector.pause_s() == given_s, "a follower has time"


async def test_a_leader_that_was_asked_for_time_renews_before_its_lease_runs_out(world: World) -> None:
    a, b = world.replica("pod-a"), world.replica("pod-b")
    await world.run(30.0, a, b)
    for _ in range(10):
        assert await a.look()
        assert not await b.look()
        await world.run(RETRY_S, b)
        a.line.fault = ApiError(429, "TooManyRequests", "", 3_600.0)
        for _ in range(2):
            assert await a.look()
            assert await world.run(a.elector.pause_s(), b) == set()
        a.line.fault = None
    assert b.told == []


@pytest.mark.parametrize("answer_s", [1.0, 4.0, 4.9])
async def test_slow_answers_cost_nobody_the_lease(world: World, answer_s: float) -> None:
    a, b = world.replica("pod-a"), world.replica("pod-b")
    a.line.answer_s = b.line.answer_s = answer_s
    assert await world.run(600.0, a, b) == {"pod-a"}
    assert a.told == [True]


async def test_a_renewal_that_was_done_but_never_answered_is_found_out(world: World) -> None:
    a, b = world.replica("pod-a"), world.replica("pod-b")
    await a.look()
    await b.look()
    for _ in range(5):
        world.clock.advance(1.0)
        written = (await world.spec())["renewTime"]
        a.line.answer_s = 60.0
        assert await a.look()
        assert (await world.spec())["renewTime"] > written, "what it wrote counts, told or not"
        a.line.answer_s = 0.0
        assert await world.run(20.0, a, b) == {"pod-a"}
    assert a.told == [True]


async def test_an_acquisition_that_was_done_but_never_answered_is_found_out(world: World) -> None:
    a = world.replica("pod-a")
    a.line.answer_s = 60.0
    assert not await a.look()
    assert (await world.spec())["holderIdentity"] == "pod-a"
    a.line.answer_s = 0.0
    assert await a.look()
    assert (await world.spec())["leaseTransitions"] == 0


async def test_a_leader_whose_answers_all_come_too_late_is_as_good_as_cut_off(world: World) -> None:
    a, b = world.replica("pod-a"), world.replica("pod-b")
    await world.run(10.0, a, b)
    a.line.answer_s = 60.0
    assert await world.run(300.0, a, b) == {"pod-a", "pod-b"}
    a.line.answer_s = 0.0
    assert not await a.look()


async def test_a_server_that_is_not_there(world: World) -> None:
    a = world.replica("pod-a")
    await a.look()
    gone = Api.at("http://127.0.0.1:1")
    a.line._api = gone
    assert await a.look()
    await gone.close()


# Refusals


@pytest.mark.parametrize("verb", ["get", "create", "update"])
async def test_a_missing_verb_is_named_once(world: World, verb: str, caplog: pytest.LogCaptureFixture) -> None:
    if verb == "update":
        await world.create({"holderIdentity": "", "leaseDurationSeconds": 1})
    world.server.refuse("leases", verbs={verb})
    a = world.replica("pod-a")
    with caplog.at_level(logging.WARNING, LOGGER):
        assert await world.run(60.0, a) == set()
    (reason,) = warnings(caplog)
    assert f"the verb {verb} on leases.coordination.k8s.io in namespace {NAMESPACE}" in reason


async def test_a_leader_that_may_no_longer_write_leads_while_the_lease_shows_nobody_else(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    a = world.replica("pod-a")
    await a.look()
    world.server.refuse("leases", verbs={"update"})
    with caplog.at_level(logging.WARNING, LOGGER):
        assert await world.run(600.0, a) == {"pod-a"}
    assert a.told == [True]
    (reason,) = warnings(caplog)
    assert "the verb update on" in reason
    taken = (await world.lease()) | {"spec": {"holderIdentity": "pod-z", "leaseDurationSeconds": 15}}
    world.server.update(taken)
    assert not await a.look()


async def test_a_leader_that_is_refused_everything_stops_at_the_deadline(world: World) -> None:
    a = world.replica("pod-a")
    await a.look()
    world.server.refuse("leases", verbs={"get", "update", "create"})
    world.clock.advance(60.0)
    assert await a.look(), "the first refusal starts the count"
    world.clock.advance(RENEW_DEADLINE_S - 0.1)
    assert await a.look()
    world.clock.advance(0.1)
    assert not await a.look()
    assert a.told == [True, False]


async def test_refusals_with_an_outage_between_are_counted_anew(world: World) -> None:
    """A restarted API server refuses for a moment what it will allow."""
    a = world.replica("pod-a")
    await a.look()
    world.server.refuse("leases", verbs={"get", "update", "create"})
    await a.look()
    a.line.down = True
    world.clock.advance(RENEW_DEADLINE_S)
    await a.look()
    a.line.down = False
    assert await a.look()


async def test_a_namespace_that_is_not_there_and_a_lease_that_is_none(world: World, caplog: pytest.LogCaptureFixture) -> None:
    class Nonsense:
        async def get(self, path: str, *, timeout_s: float) -> bytes:
            return b'{"spec": {"leaseDurationSeconds": "long"}}'

    a = world.replica("pod-a")
    a.elector._api = cast("Api", Nonsense())
    with caplog.at_level(logging.WARNING, LOGGER):
        assert not await a.look()
        assert not await a.look()
    (reason,) = warnings(caplog)
    assert "can't be read" in reason


@pytest.mark.parametrize("answer", [b'{"spec": {"holderIdentity": "\xff"}}', b'{"spec": ' + b"[" * 30_000], ids=["byte", "deep"])
async def test_a_lease_that_is_no_text_changes_nothing(world: World, answer: bytes, caplog: pytest.LogCaptureFixture) -> None:
    class Noise:
        async def get(self, path: str, *, timeout_s: float) -> bytes:
            return answer

        async def put(self, path: str, body: bytes, *, timeout_s: float) -> bytes:
            return answer

    a, b = world.replica("pod-a"), world.replica("pod-b")
    await a.look()
    with caplog.at_level(logging.WARNING, LOGGER):
        for each in (a, b):
            each.elector._api = cast("Api", Noise())
            await each.look()
            world.clock.advance(LEASE_S)
            await each.look()
    assert (a.leading, b.leading) == (True, False)
    assert all("can't be read" in reason for reason in warnings(caplog))
    await a.elector.release()
    assert a.told == [True, False]


async def test_whatever_goes_wrong_the_loop_goes_on_and_who_leads_leads(world: World, caplog: pytest.LogCaptureFixture) -> None:
    """Also what nobody thought of."""
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)
        world.clock.advance(seconds)
        if len(slept) == 3:
            a.line.fault = None
        if len(slept) == 5:
            await a.elector.release()

    a = world.replica("pod-a", sleep=sleep)
    await a.look()
    a.line.fault = cast("ApiError", ZeroDivisionError())
    await a.elector.run()
    assert slept == [RENEW_DEADLINE_S / 2] * 3 + [RETRY_S] * 2
    assert a.told == [True, False], "not before it was released"
    assert a.elector.failures_total == 3
    assert sum("could not be looked after" in record.getMessage() for record in caplog.records) == 3


# With client-go's elector


GO = {
    "holderIdentity": "epp-7c9f6d-x2x4j_8a5d6c5e-3c1e-4a39-9d8e-0f6f7a1f2b3c",
    "leaseDurationSeconds": 15,
    "acquireTime": "2026-01-31T09:00:00.123456Z",
    "renewTime": "2026-01-31T12:16:39.000001Z",
    "leaseTransitions": 3,
}


async def test_a_lease_a_go_picker_holds_is_respected_and_taken_when_it_runs_out(world: World) -> None:
    await world.create(GO)
    a = world.replica("pod-a")
    assert not await a.look()
    for n in range(5):  # it renews
        await world.wait(LEASE_S - 1.0, a)
        await world.change(lambda lease, n=n: lease["spec"].update(renewTime=f"2026-01-31T12:20:0{n}.000000Z"))  # type: ignore[misc]
        assert not await a.look()
    await world.wait(LEASE_S, a)
    assert await a.look()
    assert (await world.spec())["leaseTransitions"] == 4


@pytest.mark.parametrize("released", [{"holderIdentity": ""}, {"holderIdentity": None}, {}])
async def test_a_lease_a_go_picker_released_is_taken_at_once(world: World, released: dict[str, Any]) -> None:
    spec = {key: value for key, value in GO.items() if key != "holderIdentity"}
    await world.create(spec | {"leaseDurationSeconds": 1} | {key: value for key, value in released.items() if value is not None})
    assert await world.replica("pod-a").look()


async def test_a_lease_lasts_as_long_as_its_holder_says(world: World) -> None:
    await world.create(GO | {"leaseDurationSeconds": 40})
    a = world.replica("pod-a")
    await a.look()
    assert await world.run(39.0, a) == set()
    assert await world.run(2 * RETRY_S * (1 + JITTER), a) == {"pod-a"}


async def test_an_empty_lease_is_anybodys(world: World) -> None:
    await world.create({})
    a = world.replica("pod-a")
    assert await a.look()
    spec = await world.spec()
    assert (spec["holderIdentity"], spec["leaseDurationSeconds"], spec["leaseTransitions"]) == ("pod-a", 15, 1)


# Several replicas for a long time


@pytest.mark.parametrize("seed", range(6))
async def test_whatever_fails_somebody_leads_and_afterwards_one_does(world: World, seed: int) -> None:
    """Lines are cut and mended at random. Once somebody led somebody always does; left alone, exactly one does."""
    rng = random.Random(seed)
    replicas = [world.replica(f"pod-{n}", skew_s=rng.uniform(-5_000, 5_000)) for n in range(3)]
    assert len(await world.run(20.0, *replicas)) == 1
    for _ in range(40):
        for each in replicas:
            each.line.down = rng.random() < 0.4
            each.line.answer_s = rng.choice((0.0, 0.0, 0.5, 4.0))
        await world.run(rng.uniform(1.0, 25.0), *replicas)
        assert any(each.leading for each in replicas)
    for each in replicas:
        each.line.down, each.line.answer_s = False, 0.0
    await world.run(2 * LEASE_S, *replicas)
    leaders = [each.elector.identity for each in replicas if each.leading]
    assert leaders == [(await world.spec())["holderIdentity"]]


async def test_followers_do_not_look_all_at_once(world: World) -> None:
    a, b = world.replica("pod-a"), world.replica("pod-b")
    await a.look()
    await b.look()
    pauses = {b.elector.pause_s() for _ in range(100)}
    assert RETRY_S <= min(pauses) < RETRY_S * 1.2
    assert RETRY_S * (0.8 + JITTER) < max(pauses) <= RETRY_S * (1 + JITTER)


async def test_the_loop_tries_until_it_is_released(world: World) -> None:
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)
        world.clock.advance(seconds)
        if len(slept) == 5:
            await a.elector.release()

    a = world.replica("pod-a", sleep=sleep)
    await a.elector.run()
    assert slept == [RETRY_S] * 5
    assert a.told == [True, False]
    assert a.line.sent == ["GET", "POST", *["PUT"] * 4, "PUT"]


# What it is made with


@pytest.mark.parametrize(
    "times",
    [
        {"lease_s": 10.0},
        {"renew_deadline_s": 15.0},
        {"retry_s": 9.0},
        {"retry_s": 0.0},
        {"lease_s": 0.9, "renew_deadline_s": 0.5, "retry_s": 0.1},
    ],
)
async def test_times_that_can_not_work_are_refused(world: World, times: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="renew deadline"):
        world.replica("pod-a", **times)


def test_names() -> None:
    assert lease_name("prod", "llama-70b") == "epp-prod-llama-70b.llm-d.ai"
    assert replica_identity("epp-0", "node-7") == "epp-0"
    made = {replica_identity("", "node-7") for _ in range(2)}
    assert len(made) == 2
    assert all(each.startswith("node-7_") for each in made)
