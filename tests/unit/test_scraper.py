"""Pace, health, engines and accounting of scrapes, in virtual time."""

import asyncio
import logging
import random
from collections import defaultdict

import pytest

from epp.clock import VirtualClock
from epp.datastore import Datastore, Reading, Ticket
from epp.engines.access import FetchOptions
from epp.engines.family import EngineFamily, ReadingError
from epp.engines.fetch import FetchError, StatusError, UnreachableError
from epp.engines.scraper import CORES_MAX, IDLE_SHARE, Scraper
from epp.engines.vllm import Vllm
from epp.freshness import faded, trust
from epp.types import Address, Endpoint, EndpointSpec

A = EndpointSpec("a", Address("10.0.0.1", 8000))
B = EndpointSpec("b", Address("10.0.0.2", 8000), metrics_address=Address("10.0.0.2", 9100))


URL_A = "http://10.0.0.1:8000/metrics"


def metrics(waiting: int = 0, running: int = 0, *, started: float | None = None, queries: int | None = None) -> bytes:
    text = b"vllm:num_requests_waiting %d\nvllm:num_requests_running %d\n" % (waiting, running)
    if started is not None:
        text += b"process_start_time_seconds %r\n" % started
    if queries is not None:
        text += b"vllm:prefix_cache_queries_total %d\n" % queries
    return text


class Abacus:
    """An engine family of its own: one number, found at a path of its own."""

    name = "abacus"
    paths = ("/beads",)

    def read(self, text: bytes) -> Reading:
        if not text.startswith(b"abacus:"):
            raise ReadingError("no beads")
        return Reading(waiting=float(text.removeprefix(b"abacus:")))


VLLM, ABACUS = Vllm(), Abacus()


def family_of(_: Endpoint, text: bytes) -> EngineFamily | None:
    return VLLM if b"vllm:" in text else ABACUS if b"abacus" in text else None


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
    def __init__(self, *specs: EndpointSpec, rng: random.Random | None = None, **options: object) -> None:
        self.clock = VirtualClock()
        self.datastore = Datastore(self.clock)
        self.datastore.apply(specs)
        self.engines = Engines()
        self.naps = Naps(self.clock)
        self.restarted: list[str] = []
        self.scraper = Scraper(
            self.datastore,
            self.engines,
            families=family_of,
            clock=self.clock,
            rng=rng or Middle(),
            on_restart=lambda endpoint: self.restarted.append(endpoint.name),
            sleep=self.naps,
            **options,  # type: ignore[arg-type]
        )

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
    rig.engines.answers[URL_A] = metrics() + b'vllm:engine_sleep_state{sleep_state="awake"} 0\n'
    assert not await rig.scraper.once(rig.endpoint(A))
    assert not rig.endpoint(A).healthy


@pytest.mark.parametrize("answer", [FetchError("no answer within 1 s"), StatusError(503)])
async def test_other_failures_count_after_three_in_a_row(answer: Exception) -> None:
    rig = Rig(A)
    endpoint = rig.endpoint(A)
    healthy = []
    for reply in (answer, answer, metrics(), answer, answer, answer):
        rig.engines.answers[URL_A] = reply
        await rig.scraper.once(endpoint)
        healthy.append(endpoint.healthy)
    assert healthy == [True, True, True, True, True, False]
    assert endpoint.scrape_failures == 3


# which engine, and where


@pytest.mark.parametrize(
    ("metrics_path", "asked"),
    [
        ("/metrics", ["/metrics"]),
        ("/v1/metrics", ["/metrics", "/v1/metrics"]),
        ("/prometheus/metrics", ["/metrics", "/v1/metrics", "/prometheus/metrics"]),
    ],
)
async def test_the_path_is_found_once(metrics_path: str, asked: list[str]) -> None:
    rig = Rig(A)
    rig.engines.answers.default_factory = lambda: StatusError(404)
    rig.engines.answers[f"http://10.0.0.1:8000{metrics_path}"] = metrics(3)
    assert await rig.scraper.once(rig.endpoint(A))
    assert rig.engines.asked == [f"http://10.0.0.1:8000{path}" for path in asked]
    assert (rig.endpoint(A).waiting, rig.scraper.engine(rig.endpoint(A))) == (3.0, "vllm")
    rig.engines.asked.clear()
    assert await rig.scraper.once(rig.endpoint(A))
    assert rig.engines.asked == [f"http://10.0.0.1:8000{metrics_path}"]


async def test_a_family_says_where_else_to_ask() -> None:
    rig = Rig(A)
    rig.engines.answers.default_factory = lambda: StatusError(404)
    rig.engines.answers[URL_A] = b"[abacus, but as JSON]"
    rig.engines.answers["http://10.0.0.1:8000/beads"] = b"abacus:4"
    assert await rig.scraper.once(rig.endpoint(A))
    assert rig.endpoint(A).waiting == 4.0


async def test_a_label_says_where_to_ask_first() -> None:
    rig = Rig(A, paths=lambda endpoint: ["/beads"] if endpoint.name == "a" else [])
    rig.engines.answers["http://10.0.0.1:8000/beads"] = b"abacus:4"
    assert await rig.scraper.once(rig.endpoint(A))
    assert rig.engines.asked == ["http://10.0.0.1:8000/beads"]


async def test_scheme_path_and_port_can_be_told() -> None:
    rig = Rig(A, B, options=FetchOptions(scheme="https", path="/m", port=9))
    rig.engines.answers.default_factory = lambda: StatusError(404)
    for spec in (A, B):
        assert await rig.scraper.once(rig.endpoint(spec))
    assert rig.engines.asked == ["https://10.0.0.1:9/m", "https://10.0.0.2:9/m"]


async def test_an_address_that_moves_with_the_same_endpoint_is_followed() -> None:
    rig = Rig(A)
    await rig.scraper.once(rig.endpoint(A))
    rig.datastore.apply([A._replace(metrics_address=Address("10.0.0.9", 9))])
    await rig.scraper.once(rig.endpoint(A))
    assert rig.engines.asked == [URL_A, "http://10.0.0.9:9/metrics"]


async def test_an_engine_replaced_by_another_is_found_anew() -> None:
    rig = Rig(A)
    await rig.scraper.once(rig.endpoint(A))
    rig.engines.answers[URL_A] = b"abacus:7"
    assert await rig.scraper.once(rig.endpoint(A))
    assert (rig.endpoint(A).waiting, rig.scraper.engine(rig.endpoint(A)), rig.restarted) == (7.0, "abacus", ["a"])
    rig.engines.answers[URL_A] = metrics(1)
    assert await rig.scraper.once(rig.endpoint(A))
    assert (rig.endpoint(A).waiting, rig.scraper.engine(rig.endpoint(A)), rig.restarted) == (1.0, "vllm", ["a", "a"])
    assert rig.scraper.poll_errors_total == 0


# without metrics


@pytest.mark.parametrize(
    "answer", [b"<html>", b"go_goroutines 7\n", b"", StatusError(404), StatusError(401), StatusError(307), StatusError(501)]
)
async def test_an_endpoint_that_tells_no_load_is_healthy_and_said_once(answer: bytes | Exception, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    rig = Rig(A)
    endpoint = rig.endpoint(A)
    rig.engines.answers.default_factory = lambda: answer
    for _ in range(4):
        assert await rig.scraper.once(endpoint)
    assert endpoint.healthy
    assert (rig.scraper.without_metrics, rig.scraper.poll_errors_total, rig.scraper.engine(endpoint)) == (1, 0, "")
    assert len([record for record in caplog.records if "no metrics we know" in record.message]) == 1
    assert endpoint.scraped_at_s == float("-inf")


async def test_without_metrics_our_own_count_is_the_load() -> None:
    rig = Rig(A)
    endpoint = rig.endpoint(A)
    rig.engines.answers.default_factory = lambda: StatusError(404)
    tickets = [Ticket(endpoint, 10) for _ in range(3)]
    tickets[0].release()
    seen = rig.datastore.changes.count
    await rig.scraper.once(endpoint)
    assert (endpoint.waiting_estimate, endpoint.running_estimate, endpoint.kv_usage_estimate) == (2.0, 2.0, 0.0)
    assert rig.datastore.changes.count > seen


async def test_without_metrics_paths_are_asked_in_turn_once_a_second() -> None:
    rig = Rig(A)
    endpoint = rig.endpoint(A)
    rig.engines.answers.default_factory = lambda: StatusError(404)
    Ticket(endpoint, 1)
    rest = []
    for _ in range(4):
        answered = await rig.scraper.once(endpoint)
        rest.append(rig.scraper.rest_s(endpoint, answered=answered, took_s=0))
    assert rest == [1.0] * 4
    paths = [url.removeprefix("http://10.0.0.1:8000") for url in rig.engines.asked]
    assert paths == ["/metrics", "/v1/metrics", "/prometheus/metrics", "/v1/metrics", "/prometheus/metrics", "/metrics"]


async def test_metrics_that_begin_later_are_found() -> None:
    rig = Rig(A)
    endpoint = rig.endpoint(A)
    rig.engines.answers.default_factory = lambda: StatusError(404)
    await rig.scraper.once(endpoint)
    rig.engines.answers[URL_A] = metrics(5)
    for _ in range(3):
        await rig.scraper.once(endpoint)
    assert (endpoint.waiting, rig.scraper.without_metrics, rig.scraper.engine(endpoint)) == (5.0, 0, "vllm")


async def test_metrics_that_end_are_missed_after_three_answers_without() -> None:
    rig = Rig(A)
    endpoint = rig.endpoint(A)
    rig.engines.answers[URL_A] = metrics(5)
    await rig.scraper.once(endpoint)
    rig.engines.answers[URL_A] = b"<html>"
    rig.engines.answers.default_factory = lambda: StatusError(404)
    seen = []
    for _ in range(3):
        await rig.scraper.once(endpoint)
        seen.append((endpoint.waiting_estimate, endpoint.healthy, rig.scraper.without_metrics))
    assert seen == [(5.0, True, 0), (5.0, True, 0), (0.0, True, 1)]
    assert rig.scraper.poll_errors_total == 2


async def test_an_endpoint_without_metrics_fails_and_returns_like_any_other() -> None:
    rig = Rig(A, B)
    endpoint = rig.endpoint(A)
    healthy = []
    for answer in (StatusError(404), UnreachableError("Connection refused"), StatusError(404)):
        rig.engines.answers.default_factory = lambda answer=answer: answer
        rig.engines.answers.clear()
        await rig.scraper.once(endpoint)
        healthy.append(endpoint.healthy)
    assert healthy == [True, False, True]


# restarts


@pytest.mark.parametrize(
    ("before", "after", "restarts"),
    [
        (metrics(started=100.0), metrics(started=160.0), 1),
        (metrics(started=100.0), metrics(started=100.4), 0),
        (metrics(started=100.0), metrics(started=40.0), 0),
        (metrics(started=100.0), metrics(), 0),
        (metrics(), metrics(started=100.0), 0),
        (metrics(queries=500), metrics(queries=499), 1),
        (metrics(queries=500), metrics(queries=500), 0),
        (metrics(queries=500), metrics(), 0),
        (metrics(started=100.0, queries=500), metrics(started=160.0, queries=3), 1),
    ],
)
async def test_a_restart_is_told_once(before: bytes, after: bytes, restarts: int) -> None:
    rig = Rig(A)
    for text in (before, after, after):
        rig.engines.answers[URL_A] = text
        await rig.scraper.once(rig.endpoint(A))
    assert rig.restarted == ["a"] * restarts
    assert rig.scraper.restarts_total == restarts


async def test_a_restart_is_noticed_across_the_time_nobody_listened() -> None:
    rig = Rig(A)
    for answer in (metrics(queries=500), UnreachableError("Connection refused"), metrics(queries=0)):
        rig.engines.answers[URL_A] = answer
        await rig.scraper.once(rig.endpoint(A))
    assert rig.restarted == ["a"]


async def test_processes_that_answer_in_turn_are_one_restart_at_most() -> None:
    rig = Rig(A)
    for started in (100.0, 105.0, 100.0, 105.0):
        rig.engines.answers[URL_A] = metrics(started=started)
        await rig.scraper.once(rig.endpoint(A))
    assert rig.restarted == ["a"]


# pace


def rests(rig: Rig, count: int, *, answered: bool = True, took_s: float = 0.0) -> list[float]:
    return [round(rig.scraper.rest_s(rig.endpoint(A), answered=answered, took_s=took_s), 3) for _ in range(count)]


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
    assert rests(rig, 5)[-1] == 0.8
    Ticket(rig.endpoint(A), 1).release()
    assert rests(rig, 3) == [0.05, 0.05, 0.1]


def test_an_engine_that_answers_slowly_gets_as_long_a_rest() -> None:
    rig = Rig(A)
    Ticket(rig.endpoint(A), 1)
    assert rests(rig, 2, took_s=0.3) == [0.3, 0.3]
    assert rests(rig, 1, took_s=5.0) == [1.0]


def pool(count: int) -> list[EndpointSpec]:
    return [EndpointSpec(f"p{i}", Address(f"10.1.{i // 200}.{i % 200 + 1}", 8000)) for i in range(count)]


def pace(rig: Rig) -> list[float]:
    """How long every endpoint rests, once all have been looked at."""
    for _ in range(12):
        rest = [rig.scraper.rest_s(endpoint, answered=True, took_s=0) for endpoint in rig.datastore.endpoints.values()]
    return rest


def test_a_large_busy_pool_is_read_as_often_as_its_share_of_a_core_allows() -> None:
    intervals = {}
    for count in (10, 50, 100, 500):
        rig = Rig(*pool(count))
        for endpoint in rig.datastore.endpoints.values():
            Ticket(endpoint, 1)
        intervals[count] = max(pace(rig))
        assert rig.scraper.interval_s == pytest.approx(intervals[count])
    assert intervals[10] == intervals[50] == 0.05
    assert intervals[100] == pytest.approx(100 * 174e-6 / CORES_MAX)
    assert intervals[500] == pytest.approx(5 * intervals[100])


def test_https_weighs_more() -> None:
    slow, fast = Rig(*pool(200), options=FetchOptions(scheme="https")), Rig(*pool(200))
    for rig in (slow, fast):
        for endpoint in rig.datastore.endpoints.values():
            Ticket(endpoint, 1)
    assert max(pace(slow)) == pytest.approx(200 * 222e-6 / CORES_MAX)
    assert max(pace(slow)) > max(pace(fast))


def test_large_answers_weigh_more() -> None:
    rig = Rig(*pool(10))
    for endpoint in rig.datastore.endpoints.values():
        Ticket(endpoint, 1)
        rig.scraper._followed[endpoint].source.bytes = 6_000_000
    assert max(pace(rig)) > 0.5


def test_idle_endpoints_of_a_very_large_pool_are_read_more_rarely_and_leave_the_busy_one_alone() -> None:
    rig = Rig(*pool(2000))
    busy = next(iter(rig.datastore.endpoints.values()))
    Ticket(busy, 1)
    rest = pace(rig)
    assert rest[0] == 0.05
    assert rest[-1] == pytest.approx(1999 * 174e-6 / (CORES_MAX * IDLE_SHARE))


def test_endpoints_that_go_weigh_no_longer() -> None:
    rig = Rig(*pool(500))
    for endpoint in rig.datastore.endpoints.values():
        Ticket(endpoint, 1)
    assert max(pace(rig)) > 0.4
    rig.datastore.apply(pool(10))
    assert max(pace(rig)) == 0.05


def test_jitter_is_a_tenth_either_way_and_within_the_longest_interval() -> None:
    rig = Rig(A, rng=random.Random(1))
    ticket = Ticket(rig.endpoint(A), 1)
    busy = rests(rig, 200)
    assert 0.045 <= min(busy) < 0.047
    assert 0.053 < max(busy) <= 0.055
    ticket.release()
    assert max(rests(rig, 50)) <= 1.0


async def test_what_the_first_round_asked_at_once_is_asked_spread_out_afterwards() -> None:
    rig = Rig(*pool(20), rng=random.Random(1))
    await rig.scraper.first_round(1.0)
    rig.engines.asked.clear()
    running = asyncio.create_task(rig.scraper.run())
    await rig.naps.advance(0)
    assert rig.engines.asked == []
    counts = []
    for _ in range(5):
        await rig.naps.advance(0.01)
        counts.append(len(set(rig.engines.asked)))
    assert counts[0] < 10
    assert counts[-1] == 20
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running


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


@pytest.mark.parametrize(("age_s", "trusted"), [(0.0, 1.0), (2.0, 1.0), (4.0, 0.75), (6.0, 0.5), (10.0, 0.0), (float("inf"), 0.0)])
def test_a_reading_fades(age_s: float, trusted: float) -> None:
    assert trust(age_s) == trusted
    assert faded(20.0, 4.0, trusted) == 4.0 + 16.0 * trusted
