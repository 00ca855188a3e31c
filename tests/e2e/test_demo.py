"""`epp demo` as a user runs it: engines, picker and Envoy as processes of their own, told to end in every way there is."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
from programs import Program, descendants

pytestmark = pytest.mark.e2e

SMALL = ("--duration", "8", "--time-scale", "8", "--concurrency", "40", "--engines", "2")


class Demo(Program):
    stop_signal = signal.SIGINT

    def __init__(self, *flags: str) -> None:
        super().__init__("demo", "--plain", *flags)

    def await_phase(self, name: str) -> None:
        self.await_output(rf"^ +[\d.]+ s  {name}: [1-9]\d*/\d+ requests|^ +2\.\d s  {name}: ")

    def part(self, name: str) -> int:
        """The pid of the child whose command line has this word."""
        (pid,) = (pid for pid in descendants(self.process.pid) if name in Path(f"/proc/{pid}/cmdline").read_text().split("\0"))
        return pid


def row(timestamp_ms: int, input_length: int, hash_ids: list[int]) -> str:
    return json.dumps({"timestamp": timestamp_ms, "input_length": input_length, "output_length": 4, "hash_ids": hash_ids}) + "\n"


def test_the_chat_workload_is_sent_twice_and_compared(tmp_path: Path) -> None:
    results = tmp_path / "results.json"
    with Demo(*SMALL, "--json", str(results)) as demo:
        demo.await_phase("picker")
        demo._offspring |= descendants(demo.process.pid)
        assert demo.wait() == 0, repr(demo)
        assert "the same requests, two ways" in demo.stdout
        assert "time to first token, mean" in demo.stdout
        assert "\x1b" not in demo.stdout
        assert demo.stderr == ""
    report = json.loads(results.read_text())
    baseline, picker = report["phases"]["round robin"], report["phases"]["picker"]
    assert baseline["requests"] == picker["requests"] > 20
    assert baseline["errors"] == picker["errors"] == 0
    assert baseline["prompt_tokens"] == picker["prompt_tokens"]
    assert sum(picker["picks"].values()) == sum(picker["per_engine"].values()) == picker["requests"]
    counts = list(baseline["per_engine"].values())
    assert max(counts) - min(counts) <= 1
    assert picker["cached_tokens"] > baseline["cached_tokens"]
    assert report["round_robin_over_picker"]["ttft_s_mean"] > 0


def test_failed_requests_are_counted_shown_and_the_exit_code(tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    blocks = 2100  # more tokens than an engine has KV cache for
    rows = [row(100 * number, 1000, [number % 3, number]) for number in range(20)]
    trace.write_text("".join([*rows[:10], row(1000, blocks * 512, list(range(blocks))), *rows[10:]]))
    with Demo("--trace", str(trace), "--duration", "12", "--transport", "grpc", "--engines", "2") as demo:
        assert demo.wait() == 1, repr(demo)
        assert "21 of the first 21 requests of trace.jsonl" in demo.stdout
        for phase in ("round robin", "picker"):
            assert f"{phase}: 1 failed and 0 were not sent for it; the first:" in demo.stdout
        assert demo.stdout.count("HTTP 400") == 2
        assert "the same requests, two ways" in demo.stdout


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_everything(number: signal.Signals) -> None:
    with Demo(*SMALL) as demo:
        demo.await_phase("round robin")
        assert len(descendants(demo.process.pid)) == 3
        demo.signal(number)
        assert demo.wait() == 130
        assert demo.stdout.splitlines()[-1] == "interrupted: everything is stopped"
        assert demo.stderr == ""


def test_a_signal_while_it_starts_ends_everything() -> None:
    with Demo(*SMALL) as demo:
        demo.await_output("^starting the picker")
        demo.signal(signal.SIGINT)
        assert demo.wait() == 130


def test_even_killed_it_leaves_nothing_behind() -> None:
    with Demo(*SMALL) as demo:
        demo.await_phase("round robin")
        demo.signal(signal.SIGKILL)
        assert demo.wait() == -signal.SIGKILL


@pytest.mark.parametrize(("word", "name"), [("sim", "engines' process"), ("serve", "picker")])
def test_a_part_that_dies_ends_the_demo_and_is_named(word: str, name: str) -> None:
    with Demo(*SMALL) as demo:
        demo.await_phase("round robin")
        demo._offspring |= descendants(demo.process.pid)
        os.kill(demo.part(word), signal.SIGKILL)
        assert demo.wait() == 1
        assert demo.stderr.startswith(f"epp: the {name} ended by itself (exit -9)")


def test_a_part_that_can_t_start_is_named(tmp_path: Path) -> None:
    broken = tmp_path / "envoy"
    broken.write_text("#!/bin/sh\necho 'critical no such thing' >&2\nexit 1\n")
    broken.chmod(0o755)
    with Demo(*SMALL, "--envoy-path", str(broken)) as demo:
        assert demo.wait() == 1
        assert demo.stderr == "epp: Envoy did not start: no such thing\n"
