"""Playing conversations against a small server on loopback."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
from aiohttp import ClientSession, ClientTimeout, web

from epp.demo.client import parse_answer, play, send
from epp.demo.results import Tally
from epp.demo.workload import ChatSession, Request, Turn

FAST = 1e6  # times life: no pause is felt
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def events(*texts: str, cached: int = 3, chat: bool = True) -> bytes:
    def choice(text: str) -> dict[str, object]:
        return {"index": 0, "delta": {"content": text}} if chat else {"index": 0, "text": text}

    lines: list[dict[str, object]] = [{"choices": [choice(text)]} for text in texts]
    usage = {"prompt_tokens": 10, "completion_tokens": len(texts), "prompt_tokens_details": {"cached_tokens": cached}}
    lines.append({"choices": [], "usage": usage})
    return b"".join(b"data: " + json.dumps(line).encode() + b"\n\n" for line in lines) + b"data: [DONE]\n\n"


@asynccontextmanager
async def serving(handler: Handler) -> AsyncIterator[str]:
    app = web.Application()
    app.router.add_post("/{tail:.*}", handler)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


# --- answers


@pytest.mark.parametrize("chat", [True, False])
def test_an_answer_is_put_together(chat: bool) -> None:
    assert parse_answer(events("one ", "two ", chat=chat)) == ("one two ", 10, 3, 2)


def test_an_answer_without_details_has_nothing_cached() -> None:
    text = b'data: {"choices":[{"delta":{}}]}\n\ndata: {"choices":[],"usage":{"prompt_tokens":4,"completion_tokens":1}}\n\ndata: [DONE]\n\n'
    assert parse_answer(b": comment\n\n" + text) == ("", 4, 0, 1)


@pytest.mark.parametrize(
    ("stream", "complaint"),
    [
        (events("a").removesuffix(b"data: [DONE]\n\n"), "cut off"),
        (b"", "cut off after 0 bytes"),
        (b"data: [DONE]\n\n", "no usage"),
        (b'data: {"choices":\n\n', "truncated"),
    ],
)
def test_half_an_answer_is_none(stream: bytes, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        parse_answer(stream)


# --- requests


async def test_a_request_is_measured() -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        whole = events("one ", "two ")
        await response.write(whole[:37])
        await response.write(whole[37:])
        return response

    async with serving(answer) as url, ClientSession() as session:
        outcome = await send(session, url, Request("/v1/x", b"{}"))
    assert (outcome.error, outcome.answer) == ("", "one two ")
    assert 0 < outcome.ttft_s <= outcome.duration_s
    assert (outcome.prompt_tokens, outcome.cached_tokens, outcome.answer_tokens) == (10, 3, 2)


async def test_what_goes_wrong_is_told_and_not_raised() -> None:
    async def fail(request: web.Request) -> web.StreamResponse:
        if request.path == "/status":
            return web.Response(status=429, text="too busy")
        if request.path == "/abort":
            assert request.transport is not None
            request.transport.abort()
        return web.Response(body=b"data: {}\n\n")

    async with serving(fail) as url, ClientSession(timeout=ClientTimeout(total=5)) as session:
        errors = {path: (await send(session, url, Request(path, b"{}"))).error for path in ("/status", "/abort", "/half")}
        refused = (await send(session, "http://127.0.0.1:9", Request("/", b"{}"))).error
    assert errors["/status"] == "HTTP 429: too busy"
    assert "ServerDisconnectedError" in errors["/abort"] or "ClientOSError" in errors["/abort"]
    assert errors["/half"] == "ValueError: the answer was cut off after 10 bytes"
    assert "Connect" in refused


async def test_conversations_are_played_to_their_end_and_quote_the_answers() -> None:
    bodies: list[dict[str, object]] = []

    async def answer(request: web.Request) -> web.StreamResponse:
        bodies.append(await request.json())
        return web.Response(body=events(f"answer {len(bodies)} "))

    session = ChatSession(0.5, "s", tuple(Turn(f"q{number}", 1, 3.0) for number in range(3)))
    tally = Tally(requests_planned=3)
    async with serving(answer) as url:
        await play(url, [session], tally, model="m", time_scale=FAST)
    assert (tally.sent, tally.finished, tally.errors_total, tally.not_sent) == (3, 3, 0, 0)
    assert [message["content"] for message in bodies[-1]["messages"]] == ["s", "q0", "answer 1 ", "q1", "answer 2 ", "q2"]  # type: ignore[attr-defined]
    assert {body["model"] for body in bodies} == {"m"}
    assert tally.cached_tokens == 9


async def test_a_failed_request_ends_its_conversation_and_no_other() -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        body = await request.text()
        return web.Response(status=500, text="broken") if '"bad"' in body else web.Response(body=events("ok "))

    def session(first: str) -> ChatSession:
        return ChatSession(0.0, "s", (Turn("good", 1, 0.0), Turn(first, 1, 0.0), Turn("more", 1, 0.0)))

    tally = Tally(requests_planned=6)
    async with serving(answer) as url:
        await play(url, [session("bad"), session("good")], tally, model="m", time_scale=FAST)
    assert (tally.sent, tally.finished, tally.errors_total, tally.not_sent) == (5, 5, 1, 1)
    assert tally.first_errors == ["HTTP 500: broken"]
