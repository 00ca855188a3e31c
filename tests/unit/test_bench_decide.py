"""The bench of one decision: what it measures, the rows it writes, and its own exit codes."""

import argparse
import json
import random

import pytest

from bench import BenchError, decide
from bench.__main__ import main

SMALL = ["decide", "--endpoints", "2,5", "--prompt-tokens", "64,300", "--requests", "20", "--rounds", "2"]


def test_rows_of_every_size(tmp_path, capsys):
    written = tmp_path / "rows.json"
    assert main([*SMALL, "--json", str(written)]) == 0
    document = json.loads(written.read_text())
    rows = document["rows"]
    assert [(row["endpoints"], row["prompt_tokens"]) for row in rows] == [(2, 64), (2, 300), (5, 64), (5, 300)]
    for row in rows:
        assert 0 < row["p50_us"] <= row["p99_us"] < 1e6
        assert 0 <= row["hit"] <= 1
        assert "met" not in row, "the target is that of 1 000 endpoints"
    out = capsys.readouterr().out
    assert "p99 us" in out
    assert out.count("measured: ") == 4


def test_the_target_is_checked_at_its_size_alone(monkeypatch, capsys):
    monkeypatch.setattr(decide, "TARGET_ENDPOINTS", 5)
    for target_us, code, word in ((1e9, 0, "PASS"), (0.001, 1, "MISS")):
        monkeypatch.setattr(decide, "P99_TARGET_US", target_us)
        assert main([*SMALL, "--check"]) == code
        assert capsys.readouterr().out.count(word) == 2, "of the two rows with 5 endpoints"
        assert main(SMALL) == 0
        capsys.readouterr()


def test_another_configuration(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("apiVersion: llm-d.ai/v1alpha1\nkind: EndpointPickerConfig\nplugins: [{type: random-picker}]\n")
    assert main([*SMALL, "--config", str(file), "--no-debug-decisions"]) == 0
    file.write_text("plugins: 3\n")
    with pytest.raises(BenchError, match="config"):
        decide.run(arguments("--config", str(file)))
    with pytest.raises(BenchError, match="No such file"):
        decide.run(arguments("--config", str(tmp_path / "none")))


def arguments(*argv):
    parser = argparse.ArgumentParser()
    decide.configure(parser)
    return parser.parse_args([*SMALL[1:], *argv])


def test_bodies_are_as_long_as_they_should_be_and_half_of_it_is_shared():
    for tokens in (1_000, 32_000):
        bodies = decide.Bodies(tokens, random.Random(1))
        made = [json.loads(bodies.next()) for _ in range(2 * decide.SHARED_PROMPTS)]
        lengths = [sum(len(message["content"]) for message in body["messages"]) / decide.TOKEN_CHARS for body in made]
        assert all(0.95 < length / tokens < 1.05 for length in lengths)
        shared = {body["messages"][0]["content"] for body in made}
        assert 1 < len(shared) <= decide.SHARED_PROMPTS
        assert len({body["messages"][1]["content"] for body in made}) == len(made)


def test_the_world_goes_on_between_decisions():
    rng = random.Random(1)
    world = decide.World(3, "", rng, keep=True)
    bodies = decide.Bodies(400, rng)
    for _ in range(100):
        assert world.decide(bodies.next()) > 0
    endpoints = world._all
    assert sum(endpoint.inflight_requests for endpoint in endpoints) == 3 * decide.IN_FLIGHT_PER_ENDPOINT
    assert sum(endpoint.inflight_tokens for endpoint in endpoints) == 0, "their prefill is done"
    assert sum(endpoint.picks_total for endpoint in endpoints) == 100
    assert max(world.hits) > 0.3, "some system prompt was there"


@pytest.mark.parametrize("text", ["", "a", "1,", "0", "-1,2", "1.5"])
def test_sizes_that_are_none(text, capsys):
    with pytest.raises(SystemExit):
        main(["decide", f"--endpoints={text}"])
    assert "--endpoints" in capsys.readouterr().err
