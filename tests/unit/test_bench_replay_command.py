"""Figures of the replay, its command, and the comparison of two of its files."""

import argparse
import dataclasses
import importlib
import json
import math
from datetime import UTC, datetime, timedelta, timezone

import pytest

from bench import BenchError, compare, replay
from bench.__main__ import main
from bench.replay import notes_of, policies_of, saturation, stats, tables
from bench.replay.baselines import BASELINES
from bench.replay.cells import Cell, Settings, configured, row_of
from bench.replay.simulation import Scrapes
from bench.replay.stats import Objective

SMALL = Settings(replicas=4)


def written(path, requests):
    """So many requests in 3-second ticks, three families of prefixes."""
    lines = []
    for number in range(requests):
        family, length = number % 3, 2_000 + 37 * (number % 60)
        ids = [family * 1_000 + place if place < 3 else 10_000 + number * 100 + place for place in range(-(-length // 512))]
        lines.append({"timestamp": number // 6 * 3_000, "input_length": length, "output_length": 20 + number % 60, "hash_ids": ids})
    path.write_text("\n".join(map(json.dumps, lines)) + "\n")
    return path


@pytest.fixture
def trace_file(tmp_path):
    return written(tmp_path / "trace.jsonl", 60)


# figures


def test_percentiles_and_intervals():
    assert [stats.percentile(range(1, 11), share) for share in (0.5, 0.9, 0.99)] == [5, 9, 10]
    assert stats.percentile([], 0.5) == 0.0
    found = stats.interval([1.0, 2.0, 3.0])
    assert (found.mean, found.half) == (2.0, pytest.approx(4.303 / math.sqrt(3)))
    assert stats.interval([5.0]) == stats.Interval(5.0, 0.0)


def test_saturation_is_where_round_robin_takes_ten_times_as_long():
    asked = []

    def ttft_p90_s(rate):
        asked.append(rate)
        return 1.0 / (1 - rate / 3) if rate < 3 else 1e9

    light_s = 1 / (1 - 0.1 / 3)
    exact = 3 * (1 - 1 / (10 * light_s))
    assert exact <= saturation.saturation_rate(ttft_p90_s) <= 1.02 * exact
    assert len(asked) < 15
    assert saturation.saturation_rate(lambda _rate: 1.0) == math.inf


def against_best(p90_s_by_seed):
    """Policy -> the table's last column, for those TTFT p90 of each policy and seed."""
    rows = [
        dict.fromkeys((key for key, _, _ in tables.FIGURES), 1.0)
        | {"workload": "w", "policy": policy, "rate": 1.0, "seed": seed, "ttft_p90_s": p90_s}
        for policy, of_seeds in p90_s_by_seed.items()
        for seed, p90_s in enumerate(of_seeds, 1)
    ]
    return {line.split()[0]: line.split()[-1] for line in tables.text_of(rows).splitlines()[3:] if line}


def test_policies_are_held_against_the_best_baseline_seed_by_seed():
    values = {"lmetric": (1.0, 2.0), "lpwl": (2.0, 3.0), "clairvoyant": (0.5, 1.0), "cost-aware": (0.9, 1.8)}
    last = against_best(values)
    assert last == {"lmetric": "best", "lpwl": "1.750±3.176", "clairvoyant": "0.500", "cost-aware": "0.900"}


def test_who_answered_nobody_has_no_latency_and_is_never_best(trace_file, capsys):
    """A pool of tiny caches: no engine takes anything."""
    settings = dataclasses.replace(SMALL, trace=str(trace_file), kv_tokens=1_024)
    row = row_of(settings, Cell("lpwl", "", "trace", 1.0, 1))
    assert {key for key, value in row.items() if value is None} == {
        "ttft_mean_s", "ttft_p50_s", "ttft_p90_s", "ttft_p99_s", "tpot_mean_s", "tpot_p90_s", "e2e_mean_s", "e2e_p90_s", "imbalance",
    }  # fmt: skip
    assert (row["errors"], row["goodput"]) == (60, 0.0)
    other = row_of(dataclasses.replace(settings, kv_tokens=0), Cell("lmetric", "", "trace", 1.0, 1))
    lines = {line.split()[0]: line.split() for line in tables.text_of([row, other]).splitlines()[3:] if line}
    assert lines["lpwl"] == ["lpwl", "-", "-", "-", "-", "-", "-", "0.000", "0.000", "60", "60", "-", "-"]
    assert lines["lmetric"][-1] == "best"
    arguments = ["--trace", str(trace_file), "--kv-tokens", "1024", "--policies", "lpwl,cost-aware", "--seeds", "2", "--jobs", "1"]
    assert main(["replay", *arguments]) == 0
    assert "nobody answered, errors 60" in capsys.readouterr().out
    assert main(["replay", *arguments, "--saturation"]) == 2
    assert "round robin has no answer at rate 0.1" in capsys.readouterr().err


def test_who_answered_nobody_on_one_seed_is_not_best():
    values = {"lmetric": (0.1, None), "lpwl": (2.0, 3.0), "cost-aware": (None, 1.5)}
    last = against_best(values)
    assert last == {"lmetric": "0.050", "lpwl": "best", "cost-aware": "0.500"}


# the command


def test_the_command_writes_what_it_prints(trace_file, tmp_path, capsys):
    out = tmp_path / "out.json"
    config = tmp_path / "mine.yaml"
    config.write_text(configured("epp-223"))
    arguments = ["replay", "--trace", str(trace_file), "--replicas", "2", "--rate", "1,3", "--policies", f"round-robin,mine={config}"]
    assert main([*arguments, "--seeds", "2", "--jobs", "1", "--json", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "trace: 60 requests, the last comes at" in printed
    assert "jittered within ticks of 3 s" in printed
    assert printed.count("[8/8]") == 1
    assert "trace, rate 3, mean and 95 % interval of 2 seeds" in printed
    document = json.loads(out.read_text())
    assert [(row["policy"], row["rate"], row["seed"]) for row in document["rows"]] == [
        (policy, rate, seed) for rate in (1.0, 3.0) for policy in ("round-robin", "mine") for seed in (1, 2)
    ]
    assert document["notes"]["arrivals"] == "jittered"
    assert main(["compare", str(out), str(out), "--check", "0"]) == 0


def test_saturation_chooses_the_rates(tmp_path, capsys):
    out = tmp_path / "out.json"
    path = written(tmp_path / "longer.jsonl", 400)
    arguments = ["--trace", str(path), "--raw", "--replicas", "1", "--policies", "round-robin,lmetric", "--seeds", "1", "--jobs", "1"]
    assert main(["replay", *arguments, "--saturation", "--json", str(out)]) == 0
    document = json.loads(out.read_text())
    saturated = document["notes"]["saturation"]["trace"]
    assert [row["rate"] for row in document["rows"][::2]] == [round(load * saturated, 4) for load in (0.6, 0.85, 1.1)]
    assert "round robin saturates at rate" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--scenario", "nothing"], "no scenario is named 'nothing'"),
        (["--scenario", "rag", "--policies", "nobody"], "no policy is named 'nobody'"),
        (["--scenario", "rag", "--policies", "mine=/nowhere.yaml"], "/nowhere.yaml: No such file"),
        (["--scenario", "rag", "--profile", "abacus"], "no profile is named 'abacus'"),
        (["--trace", "/nowhere.jsonl", "--policies", "random"], "/nowhere.jsonl: No such file"),
        (["--scenario", "rag", "--seeds", "0"], "at least 1"),
        (["--scenario", "rag", "--scrape-interval", "0"], "above 0"),
        (["--scenario", "rag", "--scrape-interval", "nan"], "above 0"),
        (["--scenario", "rag", "--event-delay", "nan"], "not below 0"),
        (["--scenario", "rag", "--replicas", "10001"], "--replicas 10001: at most 10000"),
        (["--scenario", "rag", "--policies", ""], "--policies: a name is missing"),
        (["--scenario", "rag", "--policies", "random,"], "--policies: a name is missing"),
        (["--scenario", "rag", "--policies", "=mine.yaml"], "--policies: a name is missing"),
        (["--scenario", "rag", "--policies", "a=x.yaml,random,a=y.yaml"], "--policies: a is there more than once"),
        (["--flow", "tenants", "--policies", ""], "--policies: a name is missing"),
        (["--flow", "tenants", "--policies", "off,off"], "--policies: off is there more than once"),
        (["--flow", ""], "--flow: a name is missing"),
        (["--flow", "tenants", "--rate", "2"], "--rate is not for --flow"),
        (["--flow", "tenants", "--saturation"], "--saturation is not for --flow"),
        (["--flow", "tenants", "--limit", "9"], "--limit is not for --flow"),
        (["--flow", "tenants", "--raw"], "--raw is not for --flow"),
        (["--scenario", "rag,rag"], "--scenario: rag is there more than once"),
        (["--scenario", "rag", "--rate", "1,2,1.0"], "--rate: 1 is there more than once"),
        (["--scenario", "rag", "--profile", "qwen3-32b-2xh100,abacus"], "no profile is named 'abacus'"),
        (["--scenario", "rag", "--profile", "llama-8b-h100,qwen3-32b-2xh100", "--replicas", "1"], "some would not be played"),
        (["--trace", ""], "Is a directory"),
    ],
)
def test_what_cannot_be_measured_is_said(arguments, message, capsys):
    assert main(["replay", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("limit", ["0", "-1", "some"])
def test_a_limit_is_at_least_one(limit, trace_file, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["replay", "--trace", str(trace_file), f"--limit={limit}"])
    assert stopped.value.code == 2
    assert "argument --limit: " in capsys.readouterr().err


def test_plots_are_refused_before_anything_is_played(trace_file, tmp_path, monkeypatch, capsys):
    found = importlib.import_module

    def without(name):
        if name.startswith("matplotlib"):
            raise ModuleNotFoundError(name)
        return found(name)

    monkeypatch.setattr(tables.importlib, "import_module", without)
    assert main(["replay", "--trace", str(trace_file), "--policies", "random", "--plot", str(tmp_path)]) == 2
    said = capsys.readouterr()
    assert "pip install" in said.err
    assert not said.out


def test_two_runs_differ_in_their_date_alone(trace_file, tmp_path):
    parser = argparse.ArgumentParser()
    replay.configure(parser)
    now = datetime(2026, 11, 21, 23, 59, 58, 5, tzinfo=timezone(timedelta(hours=2)))
    for name, at in (("a", now), ("b", now), ("c", now + timedelta(days=1))):
        arguments = ["--trace", str(trace_file), "--policies", "lmetric,epp-223", "--seeds", "2", "--json", str(tmp_path / name)]
        assert replay.run(parser.parse_args(arguments), lambda at=at: at) == 0
    texts = [(tmp_path / name).read_text() for name in "abc"]
    assert texts[0] == texts[1]
    assert '"date": "2026-11-21T21:59:58+00:00"' in texts[0]
    assert texts[0].replace("2026-11-21T21", "2026-11-22T21") == texts[2]


def test_everything_a_run_was_told_is_in_its_notes():
    others = {
        "replicas": 5, "profile": "llama-8b-h100,qwen3-32b-2xh100", "trace": "b.jsonl", "limit": 7, "block_tokens": 256, "jitter": False,
        "scrapes": Scrapes(0.1, 0.2), "objective": Objective(1.0, 0.2), "speeds": (0.5,), "offload_tokens": 9, "warmup_s": 8.0,
        "usage": True, "whole": 0.5, "event_delay_s": 0.3, "kv_tokens": 1_000,
    }  # fmt: skip
    assert set(others) == {field.name for field in dataclasses.fields(Settings)}
    settings = Settings(trace="a.jsonl")
    date = datetime(2026, 11, 21, tzinfo=UTC)
    notes = notes_of(settings, {}, date)
    assert json.loads(json.dumps(notes)) == notes
    assert all(notes_of(dataclasses.replace(settings, **{name: value}), {}, date) != notes for name, value in others.items())
    mixed = notes_of(dataclasses.replace(settings, profile=others["profile"]), {}, date)
    assert (mixed["profile"], mixed["kv_tokens"]) == ("llama-8b-h100,qwen3-32b-2xh100", [381_000, 307_328])


def test_a_broken_config_names_its_policy(tmp_path, trace_file, capsys):
    config = tmp_path / "broken.yaml"
    config.write_text("kind: Nothing\n")
    assert main(["replay", "--trace", str(trace_file), "--policies", f"mine={config}", "--seeds", "1", "--jobs", "1"]) == 2
    assert "policy mine" in capsys.readouterr().err


def test_policies_that_come_with_the_bench():
    names = dict(policies_of(""))
    assert {"cost-aware", "llm-d", "lmetric", "dynamo", "clairvoyant", "epp-223"} <= set(names)
    assert [name for name, config in names.items() if config] == [name for name in names if name not in BASELINES]


def test_plots_need_matplotlib_or_are_written(trace_file, tmp_path):
    rows = [
        row_of(dataclasses.replace(SMALL, trace=str(trace_file)), Cell("random", "", "trace", rate, seed))
        for rate in (1.0, 2.0)
        for seed in (1, 2)
    ]
    try:
        import matplotlib as mpl  # noqa: F401
    except ImportError:
        with pytest.raises(BenchError, match="matplotlib"):
            tables.plot(rows, tmp_path)
        return
    written = tables.plot(rows, tmp_path)
    assert [path.name for path in written] == ["trace.png", "trace.svg"]
    assert all(path.stat().st_size > 1_000 for path in written)


# comparing


def rows_of(policy, values, metric="ttft_mean_s"):
    base = dict.fromkeys((name for name, _ in compare.METRICS), 1.0)
    return [
        base | {"workload": "trace", "policy": policy, "rate": 1.0, "seed": seed, metric: value} for seed, value in enumerate(values, 1)
    ]


@pytest.mark.parametrize(
    ("metric", "before", "after", "verdict"),
    [
        ("ttft_mean_s", (1.0, 1.01, 0.99), (1.2, 1.21, 1.19), "WORSE"),
        ("ttft_mean_s", (1.0, 1.01, 0.99), (0.8, 0.81, 0.79), "better"),
        ("ttft_mean_s", (1.0, 1.3, 0.7), (1.2, 1.21, 1.19), ""),  # within what seeds differ by
        ("goodput", (0.9, 0.9, 0.9), (0.8, 0.8, 0.8), "WORSE"),
        ("errors", (0, 0, 0), (3, 3, 3), "WORSE"),
    ],
)
def test_a_change_is_one_only_outside_the_intervals(metric, before, after, verdict):
    rows, missing = compare.compared(rows_of("p", before, metric), rows_of("p", after, metric))
    assert [row["verdict"] for row in rows if row["metric"] == metric] == [verdict]
    assert {row["verdict"] for row in rows if row["metric"] != metric} == {""}
    assert not missing


def test_compare_says_what_only_one_has_and_checks(tmp_path, capsys):
    a, b = tmp_path / "a.json", tmp_path / "b.json"
    a.write_text(json.dumps({"rows": rows_of("p", (1.0, 1.0)) + rows_of("q", (1.0, 1.0))}))
    b.write_text(json.dumps({"rows": rows_of("p", (1.1, 1.1))}))
    assert main(["compare", str(a), str(b), "--check", "5", "--changed"]) == 1
    printed = capsys.readouterr().out
    assert "only in A: trace q 1.0" in printed
    assert printed.count("WORSE") == 1
    assert main(["compare", str(a), str(b), "--check", "15"]) == 0
    a.write_text("{}")
    assert main(["compare", str(a), str(b)]) == 2


def test_compare_says_how_the_runs_differ(tmp_path, capsys):
    a, b, c = tmp_path / "a.json", tmp_path / "b.json", tmp_path / "c.json"
    rows = rows_of("p", (1.0, 1.0))
    notes = {"date": "yesterday", "replicas": 8, "trace": "chats.jsonl", "saturation": {"trace": 1.2}}
    a.write_text(json.dumps({"rows": rows, "notes": notes}))
    b.write_text(json.dumps({"rows": rows[:1], "notes": notes | {"date": "today", "trace": "code.jsonl", "whole": 0.5, "usage": True}}))
    c.write_text(json.dumps({"rows": rows, "notes": notes | {"date": "today", "saturation": {}}}))
    assert main(["compare", str(a), str(b)]) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if "unlike" in line]
    assert said == [
        'unlike runs: trace is "chats.jsonl" in A, "code.jsonl" in B',
        "perhaps unlike runs: A does not say whole, usage",
        "unlike runs: seeds are 1 2 in A, 1 in B",
    ]
    assert main(["compare", str(a), str(c), "--check", "0"]) == 0
    assert "unlike" not in capsys.readouterr().out
    c.write_text(json.dumps({"rows": rows, "notes": 5}))
    assert main(["compare", str(a), str(c)]) == 2


def test_what_one_of_them_cannot_say_is_not_compared(tmp_path, capsys):
    a, b = tmp_path / "a.json", tmp_path / "b.json"
    a.write_text(json.dumps({"rows": rows_of("p", (1.0, 1.0))}))
    b.write_text(json.dumps({"rows": rows_of("p", (None, None))}))
    for one, other, figures in ((a, b, ["1", "-", "-"]), (b, a, ["-", "1", "-"])):
        assert main(["compare", str(one), str(other), "--metrics", "ttft_mean_s", "--check", "0"]) == 0
        line = next(line for line in capsys.readouterr().out.splitlines() if "ttft_mean_s" in line)
        assert line.split()[4:] == figures


def test_a_mean_over_some_of_the_seeds_gets_no_verdict(tmp_path, capsys):
    a, b = tmp_path / "a.json", tmp_path / "b.json"
    a.write_text(json.dumps({"rows": rows_of("p", (1.0, 1.0))}))
    b.write_text(json.dumps({"rows": rows_of("p", (0.5, None))}))
    assert main(["compare", str(a), str(b), "--metrics", "ttft_mean_s"]) == 0
    assert "better" not in capsys.readouterr().out
    b.write_text(json.dumps({"rows": [{k: v for k, v in row.items() if k != "ttft_mean_s"} for row in rows_of("p", (0.5, 0.5))]}))
    assert main(["compare", str(a), str(b), "--metrics", "ttft_mean_s"]) == 0
    assert "better" not in capsys.readouterr().out
