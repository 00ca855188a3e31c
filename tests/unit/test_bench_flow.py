"""The bench of flow control: the rows it writes, its exit codes, and that what it measures is real."""

import json

import pytest

from bench import flow
from bench.__main__ import main

SMALL = ["flow", "--queued", "50,120", "--requests", "20", "--rounds", "1", "--flows", "5", "--endpoints", "3"]


def test_rows_of_every_policy_and_size(tmp_path, capsys):
    written = tmp_path / "rows.json"
    assert main([*SMALL, "--json", str(written)]) == 0
    rows = json.loads(written.read_text())["rows"]
    expected = {(policy, op, queued) for policy in flow.POLICIES for op in ("enqueue", "dispatch", "dispatch_one") for queued in (50, 120)}
    assert {(row["policy"], row["op"], row["queued"]) for row in rows} == expected
    for row in rows:
        assert row["cpu_us"] > 0
        assert 100 < row["bytes_per_request"] < 10_000
        assert "met" not in row, "the target is that of 100 000"
    assert capsys.readouterr().out.count("measured: ") == 8


def test_the_target_is_checked_at_its_size_alone(monkeypatch, capsys):
    monkeypatch.setattr(flow, "TARGET_QUEUED", 120)
    for target_us, code, word in ((1e9, 0, "PASS"), (0.0001, 1, "MISS")):
        monkeypatch.setattr(flow, "TARGET_US", target_us)
        assert main([*SMALL, "--policies", "strict", "--check"]) == code
        assert capsys.readouterr().out.count(word) == 2, "enqueue and dispatch with 120 queued"


@pytest.mark.parametrize("wrong", [["--queued", "0"], ["--queued", "many"], ["--policies", "fifo"], ["--requests", "0"]])
def test_arguments_that_make_no_sense(wrong, capsys):
    with pytest.raises(SystemExit):
        main(["flow", *wrong])
    capsys.readouterr()


def test_the_world_is_full_and_goes_on_in_order():
    world = flow.World("round-robin", flows=3, endpoints=2)
    world.enqueue(world.arrivals(30))
    assert world.flow.requests == 30
    world.dispatch(7)
    world.dispatch_singly(4)
    assert world.flow.requests == 19
    assert sum(world.flow.counts.outcomes.values()) == 11
