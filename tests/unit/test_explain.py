"""`epp explain` and what it asks: the table is what a request would meet now, and asking changes nothing."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import random
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import aiohttp
import pytest

from epp import cli
from epp.console.server import EXPLAIN_BYTES_MAX, HttpServer
from epp.datastore import Reading
from epp.decisions import Decisions
from epp.explain import render
from epp.outliers import EJECT_S
from epp.plugins.base import Plugin
from epp.types import Address, Endpoint, EndpointSpec, LLMRequest
from tests.builders import LLM_D, PATH, Core, chat, core

HEAD = "apiVersion: llm-d.ai/v1alpha1\nkind: EndpointPickerConfig\n"
CONFIGS = Path(__file__).parents[1] / "data" / "configs"
LONG = "tell me about " + "the sea and " * 200
BY_TIER = f"""{HEAD}
plugins:
- {{type: label-selector-filter, name: gold, parameters: {{matchLabels: {{tier: gold}}}}}}
- type: queue-scorer
schedulingProfiles: [{{name: default, plugins: [{{pluginRef: gold}}, {{pluginRef: queue-scorer, weight: 2}}]}}]
"""


class Console:
    """The HTTP port of a picker's core."""

    def __init__(self, world: Core, server: HttpServer, client: aiohttp.ClientSession) -> None:
        self.world = world
        self.url = f"http://127.0.0.1:{server.port}"
        self._client = client

    async def ask(self, body: Mapping[str, Any] | bytes) -> tuple[int, dict[str, Any]]:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        async with self._client.post(f"{self.url}/debug/explain", data=data) as response:
            return response.status, await response.json()

    async def run(self, *argv: str) -> int:
        """`epp explain` as a person calls it; it blocks, so elsewhere."""
        return await asyncio.to_thread(cli.main, ["explain", "--url", self.url, *argv])


@contextlib.asynccontextmanager
async def console(world: Core, *, debug: bool = True, kept: bool = True) -> AsyncIterator[Console]:
    decisions = Decisions(world.clock, 8) if kept else None
    world.director._decisions = decisions  # the server and the director share them, as in the app
    server = HttpServer(
        world.metrics,
        world.director,
        decisions,
        world.built.plugins.values,
        datastore=world.datastore,
        engine=lambda _endpoint: "vllm",
        debug=debug,
        admin_token=str,
        listen_problem=lambda host, port, error: f"{host}:{port}: {error}",
    )
    await server.start("127.0.0.1", 0)
    try:
        async with aiohttp.ClientSession() as client:
            yield Console(world, server, client)
    finally:
        await server.stop()


def request_of(headers: Mapping[str, str] | None = None) -> LLMRequest:
    return LLMRequest(id="r", path=PATH, headers={":path": PATH, **(headers or {})})


def busy(config: str, seed: int, count: int = 6) -> Core:
    """A pool whose endpoints all have different loads, and some of which have seen some prompts."""
    rng = random.Random(seed)
    roles = ("decode", "prefill", "decode", "encode", "prefill", "decode")
    specs = [EndpointSpec(f"pod-{i}", Address(f"10.0.0.{i}", 8000), labels={"llm-d.ai/role": roles[i - 1]}) for i in range(1, count + 1)]
    world = core(specs, config=config)
    for number in range(1, count + 1):
        reading = Reading(waiting=float(rng.randrange(50)), running=float(rng.randrange(50)), kv_usage=rng.random())
        world.datastore.record_reading(world.endpoint(number), reading, sent_requests=0, sent_tokens=0)
    for number in range(3):
        world.director.route(request_of(), chat(f"{number} {LONG}"), (f"10.0.0.{rng.choice((1, 3, 6))}", "10.0.0.2"), 0.0).finish(
            complete=True
        )
    return world


def state_of(world: Core) -> object:
    """Everything a request leaves traces in."""
    each = [
        (e.name, e.inflight_requests, e.inflight_tokens, e.sent_requests, e.sent_tokens, e.picks_total, e.healthy, e.ejected, e.half_open)
        for e in world.datastore.endpoints.values()
    ]
    held = {name: (len(index), index.blocks) for name, index in world.policy.built.indexes.items()}
    return each, held, world.metrics.exposition()[0], len(world.director._decisions or ()), world.inflight


# The answer


@pytest.mark.parametrize("config", ["", LLM_D, "optimized-baseline", "pd-disaggregation", "e2e-pd-topology"])
@pytest.mark.parametrize("seed", range(12))
def test_the_winner_is_whom_the_request_then_goes_to(config: str, seed: int) -> None:
    world = busy(config if config in ("", LLM_D) else (CONFIGS / f"{config}.yaml").read_text(), seed)
    for prompt in (f"{seed % 3} {LONG}", "something new", LONG):
        before = state_of(world)
        told = world.director.explain(request_of(), chat(prompt), None)
        assert state_of(world) == before
        deciding = next(profile for profile in told["profiles"] if profile["profile"] == told["profile"])
        rows = deciding["endpoints"]
        assert [row["name"] for row in rows if row["picked"]] == [told["endpoint"]]
        weights = {scorer["name"]: scorer["weight"] for scorer in deciding["scorers"]}
        for row in rows:
            assert row["total"] == pytest.approx(sum(weights[name] * score for name, score in row["scores"].items()), abs=1e-5)
        best, *others = [row["total"] for row in rows]
        assert all(best >= other for other in others), "best first"
        assert rows[0]["picked"] or others[0] == best
        if others and others[0] < best:
            exchange = world.director.route(request_of(), chat(prompt), None, 0.0)
            assert exchange.decision.endpoint.name == told["endpoint"]
            assert exchange.decision.destination == told["destination"]
            if all(len({row["total"] for row in p["endpoints"][:2]}) == 2 for p in told["profiles"] if len(p["endpoints"]) > 1):
                assert {name: e.name for name, e in exchange.decision.targets.items()} == told["targets"]


async def test_what_it_says_over_http_and_that_nothing_is_charged_or_counted() -> None:
    world = core(2, config=LLM_D)
    world.read(1, waiting=2.0, kv_usage=0.5)
    world.read(2, waiting=0.0, kv_usage=0.5)
    async with console(world) as page:
        world.director.route(request_of(), chat(LONG), ("10.0.0.1",), 0.0).finish(complete=True)
        before = state_of(world)
        for _ in range(3):
            status, told = await page.ask({"headers": {"X-Request-Id": "why"}, "body": chat(LONG).decode()})
            assert status == 200
        assert state_of(world) == before
    tokens = told["prompt_tokens"]
    assert tokens > 500
    assert (told["request_id"], told["model"], told["target_model"], told["path"]) == ("why", "m", "m", PATH)
    assert (told["endpoint"], told["destination"], told["profile"], told["targets"]) == ("pod-1", "10.0.0.1:8000", "default", {})
    (profile,) = told["profiles"]
    assert profile["scorers"] == [
        {"name": "queue-scorer", "weight": 2.0},
        {"name": "kv-cache-utilization-scorer", "weight": 2.0},
        {"name": "prefix-cache-scorer", "weight": 3.0},
    ]
    cached = profile["endpoints"][0]["cached_tokens"]
    assert 0 < cached <= tokens
    assert profile["endpoints"] == [
        {
            "name": "pod-1",
            "address": "10.0.0.1:8000",
            "scores": {"queue-scorer": 0.0, "kv-cache-utilization-scorer": 0.5, "prefix-cache-scorer": round(cached / tokens, 6)},
            "total": round(1.0 + 3 * cached / tokens, 6),
            "cached_tokens": cached,
            "picked": True,
        },
        {
            "name": "pod-2",
            "address": "10.0.0.2:8000",
            "scores": {"queue-scorer": 1.0, "kv-cache-utilization-scorer": 0.5, "prefix-cache-scorer": 0.0},
            "total": 3.0,
            "cached_tokens": 0,
            "picked": False,
        },
    ]


async def test_a_half_open_endpoint_is_not_tried_by_asking() -> None:
    world = core(1)
    world.outliers.failed(world.endpoint(1), "connection failed", certain=True)
    world.clock.advance(EJECT_S)
    world.outliers.tick()
    async with console(world) as page:
        assert (await page.ask({"body": chat().decode()}))[1]["endpoint"] == "pod-1"
    assert world.endpoint(1).half_open


async def test_only_endpoints_of_the_subset() -> None:
    world = core(3)
    world.read(3, waiting=9.0, kv_usage=0.9)
    async with console(world) as page:
        _, told = await page.ask({"body": chat().decode(), "subset": ["10.0.0.3:8000"]})
        assert (told["endpoint"], told["profiles"][0]["endpoints_count"]) == ("pod-3", 1)
        status, told = await page.ask({"body": chat().decode(), "subset": ["10.9.9.9"]})
    assert (status, told["endpoint"], told["profiles"]) == (200, None, [])
    assert told["error"].startswith("503 ")


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        ({"body": '{"model": "m", "messages": 3}'}, "400 "),
        ({"body": "no JSON"}, "400 "),
        ({"body": '{"messages": [{"role": "user", "content": "x"}]}'}, "400 model not found in request body"),
        ({"path": "/nowhere", "body": "{}"}, "404 "),
        ({"body": chat().decode()}, "429 no endpoints available for the given request"),
    ],
)
async def test_a_request_that_would_be_refused_says_why(asked: Mapping[str, str], reason: str) -> None:
    async with console(core(2, config=BY_TIER)) as page:
        status, told = await page.ask(asked)
    assert status == 200
    assert told["endpoint"] is None
    assert told["error"].startswith(reason)
    if reason.startswith("429"):
        (profile,) = told["profiles"]
        assert profile["filters"] == [{"filter": "gold", "removed": ["pod-1", "pod-2"], "removed_count": 2}]


async def test_an_empty_pool_and_a_request_without_a_body() -> None:
    world = core(0)
    async with console(world) as page:
        assert (await page.ask({"body": chat().decode()}))[1]["error"].startswith("503 ")
        world.datastore.apply([EndpointSpec("pod-1", Address("10.0.0.1", 8000))])
        _, told = await page.ask({"path": "/v1/models"})
    assert (told["endpoint"], told["model"]) == ("pod-1", "")


@pytest.mark.parametrize(
    "sent",
    [b"", b"{", b"[]", b"null", b"\xff", b'{"prompt": "x"}', b'{"body": 3}', b'{"headers": {"a": 1}}', b'{"subset": "10.0.0.1"}', b'{"body": "\\ud800"}'],
)  # fmt: skip
async def test_what_is_no_question_is_a_400(sent: bytes) -> None:
    async with console(core(1)) as page:
        status, told = await page.ask(sent)
    assert status == 400
    assert list(told) == ["error"]
    assert told["error"]


class Failing(Plugin):
    """A scorer with a bug."""

    type: ClassVar[str] = "failing"
    per_request: ClassVar[bool] = True

    def score(self, request: LLMRequest, endpoints: Sequence[Endpoint]) -> Sequence[float]:
        raise RuntimeError("a plugin's bug")


async def test_a_plugins_bug_is_a_500_that_says_so(capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    async with console(core(1, config=f"{HEAD}plugins: [{{type: '{__name__}:Failing'}}]")) as page:
        status, told = await page.ask({"body": chat().decode()})
        assert (status, told) == (500, {"error": "the request fails with RuntimeError; the picker's log says where"})
        assert await page.run("-d", chat().decode()) == 1
    assert "answered 500: the request fails with RuntimeError" in capsys.readouterr().err
    assert "a plugin's bug" in caplog.text


async def test_a_question_longer_than_the_limit_is_a_413() -> None:
    async with console(core(1)) as page:
        sent = io.BytesIO(b'{"body": "' + b" " * EXPLAIN_BYTES_MAX + b'"}')
        async with page._client.post(f"{page.url}/debug/explain", data=sent) as response:
            assert (response.status, await response.json()) == (413, {"error": "longer than 16777216 bytes"})


# The command


async def test_the_command_prints_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    world = core(3, config=BY_TIER)
    labelled = [EndpointSpec(e.name, e.spec.address, labels={"tier": "gold"}) for e in list(world.datastore.endpoints.values())[:2]]
    world.datastore.apply([*labelled, world.endpoint(3).spec])
    world.read(1, waiting=4.0)
    world.read(2, waiting=0.0)
    async with console(world) as page:
        assert await page.run("-d", chat("x" * 40).decode()) == 0
    assert capsys.readouterr().out.splitlines() == [
        "request explain  model m  about 18 prompt tokens",
        "profile default",
        "  gold removed pod-3",
        "     ENDPOINT  ADDRESS        queue-scorer x2  CACHED  TOTAL",
        "  *  pod-2     10.0.0.2:8000            1.000       0  2.000",
        "     pod-1     10.0.0.1:8000            0.000       0  0.000",
        "-> pod-2 (10.0.0.2:8000)",
        "",
    ]


async def test_a_body_from_a_file_or_standard_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "body.json").write_bytes(chat(model="from-file"))
    async with console(core(1)) as page:
        assert await page.run("-d", f"@{tmp_path}/body.json") == 0
        assert "model from-file" in capsys.readouterr().out
        monkeypatch.setattr(sys, "stdin", io.StringIO(chat(model="piped").decode()))
        assert await page.run("-d", "@-") == 0
        assert "model piped" in capsys.readouterr().out
        assert await page.run("-d", f"@{tmp_path}/none.json") == 2
        assert "--data: " in capsys.readouterr().err


async def test_headers_path_subset_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    async with console(core(2)) as page:
        argv = ["-H", "X-Request-Id: 7", "-H", "x-llm-d-model-name-rewrite:other", "--path", "/v1/completions", "--subset", "10.0.0.2, "]
        assert await page.run(*argv, "-d", '{"model": "m", "prompt": "x"}', "--json") == 0
        told = json.loads(capsys.readouterr().out)
        assert (told["request_id"], told["path"], told["endpoint"], told["target_model"]) == ("7", "/v1/completions", "pod-2", "other")
        assert await page.run(*argv, "-d", '{"model": "m", "prompt": "x"}') == 0
        assert capsys.readouterr().out.startswith("request 7  model m -> other  about ")


async def test_a_refused_request_is_exit_code_1(capsys: pytest.CaptureFixture[str]) -> None:
    async with console(core(1, config=BY_TIER)) as page:
        assert await page.run("-d", chat().decode()) == 1
    out = capsys.readouterr().out
    assert "gold removed pod-1" in out
    assert "refused: 429 no endpoints available for the given request" in out


async def test_the_last_decisions(capsys: pytest.CaptureFixture[str]) -> None:
    world = core(1)
    async with console(world) as page:
        assert await page.run("--last", "2") == 0
        assert capsys.readouterr().out.strip() == ""
        for model in ("a", "b", "c"):
            world.director.route(request_of(), chat(model=model), None, 0.0)
            world.clock.advance(2.5)
        assert await page.run("--last", "2") == 0
        heads = [line for line in capsys.readouterr().out.splitlines() if line.startswith("request ")]
        assert [head.partition("  about")[0] for head in heads] == ["request r  model c  2.5 s ago", "request r  model b  5 s ago"]
        assert await page.run("--last", "9", "--json") == 0
        assert [each["model"] for each in json.loads(capsys.readouterr().out)["decisions"]] == ["c", "b", "a"]


async def test_before_the_first_decision_there_is_none_to_show(capsys: pytest.CaptureFixture[str]) -> None:
    async with console(core()) as page:
        assert await page.run("--last", "2") == 0
        seen = capsys.readouterr()
        assert (seen.out, seen.err) == ("", "epp: no request was decided yet\n")
        assert await page.run("--last", "2", "--json") == 0
        assert '"decisions": []' in capsys.readouterr().out


def test_no_decisions_can_not_be_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["explain", "--last", "0"])
    assert "'0' is not a whole number of at least 1" in capsys.readouterr().err


def test_a_body_that_is_not_there(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.main(["explain", "-d", f"@{tmp_path}/none"]) == 2
    assert capsys.readouterr().err.endswith(f"--data: {tmp_path}/none can't be read: No such file or directory\n")


async def test_no_picker_there_is_exit_code_1_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    async with console(core(1), debug=False, kept=False) as page:
        assert await page.run("-d", "{}") == 1
        assert "answered 404: is this a picker's metrics port, with its debug paths on?" in capsys.readouterr().err
        url = page.url
    async with console(core(1), kept=False) as page:
        assert await page.run("--last", "1") == 1
        assert "start the picker with --debug-decisions=64" in capsys.readouterr().err
    assert await asyncio.to_thread(cli.main, ["explain", "--url", url, "-d", "{}"]) == 1
    assert f"no picker answers at {url}" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [("--url", "file:///etc/passwd"), ("--url", "127.0.0.1:9090"), ("-H", "no-colon"), ("-H", ": empty")])
def test_wrong_usage_is_exit_code_2(argv: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["explain", *argv]) == 2
    assert argv[0].replace("-H", "--header") in capsys.readouterr().err


def test_a_large_pool_is_cut_and_the_picked_is_shown_wherever_it_stands() -> None:
    specs = [EndpointSpec(f"pod-{i}", Address(f"10.0.0.{i}", 8000)) for i in range(1, 101)]
    world = core(specs, config=f"{HEAD}plugins: [{{type: queue-scorer}}, {{type: random-picker}}]\n")
    for number in range(1, 101):
        world.read(number, waiting=float(number))
    lefts = set()
    for _ in range(20):
        told = world.director.explain(request_of(), chat(), None)
        lines = list(render(told))
        assert [line.split()[1] for line in lines if line.startswith("  *")] == [told["endpoint"]]
        assert " pod-1 " in lines[3], "best first"
        (left,) = [line for line in lines if line.startswith("  ... and ")]
        lefts.add(left)
    assert lefts == {f"  ... and {count} more endpoints" for count in (67, 68)}


def test_stages_are_shown_one_by_one() -> None:
    world = busy((CONFIGS / "pd-disaggregation.yaml").read_text(), 1)
    told = world.director.explain(request_of(), chat(LONG), None)
    lines = list(render(told))
    assert [line for line in lines if line.startswith("profile ")] == ["profile decode", "profile prefill"]
    assert lines[-2] == f"-> {told['endpoint']} ({told['destination']}), prefill on {told['targets']['prefill']}"
    assert any(line.startswith("  decode-filter removed pod-2, pod-4, pod-5") for line in lines)
