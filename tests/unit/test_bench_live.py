"""`bench live`: what it sends and how it counts, and small real runs."""

import asyncio
import contextlib
import json
import sys
from argparse import Namespace
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web

from bench import BenchError
from bench.__main__ import main
from bench.live import _Busy, dynamo_shim, imbalance, workload_of
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


def test_who_answered_nobody_has_no_latency():
    row = figures([Sample(0.0, 0.1, 0, 0, 0, "HTTP 503: no")], Objective(), planned=1)
    assert {key for key, value in row.items() if value is None} == {
        "ttft_mean_s", "ttft_p50_s", "ttft_p90_s", "ttft_p99_s", "tpot_p90_s", "e2e_mean_s",
    }  # fmt: skip
    assert (row["errors"], row["late_p99_s"]) == (1, 0.1)


def test_imbalance_is_of_requests_an_engine_finished():
    assert imbalance([7, 0, 0, 0]) == pytest.approx(3**0.5)
    assert imbalance([5, 5, 5]) == 0.0
    assert imbalance([3, 1]) == 0.5
    assert imbalance([0, 0]) is None


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


# The gateway in front of Dynamo's select_service

HUNG_S = 20.0
"""A test that waits so long for something to happen has failed."""


class SelectService:
    """As Dynamo's answers, with what it was asked. `worker` is chosen always."""

    def __init__(self):
        self.workers = []
        self.worker = ""
        self.calls = []
        self.prompts = []
        self.booked = set()
        self.asked, self.go_on, self.prefilled, self.note_prefill, self.freed = (asyncio.Event() for _ in range(5))
        self.go_on.set()
        self.note_prefill.set()
        self.answer_is_lost = False
        self.free_status = 200

    def application(self):
        app = web.Application(client_max_size=1 << 26)
        app.add_routes([
            web.post("/workers", self._add),
            web.get("/ready", self._ready),
            web.post("/select_and_reserve", self._select),
            web.post("/reservations/{id}/prefill_complete", self._prefill_complete),
            web.delete("/reservations/{id}", self._free),
        ])  # fmt: skip
        return app

    async def _add(self, request):
        self.workers.append(await request.json())
        return web.json_response({"lifecycle": "schedulable"}, status=201)

    async def _ready(self, _request):
        return web.json_response({}, status=200 if self.workers else 503)

    async def _select(self, request):
        asked = await request.json()
        if not self.worker:
            return web.json_response({"error": "no schedulable workers are available"}, status=503)
        self.prompts.append(asked["token_ids"])
        self.asked.set()
        await self.go_on.wait()
        self.calls.append("select")
        self.booked.add(asked["selection_id"])
        if self.answer_is_lost:
            request.transport.abort()
        return web.json_response({"selection_id": asked["selection_id"], "worker_id": 1, "endpoint": self.worker})

    async def _prefill_complete(self, request):
        self.prefilled.set()
        await self.note_prefill.wait()
        self.calls.append("prefill_complete")
        return self._known(request)

    async def _free(self, request):
        self.calls.append("free")
        response = self._known(request)
        self.booked.discard(request.match_info["id"])
        self.freed.set()
        return response if self.free_status == 200 else web.Response(status=self.free_status)

    def _known(self, request):
        return web.json_response({"status": "ok"}, status=200 if request.match_info["id"] in self.booked else 404)


@contextlib.asynccontextmanager
async def _listening(app):
    """Handlers end when their client leaves, as Dynamo's and engines' do."""
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


@contextlib.asynccontextmanager
async def _shim(handle=None):
    """(select_service, URL of the gateway, client); the engine is `handle`."""
    service, app = SelectService(), web.Application(client_max_size=1 << 26)
    if handle is not None:
        app.add_routes([web.post("/v1/completions", handle)])
    async with (
        asyncio.timeout(HUNG_S),
        _listening(app) as engine,
        _listening(service.application()) as select_url,
        aiohttp.ClientSession() as client,
        dynamo_shim.serving(select_url) as (calls, port),
    ):
        service.worker = engine
        await calls.register([engine], block_tokens=16)
        yield service, f"http://127.0.0.1:{port}", client


async def _ask(client, url, prompt="the and you "):
    async with client.post(f"{url}/v1/completions", json={"prompt": prompt, "stream": True}) as response:
        return response.status, await response.text()


async def test_shim_passes_an_answer_on_and_tells_of_it():
    """The engine goes on only once select_service knows of the first piece: that is told during the answer, not after it."""
    seen = {}

    async def engine(request):
        seen.update(body=await request.json(), header=request.headers["x-request-id"])
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "x-engine": "one"})
        await response.prepare(request)
        await response.write(b"data: first\n\n")
        await service.prefilled.wait()
        await response.write(b"data: [DONE]\n\n")
        return response

    async with _shim(engine) as (service, url, client):
        headers = {"x-request-id": "r1"}
        async with client.post(f"{url}/v1/completions", json={"prompt": "the and x"}, headers=headers) as response:
            text = await response.text()
            assert (response.status, response.headers["x-engine"], response.content_type) == (200, "one", "text/event-stream")
    assert text == "data: first\n\ndata: [DONE]\n\n"
    assert seen == {"body": {"prompt": "the and x"}, "header": "r1"}
    assert service.calls == ["select", "prefill_complete", "free"]
    assert service.booked == set()
    assert service.prompts == [tokens_of("the and x")]


async def test_shim_does_not_wait_for_select_service_during_an_answer_but_frees_last():
    async def engine(_request):
        return web.Response(text="whole")

    async with _shim(engine) as (service, url, client):
        service.note_prefill.clear()
        assert await _ask(client, url) == (200, "whole")
        await service.prefilled.wait()
        async with client.get(f"{url}/health") as response:  # asks select_service: a free that did not wait would be there before it
            assert response.status == 200
        service.note_prefill.set()
    assert service.calls == ["select", "prefill_complete", "free"]


async def test_shim_registers_engines_without_events_and_is_ready_then():
    async with _shim() as (service, url, client):
        async with client.get(f"{url}/health") as response:
            assert response.status == 200
        assert [(worker["endpoint"], worker["block_size"]) for worker in service.workers] == [(service.worker, 16)]
        assert not any(key.startswith("kv_events") for key in service.workers[0])
        service.workers.clear()
        async with client.get(f"{url}/health") as response:
            assert response.status == 503


async def test_shim_speaks_to_an_engine_of_ours_with_the_tokens_it_counts():
    server = RenderingServer(SimOptions(time_scale=20, tokens_per_chunk=16))
    await server.start("127.0.0.1", 0)
    try:
        async with _shim() as (service, url, _client):
            service.worker = f"http://{server.address}"
            samples = await play(url, [Arrival(0, 1000, 40, (1, 2)), Arrival(0, 1000, 40, (1, 3))], speedup=20, model=MODEL_DEFAULT)
    finally:
        await server.stop()
    assert [(sample.error, sample.answer_tokens) for sample in samples] == [("", 40)] * 2
    assert [len(prompt) for prompt in service.prompts] == [1000, 1000]
    assert service.prompts[0][:512] == service.prompts[1][:512]
    assert service.prompts[0][512:] != service.prompts[1][512:]
    assert (service.calls.count("free"), service.booked) == (2, set())


async def test_shim_without_select_service_is_unavailable():
    (port,) = free_ports(1)
    async with dynamo_shim.serving(f"http://127.0.0.1:{port}") as (_, gateway), aiohttp.ClientSession() as client:
        url = f"http://127.0.0.1:{gateway}"
        status, text = await _ask(client, url)
        assert status == 503
        assert "select_service" in text
        async with client.get(f"{url}/health") as response:
            assert response.status == 503


async def test_shim_without_an_engine_to_choose_is_unavailable():
    async with _shim() as (service, url, client):
        service.worker = ""
        status, text = await _ask(client, url)
    assert status == 503
    assert "no schedulable workers" in text
    assert service.calls == []


async def test_shim_whose_engine_can_not_be_reached_frees_once():
    (port,) = free_ports(1)
    async with _shim() as (service, url, client):
        service.worker = f"http://127.0.0.1:{port}"
        status, _ = await _ask(client, url)
    assert status == 502
    assert service.calls == ["select", "free"]


async def test_shim_passes_an_engines_refusal_on_and_frees_once():
    async def engine(_request):
        return web.json_response({"error": "full"}, status=429, headers={"retry-after": "1"})

    async with _shim(engine) as (service, url, client):
        assert await _ask(client, url) == (429, '{"error": "full"}')
    assert service.calls == ["select", "free"]


async def test_shim_does_not_make_half_an_answer_look_whole():
    async def engine(request):
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b"data: first\n\n")
        await service.prefilled.wait()
        request.transport.abort()
        return response

    async with _shim(engine) as (service, url, client):
        with pytest.raises(aiohttp.ClientError):
            await _ask(client, url)
    assert service.calls == ["select", "prefill_complete", "free"]


@pytest.mark.parametrize("pieces", [0, 1], ids=["before the first piece", "during the answer"])
async def test_shim_whose_client_leaves_frees_once_and_lets_the_engine_go(pieces):
    asked, left = asyncio.Event(), asyncio.Event()

    async def engine(request):
        response = web.StreamResponse()
        await response.prepare(request)
        for _ in range(pieces):
            await response.write(b"data: first\n\n")
            await service.prefilled.wait()
        asked.set()
        try:
            await asyncio.Event().wait()
        finally:
            left.set()

    async with _shim(engine) as (service, url, client):
        request = asyncio.create_task(_ask(client, url))
        await asked.wait()
        request.cancel()
        await service.freed.wait()
        await left.wait()
    assert service.calls == ["select", *["prefill_complete"] * pieces, "free"]
    assert service.booked == set()


async def test_shim_whose_client_leaves_during_the_choice_frees_what_was_booked_after():
    engine_asked = []

    async def engine(request):
        engine_asked.append(request)
        return web.Response()

    async with _shim(engine) as (service, url, client):
        service.go_on.clear()
        request = asyncio.create_task(_ask(client, url))
        await service.asked.wait()
        request.cancel()
        await asyncio.wait([request])
        # the gateway has seen the client leave once it answers another one on a new connection
        async with aiohttp.ClientSession() as other, other.get(f"{url}/health") as response:
            assert response.status == 200
        service.go_on.set()
        await service.freed.wait()
    assert service.calls == ["select", "free"]
    assert service.booked == set()
    assert engine_asked == []


async def test_shim_frees_what_may_be_booked_when_the_answer_is_lost():
    async with _shim() as (service, url, client):
        service.answer_is_lost = True
        status, _ = await _ask(client, url)
    assert status == 503
    assert service.calls == ["select", "free"]
    assert service.booked == set()


async def test_shim_that_is_stopped_frees_what_is_in_flight():
    asked = asyncio.Event()

    async def engine(_request):
        asked.set()
        await asyncio.Event().wait()

    service, app = SelectService(), web.Application()
    app.add_routes([web.post("/v1/completions", engine)])
    async with asyncio.timeout(HUNG_S), _listening(app) as service.worker, _listening(service.application()) as select_url:
        async with aiohttp.ClientSession() as client, dynamo_shim.serving(select_url) as (_, port):
            request = asyncio.create_task(_ask(client, f"http://127.0.0.1:{port}"))
            await asked.wait()
        with contextlib.suppress(aiohttp.ClientError, asyncio.CancelledError):
            await request
    assert service.calls == ["select", "free"]


async def test_shim_says_what_could_not_be_freed(capsys):
    async def engine(_request):
        return web.Response(text="whole")

    async with _shim(engine) as (service, url, client):
        service.free_status = 500
        assert await _ask(client, url) == (200, "whole")
    assert "DELETE /reservations/" in capsys.readouterr().err


@pytest.mark.parametrize(("body", "status"), [(b"{", 400), (b'{"prompt": "x", "model": "another"}', 404)])
async def test_shim_asks_nobody_about_what_it_can_not_read(body, status):
    async with _shim() as (service, url, client), client.post(f"{url}/v1/completions", data=body) as response:
        assert response.status == status
    assert service.calls == []


async def test_an_engine_that_is_not_taken_is_told():
    async with _listening(web.Application()) as nobody, dynamo_shim.serving(nobody) as (calls, _):
        with pytest.raises(dynamo_shim.NoEngineError, match="did not take the worker http://one: status 404"):
            await calls.register(["http://one"], block_tokens=16)


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


def test_dynamo_has_one_policy_here_and_is_told_what_it_opens(tmp_path):
    said = []
    assert peer_sides(f"dynamo={_python_with_dynamo(tmp_path, '')}", said.append)[0].name == "dynamo:approximate"
    assert "all interfaces" in said[0]
    with pytest.raises(BenchError, match="policies of dynamo are approximate"):
        peer_sides("dynamo:lru", said.append)


def _python_with_dynamo(where, program):
    """The Python of a virtual environment in which `dynamo.select_service` is this program."""
    packages, python = where / "lib" / "python3.11" / "site-packages", where / "bin" / "python"
    (packages / "dynamo").mkdir(parents=True)
    (packages / "dynamo" / "select_service.py").write_text(program)
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\nPYTHONPATH={packages} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    return python


SELECT_SERVICE = """\
import os, sys
from aiohttp import web

assert os.environ["DYN_ROUTER_USE_KV_EVENTS"] == "false"
assert sys.argv[3:] == ["--threads", "1"]
workers, booked = [], set()

async def health(request):
    return web.Response()

async def ready(request):
    return web.Response(status=200 if len(workers) == 2 else 503)

async def add(request):
    worker = await request.json()
    assert worker["block_size"] == 32
    workers.append(worker["endpoint"])
    return web.json_response({}, status=201)

async def select(request):
    asked = await request.json()
    booked.add(asked["selection_id"])
    return web.json_response({"endpoint": workers[1]})

async def known(request):
    assert request.match_info["id"] in booked
    return web.json_response({})

app = web.Application()
app.add_routes([
    web.get("/health", health), web.get("/ready", ready), web.post("/workers", add), web.post("/select_and_reserve", select),
    web.post("/reservations/{id}/prefill_complete", known), web.delete("/reservations/{id}", known),
])
web.run_app(app, host="127.0.0.1", port=int(sys.argv[2]), print=None)
"""


@pytest.mark.e2e
def test_a_run_with_dynamos_select_service(tmp_path, capsys):
    trace, result = tmp_path / "t.jsonl", tmp_path / "live.json"
    trace.write_text("\n".join(map(json.dumps, TRACE)))
    code = main([
        "live", f"--trace={trace}", "--raw", "--speedup=4", "--engines=2", "--policies=", "--no-round-robin", "--sim-args=--block-tokens=32",
        f"--peers=dynamo={_python_with_dynamo(tmp_path, SELECT_SERVICE)}", f"--json={result}", "--again=0",
    ])  # fmt: skip
    said = capsys.readouterr()
    assert code == 0, said.err
    (row,) = json.loads(result.read_text())["rows"]
    assert (row["policy"], row["errors"], row["per_engine"]) == ("dynamo:approximate", 0, [0, 4])
    assert row["hit_rate"] > 0.4


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
    document = json.loads(result.read_text())
    notes = document["notes"]
    assert (notes["trace"], notes["scenario"], notes["raw"], notes["speedup"], notes["engines"]) == ("t.jsonl", "", True, 4.0, 2)
    rows = {row["policy"]: row for row in document["rows"]}
    assert list(rows) == ["round-robin", "cost-aware", "smg:cache_aware"]
    for row in rows.values():
        assert row["errors"] == 0, said.err
        assert row["requests"] == 4
        assert sum(row["per_engine"]) == 4
        assert row["imbalance"] == imbalance(row["per_engine"])
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
