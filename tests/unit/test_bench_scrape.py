"""The scraping bench: its figures from given samples, its model servers, and a whole small run."""

import asyncio
import json
import math
import random

import aiohttp
import grpc.aio
import pytest

from bench import BenchError, metrics_stub
from bench.__main__ import main
from bench.processes import Child
from bench.scrape import CORES_TARGET, Sample, age_quantile_s, hold, in_flight, missed, row, serve_arguments
from epp.engines.vllm import Vllm


def test_of_an_even_gap_every_age_up_to_it_is_as_likely() -> None:
    assert age_quantile_s([0.1] * 7, 0.5) == pytest.approx(0.05)
    assert age_quantile_s([0.1] * 7, 0.99) == pytest.approx(0.099)


def test_a_long_gap_counts_by_its_length() -> None:
    gaps = [1.0, *[0.1] * 10]  # half of all time is in the long one
    assert age_quantile_s(gaps, 0.5) == pytest.approx(0.1 - 0.1 * (1.1 - 1.0) / 1.1)
    assert age_quantile_s(gaps, 0.95) == pytest.approx(0.9)
    assert math.isnan(age_quantile_s([], 0.5))


def test_ages_are_those_of_decisions_at_any_time() -> None:
    rng = random.Random(1)
    gaps = [rng.expovariate(10) for _ in range(2000)]
    ages = sorted(gap * rng.random() for gap in rng.choices(gaps, weights=gaps, k=200_000))
    for quantile in (0.1, 0.5, 0.99):
        assert age_quantile_s(gaps, quantile) == pytest.approx(ages[int(quantile * len(ages))], rel=0.05)


def test_a_row_is_told_per_scrape_and_a_busy_one_has_a_target() -> None:
    busy, idle, costly = (
        row(Sample(100, state, cores, 2.0, [0.05] * 400, 0.1)) for state, cores in (("busy", 0.02), ("idle", 0.9), ("busy", 0.26))
    )
    assert (busy["endpoints"], busy["cores"], busy["scrapes_per_s"], busy["scrape_cpu_us"]) == (100, 0.02, 200.0, 100.0)
    assert (busy["age_p50_s"], busy["age_p99_s"]) == (0.025, 0.0495)
    assert (busy["target_cores"], busy["met"]) == (CORES_TARGET, True)
    assert "met" not in idle
    assert costly["met"] is False
    assert missed([busy, idle, costly]) == 1


def test_an_idle_pool_may_not_have_been_asked_twice() -> None:
    assert row(Sample(3, "idle", 0.01, 0.5, [], 0.0))["age_p99_s"] is None


def test_the_picker_gets_every_endpoint_and_further_arguments() -> None:
    assert serve_arguments([1, 2], [7, 8, 9], "--config-file 'a b.yaml'") == [
        *("epp", "serve", "--secure-serving=false", "--drain-timeout=0s", "--endpoint", "127.0.0.1:1", "--endpoint", "127.0.0.1:2"),
        *("--grpc-port", "7", "--grpc-health-port", "8", "--metrics-port", "9", "--config-file", "a b.yaml"),
    ]


def test_the_texts_in_rotation_are_a_live_engine_never_one_that_restarts() -> None:
    readings = [Vllm().read(metrics_stub.exposition(serial)) for serial in range(metrics_stub.VARIANTS)]
    assert len({(reading.running, reading.waiting, reading.kv_usage) for reading in readings}) == metrics_stub.VARIANTS
    assert len({(reading.started_s, reading.prefix_queries) for reading in readings}) == 1


async def test_the_stub_tells_how_long_it_was_not_asked() -> None:
    runner, ports = await metrics_stub.start(2)
    try:
        async with aiohttp.ClientSession() as session:

            async def get(port: int, path: str) -> tuple[int, bytes]:
                async with session.get(f"http://127.0.0.1:{port}{path}") as response:
                    return response.status, await response.read()

            for port in (ports[0], ports[1], ports[0], ports[0]):
                assert (await get(port, "/metrics"))[0] == 200
            gaps = json.loads((await get(ports[1], "/bench/gaps"))[1])
            assert len(gaps) == 2
            assert all(0 < gap < 5 for gap in gaps)
            assert json.loads((await get(ports[1], "/bench/gaps"))[1]) == []
            assert json.loads((await get(ports[0], "/v1/models"))[1])["data"][0]["id"]
            assert (await get(ports[0], "/other"))[0] == 404
    finally:
        await runner.cleanup()


async def test_a_request_that_is_not_held_where_it_should_be_stops_the_run() -> None:
    with Child(["bench", "echo"], announces=True) as echo:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{echo.announced['port']}") as channel:
            with pytest.raises(BenchError, match=r"a request that may go to 127\.0\.0\.1:1 only went to 127\.0\.0\.1:8000"):
                await hold(channel, "127.0.0.1:1")


async def test_nobody_to_hold_requests() -> None:
    server = await asyncio.start_server(lambda _reader, writer: writer.close(), "127.0.0.1", 0)
    async with server:
        with pytest.raises(grpc.aio.AioRpcError):
            async with in_flight(server.sockets[0].getsockname()[1], ["127.0.0.1:1"]):
                pass


def test_a_small_run_from_end_to_end(tmp_path, capsys) -> None:
    out = tmp_path / "out.json"
    assert main(["scrape", "--endpoints", "3", "--seconds", "0.5", "--json", str(out)]) == 0
    content = json.loads(out.read_text())
    busy = content["rows"][1]
    assert [(each["endpoints"], each["state"]) for each in content["rows"]] == [(3, "idle"), (3, "busy")]
    assert busy["scrapes_per_s"] > 20
    assert 0 < busy["cores"] < 1
    assert 0 < busy["age_p50_s"] <= busy["age_p99_s"] < 1
    assert "Targets missed:" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["--endpoints", "0"], ["--endpoints", "a"], ["--seconds", "x"]])
def test_senseless_options_are_refused(arguments, capsys) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["scrape", *arguments])
    assert exit_.value.code == 2
    assert arguments[0] in capsys.readouterr().err
