"""`/debug/explain` passes what a request passes: its tokens are found first, and flow control says what it would do. Asking leaves no trace."""

from __future__ import annotations

import asyncio
import contextlib
import json
from array import array
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from types import MethodType
from typing import Any

import aiohttp
import pytest

from epp import cli
from epp.admission.outlook import outlook
from epp.arrival import Arrival
from epp.candidates import Candidates
from epp.console.asking import CROWDED, EXACT, LATE, NO_TOKENIZER, WAITING_MAX, WHY, Asking, AskTokens
from epp.console.server import HttpServer
from epp.decisions import Decisions
from epp.errors import EppError, SaturatedError
from epp.explain import render
from epp.observe.kv_index import index_families
from epp.plugins.producers.precise_prefix_cache import PrecisePrefixCacheProducer
from epp.prefix.kv_events import BlockStored
from epp.tokenize import backend
from epp.tokenize.stage import NO_TOKENIZER as STAGE_HAS_NONE
from epp.tokenize.stage import NOTHING, TokenStage
from epp.tokenize.tokens import Tokens, put
from epp.types import TOKEN_IDS, Address, EndpointSpec
from tests.builders import PATH, Core, Stream, chat, core, llm_request, request_body, request_headers
from tests.picture import picture
from tests.spec.flow_wire import FAIRNESS, OBJECTIVE, REASON, TTL, Queued, queued

DATA = Path(__file__).parents[1] / "data" / "tokenize"
QUESTION = "Which of the two engines has seen the sea, and how calm was it when nobody spoke? " * 3
BLOCK = 16
MODEL = {"name": "m", "path": str(DATA), "chatTemplate": str(DATA / "chatml.jinja")}
PRECISE = json.dumps(
    {
        "apiVersion": "llm-d.ai/v1alpha1",
        "kind": "EndpointPickerConfig",
        "plugins": [
            {"type": "token-producer", "parameters": {"local": {"models": [MODEL], "timeout": "60s"}}},
            {"type": "precise-prefix-cache-producer"},
            {"type": "prefix-cache-scorer"},
            {"type": "queue-scorer"},
        ],
    }
)


class Page:
    """The HTTP port of a picker's core."""

    def __init__(self, server: HttpServer, client: aiohttp.ClientSession) -> None:
        self.server = server
        self.url = f"http://127.0.0.1:{server.port}"
        self.client = client

    async def ask(self, body: bytes = b"", **more: Any) -> dict[str, Any]:
        asked = {"body": body.decode() or None, **more}
        async with self.client.post(f"{self.url}/debug/explain", data=json.dumps(asked)) as response:
            assert response.status == 200, await response.text()
            answer: dict[str, Any] = await response.json()
            return answer

    async def run(self, *argv: str) -> int:
        return await asyncio.to_thread(cli.main, ["explain", "--url", self.url, *argv])


@contextlib.asynccontextmanager
async def console(world: Core, tokens: AskTokens | None = None) -> AsyncIterator[Page]:
    decisions = Decisions(world.clock, 8)
    world.director._decisions = decisions
    server = HttpServer(
        world.metrics,
        world.director,
        decisions,
        world.built.plugins.values,
        datastore=world.datastore,
        engine=lambda _endpoint: "vllm",
        debug=True,
        admin_token=str,
        listen_problem=lambda host, port, error: f"{host}:{port}: {error}",
        tokens=tokens,
    )
    await server.start("127.0.0.1", 0)
    try:
        async with aiohttp.ClientSession() as client:
            yield Page(server, client)
    finally:
        await server.stop()


# Exact tokens


class Tokenized:
    """A pool whose engines say what they have cached, and a tokenizer."""

    def __init__(self) -> None:
        self.core = core(2, config=PRECISE)
        self.hits: list[str] = []
        self.waited: list[float] = []
        self.stage = TokenStage(self.core.clock, lambda _pool: (), limit_hit=self.hits.append, waited=self.waited.append)
        self.stage.use(self.core.built.plugins.values())
        self.core.director.stages = self.stage.stages
        producers = self.core.built.plugins.values()
        self.index = next(each.index for each in producers if isinstance(each, PrecisePrefixCacheProducer))
        self.core.metrics.parts.append(lambda: index_families(self.index))

    async def exact(self, body: bytes) -> bytes:
        """The tokens of a prompt, as its request would have them."""
        request, woken = llm_request(), asyncio.Event()
        understood = self.core.director._understood(request, body)
        arrival = Arrival(request, body, None, 0.0, understood=understood, wake=woken.set, stages=())
        wait = self.stage.inquire(arrival, lambda _outcome: None)
        if wait is not None:
            async with asyncio.timeout(60):
                await woken.wait()
        found: bytes = request.attributes[TOKEN_IDS]
        return found

    def holds(self, number: int, tokens: bytes) -> int:
        """The engine of that endpoint says so; how much of it."""
        blocks = len(tokens) // 4 // BLOCK
        event = BlockStored(list(range(1, blocks + 1)), None, tokens[: blocks * BLOCK * 4], BLOCK, "gpu", "", "")
        self.index.precise.apply(self.core.endpoint(number).slot, event)
        return blocks * BLOCK

    def state(self) -> object:
        """What a request leaves traces in."""
        world = self.core
        endpoints = [
            (e.name, e.inflight_requests, e.inflight_tokens, e.sent_requests, e.picks_total) for e in world.datastore.endpoints.values()
        ]
        stage = self.stage.waiting, dict(self.stage.outcomes), list(self.waited), list(self.hits)
        kept = len(world.director._decisions or ()), self.index.state({}, 0)
        return endpoints, stage, kept, world.metrics.exposition()[0], world.inflight


@contextlib.asynccontextmanager
async def tokenized() -> AsyncIterator[Tokenized]:
    world = Tokenized()
    async with asyncio.TaskGroup() as tasks:
        life = tasks.create_task(world.stage.run())
        await asyncio.sleep(0)
        yield world
        life.cancel()


async def routed(world: Core, body: bytes) -> str:
    """Where the request itself goes, all stages passed."""
    stream, woken = Stream(world.session()), asyncio.Event()
    stream.session.notify = woken.set
    stream.send(request_headers(), request_body(body, end_of_stream=True))
    if stream.session.waiting:
        async with asyncio.timeout(60):
            await woken.wait()
        stream.resume()
    assert stream.session._exchange is not None
    return stream.session._exchange.decision.endpoint.name


@pytest.mark.parametrize("holder", [1, 2])
async def test_prefixes_are_looked_up_by_exact_tokens_as_the_request_s_own_are(holder: int) -> None:
    async with tokenized() as world, console(world.core, world.stage.inquire) as page:
        body = chat(QUESTION)
        tokens = await world.exact(body)
        cached = world.holds(holder, tokens)
        before = world.state()
        answer = await page.ask(body)
        assert world.state() == before, "nothing is counted"
        assert answer["prompt_tokens"] == len(tokens) // 4
        assert answer["tokens"] == {"source": "tokenizer", "outcome": "exact", "why": "", "engines_believed": 1}
        assert {row["name"]: row["cached_tokens"] for row in answer["profiles"][0]["endpoints"]} == {
            f"pod-{holder}": cached,
            f"pod-{3 - holder}": 0,
        }
        assert answer["endpoint"] == await routed(world.core, body) == f"pod-{holder}"
        assert world.index.lookups == 1, "the request itself is counted"
        assert world.stage.outcomes == {"exact": 1}


async def test_neither_the_prompt_nor_its_tokens_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    async with tokenized() as world, console(world.core, world.stage.inquire) as page:
        tokens = array("I", await world.exact(chat(QUESTION)))
        text = json.dumps(await page.ask(chat(QUESTION)))
        assert await page.run("-d", chat(QUESTION).decode()) == 0
        text += capsys.readouterr().out
        assert not {word for word in set(QUESTION.split()) if len(word) > 3} & set(text.split())
        assert not {str(token) for token in tokens if token > 999} & set(text.replace(",", " ").replace("]", " ").split())


async def test_the_text_says_where_tokens_are_from(capsys: pytest.CaptureFixture[str]) -> None:
    async with tokenized() as world, console(world.core, world.stage.inquire) as page:
        count = len(await world.exact(chat(QUESTION))) // 4
        world.holds(1, await world.exact(chat(QUESTION)))
        ids = json.dumps({"model": "m", "prompt": list(range(40))})
        for argv, said in (
            (
                ["-d", chat(QUESTION).decode()],
                f"{count} prompt tokens, by the tokenizer; cached by the word of 1 engine, else by what was sent",
            ),
            (
                ["-d", ids, "--path", "/v1/completions"],
                "40 prompt tokens, by the client; cached by the word of 1 engine, else by what was sent",
            ),
            (["-d", chat("hi", model="other").decode()], f" prompt tokens, estimated: {WHY[backend.UNKNOWN_MODEL]}"),
        ):
            assert await page.run(*argv) == 0
            assert capsys.readouterr().out.splitlines()[0].endswith(said)


def test_every_outcome_of_the_tokenizer_has_its_words() -> None:
    outcomes = {getattr(backend, name) for name in ("TIMEOUT", "FAILED", "FULL", "RESTING", "UNKNOWN_MODEL", "UNSUPPORTED", "TOO_LONG")}
    assert outcomes | {STAGE_HAS_NONE, NOTHING, LATE, CROWDED} == WHY.keys()
    assert STAGE_HAS_NONE == NO_TOKENIZER


@pytest.mark.parametrize(
    ("path", "body", "source", "outcome"),
    [
        (PATH, chat("hello", model="other"), "estimate", backend.UNKNOWN_MODEL),
        (PATH, chat([{"type": "image_url", "image_url": {"url": "https://x/y.png"}}]), "estimate", backend.UNSUPPORTED),  # type: ignore[arg-type]
        ("/v1/completions", b'{"model": "m", "prompt": [1, 2, 3]}', "client", EXACT),
        ("/v1/embeddings", b'{"model": "m", "input": "some text"}', "estimate", NOTHING),
        ("/v1/models", b"", "none", NOTHING),
    ],
)
async def test_why_there_are_none(path: str, body: bytes, source: str, outcome: str) -> None:
    async with tokenized() as world, console(world.core, world.stage.inquire) as page:
        before = world.state()
        told = (await page.ask(body, path=path))["tokens"]
        assert (told["source"], told["outcome"], told["why"]) == (source, outcome, WHY.get(outcome, ""))
        assert world.state() == before


async def test_without_a_tokenizer_tokens_are_estimated_and_nobody_waits() -> None:
    world = core(1)
    stage = TokenStage(world.clock, lambda _pool: ())
    for tokens in (None, stage.inquire):
        async with console(world, tokens) as page:
            told = await page.ask(chat("x" * 40))
            assert told["tokens"] == {"source": "estimate", "outcome": NO_TOKENIZER, "why": WHY[NO_TOKENIZER]}
            assert next(iter(render(told))).endswith("  about 18 prompt tokens"), "as ever"


async def test_what_can_t_be_understood_has_no_tokens_to_tell_of() -> None:
    async with tokenized() as world, console(world.core, world.stage.inquire) as page:
        before = world.state()
        told = await page.ask(b"no JSON")
        assert told["error"].startswith("400 ")
        assert "tokens" not in told
        assert world.state() == before


class Held:
    """One question's wait."""

    def __init__(self, arrival: Arrival, told: Callable[[str], None]) -> None:
        self.arrival, self.told = arrival, told
        self.error: EppError | None = None
        self.left = asyncio.Event()

    def cancel(self) -> None:
        self.left.set()


class Slow:
    """A tokenizer that answers when it is told to."""

    def __init__(self) -> None:
        self.held: asyncio.Queue[Held] = asyncio.Queue()

    def inquire(self, arrival: Arrival, told: Callable[[str], None]) -> Held:
        held = Held(arrival, told)
        self.held.put_nowait(held)
        return held


async def soon(what: Any) -> Any:
    async with asyncio.timeout(20):
        return await what


async def test_a_question_waits_for_its_tokens_and_the_pool_may_change_meanwhile() -> None:
    world, slow = core(1), Slow()
    async with console(world, slow.inquire) as page, asyncio.TaskGroup() as tasks:
        asked = tasks.create_task(page.ask(chat()))
        held = await soon(slow.held.get())
        assert page.server.asking.waiting == 1
        world.datastore.apply([EndpointSpec("pod-9", Address("10.0.0.9", 8000))])
        put(held.arrival.request, Tokens(array("I", range(123)).tobytes()))
        held.told(EXACT)
        held.arrival.wake()
        answer = await soon(asked)
        assert (answer["endpoint"], answer["prompt_tokens"]) == ("pod-9", 123)
        assert page.server.asking.waiting == 0


async def test_who_leaves_is_waited_for_no_longer() -> None:
    world, slow = core(1), Slow()
    async with console(world, slow.inquire) as page:
        page.server.asking = Asking(world.director, slow.inquire, wait_s=3_600.0)
        asked = asyncio.ensure_future(page.ask(chat()))
        held = await soon(slow.held.get())
        assert not held.left.is_set()
        asked.cancel()
        await soon(held.left.wait())
        assert page.server.asking.waiting == 0


async def test_a_tokenizer_that_takes_too_long_is_waited_for_no_longer() -> None:
    slow = Slow()
    asking = Asking(core(1).director, slow.inquire, wait_s=0.0)
    told = await asking.explain(llm_request(headers={":path": PATH}), chat("x" * 40), None)
    assert (await slow.held.get()).left.is_set()
    assert told["tokens"] == {"source": "estimate", "outcome": LATE, "why": WHY[LATE]}
    assert told["endpoint"] == "pod-1"
    assert asking.waiting == 0


async def test_no_more_than_a_few_wait_at_once() -> None:
    slow = Slow()
    asking = Asking(core(1).director, slow.inquire)
    async with asyncio.TaskGroup() as tasks:
        asked = [tasks.create_task(asking.explain(llm_request(), chat(), None)) for _ in range(WAITING_MAX)]
        held = [await soon(slow.held.get()) for _ in asked]
        told = await asking.explain(llm_request(), chat(), None)
        assert (told["tokens"]["outcome"], slow.held.qsize()) == (CROWDED, 0)
        for each in held:
            each.told(backend.FAILED)
            each.arrival.wake()
    assert {each.result()["tokens"]["outcome"] for each in asked} == {backend.FAILED}
    again = asyncio.ensure_future(asking.explain(llm_request(), chat(), None))
    (await soon(slow.held.get())).arrival.wake()
    assert (await again)["endpoint"] == "pod-1"


async def test_a_stage_that_refuses_is_why_the_request_is_refused() -> None:
    slow = Slow()
    asking = Asking(core(1).director, slow.inquire)
    asked = asyncio.ensure_future(asking.explain(llm_request(), chat(), None))
    held = await soon(slow.held.get())
    held.error = SaturatedError("no tokens, no service")
    held.arrival.wake()
    assert (await soon(asked))["error"] == "429 no tokens, no service"


# Flow control


def flow_controlled(endpoints: int = 2, priorities: Mapping[str, int] | None = None, **block: Any) -> Queued:
    """Each endpoint takes one request at a time."""
    world = queued(endpoints, priorities=priorities, **block)
    flow = world.flow
    world.world.director.outlook = lambda arrival: outlook(flow, arrival)
    world.world.metrics.parts.append(world.queueing.families)
    return world


def traces(world: Queued) -> object:
    """What asking could leave behind: in flow control, but for the pool it looks at, and in what is counted."""
    exposition = world.world.metrics.exposition()[0]  # first: it brings some of what it shows up to date
    return exposition, picture(world.flow, leave_out=(Candidates, MethodType)), world.world.inflight, len(world.timers.heap)


async def test_it_passes_while_there_is_room() -> None:
    world = flow_controlled()
    async with console(world.world) as page:
        world.ask()
        before = traces(world)
        told = await page.ask(chat(), headers={FAIRNESS: "tenant-a"})
        assert traces(world) == before
    assert told["endpoint"] is not None
    assert "error" not in told
    assert told["flow_control"] == {
        "verdict": "passes",
        "why": "",
        "priority": 0,
        "band": 0,
        "fairness_id": "tenant-a",
        "candidates": 2,
        "empty": False,
        "saturation": 0.5,
        "ceiling": 1.0,
        "detector": "concurrency-detector",
        "queued": 0,
        "ahead": {"higher_bands": 0, "band": 0, "flow": None},
    }
    assert list(render(told))[-3:] == [
        "flow control: passes",
        "  band 0, flow tenant-a; saturation 0.5 of 1 (concurrency-detector, 2 candidates); 0 queued in all",
        "",
    ]


async def test_it_waits_behind_those_who_wait_already(capsys: pytest.CaptureFixture[str]) -> None:
    world = flow_controlled(
        1, {"high": 10}, defaultPriorityBand={"fairnessPolicyRef": "round-robin-fairness-policy"}, defaultRequestTTL="30s"
    )
    async with console(world.world) as page:
        world.ask()
        waiting = [world.ask(headers=headers) for headers in ({FAIRNESS: "a"}, {FAIRNESS: "a"}, {FAIRNESS: "b"}, {OBJECTIVE: "high"})]
        before = traces(world)
        argv = ["-d", chat().decode(), "-H", f"{FAIRNESS}: a"]
        assert await page.run(*argv) == 0, "it is not refused"
        assert traces(world) == before
        lines = capsys.readouterr().out.splitlines()
        assert lines[-4:] == [
            "-> pod-1 (10.0.0.1:8000), were it let through now",
            "flow control: waits, others come first: 4 ahead (1 in higher bands, 3 in its own, 2 of them of its flow), at most 30 s",
            "  band 0, flow a; saturation 1 of 1 (concurrency-detector, 1 candidate); 4 queued in all",
            "",
        ]
        told = (await page.ask(chat(), headers={FAIRNESS: "a", OBJECTIVE: "high"}))["flow_control"]
        assert (told["band"], told["ahead"]) == (10, {"higher_bands": 0, "band": 1, "flow": 0})
        for stream in waiting:
            stream.close()
        told = (await page.ask(chat(), headers={TTL: "5s"}))["flow_control"]
        assert (told["verdict"], told["why"], told["ttl_s"]) == ("waits", "its candidates are full", 5.0)


async def test_it_is_refused_with_what_the_request_is_then_told(capsys: pytest.CaptureFixture[str]) -> None:
    world = flow_controlled(1, maxRequests="1")
    async with console(world.world) as page:
        for _ in range(2):
            world.ask()
        before = traces(world)
        told = await page.ask(chat())
        assert await page.run("-d", chat().decode()) == 1
        assert traces(world) == before
        refused = world.ask().got[-1].immediate_response
    assert told["flow_control"]["verdict"] == "refused"
    assert told["flow_control"]["status"] == refused.status.code == 429
    headers = {option.header.key: option.header.raw_value.decode() for option in refused.headers.set_headers}
    assert {key: told["flow_control"][key] for key in ("code", "dropped_reason", "retry_after_s", "why")} == {
        "code": "queue_full",
        "dropped_reason": headers[REASON],
        "retry_after_s": int(headers["retry-after"]),
        "why": "the queue is full: 1 requests wait",
    }
    assert (told["error"], told["endpoint"]) == ("429 the queue is full: 1 requests wait", None)
    assert [row["name"] for row in told["profiles"][0]["endpoints"] if row["picked"]] == ["pod-1"], "where it would go all the same"
    out = capsys.readouterr().out
    assert "\nrefused: 429 the queue is full: 1 requests wait\n" in out
    assert f"\nflow control: refused with 429, the queue is full: 1 requests wait; retry after {headers['retry-after']} s\n" in out


async def test_a_request_that_may_not_wait_and_one_that_says_nonsense() -> None:
    world = flow_controlled(1)
    async with console(world.world) as page:
        world.ask()
        for ttl, status in (("0", 429), ("soon", 400)):
            told = await page.ask(chat(), headers={TTL: ttl})
            assert told["error"].startswith(f"{status} ")
            assert told["flow_control"]["status"] == status


async def test_in_an_empty_pool_it_waits_for_an_endpoint() -> None:
    world = flow_controlled(0)
    async with console(world.world) as page:
        told = await page.ask(chat())
        lines = list(render(told))
    assert "error" not in told
    assert told["endpoint"] is None
    assert (told["flow_control"]["verdict"], told["flow_control"]["why"]) == ("waits", "no endpoint is ready")
    assert told["flow_control"]["saturation"] is told["flow_control"]["ceiling"] is None
    assert lines[-3].startswith("flow control: waits, no endpoint is ready: 0 ahead")
    assert not any(line.startswith("-> ") for line in lines)


async def test_a_request_of_a_priority_nobody_had_leaves_no_band_behind() -> None:
    world = flow_controlled(1, {"new": 7})
    world.flow.bands.provision((), 0.0)
    world.world.clock.advance(10_000.0)
    async with console(world.world) as page:
        before = traces(world)
        told = await page.ask(chat(), headers={OBJECTIVE: "new", FAIRNESS: "nobody-yet"}, subset=["10.0.0.1"])
        assert traces(world) == before
    assert (told["flow_control"]["band"], told["flow_control"]["fairness_id"]) == (7, "nobody-yet")


def test_what_an_older_picker_answers_is_shown_too() -> None:
    told = core(1).director.explain(llm_request(headers={":path": PATH}), chat("x" * 40), None)
    assert "tokens" not in told
    assert "flow_control" not in told
    first, *_, last, _ = render(told)
    assert first == "request r  model m  about 18 prompt tokens"
    assert last.startswith("-> pod-1 ")
