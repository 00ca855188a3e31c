"""Flags to options to load; that the parts work together is checked in e2e/test_demo."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import pytest

from epp.demo import DemoOptions, add_demo_arguments, demo_options
from epp.demo.processes import Parts
from epp.demo.readings import CpuTime, EngineReading, cpu_time
from epp.demo.runner import CHAT_KV_BLOCKS, SCHEDSTAT, TRACE_KV_BLOCKS, Meter, make_load, make_notes, run_demo
from epp.engines.fetch import FetchError
from epp.errors import ConfigError
from epp.types import Address

ROW = '{"timestamp": %d, "input_length": 5, "output_length": 1, "hash_ids": [1]}\n'


def parse(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_demo_arguments(parser)
    return parser.parse_args(argv)


def test_without_flags_it_is_the_default() -> None:
    assert demo_options(parse()) == DemoOptions()


def test_every_flag_reaches_the_options() -> None:
    argv = "--plain --duration 9 --engines 2 --concurrency 5 --time-scale 8 --seed 7 --json r.json --transport grpc --envoy-path /e"
    assert demo_options(parse(*argv.split())) == DemoOptions(
        plain=True, duration_s=9, engines=2, concurrency=5, time_scale=8, seed=7, json="r.json", transport="grpc", envoy_path="/e"
    )


def test_more_engines_get_more_load() -> None:
    assert demo_options(parse("--engines", "8")).concurrency == 2 * DemoOptions().concurrency


def test_a_trace_runs_faster_and_needs_no_concurrency() -> None:
    options = demo_options(parse("--trace", "t.jsonl", "--limit", "20"))
    assert (options.trace, options.limit, options.time_scale) == ("t.jsonl", 20, 10.0)
    assert demo_options(parse("--trace", "t.jsonl", "--time-scale", "2")).time_scale == 2.0
    with pytest.raises(ConfigError, match="--concurrency"):
        demo_options(parse("--trace", "t.jsonl", "--concurrency", "3"))


@pytest.mark.parametrize(
    "argv", [("--engines", "0"), ("--duration", "-1"), ("--time-scale", "nan"), ("--limit", "many"), ("--transport", "x")]
)
def test_a_wrong_flag_is_refused(argv: tuple[str, str]) -> None:
    with pytest.raises(argparse.ArgumentError, match=argv[0]):
        parse(*argv)


def test_a_longer_demo_sends_more() -> None:
    short, long = (make_load(DemoOptions(duration_s=duration_s)) for duration_s in (20, 60))
    assert 0 < short.requests < long.requests
    assert long.kv_blocks == CHAT_KV_BLOCKS
    assert make_load(DemoOptions(duration_s=1)).requests > 0


def test_a_trace_is_cut_to_fit_the_duration(tmp_path: Path) -> None:
    trace = tmp_path / "t.jsonl"
    trace.write_text("".join(ROW % (second * 1000) for second in range(0, 100, 10)))
    load = make_load(DemoOptions(trace=str(trace), duration_s=16, time_scale=10))  # 5 s a phase: 50 s of the trace, 20 kept for its tail
    assert (load.requests, load.kv_blocks, load.title) == (4, TRACE_KV_BLOCKS, "4 of the first 10 requests of t.jsonl")
    assert make_load(DemoOptions(trace=str(trace), duration_s=1)).requests == 1


async def test_faults_of_flags_and_files_are_found_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--json"):
        await run_demo(parse("--json", str(tmp_path / "missing" / "r.json")))
    with pytest.raises(ConfigError, match="can't be read"):
        await run_demo(parse("--trace", str(tmp_path / "missing.jsonl")))


def test_the_flags_need_nothing_of_the_optional_extra() -> None:
    script = "import sys; sys.modules['rich'] = sys.modules['envoy_data_plane'] = None; import epp.demo, epp.cli; epp.cli.parser()"
    subprocess.run([sys.executable, "-c", script], check=True, env={"PYTHONPATH": ":".join(sys.path)})


@pytest.mark.parametrize(("module", "extra"), [("rich", "demo"), ("envoy_data_plane", "envoy")])
def test_without_the_extra_the_remedy_is_named(module: str, extra: str) -> None:
    script = f"import sys; sys.modules[{module!r}] = None; from epp.cli import main; sys.exit(main(['demo', '--plain']))"
    run = subprocess.run(
        [sys.executable, "-c", script], check=False, capture_output=True, text=True, env={"PYTHONPATH": ":".join(sys.path)}
    )
    assert run.returncode == 1
    assert f"pip install 'envoy-endpoint-picker[{extra}]'" in run.stderr
    assert "Traceback" not in run.stderr


class Pages:
    """An `epp.engines.fetch.Fetcher` over made-up pages."""

    def __init__(self, pages: dict[str, bytes]) -> None:
        self.pages = pages

    async def fetch(self, url: str) -> bytes:
        if url not in self.pages:
            raise FetchError("gone")
        return self.pages[url]


async def test_the_meter_counts_from_the_start_of_a_phase_and_survives_a_silent_engine() -> None:
    engine, picker = Address("127.0.0.1", 1), Address("127.0.0.1", 2)
    page = 'vllm:num_requests_running 1\nvllm:request_success_total{{finished_reason="length"}} {}\n'
    count = 'llm_d_epp_scheduler_attempts_total{{status="success",endpoint_name="engine-1"}} {}\n'

    def pages(finished: int, picked: int) -> dict[str, bytes]:
        return {f"http://{engine}/metrics": page.format(finished).encode(), f"http://{picker}/metrics": count.format(picked).encode()}

    fetcher = Pages(pages(5, 3))
    meter = Meter(Parts({"engine-1": engine}, picker, Address("127.0.0.1", 3), Address("127.0.0.1", 4)), fetcher)
    await meter.start()
    assert meter.engines == {"engine-1": EngineReading(running=1)}
    fetcher.pages = pages(9, 10)
    await meter.read()
    assert (meter.engines["engine-1"].finished, meter.picks) == (4, {"engine-1": 7})
    assert [row.picks for row in meter.rows(picked=True)] == [7]
    assert [row.picks for row in meter.rows(picked=False)] == [5]
    fetcher.pages = {}
    await meter.read()
    assert meter.engines["engine-1"].finished == 4


def test_a_busy_machine_is_said() -> None:
    start = cpu_time("1000000000 500000000 77\n")
    assert start == CpuTime(1.0, 0.5)
    assert cpu_time("3000000000 5500000000 99").crowded(start) == 2.5
    assert start.crowded(start) == 0.0
    (quiet,) = make_notes(DemoOptions(), [], 0.9)
    same, busy = make_notes(DemoOptions(), [], 2.53)
    assert same == quiet
    assert busy.startswith("This machine was busy: the client waited 2.5 times as long for a CPU as it had one.")


@pytest.mark.parametrize("text", ["", "1 2", "a b c"])
def test_a_system_that_tells_otherwise_is_not_believed(text: str) -> None:
    with pytest.raises(ValueError, match=r"values to unpack|invalid literal"):
        cpu_time(text)


@pytest.mark.skipif(not SCHEDSTAT.exists(), reason="this kernel does not say")
def test_linux_tells_it_so() -> None:
    assert cpu_time(SCHEDSTAT.read_text()).used_s > 0
