"""`bench live`: what it sends and how it counts, and small real runs."""

import json
import sys
from argparse import Namespace
from pathlib import Path

import pytest

from bench import BenchError
from bench.__main__ import main
from bench.live import _Busy, workload_of
from bench.live.client import Sample, figures, first_errors, play, request_of
from bench.live.engines import RenderingServer, tokens_of
from bench.live.sides import CONFIGS, peer_sides, picker_sides
from bench.processes import free_ports
from bench.replay.stats import Objective
from bench.replay.workload import Arrival
from epp.sim.options import MODEL_DEFAULT, SimOptions

TRACE = [
    {"timestamp": 0, "input_length": 600, "output_length": 4, "hash_ids": [1, 2]},
    {"timestamp": 300, "input_length": 600, "output_length": 4, "hash_ids": [1, 3]},
    {"timestamp": 600, "input_length": 100, "output_length": 1, "hash_ids": [9]},
    {"timestamp": 900, "input_length": 600, "output_length": 4, "hash_ids": [1, 2]},
]


def _args(**more):
    return Namespace(**{"trace": None, "scenario": "chat", "limit": 50, "block_tokens": 512, "raw": True, "rate": 1.0, "engines": 2} | more)


# What is sent


def test_equal_blocks_are_equal_text_of_the_right_length():
    bodies = [json.loads(request_of(Arrival(0, 600, 4, blocks), "m").body) for blocks in ((1, 2), (1, 3))]
    assert [len(body["prompt"]) for body in bodies] == [2400, 2400]
    assert bodies[0]["prompt"][: 512 * 4] == bodies[1]["prompt"][: 512 * 4]
    assert bodies[0]["prompt"][512 * 4 :] != bodies[1]["prompt"][512 * 4 :]
    assert bodies[0]["max_tokens"] == 4


def test_rate_makes_arrivals_denser_and_limit_fewer(tmp_path):
    file = tmp_path / "t.jsonl"
    file.write_text("\n".join(map(json.dumps, TRACE)))
    arrivals = workload_of(_args(trace=file, limit=3, rate=2.0), 1).arrivals
    assert [arrival.at_s for arrival in arrivals] == [0, 0.15, 0.3]


def test_chats_are_those_of_the_seed():
    first, again, other = (workload_of(_args(), seed).arrivals for seed in (1, 1, 2))
    assert first == again != other
    assert len(first) == 50
    assert [arrival.at_s for arrival in first] == sorted(arrival.at_s for arrival in first)


# How it counts


def test_figures_by_hand():
    samples = [Sample(float(i), 0.0, i / 10, i / 10 + 0.9, 10) for i in range(1, 11)] + [Sample(5.0, 0.5, 0, 0, 0, "HTTP 503: no")]
    row = figures(samples, Objective(ttft_s=0.55, tpot_s=0.2), planned=12)
    assert (row["ttft_mean_s"], row["ttft_p50_s"], row["ttft_p90_s"], row["ttft_p99_s"]) == (0.55, 0.5, 0.9, 1.0)
    assert row["tpot_p90_s"] == pytest.approx(0.1)
    assert row["e2e_mean_s"] == pytest.approx(1.45)
    assert (row["errors"], row["requests"]) == (2, 12)  # one failed, one was never sent
    assert row["goodput"] == pytest.approx(5 / 12, abs=1e-6)
    assert row["late_p99_s"] == 0.5
    assert first_errors(samples) == ["1 x HTTP 503: no"]


def test_the_warm_up_is_not_counted():
    samples = [Sample(at_s, 0.0, ttft_s, 1.0, 1) for at_s, ttft_s in ((0.0, 9.0), (10.0, 1.0), (11.0, 2.0))]
    row = figures(samples, Objective(), planned=3, warmup_s=10)
    assert (row["ttft_mean_s"], row["requests"], row["errors"]) == (1.5, 2, 0)


def test_the_machine_is_as_busy_as_proc_says(tmp_path):
    stat = tmp_path / "stat"
    stat.write_text("cpu  100 0 100 800 0 0 0 0 0 0\ncpu0 1 1\n")
    busy = _Busy(stat)
    stat.write_text("cpu  160 0 100 820 20 0 0 0 0 0\ncpu0 1 1\n")
    assert busy.share() == pytest.approx(0.6)


async def test_latency_counts_from_the_intended_time_and_in_seconds_of_life():
    """Three requests at once on an engine that takes one at a time: the last waits for the others, whoever measures."""
    server = RenderingServer(SimOptions(time_scale=20, tokens_per_chunk=16))
    await server.start("127.0.0.1", 0)
    try:
        arrivals = [Arrival(at_s, 1000, 5, (index, 100 + index)) for index, at_s in enumerate((0.0, 0.0, 1.0))]
        arrivals.append(Arrival(1.0, 600, 2, (1, 100), turns=(Arrival(0.5, 600, 2, (1, 100)),)))
        samples = await play(f"http://{server.address}", arrivals, speedup=20, model=MODEL_DEFAULT)
    finally:
        await server.stop()
    assert len(samples) == 5
    assert [sample.error for sample in samples] == [""] * 5
    assert sorted(sample.answer_tokens for sample in samples) == [2, 2, 5, 5, 5]
    for sample in samples:
        assert 0 <= sample.late_s < sample.ttft_s <= sample.e2e_s
    assert max(sample.ttft_s for sample in samples) > 0.06  # 1000 tokens of 60 us


async def test_who_can_not_be_reached_is_an_error_and_its_turns_too():
    (port,) = free_ports(1)
    arrivals = [Arrival(0.0, 10, 1, (1,), turns=(Arrival(0.0, 10, 1, (1,)),))]
    samples = await play(f"http://127.0.0.1:{port}", arrivals, speedup=10, model=MODEL_DEFAULT)
    assert len(samples) == 1
    assert figures(samples, Objective(), planned=2)["errors"] == 2


def test_tokens_of_a_prompt_are_as_many_as_the_engine_counts():
    assert len(tokens_of("the and x")) == 3
    assert tokens_of("the and ")[:1] == tokens_of("the you ")[:1]


# Sides


def test_policies_by_name_and_by_file(tmp_path):
    (tmp_path / "p.yaml").write_text("")
    sides = picker_sides(f"cost-aware,mine={tmp_path / 'p.yaml'}")
    assert [(side.name, side.config) for side in sides] == [("cost-aware", CONFIGS / "cost-aware.yaml"), ("mine", tmp_path / "p.yaml")]
    with pytest.raises(BenchError, match="by name there are cost-aware"):
        picker_sides("unheard-of")


def test_peers_that_are_not_here_are_skipped_and_said(tmp_path):
    said = []
    assert peer_sides(f"smg={tmp_path / 'smg'},sglang-router={tmp_path / 'bin' / 'python'}", said.append) == []
    assert [line.split()[1] for line in said] == ["smg", "sglang-router"]
    assert "pip install smg" in said[0]
    with pytest.raises(BenchError, match="known are vllm-router"):
        peer_sides("nginx", said.append)


def test_a_peers_policy_is_in_its_name():
    (side,) = peer_sides(f"smg:prefix_hash={sys.executable}", print)
    assert (side.name, side.peer_policy, side.program) == ("smg:prefix_hash", "prefix_hash", (sys.executable,))


ROUTER = """\
#!{python}
import asyncio, itertools, sys
import aiohttp
from aiohttp import web

arguments = sys.argv[1:]
workers = arguments[arguments.index("--worker-urls") + 1 : arguments.index("--policy")]
turn = itertools.cycle(workers[:1])

async def forward(request):
    async with aiohttp.ClientSession() as session, session.post(next(turn) + request.path, data=await request.read()) as answer:
        response = web.StreamResponse(status=answer.status)
        await response.prepare(request)
        async for piece in answer.content.iter_any():
            await response.write(piece)
        return response

async def ready(request):
    return web.Response()

app = web.Application(client_max_size=1 << 26)
app.add_routes([web.get("/readiness", ready), web.post("/v1/{{tail:.*}}", forward)])
assert arguments[0] == "launch"
web.run_app(app, host="127.0.0.1", port=int(arguments[arguments.index("--port") + 1]), print=None)
"""


@pytest.mark.e2e
def test_a_run_with_the_picker_round_robin_and_a_peer(tmp_path, capsys):
    trace, router, result = tmp_path / "t.jsonl", tmp_path / "router", tmp_path / "live.json"
    trace.write_text("\n".join(map(json.dumps, TRACE)))
    router.write_text(ROUTER.format(python=sys.executable))
    router.chmod(0o755)
    code = main([
        "live", f"--trace={trace}", "--raw", "--speedup=4", "--engines=2", "--policies=cost-aware", f"--peers=smg={router},vllm-router=/nowhere/x",
        f"--json={result}",
    ])  # fmt: skip
    said = capsys.readouterr()
    assert code == 0, said.err
    assert "skipped: vllm-router is not here (/nowhere/x)" in said.err
    rows = {row["policy"]: row for row in json.loads(result.read_text())["rows"]}
    assert list(rows) == ["round-robin", "cost-aware", "smg:cache_aware"]
    for row in rows.values():
        assert row["errors"] == 0, said.err
        assert row["requests"] == 4
        assert sum(row["per_engine"]) == 4
        assert 0 < row["ttft_mean_s"] <= row["ttft_p99_s"]
    assert rows["smg:cache_aware"]["per_engine"] == [4, 0]  # the fake takes the first worker, always
    assert sorted(rows["round-robin"]["per_engine"]) == [2, 2]
    assert rows["smg:cache_aware"]["hit_rate"] > 0.4
    assert "TTFT mean s" in said.out


@pytest.mark.e2e
def test_a_peer_that_ends_is_told(tmp_path, capsys):
    router = tmp_path / "router"
    router.write_text(f"#!{sys.executable}\nimport sys\nsys.exit('no such policy')\n")
    router.chmod(0o755)
    assert main(["live", "--limit=1", "--engines=1", "--policies=", "--no-round-robin", f"--peers=smg:nonsense={router}"]) == 2
    assert "no such policy" in capsys.readouterr().err


def test_nothing_to_compare_is_an_error(capsys):
    assert main(["live", "--policies=", "--no-round-robin"]) == 2
    assert "nothing to compare" in capsys.readouterr().err


def test_configs_exist():
    assert Path(CONFIGS, "epp-223.yaml").is_file()
