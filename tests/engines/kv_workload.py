"""Conversations through a gateway, and for each request what the picker predicted to be cached against what the engine reported.

The picker says what it predicted in its log of decisions, the engine in the answer's usage; vLLM's answers have the request's id in theirs.
"""

from __future__ import annotations

import asyncio
import json
import re
from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path
from random import Random
from typing import NamedTuple

from pools import CHAT, Message, completed, user
from programs import Gateway
from servers import MODEL, fetch

from epp.plugins.producers.approx_prefix_cache import ApproxPrefixCacheProducer
from epp.types import Address, Decision, Endpoint, LLMRequest, Snapshot
from tests.builders import pool_of

CONFIG = """
apiVersion: llm-d.ai/v1alpha1
kind: EndpointPickerConfig
plugins:
  - type: token-producer
    parameters: {{local: {{models: [{{name: {name}, path: {path}}}], timeout: 5s}}}}
  - type: precise-prefix-cache-producer
    parameters: {{kvEventsConfig: {{topicFilter: ""}}}}
  - type: active-request-scorer
  - type: prefix-cache-scorer
schedulingProfiles:
  - name: default
    plugins:
      - {{pluginRef: active-request-scorer, weight: 1}}
      - {{pluginRef: prefix-cache-scorer, weight: 2}}
"""
WORDS = ("import", "return", "class", "value", "self", "name", "error", "file", "path", "string", "result", "object", "module", "method")
ROUTED = re.compile(r'^\{.*"msg":"routed".*\}$', re.MULTILINE)
ID = re.compile(r"chatcmpl-([0-9a-f]{8}-[0-9a-f-]{27})(?:-.*)?")


def config(model: Path) -> str:
    """Exact tokens by the model's own tokenizer, and precise prefixes."""
    return CONFIG.format(name=MODEL, path=model)


class Told(NamedTuple):
    """One request."""

    messages: tuple[Message, ...]
    endpoint: str
    prompt_tokens: int
    """As the engine counted them."""
    counted_tokens: int
    """As the picker did."""
    predicted: int
    reported: int


class Sums(NamedTuple):
    """Cached tokens of many requests. Precision: of what was predicted, how much was cached; recall: of what was cached, how much was predicted."""

    exact: float
    precision: float
    recall: float


def sums(pairs: Sequence[tuple[int, int]]) -> Sums:
    """Of (predicted, reported)."""
    both = sum(min(pair) for pair in pairs)
    return Sums(
        sum(predicted == reported for predicted, reported in pairs) / len(pairs),
        both / max(1, sum(predicted for predicted, _ in pairs)),
        both / max(1, sum(reported for _, reported in pairs)),
    )


def text(random: Random, words: int) -> str:
    return " ".join(random.choice(WORDS) for _ in range(words))


async def converse(
    gateway: Address, *, conversations: int, turns: int, at_once: int, words: int, system_words: int, seed: int
) -> dict[str, tuple[tuple[Message, ...], int, int]]:
    """Request id (its number, of an engine that names requests itself; then they go one after the other) -> messages, prompt tokens and cached
    tokens as the engine reported. Turns of different conversations mix."""
    random = Random(seed)
    systems = [text(random, system_words) for _ in range(8)]
    histories: list[list[Message]] = [[{"role": "system", "content": systems[number % len(systems)]}] for number in range(conversations)]
    order = [number for number in range(conversations) for _ in range(turns)]
    random.shuffle(order)
    locks = [asyncio.Lock() for _ in histories]
    places = asyncio.Semaphore(at_once)
    found: dict[str, tuple[tuple[Message, ...], int, int]] = {}

    async def turn(number: int, question: str) -> None:
        async with locks[number], places:
            history = histories[number]
            history.append(user(question))
            answer = await completed(gateway, history, max_tokens=8)
            assert answer.status == 200, answer
            said = answer.json
            identity = ID.fullmatch(said["id"])
            assert identity is not None or at_once == 1, said["id"]
            usage = said["usage"]
            cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
            found[identity[1] if identity else f"{len(found)}"] = tuple(history), usage["prompt_tokens"], cached
            history.append({"role": "assistant", "content": said["choices"][0]["message"]["content"]})

    questions = [text(random, words) for _ in order]
    async with asyncio.TaskGroup() as tasks:
        for number, question in zip(order, questions, strict=True):
            tasks.create_task(turn(number, question))
    return found


def joined(gateway: Gateway, answers: dict[str, tuple[tuple[Message, ...], int, int]]) -> list[Told]:
    """In the order in which they were decided."""
    told = []
    for number, match in enumerate(ROUTED.finditer(gateway.stderr + gateway.stdout)):
        line = json.loads(match[0])
        answer = answers.get(line["request_id"], answers.get(f"{number}"))
        if answer is not None:
            messages, prompt_tokens, cached = answer
            predicted = line["prompt_tokens"] - line["uncached_tokens"]
            told.append(Told(messages, line["endpoint"], prompt_tokens, line["prompt_tokens"], predicted, cached))
    return told


def approximated(told: Iterable[Told], engine: Address, *, capacity_tokens: int) -> list[tuple[int, int]]:
    """(predicted, reported) had the same decisions been watched by the approximate index, which is given the engines' own tokens and the
    size of their caches: no better use can be made of it."""
    told = list(told)
    names = sorted({each.endpoint for each in told})
    pool = dict(zip(names, pool_of(*({"kv_capacity_tokens": capacity_tokens} for _ in names)), strict=True))
    producer = ApproxPrefixCacheProducer()
    pairs = []
    for each in told:
        status, body = fetch(engine, "POST", "/tokenize", json.dumps({"model": MODEL, "messages": each.messages}).encode())
        assert status == 200, body
        tokens = array("I", json.loads(body)["tokens"])
        assert len(tokens) == each.prompt_tokens
        request = LLMRequest(id="", path=CHAT, headers={})
        request.prompt, request.prompt_tokens = tokens.tobytes(), len(tokens)
        endpoint: Endpoint = pool[each.endpoint]
        producer.produce(request, Snapshot.of(list(pool.values())))
        assert request.prefix is not None
        pairs.append((request.prefix.matched_tokens.get(endpoint.slot, 0), each.reported))
        producer.picked(request, Decision(endpoint, (), "default"))
    return pairs


def endpoints_file(directory: Path, ports: Sequence[tuple[Address, int, int]]) -> Path:
    """Endpoints on one machine: each says its own port for events, and for lost ones."""
    file = directory / "endpoints.json"
    rows = [
        {
            "name": f"engine-{number}",
            "address": address.host,
            "port": str(address.port),
            "labels": {"llm-d.ai/kv-events-port": str(events), "llm-d.ai/kv-events-replay-port": str(replay)},
        }
        for number, (address, events, replay) in enumerate(ports)
    ]
    file.write_text(json.dumps({"endpoints": rows}))
    return file
