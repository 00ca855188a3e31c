"""Engines that tokenize: what they are asked, what is made of their answers, and when they are left alone."""

from __future__ import annotations

import asyncio
import json
from array import array
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

import msgspec
import pytest

from epp.clock import VirtualClock
from epp.plugins.producers.token import EngineConfig, VllmConfig
from epp.tokenize.backend import FAILED, FULL, RESTING, UNSUPPORTED, Ask
from epp.tokenize.cache import PieceCache
from epp.tokenize.post import NotThereError, PostError, RefusedError
from epp.tokenize.prompts import CHAT, GENERATE, MESSAGES, RESPONSE, TEXT
from epp.tokenize.questions import Question, Questions, Render, Tokenize, read_rendered, read_tokenized
from epp.tokenize.remote import FAILURES_MAX, NOT_THERE_S, REST_S, Remote
from epp.tokenize.tokens import Span, Tokens
from tests.builders import pool_of

MESSAGES_JSON = [{"role": "user", "content": "hi"}]
RENDERED = b'{"request_id":"chatcmpl-1","token_ids":[3,89,4294967295],"features":null,"sampling_params":{},"model":"tiny"}'
TOKENIZED = b'{"count":3,"max_model_len":8192,"tokens":[3,89,4294967295],"token_strs":null}'
IDS = array("I", [3, 89, 4294967295]).tobytes()


def ask(body: dict[str, Any], kind: str = CHAT, *, model: str = "adapter", media: int = 0) -> Ask:
    return Ask(kind, json.dumps({"model": "asked", **body}).encode(), model, media, "")


def asked(questions: Questions, given: Ask) -> tuple[str, dict[str, Any]]:
    question = questions.about(given, lambda _url: True)
    assert isinstance(question, Question)
    return question.url, json.loads(question.body)


def render(**fields: Any) -> Render:
    return Render(msgspec.convert({"url": "http://renderer:8000/", **fields}, VllmConfig), "base")


def tokenize(count: int = 1) -> Tokenize:
    endpoints = pool_of(*[{}] * count)
    return Tokenize(EngineConfig(), lambda pool: endpoints if not pool else [])


@pytest.mark.parametrize(
    ("kind", "path"),
    [
        (CHAT, "/v1/chat/completions/render"),
        (TEXT, "/v1/completions/render"),
        (MESSAGES, "/v1/messages/render"),
        (RESPONSE, "/v1/responses/render"),
    ],
)
def test_a_renderer_gets_the_request_with_the_model_it_knows(kind: str, path: str) -> None:
    body = {"messages": MESSAGES_JSON, "stream": True, "stream_options": {"include_usage": True}, "tools": None, "n": 1}
    url, sent = asked(render(), ask(body, kind))
    assert url == "http://renderer:8000" + path
    assert sent == {"messages": MESSAGES_JSON, "stream": False, "tools": None, "n": 1, "model": "base"}
    assert asked(Render(VllmConfig(), ""), ask(body, kind))[1]["model"] == "adapter"


def test_a_renderer_is_not_asked_for_tensors_and_has_longer_for_pictures() -> None:
    made = render(timeout="1s", mmTimeout="7s")
    with_media = ask({"messages": MESSAGES_JSON}, media=1)
    assert asked(made, with_media)[1]["mm_payload"] == "none"
    assert (made.timeout_s(with_media), made.timeout_s(ask({}))) == (7, 1)


def test_what_a_renderer_is_not_asked() -> None:
    for made, kind in ((render(), GENERATE), (render(messagesRenderMode="legacy"), MESSAGES)):
        assert made.about(ask({"messages": MESSAGES_JSON}, kind), lambda _url: True) == UNSUPPORTED


@pytest.mark.parametrize(
    ("kind", "body", "sent"),
    [
        (CHAT, {"messages": MESSAGES_JSON, "stream": True, "n": 1, "documents": None}, {"messages": MESSAGES_JSON}),
        (
            CHAT,
            {
                "messages": MESSAGES_JSON,
                "tools": [1],
                "tool_choice": "none",
                "add_generation_prompt": False,
                "continue_final_message": True,
            },
            {
                "messages": MESSAGES_JSON,
                "tools": [1],
                "tool_choice": "none",
                "add_generation_prompt": False,
                "continue_final_message": True,
            },
        ),
        (
            CHAT,
            {"messages": MESSAGES_JSON, "documents": [{"text": "d"}], "reasoning_effort": "none", "chat_template_kwargs": {"a": 1}},
            {
                "messages": MESSAGES_JSON,
                "reasoning_effort": "none",
                "chat_template_kwargs": {"a": 1, "documents": [{"text": "d"}], "reasoning_effort": "none", "enable_thinking": False},
            },
        ),
        (
            CHAT,
            {"messages": MESSAGES_JSON, "reasoning_effort": "low", "chat_template_kwargs": {"enable_thinking": False}},
            {
                "messages": MESSAGES_JSON,
                "reasoning_effort": "low",
                "chat_template_kwargs": {"reasoning_effort": "low", "enable_thinking": False},
            },
        ),
        (TEXT, {"prompt": "x\u00e9", "max_tokens": 1}, {"prompt": "x\u00e9"}),
        (TEXT, {"prompt": ["x"], "add_special_tokens": False}, {"prompt": "x", "add_special_tokens": False}),
        (GENERATE, {"text": "x", "sampling_params": {}}, {"prompt": "x"}),
        (TEXT, {"prompt": ["x", "y"]}, None),
        (TEXT, {"prompt": [[1], [2]]}, None),
        (TEXT, {"prompt": "x", "truncate_prompt_tokens": 5}, None),
        (CHAT, {"messages": MESSAGES_JSON, "chat_template": "{{ 1 }}"}, None),
        (MESSAGES, {"messages": MESSAGES_JSON}, None),
        (RESPONSE, {"input": "x"}, None),
    ],
)
def test_an_engine_gets_what_a_prompt_is_made_of(kind: str, body: dict[str, Any], sent: dict[str, Any] | None) -> None:
    if sent is None:
        assert tokenize().about(ask(body, kind), lambda _url: True) == UNSUPPORTED
    else:
        assert asked(tokenize(), ask(body, kind)) == ("http://10.0.0.1:8000/tokenize", {**sent, "model": "adapter"})


def test_engines_are_asked_in_turn_and_those_that_rest_are_not() -> None:
    made, given = tokenize(3), ask({"prompt": "x"}, TEXT)
    assert [asked(made, given)[0][7:15] for _ in range(4)] == ["10.0.0.1", "10.0.0.2", "10.0.0.3", "10.0.0.1"]
    question = made.about(given, lambda url: "10.0.0.1" in url)
    assert isinstance(question, Question)
    assert "10.0.0.1" in question.url
    assert made.about(given, lambda _url: False) == RESTING
    assert made.about(given._replace(pool="empty"), lambda _url: True) == FAILED
    assert made.about(ask({"messages": MESSAGES_JSON}, media=1), lambda _url: True) == UNSUPPORTED, "it would say nothing of the pictures"


def test_answers() -> None:
    assert read_rendered(RENDERED) == read_tokenized(TOKENIZED) == Tokens(IDS)
    assert read_rendered(b'[{"token_ids":[3]},{"token_ids":[89,4294967295]}]') == Tokens(IDS)
    features = {
        "mm_hashes": {"image": ["aa", "bb"]},
        "mm_placeholders": {"image": [{"offset": 1, "length": 2}, {"offset": 4, "length": 1}]},
    }
    answer = json.dumps({"token_ids": [1, 2, 2, 3, 2], "features": features}).encode()
    assert read_rendered(answer).media == (Span(1, 2, b"aa"), Span(4, 1, b"bb"))
    lacking = json.dumps({"token_ids": [1, 2], "features": {"mm_hashes": {}, "mm_placeholders": {"image": [{"offset": 0, "length": 1}]}}})
    assert read_rendered(lacking.encode()).media == (Span(0, 1, b""),)


BAD_ANSWERS = [b"", b"{}", b"null", b"<html>", b'{"token_ids":[]}', b'{"token_ids":["a"]}', b'{"token_ids":[-1]}', b'{"token_ids":[4294967296]}', b"[" * 5000]  # fmt: skip


@dataclass
class Server:
    """What answers: given beforehand, or when told to."""

    answers: list[bytes | Exception] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)
    hold: asyncio.Event | None = None

    async def post(self, url: str, body: bytes, timeout_s: float) -> bytes:
        assert body
        assert timeout_s > 0
        self.asked.append(url)
        if self.hold is not None:
            await self.hold.wait()
        answer = self.answers.pop(0) if self.answers else RENDERED
        if isinstance(answer, Exception):
            raise answer
        return answer


class World:
    """A backend that asks, and all it was told."""

    def __init__(
        self, server: Server, questions: Questions | None = None, *, cache_bytes_max: int = 1 << 20, in_flight_max: int = 4
    ) -> None:
        self.clock = VirtualClock()
        self.tasks: list[asyncio.Task[None]] = []
        self.results: list[Tokens | str] = []
        self.cache = PieceCache(cache_bytes_max, b"k")
        self.remote = Remote(
            questions or render(), server, self.clock, self.spawn, in_flight_max=in_flight_max, cache=self.cache
        )  # fmt: skip

    def spawn(self, work: Callable[[], Coroutine[Any, Any, None]]) -> asyncio.Task[None]:
        async def begun() -> None:
            await work()

        self.tasks.append(asyncio.ensure_future(begun()))
        return self.tasks[-1]

    async def ask(self, given: Ask) -> Tokens | str:
        """How it ended."""
        count = len(self.results)
        started = self.remote.start(given, self.results.append)
        if isinstance(started, str | Tokens):
            return started
        assert len(self.results) == count, "never from within"
        await self.tasks[-1]
        return self.results[-1]


def numbered(number: int) -> Ask:
    return ask({"messages": [{"role": "user", "content": str(number)}]})


async def test_the_same_body_is_asked_once() -> None:
    server = Server()
    world = World(server)
    assert [await world.ask(numbered(1)) for _ in range(3)] == [Tokens(IDS)] * 3
    assert await world.ask(numbered(2)) == Tokens(IDS)
    assert len(server.asked) == 2
    assert (world.remote.in_flight, len(world.cache)) == (0, 2)


async def test_pools_may_have_other_models_of_one_name() -> None:
    server = Server()
    world = World(server)
    for pool in ("a", "b", "a"):
        assert await world.ask(numbered(1)._replace(pool=pool)) == Tokens(IDS)
    assert len(server.asked) == 2


async def test_pictures_are_asked_for_each_time() -> None:
    """What a URL shows may change."""
    server = Server()
    world = World(server)
    for _ in range(2):
        assert await world.ask(ask({"messages": MESSAGES_JSON}, media=1)) == Tokens(IDS)
    assert len(server.asked) == 2


@pytest.mark.parametrize("answer", BAD_ANSWERS)
async def test_an_answer_that_makes_no_sense_is_a_failure(answer: bytes) -> None:
    world = World(Server([answer]))
    assert await world.ask(numbered(1)) == FAILED
    assert len(world.cache) == 0


async def test_a_server_that_fails_is_left_alone_for_a_while() -> None:
    server = Server([PostError("x")] * (FAILURES_MAX + 1))
    world = World(server)
    for number in range(FAILURES_MAX):
        assert await world.ask(numbered(number)) == FAILED
    assert await world.ask(numbered(9)) == RESTING
    world.clock.advance(REST_S)
    assert await world.ask(numbered(9)) == FAILED
    assert await world.ask(numbered(9)) == RESTING, "one try, not as many as before"
    world.clock.advance(REST_S)
    assert await world.ask(numbered(9)) == Tokens(IDS)
    assert await world.ask(numbered(10)) == Tokens(IDS)
    assert len(server.asked) == FAILURES_MAX + 3


async def test_failures_count_in_a_row() -> None:
    world = World(
        Server([PostError("x"), PostError("x"), RENDERED, PostError("x"), RefusedError("x"), PostError("x"), PostError("x"), RENDERED])
    )
    outcomes = [await world.ask(numbered(number)) for number in range(8)]
    assert outcomes == [FAILED, FAILED, Tokens(IDS), FAILED, UNSUPPORTED, FAILED, FAILED, Tokens(IDS)]


async def test_a_path_that_is_not_there_rests_at_once_and_alone() -> None:
    server = Server([NotThereError("HTTP 404")])
    world = World(server)
    assert await world.ask(numbered(1)) == FAILED
    assert await world.ask(numbered(2)) == RESTING
    assert await world.ask(ask({"prompt": "x"}, TEXT)) == Tokens(IDS)
    world.clock.advance(NOT_THERE_S)
    assert await world.ask(numbered(2)) == Tokens(IDS)


async def test_what_is_remembered_of_servers_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("epp.tokenize.remote.PATHS_MAX", 2)
    world = World(Server([PostError("x")] * 9), tokenize(5))
    for number in range(5):
        await world.ask(numbered(number))
    assert 0 < len(world.remote._health) <= 2


async def test_so_many_are_asked_at_once_and_no_more() -> None:
    server = Server(hold=asyncio.Event())
    world = World(server, in_flight_max=2)
    for number in range(2):
        assert not isinstance(world.remote.start(numbered(number), world.results.append), str)
    assert world.remote.start(numbered(3), world.results.append) == FULL
    assert server.hold is not None
    server.hold.set()
    await asyncio.gather(*world.tasks)
    assert world.results == [Tokens(IDS)] * 2
    assert world.remote.in_flight == 0


@pytest.mark.parametrize(("waited_s", "rests"), [(0.1, False), (5.0, True)])
async def test_what_nobody_waits_for_is_not_awaited_and_is_the_server_s_fault_only_when_it_was_too_slow(
    waited_s: float, rests: bool
) -> None:
    world = World(Server(hold=asyncio.Event()))
    for number in range(FAILURES_MAX):
        started: Any = world.remote.start(numbered(number), world.results.append)
        await asyncio.sleep(0)
        world.clock.advance(waited_s)
        started.abandon()
        with pytest.raises(asyncio.CancelledError):
            await world.tasks[-1]
    assert (world.results, world.remote.in_flight) == ([], 0)
    assert (world.remote.start(numbered(9), world.results.append) == RESTING) is rests
    for task in world.tasks[FAILURES_MAX:]:
        task.cancel()


async def test_the_time_a_request_waited_counts_from_when_it_was_asked() -> None:
    """Its task begins a moment later: a server that hangs would never be told from a client that left."""
    world = World(Server(hold=asyncio.Event()))
    for number in range(FAILURES_MAX):
        started: Any = world.remote.start(numbered(number), world.results.append)
        world.clock.advance(0.25)
        await asyncio.sleep(0)
        world.clock.advance(4.75)
        started.abandon()
        with pytest.raises(asyncio.CancelledError):
            await world.tasks[-1]
    assert world.remote.start(numbered(9), world.results.append) == RESTING


async def test_a_job_cancelled_before_it_began_gives_its_place_back() -> None:
    world = World(Server(), in_flight_max=1)
    for number in range(3):
        started: Any = world.remote.start(numbered(number), world.results.append)
        started.abandon()
        await asyncio.gather(*world.tasks, return_exceptions=True)
    assert world.remote.in_flight == 0


async def test_a_body_that_is_no_object_is_not_asked_about() -> None:
    server = Server()
    world = World(server)
    assert await world.ask(Ask(CHAT, b"[1]", "m", 0, "")) == UNSUPPORTED
    assert server.asked == []


@pytest.mark.parametrize(
    "places",
    [
        {"image": [{"offset": -1, "length": 2}]},
        {"image": [{"offset": 0, "length": -1}]},
        {"image": [{"offset": 2, "length": 3}]},
        {"image": [{"offset": 0, "length": 1_000_000_000_000}]},
        {"image": [{"offset": 0, "length": 4}] * 4},
    ],
)
def test_pictures_are_where_the_prompt_is(places: dict[str, Any]) -> None:
    """Every block of it is looked at."""
    answer = {"token_ids": [1, 2, 3, 4], "features": {"mm_hashes": {}, "mm_placeholders": places}}
    with pytest.raises(ValueError, match="media"):
        read_rendered(json.dumps(answer).encode())
    answer["features"] = {
        "mm_hashes": {},
        "mm_placeholders": {"video": [{"offset": 0, "length": 4}], "audio": [{"offset": 0, "length": 4}]},
    }
    assert len(read_rendered(json.dumps(answer).encode()).media) == 2
