"""Two of llama.cpp's servers behind Envoy and the picker, which is told nothing about them but where they are.

Who served a request, and from what cache, is told by llama.cpp's own counters. The tests follow each other: the last ones kill B.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import re
import statistics
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from random import Random
from typing import NamedTuple

import pytest
from http_clients import Answer, Http1, TruncatedError, eventually, scrape, until_idle
from pools import CHAT, Message, chat_body, completed, endpoints, explained, streamed, until_state, user
from programs import Gateway
from servers import LlamaProgram, LlamaServer, fetch, fetched

from epp.engines.detect import family_for
from epp.types import Address

CHATS_EACH = 2
CHATS_MAX = 40
WORDS = ("import", "return", "class", "value", "self", "name", "error", "file", "path", "string", "result", "object", "module", "method")
KEPT_SHARE = 0.9
"""Of a first turn's tokens, at the least, that the second turn finds: where texts meet, tokens may be cut differently."""
LONG_TOKENS = 1_000
WAITING = 2
"""Requests that find no slot, where a server is flooded."""
AS_TEXT = "root ::= [a-z ]+"
"""A grammar: left alone, random weights say bytes that are no text, and a stream of them has nothing to send."""
TEMPLATE_TOKENS_MAX = 32
"""Prompts that have nothing in common but the template share so many tokens at most."""
CONNECTION_REQUESTS = 100
"""llama.cpp closes a connection after so many."""
RECORDED = Path(__file__).parents[1] / "data/llamacpp-b11434-metrics-busy.txt"
RECORDED_BUILD = "b11434-"
numbers = itertools.count()


class Counts(NamedTuple):
    """What a server has counted so far."""

    computed: float
    """Tokens of prompts that were not in its cache."""
    cached: float


class Chat(NamedTuple):
    """One whose first turn was served by `holder`."""

    question: list[Message]
    answer: str
    prompt_tokens: int
    holder: LlamaServer


@pytest.fixture(scope="module")
def pair(llama_program: LlamaProgram, measured: Callable[[str], None]) -> Iterator[tuple[LlamaServer, LlamaServer]]:
    with LlamaServer(llama_program) as first, LlamaServer(llama_program) as second:
        measured(f"llama.cpp ready in {first.start_s:.1f} s")
        yield first, second


@pytest.fixture(scope="module")
def gateway(pair: tuple[LlamaServer, LlamaServer]) -> Iterator[Gateway]:
    with Gateway(tuple(engine.address for engine in pair)) as program:
        yield program


def story(words: int = 600) -> list[Message]:
    """A question nobody else has, from its first words on."""
    number = next(numbers)
    random = Random(number)
    return [user(f"{number} is the story. " + " ".join(random.choice(WORDS) for _ in range(words)))]


def second_turn(question: list[Message], answer: str) -> list[Message]:
    return [*question, {"role": "assistant", "content": answer}, user("And what then?")]


def cached_tokens(answer: Answer) -> int:
    """As the answer itself says."""
    assert answer.status == 200, answer
    return int(answer.json["usage"]["prompt_tokens_details"]["cached_tokens"])


async def counts(engine: LlamaServer) -> Counts:
    samples = await scrape(engine.address)
    return Counts(samples.sum("llamacpp:prompt_tokens_total"), samples.sum("llamacpp:prompt_tokens_cached_total"))


async def until_it_says(engine: LlamaServer, running: float, waiting: float) -> None:
    async def reached() -> bool:
        samples = await scrape(engine.address)
        return (samples.sum("llamacpp:requests_processing"), samples.sum("llamacpp:requests_deferred")) == (running, waiting)

    await eventually(reached, f"{running} running and {waiting} waiting, by its own account")


async def begun(gateway: Gateway, engines: tuple[LlamaServer, ...]) -> Chat:
    """The first turn of a new chat."""
    question = story()
    before = [await counts(engine) for engine in engines]
    answer = await completed(gateway.address, question, grammar=AS_TEXT)
    assert answer.status == 200, answer
    (holder,) = [engine for engine, then in zip(engines, before, strict=True) if await counts(engine) != then]
    return Chat(question, answer.json["choices"][0]["message"]["content"], answer.json["usage"]["prompt_tokens"], holder)


async def chats_of_both(gateway: Gateway, engines: tuple[LlamaServer, ...]) -> list[Chat]:
    """At least two each."""
    chats: list[Chat] = []
    while min(sum(chat.holder is engine for chat in chats) for engine in engines) < CHATS_EACH:
        assert len(chats) < CHATS_MAX, "all on one"
        chats.append(await begun(gateway, engines))
    return chats


def families(text: bytes) -> dict[str, str]:
    """Name -> type of everything on a /metrics page."""
    return dict(re.findall(r"^# TYPE (\S+) (\S+)$", text.decode(), re.MULTILINE))


def test_it_is_known_by_its_metrics_alone(gateway: Gateway, pair: tuple[LlamaServer, LlamaServer]) -> None:
    text = fetch(pair[0].address, "GET", "/metrics")[1]
    samples = [line for line in text.splitlines() if line and not line.startswith(b"#")]
    assert samples
    assert not [line for line in samples if b"{" in line], "no label of any kind"
    family = family_for("", text)
    assert family is not None
    assert family.name == "llamacpp"
    rows = endpoints(gateway)
    assert {address: (row["engine"], row["state"]) for address, row in rows.items()} == {
        str(engine.address): ("llamacpp", "healthy") for engine in pair
    }


@contextlib.asynccontextmanager
async def flooded(address: Address) -> AsyncIterator[list[asyncio.Task[Answer]]]:
    """More long streams than it has slots; their clients give up at the end.

    Streams, for who waits for a whole answer can't give it up: llama.cpp looks for that only when nobody asked it anything for a second.
    """
    many = range(LlamaServer.slots + WAITING)
    asked = [asyncio.create_task(completed(address, story(8), stream=True, max_tokens=LONG_TOKENS, grammar=AS_TEXT)) for _ in many]
    try:
        yield asked
    finally:
        for task in asked:
            task.cancel()
        await asyncio.gather(*asked, return_exceptions=True)


async def until_load(gateway: Gateway, engine: LlamaServer, running: float, waiting: float) -> None:
    async def reached() -> bool:
        row = endpoints(gateway)[str(engine.address)]
        return (row["running"], row["waiting"]) == (running, waiting)

    await eventually(reached, f"{running} running and {waiting} waiting")


async def test_its_slots_and_its_queue_are_read(pair: tuple[LlamaServer, LlamaServer]) -> None:
    engine = pair[0]
    with Gateway((engine.address,)) as gateway:
        async with flooded(gateway.address) as asked:  # by our own count all of them run, or all of them wait
            await until_load(gateway, engine, LlamaServer.slots, WAITING)
            assert not any(task.done() for task in asked)
        await until_it_says(engine, 0, 0)  # who gives up at the gateway gives up at the engine
        await until_load(gateway, engine, 0, 0)


async def test_a_busy_server_is_avoided(gateway: Gateway, pair: tuple[LlamaServer, LlamaServer]) -> None:
    busy, idle = pair
    async with flooded(busy.address) as asked:  # past the gateway: only its metrics can tell
        await until_load(gateway, busy, LlamaServer.slots, WAITING)
        before = await counts(idle)
        tokens = 0
        for _ in range(4):
            answer = await completed(gateway.address, story(20))
            assert answer.status == 200
            tokens += answer.json["usage"]["prompt_tokens"]
        assert not any(task.done() for task in asked), "it was busy all the time"
        assert sum(await counts(idle)) - sum(before) == tokens
    await until_load(gateway, busy, 0, 0)


async def test_second_turns_land_where_the_first_ones_are(
    gateway: Gateway, pair: tuple[LlamaServer, LlamaServer], measured: Callable[[str], None]
) -> None:
    await until_idle(gateway.metrics)
    chats = await chats_of_both(gateway, pair)
    told_before = (await scrape(gateway.metrics)).sum("llm_d_epp_request_cached_tokens_sum")
    told = 0
    for chat in reversed(chats):  # not in the order they began
        (other,) = set(pair) - {chat.holder}
        before = await counts(chat.holder), await counts(other)
        answer = await completed(gateway.address, second_turn(chat.question, chat.answer))
        found = cached_tokens(answer)
        assert found >= KEPT_SHARE * chat.prompt_tokens, answer.json["usage"]
        after = await counts(chat.holder), await counts(other)
        assert after[0].cached - before[0].cached == found, "llama.cpp's own count"
        assert after[1] == before[1], "the other one was not asked"
        told += found
    samples = await until_idle(gateway.metrics)
    assert samples.sum("llm_d_epp_request_cached_tokens_sum") - told_before == told, "the picker counts what the answers say"
    measured(f"llama.cpp: {len(chats)} chats, every second turn where its first was; {told} prompt tokens found in its slots")


async def test_a_second_turn_elsewhere_would_have_to_be_computed(
    gateway: Gateway, pair: tuple[LlamaServer, LlamaServer], measured: Callable[[str], None]
) -> None:
    cold, warm, wrong = [], [], []
    for _ in range(3):
        question = story()
        before = [await counts(engine) for engine in pair]
        first = await streamed(gateway.address, question, grammar=AS_TEXT)
        (other,) = [engine for engine, then in zip(pair, before, strict=True) if await counts(engine) == then]
        turns = second_turn(question, first.text)
        second = await streamed(gateway.address, turns, grammar=AS_TEXT)
        then = await counts(other)
        elsewhere = await streamed(other.address, turns, grammar=AS_TEXT)  # past the gateway: what a picker that knows no prefixes risks
        assert (await counts(other)).cached - then.cached <= TEMPLATE_TOKENS_MAX
        cold.append(first.ttft_s)
        warm.append(second.ttft_s)
        wrong.append(elsewhere.ttft_s)
    medians = [1_000 * statistics.median(times_s) for times_s in (cold, warm, wrong)]
    measured(
        "llama.cpp, time to first token, median: first turn {:.0f} ms; second turn {:.0f} ms; second turn elsewhere {:.0f} ms".format(
            *medians
        )
    )


async def test_requests_at_once_fill_the_slots_of_both(gateway: Gateway, pair: tuple[LlamaServer, LlamaServer]) -> None:
    for _ in range(3):
        await until_idle(gateway.metrics)
        before = [sum(await counts(engine)) for engine in pair]
        answers = await asyncio.gather(*(completed(gateway.address, story(40), max_tokens=32) for _ in range(2 * LlamaServer.slots)))
        assert {answer.status for answer in answers} == {200}
        served = [sum(await counts(engine)) - then for engine, then in zip(pair, before, strict=True)]
        tokens = [answer.json["usage"]["prompt_tokens"] for answer in answers]
        assert sum(served) == sum(tokens)
        assert abs(served[0] - served[1]) < min(tokens), "as many requests on each: nobody waits while a slot is free"


async def test_connections_it_closes_disturb_nobody(gateway: Gateway) -> None:
    """Those of requests and those of scrapes."""
    question = chat_body(story(8), max_tokens=1)
    sent = 0
    async with Http1(gateway.address) as client:

        async def enough() -> bool:
            nonlocal sent
            answer = await client.request("POST", CHAT, question, {"content-type": "application/json"})
            assert answer.status == 200, answer
            sent += 1
            scrapes = (await scrape(gateway.metrics)).sum("epp_scrapes_total")
            return sent > 2 * CONNECTION_REQUESTS and scrapes > 2 * (CONNECTION_REQUESTS + 1)  # of the two, one at least was asked so often

        await eventually(enough, "more than one connection lasts")
    assert (await scrape(gateway.metrics)).sum("llm_d_epp_datalayer_poll_errors_total") == 0
    for trouble in ("endpoint is failing", "endpoint is ejected", "engine was restarted"):
        assert trouble not in gateway.stdout + gateway.stderr


async def test_its_metrics_are_those_recorded(pair: tuple[LlamaServer, LlamaServer], llama_program: LlamaProgram) -> None:
    """Names and types, idle and busy: what other tests read is what it prints."""
    build = fetched(pair[0].address, "/props")["build_info"]
    if not build.startswith(RECORDED_BUILD):
        pytest.skip(f"it is {build}, what was recorded is {RECORDED_BUILD}")
    recorded = families(RECORDED.read_bytes())
    with LlamaServer(llama_program) as fresh:
        assert families(fetch(fresh.address, "GET", "/metrics")[1]) == recorded
        async with flooded(fresh.address):
            await until_it_says(fresh, LlamaServer.slots, WAITING)
            assert families(fetch(fresh.address, "GET", "/metrics")[1]) == recorded
        await until_it_says(fresh, 0, 0)  # stopped before that, it may hang


async def test_one_without_metrics_is_in_the_pool_too(llama_program: LlamaProgram, pair: tuple[LlamaServer, LlamaServer]) -> None:
    """--metrics has to be asked for. Who forgets it is routed by what was sent there, second turns included."""
    read = pair[0]
    with LlamaServer(llama_program, metrics=False) as unread:
        assert fetch(unread.address, "GET", "/metrics")[0] == 501
        with Gateway((read.address, unread.address)) as gateway:
            rows = endpoints(gateway)
            assert {address: (row["engine"], row["state"]) for address, row in rows.items()} == {
                str(read.address): ("llamacpp", "healthy"),
                str(unread.address): ("", "healthy"),
            }
            holders: set[bool] = set()
            for _ in range(CHATS_MAX):
                question, before = story(), await counts(read)
                first = await completed(gateway.address, question, grammar=AS_TEXT)
                assert first.status == 200, first
                holders.add(await counts(read) != before)
                second = await completed(gateway.address, second_turn(question, first.json["choices"][0]["message"]["content"]))
                assert cached_tokens(second) >= KEPT_SHARE * first.json["usage"]["prompt_tokens"], second.json["usage"]
                if len(holders) == 2:
                    break
            assert holders == {True, False}, "a chat on each of the two"


async def held_by(engine: LlamaServer, gateway: Gateway, pair: tuple[LlamaServer, LlamaServer]) -> Chat:
    """A chat that this one has, and the picker knows it."""
    for _ in range(CHATS_MAX):
        chat = await begun(gateway, pair)
        if chat.holder is engine:
            assert await known(gateway, chat.question, engine.address) > 100
            return chat
    raise AssertionError(f"none of {CHATS_MAX} went there")


async def known(gateway: Gateway, question: list[Message], address: Address) -> int:
    """Tokens of it that are cached there, as far as the picker knows; -1 while no request would go there at all."""
    row = (await explained(gateway, question)).get(str(address))
    return int(row["cached_tokens"]) if row is not None else -1


async def until_forgotten(gateway: Gateway, question: list[Message], address: Address) -> None:
    async def forgotten() -> bool:
        return await known(gateway, question, address) == 0

    await eventually(forgotten, f"nothing is cached at {address}")


async def restarts_seen(gateway: Gateway) -> float:
    return (await scrape(gateway.metrics)).sum("epp_engine_restarts_total")


async def until_served(gateway: Gateway, engine: LlamaServer) -> None:
    """Requests reach it again."""
    before = await counts(engine)

    async def served() -> bool:
        assert (await completed(gateway.address, story(8))).status == 200
        return await counts(engine) != before

    await eventually(served, "requests again")


async def test_a_crash_and_a_restart(gateway: Gateway, pair: tuple[LlamaServer, LlamaServer]) -> None:
    await until_idle(gateway.metrics)
    a, b = pair
    chat = await held_by(b, gateway, pair)
    b.kill()
    turns = second_turn(chat.question, chat.answer)
    statuses = [(await completed(gateway.address, turns)).status for _ in range(4)]
    assert statuses == [200] * 4, "the first, at least, was meant for B"
    await until_state(gateway, b.address, "failing", "ejected")
    assert await known(gateway, turns, a.address) > 100, "the chat goes on where it was answered"

    b.start()
    gateway.await_output(rf'"msg":"engine was restarted[^"]*".*{re.escape(str(b.address))}')
    await until_state(gateway, b.address, "half-open", "healthy")
    assert await known(gateway, chat.question, b.address) == 0
    assert await known(gateway, turns, a.address) > 100
    await until_served(gateway, b)
    await until_state(gateway, b.address, "healthy")


async def test_a_restart_between_two_scrapes_is_noticed(gateway: Gateway, pair: tuple[LlamaServer, LlamaServer]) -> None:
    """It is back within a tenth of a second: only its counters tell."""
    await until_idle(gateway.metrics)
    _, b = pair
    chat = await held_by(b, gateway, pair)
    restarts = await restarts_seen(gateway)
    b.kill()
    b.start()
    await until_forgotten(gateway, chat.question, b.address)
    assert await restarts_seen(gateway) == restarts + 1
    answer = await completed(gateway.address, second_turn(chat.question, chat.answer))
    assert cached_tokens(answer) <= TEMPLATE_TOKENS_MAX, "nobody has it any more"
    await until_served(gateway, b)
    await until_state(gateway, b.address, "healthy")


async def test_a_stream_is_cut_short_and_the_next_one_is_not(gateway: Gateway, pair: tuple[LlamaServer, LlamaServer]) -> None:
    await until_idle(gateway.metrics)
    _, b = pair
    chat = await held_by(b, gateway, pair)
    turns = second_turn(chat.question, chat.answer)
    async with Http1(gateway.address) as client:
        await client.send(
            "POST", CHAT, chat_body(turns, stream=True, max_tokens=LONG_TOKENS, grammar=AS_TEXT), {"content-type": "application/json"}
        )
        assert await client.head() == 200
        pieces = client.pieces()
        assert await anext(pieces)
        b.kill()
        with pytest.raises(TruncatedError):
            async for _ in pieces:
                pass
    again = await streamed(gateway.address, turns, grammar=AS_TEXT)
    assert again.text
    b.start()
    await until_served(gateway, b)
    await until_state(gateway, b.address, "healthy")
