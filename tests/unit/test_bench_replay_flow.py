"""Flow control in the replay: the product's own, with the simulation's timers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from bench import BenchError
from bench.__main__ import main
from bench.replay import flow, flow_scenarios, flow_stats
from bench.replay.cells import Cell, Settings, configured, play, row_of
from bench.replay.flow_scenarios import FLOW_SCENARIOS
from bench.replay.profiles import profile_of
from bench.replay.scenarios import SCENARIOS, Setting
from bench.replay.workload import Arrival, Workload

SMALL = Settings(replicas=3, usage=True)


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (flow_scenarios, flow_stats):
        monkeypatch.setattr(module, "DURATION_S", 60.0)
    monkeypatch.setattr(flow_stats, "WARMUP_S", 15.0)
    monkeypatch.setattr(flow_scenarios, "BURST_REQUESTS", 300)


def row(scenario: str, policy: str, replicas: int = 3) -> dict[str, float]:
    found = row_of(replace(SMALL, replicas=replicas), Cell(policy, flow.configured(policy), scenario, 1.0, 1))
    return {key: value for key, value in found.items() if isinstance(value, int | float)}


def test_tenants_at_ten_to_one_are_served_alike_where_flows_take_turns() -> None:
    assert row("tenants", "fair")["jain"] >= 0.95
    assert row("tenants", "off")["jain"] <= 0.65


def test_a_tenant_of_high_priority_is_served_as_if_it_were_alone() -> None:
    alone, held, off = (row(*of, replicas=8) for of in (("alone", "off"), ("priority", "holdback"), ("priority", "off")))
    assert held["important_requests"] == alone["important_requests"] == held["important_answered"]
    assert held["important_ttft_p90_s"] <= 1.2 * alone["important_ttft_p90_s"]
    assert off["important_ttft_p90_s"] >= 10 * alone["important_ttft_p90_s"]
    assert held["served_tokens_per_s"] >= 0.8 * off["served_tokens_per_s"]


def test_a_burst_onto_a_pool_without_endpoints_is_served_whole() -> None:
    fair, off = row("cold-burst", "fair"), row("cold-burst", "off")
    assert (fair["requests"], fair["errors"]) == (300, 0)
    assert off["errors"] == 300
    assert fair["ttft_p50_s"] > flow_scenarios.COLD_S - 1


def test_requests_come_alone_as_they_come_with_others() -> None:
    def important(workload: Workload) -> list[tuple[float, int, int]]:
        return [(each.at_s, each.prompt_tokens, each.output_tokens) for each in workload.arrivals if each.tenant == "important"]

    setting = (2, profile_of(SMALL.profile), 1)
    assert important(FLOW_SCENARIOS["alone"](Setting(*setting))) == important(FLOW_SCENARIOS["priority"](Setting(*setting)))


@pytest.fixture
def chats(monkeypatch: pytest.MonkeyPatch) -> str:
    """Few enough that nobody ever has to wait, in two turns."""
    turns = [Arrival(1.0 * n, 2_000, 30, (n, n + 100, n + 200, n + 300), turns=(Arrival(3.0, 2_400, 20, (n, n + 100)),)) for n in range(20)]
    monkeypatch.setitem(SCENARIOS, "made", lambda _setting: Workload("made", turns))
    return "made"


@pytest.mark.parametrize("config", ["cost-aware-queued", "fair"])
def test_where_nobody_has_to_wait_it_changes_nothing(chats: str, config: str) -> None:
    text = flow.configured(config) if config == "fair" else configured(config)
    settings = replace(SMALL, usage=False)
    queued, plain = (play(settings, Cell("same", each, chats, 1.0, 1)) for each in (text, configured("cost-aware")))
    assert len(queued.jobs) == len(plain.jobs) == 40
    assert [job.replica for job in queued.jobs] == [job.replica for job in plain.jobs]
    assert [job.first_token_s for job in queued.jobs] == pytest.approx([job.first_token_s for job in plain.jobs])


def test_a_cell_gives_the_same_row_every_time() -> None:
    assert row("tenants", "fair") == row("tenants", "fair")


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = tmp_path / "rows.json"
    args = ["replay", "--flow", "priority,cold-burst", "--policies", "off,fair", "--seeds", "1", "--replicas", "2", "--jobs", "1"]
    assert main([*args, "--json", str(where)]) == 0
    text = capsys.readouterr().out
    assert "p90 / alone" in text
    assert "cold-burst: 5 000 requests" in text
    rows = json.loads(where.read_text())["rows"]
    assert [(each["workload"], each["policy"]) for each in rows] == [
        ("alone", "off"),
        ("priority", "off"),
        ("priority", "fair"),
        ("cold-burst", "off"),
        ("cold-burst", "fair"),
    ]
    assert all(each["over_alone"] > 1 for each in rows if each["workload"] == "priority")


@pytest.mark.parametrize("args", [["--flow", "nothing"], ["--flow", "tenants", "--policies", "nobody"]])
def test_what_is_not_known_is_said(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", *args]) == 2
    assert "no flow" in capsys.readouterr().err


def test_jain() -> None:
    assert flow_stats.jain([5, 5, 5]) == pytest.approx(1.0)
    assert flow_stats.jain([9, 0, 0]) == pytest.approx(1 / 3)
    assert flow_stats.jain([0, 0]) == 1.0
    with pytest.raises(BenchError, match="no flow control is named"):
        flow.configured("nobody")


def test_who_answered_nobody_has_no_latency(capsys: pytest.CaptureFixture[str]) -> None:
    found = row_of(SMALL, Cell("off", flow.configured("off"), "cold-burst", 1.0, 1))
    assert (found["errors"], found["ttft_p90_s"]) == (300, None)
    assert flow_stats.flow_figures(play(replace(SMALL, kv_tokens=64), Cell("off", flow.configured("off"), "alone", 1.0, 1)))[
        "important_ttft_p90_s"
    ] is None  # fmt: skip
    args = [
        "replay",
        "--flow",
        "priority,cold-burst",
        "--policies",
        "off",
        "--seeds",
        "1",
        "--replicas",
        "2",
        "--kv-tokens",
        "64",
        "--jobs",
        "1",
    ]
    assert main(args) == 0
    assert "nobody answered" in capsys.readouterr().out
