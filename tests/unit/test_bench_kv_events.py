"""`bench kv-events`: its rows, and that its stand-in engines publish what the index understands."""

import argparse
import json
from pathlib import Path

import pytest

from bench import kv_events as command
from bench.kv_events.cell import Plan, measure
from bench.kv_events.workload import Engines
from epp.prefix import kv_events
from epp.prefix.precise import PreciseIndex


def test_a_row_has_what_the_table_and_machines_read() -> None:
    row = measure(Plan(endpoints=3, blocks=6_000, steady_blocks=2_000, decisions=30, ingest_blocks_per_s=50_000, prompt_tokens=512))
    assert {column.key for column in command.COLUMNS} - {"target", "met"} <= set(row)
    assert row["endpoints"] == 3
    assert 6_000 <= row["blocks"] < 8_000
    assert 0 < row["distinct_blocks"] <= row["blocks"]
    assert row["decision_alone_p50_us"] <= row["decision_p50_us"] <= row["decision_p99_us"]
    assert row["blocks_per_s_per_core"] > 0


def test_the_index_takes_every_event_of_the_stand_ins() -> None:
    engines, index = Engines(2, 4_000, seed=1), PreciseIndex(1 << 30)
    stored = removed = 0
    for endpoint, frame in [*engines.fill(), *((number % 2, engines.step(number % 2)[0]) for number in range(100))]:
        for event in kv_events.decode(frame):
            index.apply(endpoint, event)
            stored += len(event.hashes) if isinstance(event, kv_events.BlockStored) else 0
            removed += isinstance(event, kv_events.BlockRemoved)
    assert +index.counts == {"stored": stored, "removed": removed}
    assert index.blocks == stored - removed
    assert removed > 1_000


def test_the_command_prints_a_table_and_writes_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    parser = argparse.ArgumentParser()
    command.configure(parser)
    out = tmp_path / "out.json"
    args = parser.parse_args(
        ["--endpoints", "2", "--blocks", "3000", "--decisions", "5", "--prompt-tokens", "64", "--json", str(out), "--check"]
    )
    monkeypatch.setattr(command, "BLOCKS_TARGET_PER_S", 10**12)
    assert command.run(args) == 1, "nobody stores a million million"
    assert "MISS" in capsys.readouterr().out
    (row,) = json.loads(out.read_text())["rows"]
    assert {"endpoints", "blocks_per_s_per_core", "bytes_per_block", "decision_p99_us"} <= set(row)


@pytest.mark.parametrize("text", ["", "0", "16,", "a", "-1"])
def test_pool_sizes_are_numbers(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    command.configure(parser)
    with pytest.raises(SystemExit):
        parser.parse_args([f"--endpoints={text}"])
    assert "whole numbers" in capsys.readouterr().err
