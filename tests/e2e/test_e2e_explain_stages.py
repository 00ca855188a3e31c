"""`epp explain` against pickers whose requests pass more than the decision: exact tokens and the engines' word, and a full pool that queues."""

from __future__ import annotations

import contextlib
import json
from array import array
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from http_clients import MODEL, Http1, ask, chat, eventually, scrape, until_idle, until_metrics
from programs import Engines, Gateway, free_port
from test_e2e_explain import explain

pytestmark = pytest.mark.e2e

COMPLETIONS = "/v1/completions"
BLOCK, TOKENS = 16, 100
PROMPT = "".join(f"{number:04d}" for number in range(TOKENS))
"""A token of a simulated engine is four bytes. In blocks of 64, as prompts are cut where engines say nothing, it would be 64 of them."""
HEAD = {"apiVersion": "llm-d.ai/v1alpha1", "kind": "EndpointPickerConfig"}


async def told(gateway: Gateway, body: bytes, *argv: str, code: int = 0) -> dict[str, Any]:
    done, out, err = await explain(gateway, "--json", "-d", "@-", *argv, stdin=body)
    assert (done, err) == (code, "")
    answer: dict[str, Any] = json.loads(out)
    return answer


# Exact tokens


@contextlib.asynccontextmanager
async def tokenizer(asked: list[str]) -> AsyncIterator[int]:
    """A server that renders as vLLM's does, with the tokens of the simulated engines."""

    async def render(request: web.Request) -> web.Response:
        asked.append(request.path)
        return web.json_response({"token_ids": array("I", (await request.json())["prompt"].encode()).tolist()})

    app = web.Application()
    app.router.add_post(f"{COMPLETIONS}/render", render)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield runner.addresses[0][1]
    finally:
        await runner.cleanup()


@contextlib.contextmanager
def publishing(tmp_path: Path) -> Iterator[Path]:
    """Two engines that say what they cache, and the file that names them."""
    with contextlib.ExitStack() as stack:
        endpoints = []
        for number in range(2):
            port = free_port()
            engine = stack.enter_context(Engines("--kv-events-port", str(port), "--block-tokens", str(BLOCK)))
            address = engine.address
            labels = {"llm-d.ai/kv-events-port": str(port)}
            endpoints.append({"name": f"engine-{number}", "address": address.host, "port": str(address.port), "labels": labels})
        file = tmp_path / "endpoints.json"
        file.write_text(json.dumps({"endpoints": endpoints}))
        yield file


async def test_what_it_says_is_cached_is_what_the_engine_then_reports(tmp_path: Path) -> None:
    asked: list[str] = []
    async with tokenizer(asked) as port:
        config = {
            **HEAD,
            "plugins": [
                {
                    "type": "token-producer",
                    "parameters": {"modelName": MODEL, "vllm": {"url": f"http://127.0.0.1:{port}", "timeout": "20s"}},
                },
                {"type": "precise-prefix-cache-producer"},
                {"type": "prefix-cache-scorer"},
            ],
        }
        with (
            publishing(tmp_path) as file,
            Gateway((), "--destination", "original-dst", "--endpoints-file", str(file), "--config-text", json.dumps(config)) as gateway,
        ):
            first, second = (
                json.dumps({"model": MODEL, "prompt": text, "max_tokens": 2}).encode() for text in (PROMPT, f"{PROMPT} and on.")
            )
            served = await ask(gateway.address, COMPLETIONS, first)
            await until_metrics(
                gateway.metrics, lambda now: now.sum("llm_d_epp_kv_cache_index_admissions_total") >= TOKENS // BLOCK, "heard"
            )
            counted = "llm_d_epp_request_total", "llm_d_epp_kv_cache_index_lookup_requests_total"
            before = [(await until_idle(gateway.metrics)).sum(name) for name in counted]
            answer = await told(gateway, second, "--path", COMPLETIONS)
            assert [(await scrape(gateway.metrics)).sum(name) for name in counted] == before, "asking is not counted"
            assert len(asked) == 2
            assert answer["prompt_tokens"] == TOKENS + 2
            assert (answer["tokens"]["source"], answer["tokens"]["engines_believed"] >= 1) == ("tokenizer", True)
            cached = {row["address"]: row["cached_tokens"] for row in answer["profiles"][0]["endpoints"]}
            assert sorted(cached.values()) == [0, TOKENS // BLOCK * BLOCK]
            assert cached[served.engine] == TOKENS // BLOCK * BLOCK
            assert answer["destination"].split(",")[0] == served.engine
            again = await ask(gateway.address, COMPLETIONS, second)
            assert again.engine == served.engine
            assert again.json["usage"]["prompt_tokens_details"]["cached_tokens"] == cached[served.engine]
            _, out, _ = await explain(gateway, "-d", "@-", "--path", COMPLETIONS, stdin=second)
            assert f"{TOKENS + 2} prompt tokens, by the tokenizer; cached by the word of " in out
            assert PROMPT[:8] not in out + json.dumps(answer)


# Flow control

QUEUES_ONE = {
    **HEAD,
    "featureGates": ["flowControl"],
    "plugins": [{"type": "queue-scorer"}, {"type": "concurrency-detector", "parameters": {"maxConcurrency": 1}}],
    "schedulingProfiles": [{"name": "default", "plugins": [{"pluginRef": "queue-scorer"}]}],
    "flowControl": {"saturationDetector": {"pluginRef": "concurrency-detector"}, "maxRequests": "1", "defaultRequestTTL": "60s"},
}
OUTCOMES = "llm_d_epp_flow_control_requests_total"


async def test_what_it_says_of_a_full_pool_is_what_a_request_then_gets() -> None:
    body = chat("Hello", max_tokens=1)
    with Engines("--step-base-ms", "100") as engines, Gateway(engines.addresses, "--config-text", json.dumps(QUEUES_ONE)) as gateway:
        answer = await told(gateway, body, "-H", "x-llm-d-inference-fairness-id: tenant-a")
        flow = answer["flow_control"]
        assert (flow["verdict"], flow["fairness_id"], flow["saturation"], flow["ceiling"]) == ("passes", "tenant-a", 0.0, 1.0)

        long = chat("Hello", max_tokens=4_000, stream=True)
        async with Http1(gateway.address) as running, Http1(gateway.address) as waiting:
            await running.send("POST", "/v1/chat/completions", long, {"content-type": "application/json"})
            assert await running.head() == 200
            flow = (await told(gateway, body))["flow_control"]
            assert (flow["verdict"], flow["why"], flow["saturation"]) == ("waits", "its candidates are full", 1.0)

            await waiting.send("POST", "/v1/chat/completions", long, {"content-type": "application/json"})
            before = await until_metrics(gateway.metrics, lambda now: now.sum("llm_d_epp_flow_control_queue_size") == 1, "one is queued")
            answer = await told(gateway, body, code=1)
            code, out, _ = await explain(gateway, "-d", "@-", stdin=body)
            after = await scrape(gateway.metrics)
            for name in (OUTCOMES, "llm_d_epp_flow_control_queue_size", "llm_d_epp_request_total", "llm_d_epp_request_error_total"):
                assert after.sum(name) == before.sum(name), "asking is not counted"
            refused = await ask(gateway.address, "/v1/chat/completions", body)
            flow = answer["flow_control"]
            assert (flow["verdict"], flow["ahead"]["band"]) == ("refused", 1)
            assert (flow["status"], flow["dropped_reason"]) == (refused.status, refused.headers["x-llm-d-request-dropped-reason"])
            assert 1 <= flow["retry_after_s"] <= 60
            assert flow["why"] == refused.json["error"]["message"]
            assert code == 1
            assert f"\nflow control: refused with 429, {flow['why']}; retry after " in out
        await until_idle(gateway.metrics)

        async def passes() -> bool:
            verdict: str = (await told(gateway, body))["flow_control"]["verdict"]
            return verdict == "passes"

        await eventually(passes, "there is room again")
