"""What the picker says of a pool of real engines, and what the engines say themselves."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from http_clients import Answer, Http1, eventually, scrape
from programs import Gateway
from servers import MODEL, fetched

from epp.types import Address

CHAT = "/v1/chat/completions"
Message = dict[str, str]


class Served(NamedTuple):
    """One chat request, as its client saw it."""

    ttft_s: float
    """Until the first piece of the answer's text, or of the whole answer where it is not streamed."""
    text: str


def chat_body(messages: Sequence[Message], *, model: str = MODEL, max_tokens: int = 4, **more: Any) -> bytes:
    wanted = {"model": model, "messages": list(messages), "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
    return json.dumps(wanted | more).encode()


def user(text: str) -> Message:
    return {"role": "user", "content": text}


async def streamed(address: Address, messages: Sequence[Message], **more: Any) -> Served:
    """A streamed chat request; its time to the first token."""
    async with Http1(address) as client:
        begun_s, first_s, body = time.monotonic(), 0.0, b""
        await client.send("POST", CHAT, chat_body(messages, stream=True, **more), {"content-type": "application/json"})
        assert await client.head() == 200, await client.rest()
        async for piece in client.pieces():
            body += piece
            if not first_s and b'"content":"' in body.replace(b'"content":""', b""):
                first_s = time.monotonic() - begun_s
    chunks = [json.loads(line.removeprefix("data: ")) for line in body.decode().split("\n\n") if line.startswith("data: {")]
    text = "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"])
    return Served(first_s, text)


async def completed(address: Address, messages: Sequence[Message], **more: Any) -> Answer:
    """The same without streaming; any status."""
    async with Http1(address) as client:
        return await client.request("POST", CHAT, chat_body(messages, **more), {"content-type": "application/json"})


def endpoints(gateway: Gateway) -> dict[str, dict[str, Any]]:
    """By address, what the picker knows of each."""
    return {row["address"]: row for row in fetched(gateway.metrics, "/debug/endpoints")["endpoints"]}


async def until_state(gateway: Gateway, address: Address, *states: str) -> None:
    def state() -> str:
        return str(endpoints(gateway)[str(address)]["state"])

    async def reached() -> bool:
        return state() in states

    await eventually(reached, f"{address}, which is {state()}, becomes {' or '.join(states)}")


async def explained(gateway: Gateway, messages: Sequence[Message], **more: Any) -> dict[str, dict[str, Any]]:
    """By address, the picker's table for such a request."""
    asked = {"path": CHAT, "headers": {"content-type": "application/json"}, "body": chat_body(messages, **more).decode()}
    async with Http1(gateway.metrics) as client:
        answer = await client.request("POST", "/debug/explain", json.dumps(asked).encode())
    assert answer.status == 200, answer
    assert answer.json["profiles"], answer.json
    return {row["address"]: row for row in answer.json["profiles"][0]["endpoints"]}


async def counted(engine: Address, metric: str) -> float:
    """A counter of the engine's own, over all its series."""
    return (await scrape(engine)).sum(metric)


async def requests_served(engine: Address) -> float:
    """By a vLLM, to the end."""
    return await counted(engine, "vllm:request_success_total")
