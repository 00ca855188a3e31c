"""Requests that wait for their tokens: what they get, and that none fails, is lost or waits for good."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import threading
from array import array
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import pytest

from epp.arrival import Arrival
from epp.clock import VirtualClock
from epp.plugins.base import Plugin
from epp.plugins.producers.token import TokenProducer
from epp.tokenize.backend import FAILED, FULL, TIMEOUT, TOO_LONG, UNKNOWN_MODEL, UNSUPPORTED
from epp.tokenize.stage import CANCELLED, EXACT, TokenStage
from epp.tokenize.tokens import Span, Tokens, put
from epp.tokenize.workers import Workers
from epp.types import TOKEN_MEDIA
from tests.builders import Core, Stream, chat, core, echoed, kinds, llm_request, request_body, request_headers

DATA = Path(__file__).parent.parent / "data" / "tokenize"
EXPECTED = json.loads((DATA / "expected.json").read_text(encoding="utf-8"))["answers"]["chatml"]["one message"]
QUESTION = "How do I reverse a list in Python?"


def local(**fields: Any) -> dict[str, Any]:
    model = {"name": "m", "path": str(DATA), "chatTemplate": str(DATA / "chatml.jinja"), "aliases": ["adapter"]}
    return {"local": {"models": [model], **fields}}


def producer(parameters: dict[str, Any]) -> Plugin:
    return msgspec.convert(parameters, TokenProducer)


@dataclass
class Timers:
    """Deadlines that come when they are told to."""

    set: list[tuple[float, Callable[[], None]]] = field(default_factory=list)
    cancelled: int = 0

    def later(self, delay_s: float, callback: Callable[[], None]) -> Timers:
        self.set.append((delay_s, callback))
        return self

    def cancel(self) -> None:
        self.cancelled += 1


@dataclass
class World:
    core: Core
    stage: TokenStage
    timers: Timers
    hits: list[str]
    waited: list[float]

    def arrival(self, body: bytes, *, path: str = "/v1/chat/completions", media: int = 0) -> tuple[Arrival, asyncio.Event]:
        woken = asyncio.Event()
        request = llm_request(path=path)
        understood = self.core.director._understood(request, body)
        request.media = media
        return Arrival(request, body, None, 0.0, understood=understood, wake=woken.set, stages=(self.stage,)), woken


@contextlib.asynccontextmanager
async def running(parameters: dict[str, Any] | None) -> AsyncIterator[World]:
    timers, hits, waited, clock = Timers(), [], [], VirtualClock()
    stage = TokenStage(clock, lambda _pool: (), limit_hit=hits.append, waited=waited.append, call_later=timers.later)
    stage.use([] if parameters is None else [producer(parameters)])
    async with asyncio.TaskGroup() as tasks:
        life = tasks.create_task(stage.run())
        await asyncio.sleep(0)
        yield World(core(2), stage, timers, hits, waited)
        life.cancel()


async def woken(event: asyncio.Event) -> None:
    async with asyncio.timeout(20):
        await event.wait()


async def test_a_prompt_s_tokens_take_the_place_of_the_estimate() -> None:
    async with running(local()) as world:
        arrival, event = world.arrival(chat(QUESTION))
        estimate = arrival.request.prompt_tokens
        wait = world.stage.begin(arrival)
        assert wait is not None
        assert not event.is_set(), "never from within"
        await woken(event)
        assert wait.error is None
        request = arrival.request
        assert array("I", request.attributes["tokens"]).tolist() == EXPECTED
        assert (request.prompt, request.prompt_tokens) == (request.attributes["tokens"], len(EXPECTED))
        assert estimate != len(EXPECTED)
        assert world.stage.outcomes == {EXACT: 1}
        assert (world.stage.waiting, world.timers.cancelled, len(world.waited)) == (0, 1, 1)
        assert world.timers.set[0][0] == 0.4
        state = world.stage.state()
        assert state["outcomes"] == {EXACT: 1}
        assert QUESTION not in str(state)


async def test_adapters_have_their_base_s_tokenizer() -> None:
    async with running(local()) as world:
        for model, known in (("adapter", True), ("other", False)):
            arrival, event = world.arrival(chat(QUESTION, model=model))
            assert (world.stage.begin(arrival) is not None) is known
            if known:
                await woken(event)
            assert ("tokens" in arrival.request.attributes) is known
        assert world.stage.outcomes == {EXACT: 1, UNKNOWN_MODEL: 1}


@pytest.mark.parametrize(
    ("path", "body", "waits"),
    [
        ("/v1/completions", {"prompt": "some text"}, True),
        ("/v1/completions", {"prompt": ["some", "texts"]}, True),
        ("/v1/completions", {"prompt": [1, 2, 3]}, False),
        ("/v1/completions", {"prompt": [[1], [2]]}, False),
        ("/v1/completions", {"prompt": " "}, True),
        ("/v1/completions", {"prompt": ""}, False),
        ("/v1/completions", {}, False),
        ("/generate", {"text": "some text"}, True),
        ("/generate", {"text": ["some text"]}, True),
        ("/generate", {"input_ids": [1, 2]}, False),
        ("/generate", {"prompt": "of another engine"}, False),
        ("/v1/embeddings", {"input": "some text"}, False),
        ("/v1/messages", {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1}, False),
        ("/v1/chat/completions/render", {"messages": [{"role": "user", "content": "x"}]}, False),
        ("/inference/v1/generate", {"token_ids": [1, 2]}, False),
        ("/tokenize", {"prompt": "some text"}, False),
        ("", {"messages": [{"role": "user", "content": "x"}]}, True),
        ("", {"prompt": "some text"}, True),
        ("", {"prompt": [1]}, False),
    ],
)
async def test_which_requests_wait(path: str, body: dict[str, Any], waits: bool) -> None:
    async with running(local()) as world:
        arrival, event = world.arrival(json.dumps({"model": "m", **body}).encode(), path=path)
        before = arrival.request.prompt
        assert (world.stage.begin(arrival) is not None) is waits
        if waits:
            await woken(event)
            assert world.stage.outcomes == {EXACT: 1}
        else:
            assert arrival.request.prompt == before
            assert not set(world.stage.outcomes) - {UNSUPPORTED}


async def test_a_deadline_leaves_the_estimate_and_what_comes_later_is_not_for_this_request() -> None:
    async with running(local(timeout="50ms", workers=1)) as world:
        arrival, event = world.arrival(chat(QUESTION))
        before = (arrival.request.prompt, arrival.request.prompt_tokens)
        wait = world.stage.begin(arrival)
        assert wait is not None
        delay_s, expire = world.timers.set[0]
        assert delay_s == 0.05
        expire()
        assert event.is_set()
        assert wait.error is None
        event.clear()
        again, other = world.arrival(chat(QUESTION))
        world.stage.begin(again)
        await woken(other)  # one worker: the first job is over
        assert not event.is_set(), "woken once"
        assert (arrival.request.prompt, arrival.request.prompt_tokens, arrival.request.attributes) == (*before, {})
        assert world.stage.outcomes == {TIMEOUT: 1, EXACT: 1}
        assert world.hits == ["tokenize_time"]
        expire()
        assert world.stage.outcomes[TIMEOUT] == 1


async def test_a_client_that_leaves_is_not_woken() -> None:
    async with running(local(workers=1)) as world:
        arrival, event = world.arrival(chat(QUESTION))
        wait = world.stage.begin(arrival)
        assert wait is not None
        wait.cancel()
        again, other = world.arrival(chat(QUESTION))
        world.stage.begin(again)
        await woken(other)
        assert not event.is_set()
        assert world.stage.outcomes == {CANCELLED: 1, EXACT: 1}
        assert world.stage.waiting == 0
        assert world.timers.cancelled == 2


@pytest.mark.parametrize(
    ("parameters", "body", "media", "outcome", "hits"),
    [
        (local(textBytesMax=10), chat(QUESTION), 0, TOO_LONG, ["tokenize_bytes"]),
        (local(), chat(QUESTION), 1, UNSUPPORTED, []),
    ],
)
async def test_what_is_not_begun_does_not_wait(parameters: dict[str, Any], body: bytes, media: int, outcome: str, hits: list[str]) -> None:
    async with running(parameters) as world:
        arrival, _ = world.arrival(body, media=media)
        assert world.stage.begin(arrival) is None
        assert world.stage.outcomes == {outcome: 1}
        assert world.hits == hits
        assert world.timers.set == []


@pytest.mark.parametrize(
    ("body", "outcome"),
    [
        (chat(QUESTION, continue_final_message=True), UNSUPPORTED),
        (chat(QUESTION, add_special_tokens="perhaps"), FAILED),
        (chat(QUESTION, chat_template_kwargs={"bos_token": 1, "namespace": 1, "raise_exception": 1}), EXACT),
        (b'{"model":"m","messages":[{"role":"user","content":"x"}],"documents":' + b"[" * 900 + b"]" * 900 + b"}", FAILED),
    ],
)
async def test_whatever_the_body_is_the_request_goes_on(body: bytes, outcome: str) -> None:
    async with running(local()) as world:
        arrival, event = world.arrival(body)
        wait = world.stage.begin(arrival)
        await woken(event)
        assert wait is not None
        assert wait.error is None
        assert world.stage.outcomes == {outcome: 1}


async def test_more_than_the_queue_holds_do_not_wait() -> None:
    async with running(local(workers=1, queueMax=1)) as world:
        backend: Any = world.stage._backend
        held, begun = threading.Event(), asyncio.Event()
        loop = asyncio.get_running_loop()

        class Stuck:
            abandoned = False

            def work(self) -> None:
                loop.call_soon_threadsafe(begun.set)
                held.wait(20)

            def done(self, _result: object) -> None:
                """Of no interest."""

        assert backend._workers.submit(Stuck())
        await woken(begun)
        arrivals = [world.arrival(chat(QUESTION)) for _ in range(2)]
        waits = [world.stage.begin(arrival) for arrival, _ in arrivals]
        assert waits[0] is not None
        assert waits[1] is None
        assert world.stage.outcomes == {FULL: 1}
        assert world.hits == ["tokenize_queue"]
        held.set()
        await woken(arrivals[0][1])
        assert world.stage.outcomes == {FULL: 1, EXACT: 1}
        assert backend._workers.busy == 0


async def test_a_job_that_raises_whatever_costs_no_thread(caplog: pytest.LogCaptureFixture) -> None:
    class PanicError(BaseException):
        """As a panic in Rust arrives."""

    results: list[object] = []

    class Job:
        abandoned = False

        def __init__(self, error: BaseException | None, over: asyncio.Event) -> None:
            self.error, self.over = error, over

        def work(self) -> str:
            if self.error is not None:
                raise self.error
            return "fine"

        def done(self, result: object) -> None:
            results.append(result)
            self.over.set()

    workers = Workers(1, 9)
    for error in (PanicError("a prompt"), ValueError("a prompt"), None):
        over = asyncio.Event()
        assert workers.submit(Job(error, over))
        await woken(over)
    assert results == [None, None, "fine"]
    assert "a prompt" not in caplog.text
    workers.close()
    assert not workers.submit(Job(None, asyncio.Event()))


async def test_without_a_configuration_that_wants_tokens_there_is_no_stage() -> None:
    for parameters in (None, {}, {"estimate": {}}, {"udsTokenizerConfig": {"socketFile": "/tmp/s"}}):
        async with running(parameters) as world:
            assert world.stage.stages == ()
            assert world.stage.begin(world.arrival(chat(QUESTION))[0]) is None
    async with running(local()) as world:
        assert world.stage.stages == (world.stage,)


async def test_before_it_runs_and_after_it_nothing_waits() -> None:
    async with running(local()) as world:
        pass
    assert world.stage.begin(world.arrival(chat(QUESTION))[0]) is None
    stage = TokenStage(VirtualClock(), lambda _pool: ())
    stage.use([producer(local())])
    assert stage.begin(world.arrival(chat(QUESTION))[0]) is None


def files(folder: Path, **texts: str) -> str:
    for name, text in texts.items():
        (folder / name.replace("_json", ".json")).write_text(text)
    return str(folder)


@pytest.mark.parametrize(
    ("texts", "reason"),
    [
        ({}, "No such file"),
        ({"tokenizer_json": "{}"}, "no tokenizer"),
        ({"tokenizer_json": "not json"}, "no tokenizer"),
        ({"tokenizer_json": (DATA / "tokenizer.json").read_text(), "tokenizer_config_json": "{"}, "not JSON"),
    ],
)
def test_a_tokenizer_that_can_not_be_loaded_is_an_error_of_the_configuration(tmp_path: Path, texts: dict[str, str], reason: str) -> None:
    stage = TokenStage(VirtualClock(), lambda _pool: ())
    path = files(tmp_path, **texts)
    with pytest.raises(ValueError, match=reason) as caught:
        stage.use([producer({"local": {"models": [{"name": "m", "path": path}]}})])
    assert path in str(caught.value)
    assert stage.stages == ()


async def test_another_configuration_is_loaded_while_the_old_one_serves(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    async with running(local()) as world:
        old = world.stage._backend
        with caplog.at_level(logging.WARNING):
            world.stage.use([producer({"local": {"models": [{"name": "m", "path": str(tmp_path)}]}})])
            assert world.stage._backend is old
            await eventually(lambda: bool(caplog.records))
        assert "stay" in caplog.records[0].message
        assert world.stage._backend is old
        world.stage.use([producer(local(workers=1))])
        await eventually(lambda: world.stage._backend is not old)
        arrival, event = world.arrival(chat(QUESTION))
        world.stage.begin(arrival)
        await woken(event)
        now = world.stage._backend
        world.stage.use([producer(local(workers=1)), producer(local())])
        world.stage.use([producer(local(workers=1))])
        assert world.stage._backend is now, "the same is not loaded again"
        world.stage.use([])
        await eventually(lambda: world.stage._backend is None)
        assert world.stage.stages == ()


async def test_a_tokenizer_that_could_not_be_loaded_is_tried_again_and_what_is_in_service_is_not(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    async with running(local()) as world:
        old, loads = world.stage._backend, list[object]()
        made = world.stage._made
        world.stage._made = lambda wanted: (loads.append(wanted), made(wanted))[1]  # type: ignore[method-assign]
        wanted = [producer({"local": {"models": [{"name": "m", "path": str(tmp_path)}]}})]
        with caplog.at_level(logging.WARNING):
            world.stage.use(wanted)
            await eventually(lambda: bool(caplog.records))
        world.stage.use([producer(local())])
        assert world.stage._tasks is not None
        await eventually(lambda: not world.stage._tasks._tasks)
        assert len(loads) == 1
        assert world.stage._backend is old
        files(tmp_path, tokenizer_json=(DATA / "tokenizer.json").read_text())
        world.stage.use(wanted)
        await eventually(lambda: world.stage._backend is not old)
        assert len(loads) == 2


async def test_where_no_thread_can_be_started_nobody_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    async with running(local(workers=2)) as world:
        with monkeypatch.context() as patched:
            patched.setattr(threading.Thread, "start", refuse)
            assert world.stage.begin(world.arrival(chat(QUESTION))[0]) is None
            assert world.stage.outcomes == {FULL: 1}
        for _ in range(2):
            arrival, event = world.arrival(chat(QUESTION))
            assert world.stage.begin(arrival) is not None
            await woken(event)
        assert world.stage.outcomes == {FULL: 1, EXACT: 2}


async def eventually(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 - a thread sets no event
            await asyncio.sleep(0.001)


def test_pictures_are_the_same_ids_to_an_engine_and_are_told_apart_in_what_is_hashed() -> None:
    ids = array("I", [7, 9, 9, 9, 8]).tobytes()
    requests = [llm_request(prompt=b"estimate", prompt_tokens=2) for _ in range(3)]
    for request, content in zip(requests, (b"one", b"two", b"one"), strict=True):
        put(request, Tokens(ids, (Span(1, 3, content),)))
    assert [request.attributes["tokens"] for request in requests] == [ids] * 3
    assert requests[0].prompt == requests[2].prompt != requests[1].prompt
    assert requests[0].prompt_tokens == 5
    assert requests[0].attributes[TOKEN_MEDIA] == (Span(1, 3, b"one"),)


# Through the session


async def test_the_whole_way_of_a_request() -> None:
    async with running(local()) as world:
        world.core.director.stages = world.stage.stages
        stream = Stream(world.core.session())
        notified = asyncio.Event()
        stream.session.notify = notified.set
        body = chat(QUESTION)
        assert stream.send(request_headers(), request_body(body, end_of_stream=True)) == []
        await woken(notified)
        assert kinds(stream.resume()) == ["request_headers", "request_body"]
        assert echoed(stream.got) == body
        assert world.core.inflight[1] == len(EXPECTED), "charged with what it has"
