"""Pace, health and accounting of scrapes, in virtual time."""

import asyncio
import random
from collections import defaultdict

import pytest

from epp.clock import VirtualClock
from epp.datastore import Datastore, Ticket
from epp.engines.fetch import FetchError, UnreachableError
from epp.engines.scraper import Pace, Scraper
from epp.engines.vllm import Vllm
from epp.types import Address, Endpoint, EndpointSpec

A = EndpointSpec("a", Address("10.0.0.1", 8000))
B = EndpointSpec("b", Address("10.0.0.2", 8000), metrics_address=Address("10.0.0.2", 9100))


def metrics(waiting: int = 0, running: int = 0) -> bytes:
    return b"vllm:num_requests_waiting %d\nvllm:num_requests_running %d\n" % (waiting, running)


class Engines:
    """Answers for URLs, or raises; asks nobody."""

    def __init__(self) -> None:
        self.answers: dict[str, bytes | Exception] = defaultdict(metrics)
        self.asked: list[str] = []
        self.silent: set[str] = set()
        self.while_asked: list[object] = []

    async def fetch(self, url: str) -> bytes:
        self.asked.append(url)
        if url in self.silent:
            await asyncio.Event().wait()
        for act in self.while_asked:
            act()  # type: ignore[operator]
        answer = self.answers[url]
        if isinstance(answer, Exception):
            raise answer
        return answer


class Naps:
    """A sleep that ends when the test says so."""

    def __init__(self, clock: VirtualClock) -> None:
        self._clock = clock
        self.waiting: list[tuple[float, asyncio.Future[None]]] = []

    async def __call__(self, seconds: float) -> None:
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.waiting.append((self._clock.now_s() + seconds, future))
        await future

    async def advance(self, seconds: float) -> None:
        self._clock.advance(seconds)
        for due_s, future in list(self.waiting):
            if due_s <= self._clock.now_s() + 1e-9:
                self.waiting.remove((due_s, future))
                if not future.done():
                    future.set_result(None)
        for _ in range(10):
            await asyncio.sleep(0)


class Middle(random.Random):
    """No jitter."""

    def uniform(self, a: float, b: float) -> float:
        return (a + b) / 2


class Rig:
    def __init__(self, *specs: EndpointSpec, rng: random.Random | None = None) -> None:
        self.clock = VirtualClock()
        self.datastore = Datastore(self.clock)
        self.datastore.apply(specs)
        self.engines = Engines()
        self.naps = Naps(self.clock)
        self.scraper = Scraper(self.datastore, Vllm(), self.engines, clock=self.clock, rng=rng or Middle(), sleep=self.naps)

    def endpoint(self, spec: EndpointSpec) -> Endpoint:
        return self.datastore.endpoints[spec.address]


async def test_a_scrape_is_a_reading() -> None:
    rig = Rig(A, B)
    rig.engines.answers["http://10.0.0.2:9100/metrics"] = metrics(3, 4)
    assert await rig.scraper.once(rig.endpoint(B))
    assert rig.engines.asked == ["http://10.0.0.2:9100/metrics"]
    assert (rig.endpoint(B).waiting, rig.endpoint(B).running) == (3.0, 4.0)
    assert (rig.scraper.polls_total, rig.scraper.poll_errors_total) == (1, 0)


async def test_what_was_sent_while_asking_is_still_unread() -> None:
    rig = Rig(A)
    endpoint = rig.endpoint(A)
    Ticket(endpoint, 10)
    rig.engines.while_asked.append(lambda: Ticket(endpoint, 7))
    assert await rig.scraper.once(endpoint)
    assert (endpoint.sent_requests, endpoint.sent_tokens) == (1, 7)


async def test_nobody_listening_is_failing_at_once_and_back_at_once() -> None:
    rig = Rig(A, B)
    url = "http://10.0.0.1:8000/metrics"
    rig.engines.answers[url] = UnreachableError("Connection refused")
    assert not await rig.scraper.once(rig.endpoint(A))
    assert not rig.endpoint(A).healthy
    assert [endpoint.name for endpoint in rig.datastore.ready.endpoints] == ["b"]
    rig.engines.answers[url] = metrics()
    assert await rig.scraper.once(rig.endpoint(A))
    assert rig.endpoint(A).healthy
    assert rig.scraper.poll_errors_total == 1


async def test_a_sleeping_engine_is_failing_at_once() -> None:
    rig = Rig(A)
    rig.engines.answers["http://10.0.0.1:8000/metrics"] = metrics() + b'vllm:engine_sleep_state{sleep_state="awake"} 0\n'
    assert not await rig.scraper.once(rig.endpoint(A))
    assert not rig.endpoint(A).healthy


@pytest.mark.parametrize("answer", [FetchError("no answer within 1 s"), FetchError("HTTP 503"), b"<html>"])
async def test_other_failures_count_after_three_in_a_row(answer: bytes | Exception) -> None:
    rig = Rig(A)
    endpoint = rig.endpoint(A)
    url = "http://10.0.0.1:8000/metrics"
    healthy = []
    for reply in (answer, answer, metrics(), answer, answer, answer):
        rig.engines.answers[url] = reply
        await rig.scraper.once(endpoint)
        healthy.append(endpoint.healthy)
    assert healthy == [True, True, True, True, True, False]
    assert endpoint.scrape_failures == 3


def rests(rig: Rig, count: int, *, answered: bool = True, took_s: float = 0.0) -> list[float]:
    pace = Pace(0.05)
    return [round(rig.scraper.rest_s(rig.endpoint(A), pace, answered=answered, took_s=took_s), 3) for _ in range(count)]


def test_an_idle_endpoint_is_asked_ever_less() -> None:
    assert rests(Rig(A), 7) == [0.05, 0.1, 0.2, 0.4, 0.8, 1.0, 1.0]


def test_a_failing_endpoint_is_asked_ever_less_but_never_rarely() -> None:
    rig = Rig(A)
    Ticket(rig.endpoint(A), 1)
    assert rests(rig, 7, answered=False) == [0.05, 0.1, 0.2, 0.4, 0.8, 1.0, 1.0]


def test_a_busy_endpoint_is_asked_all_the_time() -> None:
    rig = Rig(A)
    Ticket(rig.endpoint(A), 1)
    assert rests(rig, 3) == [0.05, 0.05, 0.05]


def test_a_pick_since_the_last_scrape_makes_busy_even_if_it_is_over() -> None:
    rig = Rig(A)
    pace = Pace(1.0)
    Ticket(rig.endpoint(A), 1).release()
    assert rig.scraper.rest_s(rig.endpoint(A), pace, answered=True, took_s=0) == pytest.approx(0.05)
    assert rig.scraper.rest_s(rig.endpoint(A), pace, answered=True, took_s=0) == pytest.approx(0.05)
    assert rig.scraper.rest_s(rig.endpoint(A), pace, answered=True, took_s=0) == pytest.approx(0.1)


def test_an_engine_that_answers_slowly_gets_as_long_a_rest() -> None:
    rig = Rig(A)
    Ticket(rig.endpoint(A), 1)
    assert rests(rig, 2, took_s=0.3) == [0.3, 0.3]
    assert rests(rig, 1, took_s=5.0) == [1.0]


def test_jitter_is_a_tenth_either_way_and_within_the_longest_interval() -> None:
    rig = Rig(A, rng=random.Random(1))
    first = [rests(rig, 1)[0] for _ in range(200)]
    assert 0.045 <= min(first) < 0.047
    assert 0.053 < max(first) <= 0.055
    assert max(rests(rig, 50)) <= 1.0


async def test_endpoints_are_followed_as_they_come_and_go() -> None:
    rig = Rig(A)
    running = asyncio.create_task(rig.scraper.run())
    await rig.naps.advance(0)
    assert rig.engines.asked == ["http://10.0.0.1:8000/metrics"]
    await rig.naps.advance(0.05)
    assert len(rig.engines.asked) == 2
    rig.datastore.apply([A, B])
    await rig.naps.advance(0)
    assert rig.engines.asked[2:] == ["http://10.0.0.2:9100/metrics"]
    assert rig.scraper.following == 2
    rig.datastore.apply([B])
    await rig.naps.advance(1.0)
    assert rig.scraper.following == 1
    assert set(rig.engines.asked[3:]) == {"http://10.0.0.2:9100/metrics"}
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert rig.scraper.following == 0
    rig.datastore.apply([A])  # told, but nobody runs
    assert rig.scraper.following == 0


async def test_a_silent_engine_delays_no_other() -> None:
    rig = Rig(A, B)
    rig.engines.silent.add("http://10.0.0.1:8000/metrics")
    running = asyncio.create_task(rig.scraper.run())
    for _ in range(4):
        await rig.naps.advance(1.0)
    assert rig.engines.asked.count("http://10.0.0.1:8000/metrics") == 1
    assert rig.engines.asked.count("http://10.0.0.2:9100/metrics") == 4
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running


async def test_the_first_round_asks_all_at_once() -> None:
    rig = Rig(A, B)
    rig.engines.answers["http://10.0.0.1:8000/metrics"] = UnreachableError("Connection refused")
    assert await rig.scraper.first_round(1.0) == 1
    assert sorted(rig.engines.asked) == ["http://10.0.0.1:8000/metrics", "http://10.0.0.2:9100/metrics"]


async def test_the_first_round_does_not_wait_for_ever() -> None:
    rig = Rig(A, B)
    rig.engines.silent.add("http://10.0.0.1:8000/metrics")
    assert await rig.scraper.first_round(0.01) == 1
    assert rig.endpoint(B).scraped_at_s == 0.0
