"""Two vLLMs behind Envoy and the picker. A serves the model and the adapters `sql` and `chat`; B all but `sql`.

The tests follow each other: the last one kills B.
"""

from __future__ import annotations

import asyncio
import re
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import pytest
from http_clients import Http1, eventually, until_idle
from pools import CHAT, Message, chat_body, completed, counted, endpoints, explained, requests_served, streamed, until_state, user
from programs import Gateway
from servers import Vllm, fetch

from epp.engines.detect import family_for

CONFIG = """
apiVersion: llm-d.ai/v1alpha1
kind: EndpointPickerConfig
plugins:
  - type: queue-scorer
  - type: kv-cache-utilization-scorer
  - type: prefix-cache-scorer
  - type: lora-affinity-scorer
schedulingProfiles:
  - name: default
    plugins:
      - {pluginRef: queue-scorer, weight: 2}
      - {pluginRef: kv-cache-utilization-scorer, weight: 2}
      - {pluginRef: prefix-cache-scorer, weight: 3}
      - {pluginRef: lora-affinity-scorer, weight: 2}
"""
CHATS = 3
PREFIX_TOKENS_MIN = 700
"""Of each chat's second turn, at the least, is the first."""
WORDS = ("import", "return", "class", "value", "self", "name", "error", "file", "path", "string", "result", "object", "module", "method")


@pytest.fixture(scope="module")
def vllm_b(vllm_a: Vllm, vllm_place: Path, model: Path, measured: Callable[[str], None]) -> Iterator[Vllm]:
    """After A, not with it."""
    with Vllm(vllm_place, model, adapters={"chat": model.with_name(f"{model.name}-chat")}) as engine:
        measured(f"vLLM B ready in {engine.start_s:.0f} s")
        yield engine


@pytest.fixture(scope="module")
def gateway(vllm_a: Vllm, vllm_b: Vllm) -> Iterator[Gateway]:
    with Gateway((vllm_a.address, vllm_b.address), "--config-text", CONFIG, "--zap-encoder", "json") as program:
        yield program


def story(seed: int, words: int = 800) -> str:
    """A prompt nobody else has, from its first words on."""
    random = Random(seed)
    return f"Story {seed}. " + " ".join(random.choice(WORDS) for _ in range(words))


async def hits(engine: Vllm) -> float:
    return await counted(engine.address, "vllm:prefix_cache_hits_total")


async def test_both_are_read(gateway: Gateway, vllm_a: Vllm, vllm_b: Vllm) -> None:
    known = endpoints(gateway)
    assert set(known) == {str(vllm_a.address), str(vllm_b.address)}
    for row in known.values():
        assert row["state"] == "healthy"
        assert row["reading_age_s"] < 5
        assert (row["waiting"], row["running"], row["in_flight_requests"]) == (0, 0, 0)


def test_the_capacity_is_learned(vllm_a: Vllm) -> None:
    text = fetch(vllm_a.address, "GET", "/metrics")[1]
    family = family_for("", text)
    assert family is not None
    assert family.name == "vllm"
    reading = family.read(text)
    assert (reading.kv_blocks, reading.kv_block_tokens) == (vllm_a.blocks, vllm_a.block_tokens)
    assert reading.started_s is not None


async def test_the_second_turn_lands_where_the_first_one_is_cached(
    gateway: Gateway, vllm_a: Vllm, vllm_b: Vllm, measured: Callable[[str], None]
) -> None:
    cold, warm, wrong = [], [], []
    for seed in range(CHATS):
        question = [user(story(seed))]
        served = {engine: await requests_served(engine.address) for engine in (vllm_a, vllm_b)}
        first = await streamed(gateway.address, question)
        (holder,) = [engine for engine, before in served.items() if await requests_served(engine.address) > before]
        (other,) = {vllm_a, vllm_b} - {holder}
        before = {engine: await hits(engine) for engine in (vllm_a, vllm_b)}

        turns: list[Message] = [*question, {"role": "assistant", "content": first.text}, user("And what then?")]
        second = await streamed(gateway.address, turns)
        assert await hits(holder) - before[holder] >= PREFIX_TOKENS_MIN, "vLLM's own count of prompt tokens it had cached"
        assert await hits(other) == before[other]
        elsewhere = await streamed(other.address, turns)  # past the gateway: what a picker that knows no prefixes risks
        cold.append(first.ttft_s)
        warm.append(second.ttft_s)
        wrong.append(elsewhere.ttft_s)
    medians = [1_000 * statistics.median(times_s) for times_s in (cold, warm, wrong)]
    measured(
        "vLLM, time to first token, median: first turn {:.0f} ms; second turn {:.0f} ms; second turn elsewhere {:.0f} ms".format(*medians)
    )
    assert statistics.median(wrong) > 2 * statistics.median(warm)


async def test_requests_at_once_are_spread(gateway: Gateway, vllm_a: Vllm, vllm_b: Vllm) -> None:
    before = {engine: await requests_served(engine.address) for engine in (vllm_a, vllm_b)}
    answers = await asyncio.gather(*(completed(gateway.address, [user(story(100 + seed, 40))], max_tokens=16) for seed in range(8)))
    assert [answer.status for answer in answers] == [200] * 8
    counts = [await requests_served(engine.address) - served for engine, served in before.items()]
    assert sum(counts) == 8
    assert min(counts) >= 2, counts


async def test_a_model_that_none_has_is_a_404(gateway: Gateway, vllm_a: Vllm, vllm_b: Vllm) -> None:
    async def refused() -> bool:  # by the picker, not by an engine, once both lists of models are read
        answer = await completed(gateway.address, [user("Hello")], model="nobody-has-this")
        assert answer.status == 404, answer
        return b"no endpoint serves it" in answer.body

    await eventually(refused, "the picker's own 404")
    before = [endpoints(gateway)[str(engine.address)]["picks"] for engine in (vllm_a, vllm_b)]
    assert await refused()
    assert [endpoints(gateway)[str(engine.address)]["picks"] for engine in (vllm_a, vllm_b)] == before, "no engine was asked"


async def test_an_adapter_of_one_engine_goes_only_there(gateway: Gateway, vllm_a: Vllm, vllm_b: Vllm) -> None:
    before = await requests_served(vllm_a.address), await requests_served(vllm_b.address)
    answers = [await completed(gateway.address, [user(f"{seed}: select")], model="sql") for seed in range(6)]
    assert [(answer.status, answer.json.get("model")) for answer in answers] == [(200, "sql")] * 6
    assert (await requests_served(vllm_a.address), await requests_served(vllm_b.address)) == (before[0] + 6, before[1])


async def test_an_adapter_draws_requests_to_where_it_runs(gateway: Gateway, vllm_a: Vllm, vllm_b: Vllm) -> None:
    await until_idle(gateway.metrics)
    question = [user("A long one, please")]
    async with Http1(vllm_b.address) as client:  # at B, past the gateway: only B's metrics can tell
        await client.send(
            "POST", CHAT, chat_body(question, model="chat", stream=True, max_tokens=1_500), {"content-type": "application/json"}
        )
        assert await client.head() == 200

        async def seen() -> bool:
            rows = await explained(gateway, [user("Another")], model="chat")
            scores = [rows[str(engine.address)]["scores"]["lora-affinity-scorer"] for engine in (vllm_a, vllm_b)]
            return scores[1] == 1 and scores[0] < 1

        await eventually(seen, "B has the adapter")
        before = await requests_served(vllm_a.address), await requests_served(vllm_b.address)
        answer = await completed(gateway.address, [user("Another")], model="chat")
        assert answer.status == 200
        assert (await requests_served(vllm_a.address), await requests_served(vllm_b.address)) == (before[0], before[1] + 1)


async def test_a_sleeping_engine_gets_nothing_until_it_wakes(
    gateway: Gateway, vllm_a: Vllm, vllm_b: Vllm, measured: Callable[[str], None]
) -> None:
    await until_idle(gateway.metrics)
    assert fetch(vllm_b.address, "POST", "/sleep?level=1")[0] == 200
    try:
        asleep_s = time.monotonic()
        assert fetch(vllm_b.address, "GET", "/health")[0] == 200, "asleep, and says it is well"
        await until_state(gateway, vllm_b.address, "failing")
        measured(f"vLLM, put to sleep: noticed {time.monotonic() - asleep_s:.1f} s after it said so")
        picks = endpoints(gateway)[str(vllm_b.address)]["picks"]
        before = await requests_served(vllm_a.address)
        for seed in range(6):
            assert (await completed(gateway.address, [user(f"{seed}: awake?")])).status == 200
        assert await requests_served(vllm_a.address) == before + 6
        assert endpoints(gateway)[str(vllm_b.address)]["picks"] == picks
    finally:
        assert fetch(vllm_b.address, "POST", "/wake_up")[0] == 200
    await until_state(gateway, vllm_b.address, "healthy")
    awake = await requests_served(vllm_b.address)
    seeds = iter(range(1_000))

    async def serves_again() -> bool:
        assert (await completed(gateway.address, [user(f"{next(seeds)} is new")])).status == 200
        return await requests_served(vllm_b.address) > awake

    await eventually(serves_again, "B gets requests again")


async def test_the_other_takes_over_and_a_restart_empties_the_index(
    gateway: Gateway, vllm_a: Vllm, vllm_b: Vllm, measured: Callable[[str], None]
) -> None:
    await until_idle(gateway.metrics)
    question: list[Message] = []

    async def lands_on_b() -> bool:
        question[:] = [user(story(1_000 + len(seen), 150))]
        seen.append(await requests_served(vllm_b.address))
        assert (await completed(gateway.address, question)).status == 200
        return await requests_served(vllm_b.address) > seen[-1]

    seen: list[float] = []
    await eventually(lands_on_b, "a prompt that B has")
    assert (await explained(gateway, question))[str(vllm_b.address)]["cached_tokens"] > 100

    vllm_b.kill()
    killed_s = time.monotonic()
    statuses = [(await completed(gateway.address, question)).status for _ in range(6)]
    assert statuses == [200] * 6, "the first, at least, was meant for B"
    await until_state(gateway, vllm_b.address, "failing")
    measured(f"vLLM killed: out of the pool, and six requests answered by the other, after {time.monotonic() - killed_s:.1f} s")

    vllm_b.start()
    measured(f"vLLM B ready again in {vllm_b.start_s:.0f} s")
    gateway.await_output(rf'"msg":"engine was restarted[^"]*".*{re.escape(str(vllm_b.address))}')
    await until_state(gateway, vllm_b.address, "half-open", "healthy")
    rows = await explained(gateway, question)
    assert rows[str(vllm_b.address)]["cached_tokens"] == 0
    assert rows[str(vllm_a.address)]["cached_tokens"] > 100
    seeds = iter(range(2_000, 3_000))

    async def serves_again() -> bool:
        assert (await completed(gateway.address, [user(f"{next(seeds)} is new")])).status == 200
        return await requests_served(vllm_b.address) > 0

    await eventually(serves_again, "B gets requests again")
    await until_state(gateway, vllm_b.address, "healthy")
