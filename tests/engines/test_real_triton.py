"""Two Tritons, served on one port and measured on another. Their numbers are what the tests tell them; names and text are Triton's."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import installed
from http_clients import ask, eventually
from pools import endpoints
from programs import Gateway
from servers import Triton, fetch, numbers

from epp.engines.detect import family_for

INFER = "/v2/models/tensorrt_llm/infer"
IDLE = (0.0, 0.0, 5.0, 100.0)


@pytest.fixture(scope="module")
def pair(measured: Callable[[str], None]) -> Iterator[tuple[Triton, Triton]]:
    place = installed("triton")
    with Triton(place) as first, Triton(place) as second:
        measured(f"Triton ready in {first.start_s:.1f} s")
        yield first, second


@pytest.fixture(scope="module")
def gateway(pair: tuple[Triton, Triton], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    rows = [
        {"name": f"triton-{i}", "address": engine.address.host, "port": engine.address.port, "metricsPort": engine.metrics.port}
        for i, engine in enumerate(pair)
    ]
    file = Path(tmp_path_factory.mktemp("triton"), "endpoints.json")
    file.write_text(json.dumps({"endpoints": rows}))
    flags = ("--endpoints-file", str(file), "--destination", "original-dst", "--unknown-paths", "route")
    with Gateway((), *flags) as program:
        yield program


async def until_read(gateway: Gateway, engine: Triton, **expected: float) -> None:
    async def reached() -> bool:
        row = endpoints(gateway)[str(engine.address)]
        return all(row[name] == pytest.approx(value, abs=1e-3) for name, value in expected.items())

    await eventually(reached, f"{expected} of {endpoints(gateway)[str(engine.address)]}")


async def test_its_numbers_are_read_from_the_other_port(gateway: Gateway, pair: tuple[Triton, Triton]) -> None:
    first, second = pair
    assert b" Nan" in fetch(first.metrics, "GET", "/metrics")[1], "what Triton prints for a quantile before the first request"
    await until_read(gateway, first, waiting=0, running=0, kv_usage=0)
    first.report(waiting=9, active=12, used=85, blocks=100)
    second.report(waiting=0, active=2, used=10, blocks=100)
    await until_read(gateway, first, waiting=9, running=3, kv_usage=0.85)
    await until_read(gateway, second, waiting=0, running=2, kv_usage=0.10)
    assert {row["state"] for row in endpoints(gateway).values()} == {"healthy"}


def test_the_capacity_and_the_family(pair: tuple[Triton, Triton]) -> None:
    pair[0].report(waiting=9, active=12, used=85, blocks=100)
    text = fetch(pair[0].metrics, "GET", "/metrics")[1]
    family = family_for("", text)
    assert family is not None
    assert family.name == "triton-tensorrt-llm"
    reading = family.read(text)
    assert (reading.kv_blocks, reading.kv_block_tokens) == (100, 64)


async def test_requests_go_to_the_idle_one(gateway: Gateway, pair: tuple[Triton, Triton]) -> None:
    first, second = pair
    for busy, idle in (pair, (second, first)):
        busy.report(waiting=9, active=12, used=85, blocks=100)
        idle.report(waiting=0, active=0, used=5, blocks=100)
        await until_read(gateway, busy, waiting=9, kv_usage=0.85)
        await until_read(gateway, idle, waiting=0, kv_usage=0.05)
        before = [engine.requests_served() for engine in (busy, idle)]
        for _ in range(5):
            answer = await ask(gateway.address, INFER, numbers(*IDLE), {"content-type": "application/json"})
            assert answer.status == 200, answer
        after = [engine.requests_served() for engine in (busy, idle)]
        assert after == [before[0], before[1] + 5]
