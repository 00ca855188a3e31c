"""Engines that are down, die, hang and come back, under load: what clients notice of it, and where requests go meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import socket
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field

import pytest
from http_clients import TIMEOUT_S, Http1, Samples, TruncatedError, ask, chat, eventually, scrape, until_idle, until_metrics
from programs import LOOPBACK, EchoEngine, Engines, Gateway, free_port

from epp.types import Address

pytestmark = pytest.mark.e2e

CHAT = "/v1/chat/completions"
CONCURRENCY = 16
TIME_SCALE = "4"
"""A token takes 2 ms, and a little more with company."""
BOUNDED_S = 15.0
"""A client that can't be served knows after this: three attempts to connect of 2 s each, and what a busy machine adds."""
NOTICED_S = 1.0
"""After an engine's death, until Envoy has certainly seen its connections close."""


@dataclass
class Outcome:
    """One request of the load."""

    started_s: float
    status: int = 0
    """0: no answer at all."""
    engine: str = ""
    whole: bool = False
    over: bool = False


@dataclass
class Load:
    """`CONCURRENCY` clients that never rest, until told to; half of them stream."""

    gateway: Gateway
    outcomes: list[Outcome] = field(default_factory=list)
    _stopping: bool = False

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Load]:
        async with asyncio.TaskGroup() as clients:
            for number in range(CONCURRENCY):
                clients.create_task(self._client(number))
            try:
                yield self
            finally:
                self._stopping = True

    async def _client(self, number: int) -> None:
        turn = 0
        while not self._stopping:
            try:
                async with Http1(self.gateway.address) as client:
                    while not self._stopping:
                        turn += 1
                        outcome = Outcome(time.monotonic())
                        self.outcomes.append(outcome)
                        await self._request(client, outcome, f"Client {number} asks for the {turn}th time", stream=number % 2 == 0)
            except TruncatedError:
                continue  # on a new connection; the outcome says so

    async def _request(self, client: Http1, outcome: Outcome, text: str, *, stream: bool) -> None:
        try:
            async with asyncio.timeout(TIMEOUT_S):
                await client.send("POST", CHAT, chat(text, max_tokens=40, stream=stream))
                outcome.status = await client.head()
                outcome.engine = client.headers.get("x-inference-endpoint", "")
                outcome.whole = bool(await client.rest())
        finally:
            outcome.over = True

    @property
    def failed(self) -> list[Outcome]:
        return [outcome for outcome in self.outcomes if outcome.over and not (outcome.status == 200 and outcome.whole)]

    def served(self, since_s: float = 0.0) -> Counter[str]:
        """engine -> whole answers to requests made since then."""
        return Counter(outcome.engine for outcome in self.outcomes if outcome.whole and outcome.started_s >= since_s)

    async def until(self, reached: Callable[[], bool], what: str) -> None:
        await eventually(lambda: asyncio.sleep(0, reached()), what)


async def until_ready(gateway: Gateway, count: int) -> Samples:
    return await until_metrics(gateway.metrics, lambda now: now.sum("llm_d_epp_ready_endpoints") == count, f"{count} ready endpoints")


def picks(samples: Samples, endpoint: Address) -> float:
    """Requests the picker sent there."""
    return samples.sum("llm_d_epp_scheduler_attempts_total", status="success", port=str(endpoint.port))


async def fail(engine: Address, mode: str) -> None:
    answer = await ask(engine, "/admin/fail", json.dumps({"mode": mode}).encode())
    assert answer.status == 200, answer


@pytest.fixture
def mortal() -> Iterator[Engines]:
    """An engine on a port of its own, in a process of its own, to be killed."""
    with Engines("--time-scale", TIME_SCALE, port=free_port()) as program:
        yield program


@pytest.fixture(scope="module")
def other() -> Iterator[Engines]:
    """The engine that stays."""
    with Engines("--time-scale", TIME_SCALE) as program:
        yield program


async def test_no_request_goes_to_an_engine_that_is_down_from_the_start(other: Engines) -> None:
    down = Address(LOOPBACK, free_port())
    with Gateway((down, other.address)) as gateway:
        async with Load(gateway).running() as load:
            await load.until(lambda: len(load.outcomes) >= 200, "200 requests")
        assert load.failed == []
        assert set(load.served()) == {str(other.address)}
        samples = await scrape(gateway.metrics)
        assert picks(samples, down) == 0
        assert picks(samples, other.address) == len(load.outcomes)


async def test_an_engine_that_dies_takes_only_what_it_was_answering_and_gets_requests_again_when_it_is_back(
    mortal: Engines, other: Engines
) -> None:
    with Gateway((mortal.address, other.address)) as gateway, contextlib.ExitStack() as revived:
        async with Load(gateway).running() as load:
            await load.until(lambda: min(load.served()[str(e.address)] for e in (mortal, other)) >= 50, "both engines at work")
            assert load.failed == []

            mortal.kill()
            dead_s = time.monotonic()
            samples = await until_ready(gateway, 1)
            known_s, count = time.monotonic(), len(load.outcomes)
            await load.until(lambda: len(load.outcomes) >= count + 200, "200 requests more")
            assert picks(await scrape(gateway.metrics), mortal.address) == picks(samples, mortal.address)
            assert set(load.served(known_s)) == {str(other.address)}

            revived.enter_context(Engines("--time-scale", TIME_SCALE, port=mortal.address.port))
            await until_ready(gateway, 2)
            back_s = time.monotonic()
            await load.until(lambda: load.served(back_s)[str(mortal.address)] >= 20, "the engine that came back at work")
        assert [outcome for outcome in load.failed if outcome.started_s > dead_s + NOTICED_S] == []
        assert {outcome.engine for outcome in load.failed} <= {"", str(mortal.address)}, "the other engine's requests failed too"
        assert len(load.failed) <= CONCURRENCY, "more than it can have been answering"
        await until_idle(gateway.metrics)


@pytest.mark.parametrize("mode", ["hang-metrics", "refuse-metrics"])
async def test_an_engine_whose_metrics_fail_is_routed_around_until_they_are_back(mortal: Engines, other: Engines, mode: str) -> None:
    with Gateway((mortal.address, other.address)) as gateway:
        async with Load(gateway).running() as load:
            await load.until(lambda: min(load.served()[str(e.address)] for e in (mortal, other)) >= 20, "both engines at work")

            await fail(mortal.address, mode)
            samples = await until_ready(gateway, 1)
            known_s, count = time.monotonic(), len(load.outcomes)
            await load.until(lambda: len(load.outcomes) >= count + 100, "100 requests more")
            assert picks(await scrape(gateway.metrics), mortal.address) == picks(samples, mortal.address)
            assert set(load.served(known_s)) == {str(other.address)}

            await fail(mortal.address, "ok")
            await until_ready(gateway, 2)
            back_s = time.monotonic()
            await load.until(lambda: load.served(back_s)[str(mortal.address)] >= 20, "it is at work again")
        assert load.failed == []


async def test_a_body_goes_whole_to_the_next_engine_where_the_first_is_gone() -> None:
    """Envoy tries the engine that has the prompt cached, which died a moment ago, then the picker's second choice."""
    body = chat("".join(hashlib.sha256(b"%d" % index).hexdigest() for index in range(20_000)))
    with EchoEngine() as one, EchoEngine() as two, Gateway((one.address, two.address), "--refresh-metrics-interval", "1s") as gateway:
        warm = await ask(gateway.address, CHAT, body)
        first, second = (one, two) if warm.engine == str(one.address) else (two, one)
        before = picks(await scrape(gateway.metrics), first.address)
        first.kill()
        answer = await ask(gateway.address, CHAT, body)
        assert answer.status == 200, answer
        assert answer.engine == str(second.address)
        assert answer.json["length"] == len(body)
        assert answer.json["sha256"] == hashlib.sha256(body).hexdigest()
        samples = await until_idle(gateway.metrics)
        assert samples.sum("llm_d_epp_ready_endpoints") == 1
        if picks(samples, first.address) == before:
            pytest.skip("a scrape noticed its death in the very moment before the request: nothing was retried")


async def assert_told(gateway: Gateway) -> None:
    """Every one of many clients knows in bounded time that it can't be served."""
    bodies = [chat(f"{index}", stream=index % 2 == 0) for index in range(CONCURRENCY)]
    async with asyncio.timeout(BOUNDED_S):
        answers = await asyncio.gather(*(ask(gateway.address, CHAT, body) for body in bodies), ask(gateway.address, "/v1/models"))
    assert Counter(answer.status for answer in answers) == {503: CONCURRENCY + 1}
    await until_idle(gateway.metrics)


@pytest.mark.parametrize("destination", ["override-host", "original-dst"])
async def test_with_all_engines_down_clients_are_told_in_bounded_time(mortal: Engines, destination: str) -> None:
    down = Address(LOOPBACK, free_port())
    with Gateway((down, mortal.address), "--destination", destination) as gateway:
        assert (await ask(gateway.address, CHAT, chat("the last to be served"))).status == 200
        mortal.kill()
        await assert_told(gateway)
        await until_ready(gateway, 0)
        await assert_told(gateway)


@contextlib.contextmanager
def swallowing() -> Iterator[Address]:
    """An address that neither takes nor refuses a connection, as a host that is gone: its accept queue is full."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind((LOOPBACK, 0))
        listener.listen(0)
        address = Address(*listener.getsockname())
        while True:
            filler = stack.enter_context(socket.socket())
            filler.settimeout(0.3)
            try:
                filler.connect(address)
            except TimeoutError:
                break
        yield address


async def test_with_an_engine_s_host_gone_clients_are_told_in_bounded_time() -> None:
    with swallowing() as gone, Gateway((gone,)) as gateway:
        await assert_told(gateway)


async def test_an_engine_s_host_that_is_gone_costs_no_request(other: Engines) -> None:
    """Where another can answer: the first to try wait for a connection in vain, and are sent on."""
    with swallowing() as gone, Gateway((gone, other.address)) as gateway:
        async with Load(gateway).running() as load:
            await load.until(lambda: load.served()[str(other.address)] >= 200, "200 requests served")
        assert load.failed == []
        assert set(load.served()) == {str(other.address)}


async def test_an_engine_that_hangs_lets_its_clients_go(mortal: Engines) -> None:
    """Its clients leave, and leave nothing behind; it answers others when it is well again."""
    with Gateway((mortal.address,)) as gateway:
        await fail(mortal.address, "hang")
        async with Http1(gateway.address) as client:
            await client.send("POST", CHAT, chat("hello?"))
            await until_metrics(gateway.metrics, lambda now: now.sum("llm_d_epp_inflight_requests") == 1, "it is in flight")
        await until_idle(gateway.metrics)
        await fail(mortal.address, "ok")
        assert (await ask(gateway.address, CHAT, chat("hello!"))).status == 200
