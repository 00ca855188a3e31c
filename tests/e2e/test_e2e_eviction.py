"""Requests that run in an engine give way to one of a higher priority: through a real Envoy, with the engine's own word that it let them go."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from http_clients import Answer, Http1, TruncatedError, chat, until_idle, until_metrics
from programs import Engines, Gateway

from epp.types import Address

pytestmark = pytest.mark.e2e

PATH = "/v1/chat/completions"
LONG_TOKENS = 50_000
"""Eight minutes at the engine's pace: whoever asks for so many and ends within a test was ended."""
RESOURCES = """
apiVersion: llm-d.ai/v1alpha2
kind: InferenceObjective
metadata: {name: batch}
spec: {priority: -1, poolRef: {name: default}}
---
apiVersion: llm-d.ai/v1alpha2
kind: InferenceObjective
metadata: {name: urgent}
spec: {priority: 5, poolRef: {name: default}}
"""
CONFIG = {
    "apiVersion": "llm-d.ai/v1alpha1",
    "kind": "EndpointPickerConfig",
    "featureGates": ["flowControl"],
    "plugins": [{"type": "cost-aware-scorer"}, {"type": "concurrency-detector", "parameters": {"maxConcurrency": 2}}],
    "schedulingProfiles": [{"name": "default", "plugins": [{"pluginRef": "cost-aware-scorer"}]}],
    "flowControl": {"saturationDetector": {"pluginRef": "concurrency-detector"}, "enableEviction": True},
}


@pytest.fixture
async def pool(tmp_path: Path) -> AsyncIterator[tuple[Engines, Gateway]]:
    """An engine that may have two requests at once, and the picker before it."""
    (tmp_path / "resources.yaml").write_text(RESOURCES)
    flags = ("--config-text", json.dumps(CONFIG), "--resources-file", str(tmp_path / "resources.yaml"))
    with Engines("--step-base-ms", "10", "--kv-blocks", "20000") as engines, Gateway(engines.addresses, *flags) as gateway:
        yield engines, gateway


async def begin(client: Http1, objective: str, tokens: int, *, stream: bool = False) -> None:
    headers = {"x-llm-d-inference-objective": objective, "content-type": "application/json"}
    await client.send("POST", PATH, chat("Tell me all of it.", max_tokens=tokens, stream=stream), headers)


async def running(address: Address, count: int) -> None:
    await until_metrics(address, lambda now: now.sum("vllm:num_requests_running") == count, f"{count} requests in the engine")


async def test_the_newest_gives_way_and_the_engine_lets_it_go(pool: tuple[Engines, Gateway]) -> None:
    engines, gateway = pool
    async with Http1(gateway.address) as first, Http1(gateway.address) as second, Http1(gateway.address) as third:
        async with asyncio.timeout(30):
            await begin(first, "batch", LONG_TOKENS, stream=True)
            assert await first.head() == 200
            streamed = first.pieces()
            assert await anext(streamed)
            await begin(second, "batch", LONG_TOKENS)
            await running(engines.address, 2)

            await begin(third, "urgent", 4)
            evicted = Answer(await second.head(), second.headers, await second.rest())
            assert evicted.status == 429
            assert evicted.headers["x-llm-d-request-dropped-reason"] == "evicted"
            assert 1 <= int(evicted.headers["retry-after"]) <= 60
            assert evicted.json["error"]["code"] == "evicted"
            assert await third.head() == 200
            assert json.loads(await third.rest())["usage"]["completion_tokens"] == 4
            assert await anext(streamed), "the elder one goes on"

            async with Http1(gateway.address) as fourth, Http1(gateway.address) as fifth:
                await begin(fourth, "", LONG_TOKENS)
                await running(engines.address, 2)
                await begin(fifth, "urgent", 4)
                with pytest.raises(TruncatedError):  # its response has begun: all there is to do is to end it
                    async for _ in streamed:
                        pass
                assert await fifth.head() == 200
                await fifth.rest()
                await running(engines.address, 1)
    samples = await until_idle(gateway.metrics)
    assert samples.sum("llm_d_epp_flow_control_revocations_issued_total", priority="5") == 2
    assert samples.sum("llm_d_epp_request_error_total", error_code="ResourceExhausted") == 2
    assert samples.sum("llm_d_epp_flow_control_queue_size") == 0
    await running(engines.address, 0)
