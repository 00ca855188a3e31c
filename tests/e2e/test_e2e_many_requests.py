"""Ten thousand requests, and not one lost.

Envoy ends every ext_proc stream with RST_STREAM. An HTTP/2 server with the usual rapid-reset limit (1 000, then 33 a second) closes the
connection on it and fails everything in flight: no shorter test sees that.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator

import pytest
from http_clients import Http1, chat, until_idle
from programs import Engines, Gateway

pytestmark = pytest.mark.e2e

REQUESTS = 10_000
CONNECTIONS = 32
DEADLINE_S = 110.0


@pytest.fixture(scope="module")
def engines() -> Iterator[Engines]:
    """So fast that they cost nothing but their HTTP."""
    with Engines("--time-scale", "10000", count=2) as program:
        yield program


async def test_of_ten_thousand_requests_none_is_lost(gateway: Gateway) -> None:
    results: Counter[str] = Counter()
    bodies = iter(range(REQUESTS))

    async def work() -> None:
        async with Http1(gateway.address) as client:
            for index in bodies:
                answer = await client.request("POST", "/v1/chat/completions", chat(f"Question {index}?", max_tokens=1))
                results["ok" if answer.status == 200 else f"{answer.status} {answer.body!r}"] += 1

    async with asyncio.timeout(DEADLINE_S), asyncio.TaskGroup() as workers:
        for _ in range(CONNECTIONS):
            workers.create_task(work())
    assert results == {"ok": REQUESTS}

    samples = await until_idle(gateway.metrics)  # the last answer may be here before the picker has seen its stream end
    assert samples.sum("llm_d_epp_request_total") == REQUESTS
    assert samples.sum("llm_d_epp_request_error_total") == 0
    assert samples.sum("llm_d_epp_request_running") == 0
    assert samples.sum("llm_d_epp_inflight_tokens") == 0
    assert samples.sum("llm_d_epp_scheduler_attempts_total", status="success") == REQUESTS
    assert samples.sum("llm_d_epp_request_duration_seconds_count") == REQUESTS
