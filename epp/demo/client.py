"""Plays conversations against one address and measures each request. Not here: what is in them (workload), adding up (results).

Arrivals are kept to whatever the servers do; within a conversation the next request waits for the answer before it, as people do.
An answer is parsed after its end, so that parsing delays no measurement. A request that fails ends its conversation, is counted, and
harms no other.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import NamedTuple

import aiohttp
import msgspec

from epp.demo.results import Outcome, Tally
from epp.demo.workload import Conversation, Request

REQUEST_TIMEOUT_S = 60.0
ERROR_BYTES_SHOWN = 200
_DATA = b"data: "
_DONE = b"[DONE]"


class _Delta(msgspec.Struct):
    content: str | None = None


class _Choice(msgspec.Struct):
    delta: _Delta | None = None
    text: str | None = None


class _Details(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: _Details | None = None


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None


class Answer(NamedTuple):
    text: str
    prompt_tokens: int
    cached_tokens: int
    answer_tokens: int


_event_decoder = msgspec.json.Decoder(_Event)


def parse_answer(stream: bytes) -> Answer:
    """A whole stream of server-sent events. Raises ValueError if it is not whole."""
    pieces: list[str] = []
    usage: _Usage | None = None
    done = False
    for line in stream.splitlines():
        if not line.startswith(_DATA):
            continue
        data = line.removeprefix(_DATA)
        if data == _DONE:
            done = True
            continue
        event = _event_decoder.decode(data)
        pieces += [(choice.delta.content if choice.delta else choice.text) or "" for choice in event.choices]
        usage = event.usage or usage
    if not done:
        raise ValueError(f"the answer was cut off after {len(stream)} bytes")
    if usage is None:
        raise ValueError("the answer has no usage")
    cached = usage.prompt_tokens_details.cached_tokens if usage.prompt_tokens_details else 0
    return Answer("".join(pieces), usage.prompt_tokens, cached or 0, usage.completion_tokens)


async def send(session: aiohttp.ClientSession, base_url: str, request: Request) -> Outcome:
    """One request to the end of its answer. Never raises for what a server or a network can do."""
    loop = asyncio.get_running_loop()
    stream = bytearray()
    first_s = 0.0
    start_s = loop.time()
    try:
        async with session.post(base_url + request.path, data=request.body, headers={"content-type": "application/json"}) as response:
            async for piece in response.content.iter_any():
                if not stream:
                    first_s = loop.time()
                stream += piece
        end_s = loop.time()
        if response.status != 200:
            return Outcome(error=f"HTTP {response.status}: {bytes(stream[:ERROR_BYTES_SHOWN]).decode(errors='replace').strip()}")
        answer = parse_answer(bytes(stream))
    except (aiohttp.ClientError, TimeoutError, OSError, ValueError, msgspec.DecodeError) as error:
        return Outcome(error=f"{type(error).__name__}: {error}".removesuffix(": "))
    return Outcome(
        ttft_s=first_s - start_s,
        duration_s=end_s - start_s,
        prompt_tokens=answer.prompt_tokens,
        cached_tokens=answer.cached_tokens,
        answer_tokens=answer.answer_tokens,
        answer=answer.text,
    )


async def play(base_url: str, conversations: Sequence[Conversation], tally: Tally, *, model: str, time_scale: float) -> None:
    """All of them, to the end of the last."""
    timeout = aiohttp.ClientTimeout(total=REQUEST_TIMEOUT_S)
    connector = aiohttp.TCPConnector(limit=0)  # as many as there are conversations, each of which has one request under way at most
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session, asyncio.TaskGroup() as group:
        start_s = asyncio.get_running_loop().time()
        for conversation in conversations:
            group.create_task(_converse(session, base_url, conversation, tally, start_s=start_s, model=model, time_scale=time_scale))


async def _converse(
    session: aiohttp.ClientSession,
    base_url: str,
    conversation: Conversation,
    tally: Tally,
    *,
    start_s: float,
    model: str,
    time_scale: float,
) -> None:
    loop = asyncio.get_running_loop()
    await asyncio.sleep(start_s + conversation.arrival_s / time_scale - loop.time())
    answers: list[str] = []
    for index in range(conversation.requests):
        await asyncio.sleep(conversation.pause_s(index) / time_scale)
        request = conversation.request(index, answers, model)
        tally.sent += 1
        outcome = await send(session, base_url, request)
        tally.add(outcome)
        if outcome.error:
            tally.not_sent += conversation.requests - index - 1
            return
        answers.append(outcome.answer)
