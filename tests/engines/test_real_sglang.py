"""A mixed pool: SGLang and vLLM with the same model behind one gateway, each read by its own names."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator

import pytest
from http_clients import eventually, until_idle
from pools import Message, completed, counted, endpoints, requests_served, streamed, until_state, user
from programs import Gateway
from servers import Sglang, Vllm, fetch

from epp.engines.detect import family_for

STORY = "return self value import class " * 70


@pytest.fixture(scope="module")
def gateway(vllm_a: Vllm, sglang: Sglang) -> Iterator[Gateway]:
    with Gateway((vllm_a.address, sglang.address)) as program:
        yield program


async def hits(vllm: Vllm, sglang: Sglang) -> tuple[float, float]:
    """Prompt tokens each had cached."""
    return await counted(vllm.address, "vllm:prefix_cache_hits_total"), await counted(sglang.address, "sglang:cached_tokens_total")


async def requests_of(sglang: Sglang) -> float:
    return await counted(sglang.address, "sglang:num_requests_total")


def test_its_family_and_its_capacity(sglang: Sglang) -> None:
    text = fetch(sglang.address, "GET", "/metrics")[1]
    family = family_for("", text)
    assert family is not None
    assert family.name == "sglang"
    reading = family.read(text)
    assert (reading.kv_blocks, reading.kv_block_tokens) == (sglang.pages, sglang.page_tokens)


async def test_its_load_is_seen(gateway: Gateway, sglang: Sglang) -> None:
    await until_state(gateway, sglang.address, "healthy")
    questions = [[user(f"{number}: tell me")] for number in range(8)]  # past the gateway, and twice as many as it runs at once
    asked = [asyncio.create_task(completed(sglang.address, question, max_tokens=150)) for question in questions]

    async def loaded() -> bool:
        row = endpoints(gateway)[str(sglang.address)]
        return row["running"] >= 3 and row["waiting"] >= 1

    await eventually(loaded, "running and waiting requests")
    assert {(await task).status for task in asked} == {200}

    async def idle() -> bool:
        row = endpoints(gateway)[str(sglang.address)]
        return (row["running"], row["waiting"]) == (0, 0)

    await eventually(idle, "none any more")


async def test_both_serve_and_a_chat_stays_where_it_began(
    gateway: Gateway, vllm_a: Vllm, sglang: Sglang, measured: Callable[[str], None]
) -> None:
    await until_idle(gateway.metrics)
    holders: set[str] = set()
    numbers = iter(range(1_000))

    async def both_served() -> bool:
        question = [user(f"Chat {next(numbers)}. {STORY}")]
        before = await requests_served(vllm_a.address)
        first = await streamed(gateway.address, question)
        on_vllm = await requests_served(vllm_a.address) > before
        known = await hits(vllm_a, sglang)
        turns: list[Message] = [*question, {"role": "assistant", "content": first.text}, user("And what then?")]
        second = await streamed(gateway.address, turns)
        now = await hits(vllm_a, sglang)
        gained = [after - earlier for after, earlier in zip(now, known, strict=True)]
        holder, other = (gained[0], gained[1]) if on_vllm else (gained[1], gained[0])
        assert holder > 100, gained
        assert other == 0, gained
        name = "vLLM" if on_vllm else "SGLang"
        measured(
            f"mixed pool, {name}: first turn {1_000 * first.ttft_s:.0f} ms, second turn {1_000 * second.ttft_s:.0f} ms to the first token"
        )
        holders.add(name)
        return len(holders) == 2

    await eventually(both_served, "a chat on each of the two")
