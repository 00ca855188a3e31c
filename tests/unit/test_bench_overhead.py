"""The comparison: its figures from given samples, and a whole small run with the echo on both sides."""

import argparse
import json

import pytest

from bench import BenchError
from bench.__main__ import COMMANDS, main
from bench.overhead import Case, Sample, _serve_arguments, missed, rows
from bench.processes import Child


def _case(prompt_kb, chunks, mine, echo):
    case = Case(prompt_kb, chunks, [64, 32])
    for samples, figures in zip(case.samples, (mine, echo), strict=True):
        samples += [Sample(cpu_us, 1e6 / cpu_us, 20.0) for cpu_us in figures]
    return case


def test_the_minimum_of_each_counts_and_the_median_of_the_rounds_is_told():
    row = rows([_case(1, 1, [60.0, 50.0, 90.0], [500.0, 600.0, 450.0])])[0]
    assert (row["cpu_us"], row["echo_cpu_us"], row["ratio"]) == (50.0, 450.0, pytest.approx(50 / 450, abs=1e-4))
    assert row["ratio_median"] == pytest.approx(60 / 500)
    assert row["requests_per_s"] == 20_000.0
    assert (row["target"], row["met"]) == (0.20, True)
    assert "chunk_ratio" not in row


def test_the_cost_of_a_chunk_is_that_of_the_further_ones():
    one, hundred = rows([_case(16, 1, [100.0], [600.0]), _case(16, 100, [1090.0], [6540.0])])
    assert "chunk_ratio" not in one
    assert hundred["chunk_cpu_us"] == pytest.approx(10.0)
    assert hundred["echo_chunk_cpu_us"] == pytest.approx(60.0)
    assert hundred["chunk_ratio"] == pytest.approx(1 / 6, abs=1e-4)
    assert hundred["chunk_met"] is True
    assert "met" not in hundred


def test_a_chunk_that_seems_free_has_no_ratio():
    assert "chunk_ratio" not in rows([_case(1, 1, [50.0], [600.0]), _case(1, 2, [60.0], [590.0])])[1]


def test_missed_targets_are_counted():
    measured = rows(
        [_case(1, 1, [200.0], [600.0]), _case(1, 2, [240.0], [650.0]), _case(128, 1, [500.0], [900.0]), _case(7, 1, [9.0], [1.0])]
    )
    assert [row.get("met") for row in measured] == [False, None, True, None]
    assert missed(measured) == 2


def test_the_picker_gets_every_endpoint_and_further_arguments():
    args = argparse.Namespace(transport="grpc", serve_args="--config-file 'a b.yaml'")
    assert _serve_arguments(args, [1, 2], [7, 8, 9]) == [
        *("epp", "serve", "--endpoint", "127.0.0.1:1", "--endpoint", "127.0.0.1:2"),
        *("--grpc-port", "7", "--grpc-health-port", "8", "--metrics-port", "9"),
        *("--secure-serving=false", "--transport", "grpc", "--config-file", "a b.yaml"),
    ]


def test_a_small_run_from_end_to_end(tmp_path, capsys):
    out = tmp_path / "out.json"
    arguments = "overhead --baseline-only --prompt-kb 1 --chunks 1,3 --rounds 1 --requests 32 --streams 8 --idle-s 0.01 --quick --json"
    assert main([*arguments.split(), str(out)]) == 0
    content = json.loads(out.read_text())
    assert [(row["prompt_kb"], row["chunks"]) for row in content["rows"]] == [(1, 1), (1, 3)]
    assert all(row["cpu_us"] > 0 and row["echo_cpu_us"] > 0 and row["requests_per_s"] > 0 for row in content["rows"])
    assert content["rows"][0]["met"] is False  # the echo does not cost a fifth of itself
    assert content["notes"]["endpoints_chosen"] == 1
    assert set(content["machine"]) == {"cpu", "cores", "kernel", "python"}
    printed = capsys.readouterr()
    assert "Targets missed:" in printed.out
    assert "round 1/1" in printed.err


def test_check_turns_a_miss_into_the_exit_code(capsys):
    arguments = "overhead --baseline-only --prompt-kb 1 --chunks 1 --rounds 1 --requests 16 --streams 4 --idle-s 0.01 --quick --check"
    assert main(arguments.split()) == 1
    assert "MISS" in capsys.readouterr().out


def test_a_server_that_does_not_start_is_told_with_its_output(capsys):
    assert main(["overhead", "--quick", "--serve-args=--no-such-flag", "--prompt-kb", "1", "--chunks", "1"]) == 2
    assert "epp serve" in capsys.readouterr().err


def test_a_child_that_ends_at_once_is_told_with_its_output(capfd):
    with (
        pytest.raises(BenchError, match=r"ended with code 2(.|\n)*unrecognized arguments: --no-such-flag"),
        Child(["bench", "echo", "--no-such-flag"], announces=True),
    ):
        pass


@pytest.mark.parametrize("command", [None, *COMMANDS])
def test_help_teaches(command, capsys):
    with pytest.raises(SystemExit) as exit_:
        main([command, "--help"] if command else ["--help"])
    assert exit_.value.code == 0
    expected = {"echo": "--port", "metrics-stub": "--count", "decide": "--prompt-tokens", "scrape": "--endpoints", "replay": "--policies"}
    assert expected.get(command, "overhead" if command in (None, "overhead") else "usage") in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["--prompt-kb", "0"], ["--rounds", "-1"], ["--chunks", "a"], ["--transport", "tcp"]])
def test_senseless_options_are_refused(arguments, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["overhead", *arguments])
    assert exit_.value.code == 2
    assert arguments[0] in capsys.readouterr().err
