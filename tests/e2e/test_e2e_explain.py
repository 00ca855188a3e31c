"""`epp explain` as a process of its own, against a running picker behind a real Envoy."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

import pytest
from http_clients import Samples, ask, chat, scrape, until_idle
from programs import Engines, Gateway

pytestmark = pytest.mark.e2e

CHAT = "/v1/chat/completions"
LONG = "The sea was calm and nobody spoke. " * 60
LLM_D = "apiVersion: llm-d.ai/v1alpha1\nkind: EndpointPickerConfig\nprofile: llm-d\n"
COUNTED = ("llm_d_epp_request_total", "llm_d_epp_scheduler_attempts_total", "llm_d_epp_inflight_requests", "llm_d_epp_prefix_indexer_size")


async def explain(gateway: Gateway, *argv: str, stdin: bytes = b"") -> tuple[int, str, str]:
    """Exit code, stdout and stderr."""
    command = (sys.executable, "-m", "epp", "explain", "--url", f"http://{gateway.metrics}", *argv)
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe, stderr=pipe)
    async with asyncio.timeout(30):
        out, err = await process.communicate(stdin)
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


async def told(gateway: Gateway, body: bytes) -> dict[str, Any]:
    code, out, err = await explain(gateway, "--json", "-d", "@-", stdin=body)
    assert (code, err) == (0, "")
    answer: dict[str, Any] = json.loads(out)
    return answer


def counted(samples: Samples) -> list[float]:
    return [samples.sum(name) for name in COUNTED]


async def test_it_names_the_engine_that_then_answers(gateway: Gateway, engines: Engines) -> None:
    first = await ask(gateway.address, CHAT, chat(LONG))
    before = counted(await until_idle(gateway.metrics))
    answer = await told(gateway, chat(LONG))
    (profile,) = answer["profiles"]
    assert {row["address"] for row in profile["endpoints"]} == set(map(str, engines.addresses))
    best, other = profile["endpoints"]
    assert best["picked"]
    assert (best["address"], best["cached_tokens"] > 300, other["cached_tokens"]) == (first.engine, True, 0)
    assert best["total"] > other["total"]
    assert answer["destination"].split(",")[0] == first.engine
    assert counted(await scrape(gateway.metrics)) == before, "asking is not counted"
    again = await ask(gateway.address, CHAT, chat(LONG))
    assert again.engine == first.engine


async def test_the_table_people_read(gateway: Gateway) -> None:
    code, out, err = await explain(gateway, "-d", "@-", "-H", "x-request-id: why-this-one", stdin=chat("Hello"))
    assert (code, err) == (0, "")
    first, profile, heads, *rows = out.splitlines()
    assert first.startswith("request why-this-one  model sim/llama-8b  about ")
    assert profile == "profile default"
    assert heads.split() == ["ENDPOINT", "ADDRESS", "cost-aware-scorer", "x1", "CACHED", "TOTAL"]
    assert sum(row.startswith("  *  ") for row in rows) == 1
    assert rows[2].startswith("-> ")


async def test_a_profile_by_its_name(engines: Engines) -> None:
    with Gateway(engines.addresses, "--config-text", LLM_D) as gateway:
        first = await ask(gateway.address, CHAT, chat(LONG))
        await until_idle(gateway.metrics)
        answer = await told(gateway, chat(LONG))
        (profile,) = answer["profiles"]
        assert [(each["name"], each["weight"]) for each in profile["scorers"]] == [
            ("queue-scorer", 2.0),
            ("kv-cache-utilization-scorer", 2.0),
            ("prefix-cache-scorer", 3.0),
        ]
        assert answer["destination"].split(",")[0] == first.engine
        assert "," in answer["destination"], "the fallback the gateway is known to take"
        _, out, _ = await explain(gateway, "-d", "@-", stdin=chat(LONG))
        assert "prefix-cache-scorer x3" in out


async def test_a_request_that_would_be_refused(gateway: Gateway) -> None:
    code, out, _ = await explain(gateway, "-d", "{}")
    assert code == 1
    assert "refused: 400 " in out
    status = (await ask(gateway.address, CHAT, b"{}")).status
    assert status == 400, "as it is"


async def test_the_last_decisions_without_a_word_of_the_prompt(gateway: Gateway) -> None:
    secret = "a-word-only-I-know"
    await ask(gateway.address, CHAT, chat(f"{secret} {LONG}"), {"x-request-id": "the-last-one"})
    code, out, err = await explain(gateway, "--last", "3")
    assert (code, err) == (0, "")
    assert out.startswith("request the-last-one  model ")
    _, raw, _ = await explain(gateway, "--last", "100", "--json")
    assert secret not in out + raw
    assert "the sea" not in raw.lower()


async def test_nobody_there() -> None:
    command = (sys.executable, "-m", "epp", "explain", "--url", "http://127.0.0.1:9", "-d", "{}")
    process = await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.PIPE)
    _, err = await process.communicate()
    assert process.returncode == 1
    assert err.decode().startswith("epp: no picker answers at http://127.0.0.1:9")
