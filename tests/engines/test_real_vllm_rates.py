"""What a picker learns of a real vLLM's speed: from first tokens, and from answers that come whole."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from random import Random
from typing import Any

import pytest
from pools import completed, streamed, user
from programs import Gateway
from servers import Vllm, fetched

REQUESTS, CLIENTS = 160, 4
WORDS = ("import", "return", "class", "value", "self", "name", "error", "file", "path", "string", "result", "object", "module", "method")


async def learned(engine: Vllm, *, stream: bool) -> dict[str, Any]:
    """By a picker of its own, with prompts nobody sent before, of many lengths, and answers of many more."""
    with Gateway((engine.address,)) as gateway:
        random, left = Random(f"stream {stream}"), iter(range(REQUESTS))

        async def client() -> None:
            for number in left:
                words = [f"{stream} {number}", *(random.choice(WORDS) for _ in range(random.randrange(50, 900)))]
                ask = streamed if stream else completed
                await ask(gateway.address, [user(" ".join(words))], max_tokens=random.randrange(2, 40))

        await asyncio.gather(*(client() for _ in range(CLIENTS)))
        state: dict[str, Any] = fetched(gateway.metrics, "/debug/plugins/state")["plugins"]["cost-aware-scorer"]["state"]
        return state


async def test_whole_answers_teach_what_first_tokens_teach(vllm_a: Vllm, measured: Callable[[str], None]) -> None:
    by_stream, by_whole = [await learned(vllm_a, stream=stream) for stream in (True, False)]
    for state in (by_stream, by_whole):
        assert state["samples"] > REQUESTS / 2
    rates = by_stream["tokens_per_s"], by_whole["tokens_per_s"]
    measured("vLLM, prefill tokens/s as learned: from first tokens {}, from whole answers {}".format(*rates))
    assert rates[1] == pytest.approx(rates[0], rel=0.5)
