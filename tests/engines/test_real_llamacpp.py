"""llama.cpp's server, from a binary the machine has: `LLAMA_SERVER`, with the model `LLAMA_MODEL`."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator

import pytest
from http_clients import eventually
from pools import completed, endpoints, user
from programs import Gateway
from servers import LlamaServer

BINARY, GGUF = os.environ.get("LLAMA_SERVER", ""), os.environ.get("LLAMA_MODEL", "")
pytestmark = pytest.mark.skipif(not (BINARY and GGUF), reason="LLAMA_SERVER and LLAMA_MODEL name no llama-server and no GGUF for it")


@pytest.fixture(scope="module")
def llama() -> Iterator[LlamaServer]:
    with LlamaServer(BINARY, GGUF) as engine:
        yield engine


async def test_its_slots_and_its_queue_are_read(llama: LlamaServer) -> None:
    with Gateway((llama.address,)) as gateway:
        questions = [[user(f"{number}: tell me")] for number in range(8)]
        asked = [asyncio.create_task(completed(gateway.address, question, max_tokens=400)) for question in questions]

        async def loaded() -> bool:
            row = endpoints(gateway)[str(llama.address)]
            return row["state"] == "healthy" and row["running"] >= 3 and row["waiting"] >= 1

        await eventually(loaded, "running and waiting requests")
        assert {(await task).status for task in asked} == {200}
