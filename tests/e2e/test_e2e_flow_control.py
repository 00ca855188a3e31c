"""Two thousand clients at once in front of two slow engines: everybody is answered, served or told when to come back, and nothing stays.

Time plays no part in what is asserted: who is refused asks again once all others of its wave were answered.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from http_clients import Answer, Http1, Samples, chat, eventually, scrape, until_idle, until_metrics
from programs import Engines, Gateway

from epp.types import Address

pytestmark = pytest.mark.e2e

CLIENTS = 2_000
LEAVING = 100
PATH = "/v1/chat/completions"
WAVES_MAX = 40
DEADLINE_S = 110.0
"""Of one test, on the slowest of machines; an idle one takes a tenth of it."""
WARM = 100
KEPT_BYTES = 24 << 20
"""More than this two floods must not leave behind, over what the picker had after `WARM` requests: Python's allocator gives little back."""
TENANTS = ("a", "b", "c")
CONFIG = {
    "apiVersion": "llm-d.ai/v1alpha1",
    "kind": "EndpointPickerConfig",
    "featureGates": ["flowControl"],
    "plugins": [
        {"type": "cost-aware-scorer"},
        {"type": "concurrency-detector", "parameters": {"maxConcurrency": 16}},
        {"type": "round-robin-fairness-policy"},
    ],
    "schedulingProfiles": [{"name": "default", "plugins": [{"pluginRef": "cost-aware-scorer"}]}],
    "flowControl": {
        "saturationDetector": {"pluginRef": "concurrency-detector"},
        "defaultRequestTTL": "100s",
        "defaultPriorityBand": {"maxRequests": 800, "fairnessPolicyRef": "round-robin-fairness-policy"},
    },
}


@pytest.fixture(scope="module")
def engines() -> Iterator[Engines]:
    """Sixteen requests at once, 10 ms a token."""
    with Engines("--max-running", "16", "--step-base-ms", "10", count=2) as program:
        yield program


@pytest.fixture(scope="module")
def gateway(engines: Engines) -> Iterator[Gateway]:
    with Gateway(engines.addresses, "--config-text", json.dumps(CONFIG)) as program:
        yield program


async def ask(address: Address, number: int) -> Answer:
    """Without a limit of time of its own."""
    headers = {"x-llm-d-inference-fairness-id": TENANTS[number % len(TENANTS)], "content-type": "application/json"}
    async with Http1(address) as client:
        await client.send("POST", PATH, chat(f"Question {number} of the flood. " * 20, max_tokens=3), headers)
        status = await client.head()
        return Answer(status, client.headers, await client.rest())


async def wave(address: Address, numbers: list[int]) -> tuple[list[int], Counter[str]]:
    """All of them at once. Who was refused, and what everybody was told."""
    async with asyncio.timeout(DEADLINE_S), asyncio.TaskGroup() as clients:
        tasks = [clients.create_task(ask(address, number)) for number in numbers]
    refused: list[int] = []
    told: Counter[str] = Counter()
    for number, task in zip(numbers, tasks, strict=True):
        answer = task.result()
        if answer.status == 200:
            told["served"] += 1
        else:
            assert answer.status == 429, answer
            assert 1 <= int(answer.headers["retry-after"]) <= 60, answer
            told[answer.headers["x-llm-d-request-dropped-reason"]] += 1
            refused.append(number)
    return refused, told


async def flood(address: Address) -> Counter[str]:
    """Until everybody is served."""
    left, told = list(range(CLIENTS)), Counter[str]()
    for _ in range(WAVES_MAX):
        left, more = await wave(address, left)
        told += more
        if not left:
            return told
    raise AssertionError(f"{len(left)} were never served: {told}")


def resident_bytes(gateway: Gateway) -> int:
    status = Path(f"/proc/{gateway.process.pid}/status").read_text()
    (kilobytes,) = [line.split()[1] for line in status.splitlines() if line.startswith("VmRSS")]
    return int(kilobytes) * 1024


def settled(samples: Samples) -> None:
    """Nothing waits, runs or is charged any more."""
    for name in ("flow_control_queue_size", "flow_control_queue_bytes", "inflight_tokens", "request_running"):
        assert samples.sum(f"llm_d_epp_{name}") == 0, name


async def test_two_thousand_clients_are_all_answered_and_leave_nothing_behind(gateway: Gateway) -> None:
    _, warm = await wave(gateway.address, list(range(WARM)))
    assert warm == {"served": WARM}
    await until_idle(gateway.metrics)
    before_bytes = resident_bytes(gateway)

    told = await flood(gateway.address)
    assert told.pop("served") == CLIENTS
    assert sum(told.values()) >= 100, "more than there is room for came at once"
    assert told.keys() <= {"rejected-saturated", "evicted-queue-pressure"}
    samples = await until_idle(gateway.metrics)
    settled(samples)
    assert samples.sum("llm_d_epp_flow_control_requests_total", outcome="Dispatched") == WARM + CLIENTS
    assert samples.sum("llm_d_epp_flow_control_requests_total") == WARM + CLIENTS + sum(told.values())

    again = await flood(gateway.address)
    assert again["served"] == CLIENTS
    settled(await until_idle(gateway.metrics))
    assert resident_bytes(gateway) - before_bytes < KEPT_BYTES


async def test_clients_that_leave_make_room_at_once(gateway: Gateway) -> None:
    before = (await scrape(gateway.metrics)).sum("llm_d_epp_flow_control_requests_total", outcome="EvictedContextCancelled")
    clients = [Http1(gateway.address) for _ in range(LEAVING)]
    for number, client in enumerate(clients):
        await client.__aenter__()
        await client.send("POST", PATH, chat(f"Long {number}", max_tokens=2_000), {"content-type": "application/json"})
    waiting = LEAVING - 2 * 16

    def queued(samples: Samples) -> bool:
        return samples.sum("llm_d_epp_flow_control_queue_size") == waiting

    await until_metrics(gateway.metrics, queued, f"{waiting} requests that wait")
    for client in clients:
        await client.close()

    async def gone() -> bool:
        samples = await scrape(gateway.metrics)
        left = samples.sum("llm_d_epp_flow_control_requests_total", outcome="EvictedContextCancelled") - before
        return samples.sum("llm_d_epp_flow_control_queue_size") == 0 and 1 <= left <= waiting

    await eventually(gone, "an empty queue")
    settled(await until_idle(gateway.metrics))
