"""A pool of engines that behave and misbehave, read over real sockets: what happens to one is no matter of the others."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from epp.clock import MonotonicClock
from epp.datastore import Datastore
from epp.engines.detect import engine_label, family_for
from epp.engines.fetch import HttpFetcher
from epp.engines.models import ModelsPoller
from epp.engines.scraper import Scraper
from epp.types import Address, Endpoint, EndpointSpec

BUSY = (Path(__file__).parent.parent / "data" / "vllm-0.32-metrics-busy.txt").read_bytes()
SGLANG = b"sglang:num_running_reqs 3.0\nsglang:num_queue_reqs 2.0\nsglang:token_usage 0.25\n"
FETCH_S = 0.3
INTERVAL_S = 0.005
SOON_S = 20.0

Answer = bytes | int | Callable[[asyncio.StreamWriter], Awaitable[None]]
"""A body, a status without one, or whatever it writes itself."""


class Engine:
    """One server; what it answers can be changed while it runs."""

    def __init__(self, paths: dict[str, Answer]) -> None:
        self.paths = paths
        self.asked: list[str] = []
        self.address = Address("127.0.0.1", 1)
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()

    async def start(self) -> None:
        port = 0 if self.address.port == 1 else self.address.port
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", port)
        self.address = Address("127.0.0.1", self._server.sockets[0].getsockname()[1])

    async def stop(self) -> None:
        assert self._server is not None
        self._server.close()
        for writer in list(self._writers):
            writer.transport.abort()
        async with asyncio.timeout(SOON_S):
            while self._writers:  # noqa: ASYNC110 - polled with a deadline
                await asyncio.sleep(0.001)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            while True:
                path = (await reader.readuntil(b"\r\n\r\n")).split(b" ")[1].decode()
                self.asked.append(path)
                answer = self.paths.get(path, 404)
                if callable(answer):
                    await answer(writer)
                elif isinstance(answer, int):
                    writer.write(b"HTTP/1.1 %d Said So\r\nContent-Length: 0\r\n\r\n" % answer)
                else:
                    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(answer) + answer)
                await writer.drain()
        except (asyncio.IncompleteReadError, OSError):
            pass
        finally:
            self._writers.discard(writer)
            writer.close()


async def hang(writer: asyncio.StreamWriter) -> None:
    await writer.wait_closed()


async def trickle(writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
    while True:
        writer.write(b"vllm:num_requests_running 1\n")
        await writer.drain()
        await asyncio.sleep(0.01)


class Pool:
    """The picker's side of it."""

    def __init__(self, engines: list[Engine], fetcher: HttpFetcher, limits: list[str]) -> None:
        self.datastore = Datastore(MonotonicClock())
        self.datastore.apply([EndpointSpec(f"e{number}", engine.address) for number, engine in enumerate(engines)])
        self.limits = limits
        self.restarted: list[str] = []
        self.scraper = Scraper(
            self.datastore,
            fetcher,
            families=lambda endpoint, text: family_for(engine_label(endpoint.labels), text),
            clock=MonotonicClock(),
            rng=random.Random(1),
            on_restart=lambda endpoint: self.restarted.append(endpoint.name),
            interval_min_s=INTERVAL_S,
            interval_max_s=0.05,
        )
        self.models = ModelsPoller(self.datastore, fetcher, rng=random.Random(1), interval_s=0.05)

    def endpoint(self, number: int) -> Endpoint:
        return next(endpoint for endpoint in self.datastore.endpoints.values() if endpoint.name == f"e{number}")

    async def until(self, true: Callable[[], bool]) -> None:
        async with asyncio.timeout(SOON_S):
            while not true():  # noqa: ASYNC110 - polled with a deadline
                await asyncio.sleep(0.002)

    async def further(self, engine: Engine, questions: int = 5) -> None:
        """Until this engine has been asked so often again."""
        wanted = len(engine.asked) + questions
        await self.until(lambda: len(engine.asked) >= wanted)


@asynccontextmanager
async def pool(*engines: Engine, fetch_s: float = FETCH_S) -> AsyncIterator[Pool]:
    limits: list[str] = []
    for engine in engines:
        await engine.start()
    try:
        async with HttpFetcher(timeout_s=fetch_s, limit_hit=limits.append) as fetcher:
            made = Pool(list(engines), fetcher, limits)
            tasks = [asyncio.create_task(made.scraper.run()), asyncio.create_task(made.models.run())]
            yield made
            for task in tasks:
                assert not task.done()
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
    finally:
        for engine in engines:
            await engine.stop()


def load(endpoint: Endpoint) -> tuple[float, float, float]:
    return endpoint.waiting, endpoint.running, round(endpoint.kv_usage, 3)


async def test_a_recorded_answer_is_read() -> None:
    engine = Engine({"/metrics": BUSY})
    async with pool(engine) as made:
        await made.until(lambda: made.endpoint(0).scraped_at_s > 0)
        assert load(made.endpoint(0)) == (8.0, 4.0, 0.505)
        assert made.scraper.engine(made.endpoint(0)) == "vllm"
        await made.further(engine)
        assert made.restarted == []
        assert made.endpoint(0).healthy


@pytest.mark.parametrize("bad", [hang, trickle])
async def test_one_that_hangs_on_its_metrics_alone_fails_alone(bad: Answer) -> None:
    good = Engine({"/metrics": BUSY})
    hanging = Engine({"/metrics": bad, "/v1/models": b'{"data":[{"id":"m","owned_by":"vllm"}]}'})
    async with pool(good, hanging, fetch_s=0.05) as made:
        await made.until(lambda: not made.endpoint(1).healthy)
        assert made.endpoint(1).scrape_failures >= 3
        assert made.limits.count("scrape_time") >= 3
        assert made.endpoint(0).healthy
        assert len(good.asked) > 2 * hanging.asked.count("/metrics")
        await made.until(lambda: made.models.view.serves(made.endpoint(1), "m") is True)
        hanging.paths["/metrics"] = BUSY
        await made.until(lambda: made.endpoint(1).healthy)
        assert load(made.endpoint(1)) == (8.0, 4.0, 0.505)


async def test_fifty_megabytes_neither_delay_the_others_nor_are_kept() -> None:
    sent = 0

    async def flood(writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n" + BUSY)
        for _ in range(50 << 4):
            writer.write(b"#" * 65_535 + b"\n")
            sent += 65_536
            await writer.drain()

    good, flooding = Engine({"/metrics": BUSY}), Engine({"/metrics": flood})
    async with pool(good, flooding, fetch_s=20) as made:
        await made.until(lambda: not made.endpoint(1).healthy)
        await made.further(good)
        assert made.endpoint(0).healthy
        assert made.limits.count("scrape_bytes") >= 3
        assert sent < (len(made.limits) + 1) * (16 << 20)


async def test_one_that_flaps_stays_until_it_fails_for_good() -> None:
    engine = Engine({"/metrics": BUSY})
    turns = 0

    async def every_other(writer: asyncio.StreamWriter) -> None:
        nonlocal turns
        turns += 1
        body, status = (BUSY, b"200 OK") if turns % 2 else (b"", b"503 Service Unavailable")
        writer.write(b"HTTP/1.1 %s\r\nContent-Length: %d\r\n\r\n" % (status, len(body)) + body)

    async with pool(engine) as made:
        await made.until(lambda: made.endpoint(0).scraped_at_s > 0)
        engine.paths["/metrics"] = every_other
        await made.further(engine, 20)
        assert made.endpoint(0).healthy
        assert made.scraper.poll_errors_total >= 5
        engine.paths["/metrics"] = 503
        await made.until(lambda: not made.endpoint(0).healthy)
        engine.paths["/metrics"] = BUSY
        await made.until(lambda: made.endpoint(0).healthy)


async def test_an_address_that_another_engine_took_over() -> None:
    engine = Engine({"/metrics": BUSY})
    async with pool(engine) as made:
        await made.until(lambda: made.scraper.engine(made.endpoint(0)) == "vllm")
        engine.paths["/metrics"] = SGLANG
        await made.until(lambda: made.scraper.engine(made.endpoint(0)) == "sglang")
        assert load(made.endpoint(0)) == (2.0, 3.0, 0.25)
        assert made.restarted == ["e0"]


async def test_one_without_metrics_is_healthy_and_its_models_are_known() -> None:
    ollama = Engine({"/v1/models": b'{"object":"list","data":[{"id":"llama3:latest","object":"model","owned_by":"library"}]}'})
    async with pool(ollama) as made:
        await made.until(lambda: made.scraper.without_metrics == 1)
        assert ollama.asked.count("/metrics") == 1
        await made.further(ollama, 10)
        assert made.endpoint(0).healthy
        assert made.scraper.poll_errors_total == 0
        view = made.models.view
        await made.until(lambda: view.known("llama3") is True)
        assert (view.serves(made.endpoint(0), "llama3:latest"), view.known("qwen")) == (True, False)


async def test_one_that_serves_its_metrics_elsewhere() -> None:
    engine = Engine(
        {"/prometheus/metrics": b"trtllm_num_requests_waiting 5\ntrtllm_num_requests_running 6\ntrtllm_kv_cache_utilization 0.5\n"}
    )
    async with pool(engine) as made:
        await made.until(lambda: made.endpoint(0).scraped_at_s > 0)
        assert load(made.endpoint(0)) == (5.0, 6.0, 0.5)
        assert engine.asked.count("/metrics") == 1


async def test_one_that_ends_and_begins_anew_has_lost_its_cache() -> None:
    engine = Engine({"/metrics": BUSY})
    async with pool(engine) as made:
        await made.until(lambda: made.endpoint(0).scraped_at_s > 0)
        await engine.stop()
        await made.until(lambda: not made.endpoint(0).healthy)
        assert made.restarted == []
        engine.paths["/metrics"] = BUSY.replace(
            b"process_start_time_seconds 1.79522717686e+09", b"process_start_time_seconds 1.79522727686e+09"
        )
        await engine.start()
        await made.until(lambda: made.endpoint(0).healthy)
        assert made.restarted == ["e0"]
        await made.further(engine)
        assert made.restarted == ["e0"]
