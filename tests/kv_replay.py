"""Recorded KV-event frames, and a model of what an engine has cached that shares no code with the product.

The model keeps whole prompts (the tokens of a block and of all before it) and counts copies; it knows nothing of hashes but that they are names.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

RECORDINGS = Path(__file__).parent / "data" / "kv-events"
STORED = ("type", "block_hashes", "parent_block_hash", "token_ids", "block_size", "lora_id", "medium", "lora_name", "extra_keys")
REMOVED = ("type", "block_hashes", "medium")


def frames(name: str) -> Iterator[tuple[str, int, bytes]]:
    """(topic, sequence number, payload) of each message."""
    data, at = (RECORDINGS / f"{name}.frames.bin").read_bytes(), 0
    while at < len(data):
        parts, (count,) = [], struct.unpack_from(">I", data, at + 8)
        at += 12
        for _ in range(count):
            (size,) = struct.unpack_from(">I", data, at)
            parts.append(data[at + 4 : at + 4 + size])
            at += 4 + size
        topic, number, payload = parts
        yield topic.decode(), int.from_bytes(number, "big"), payload


def events(payload: bytes) -> list[dict[str, Any]]:
    """As maps, whichever form they have."""
    _, raw, *_ = msgspec.msgpack.decode(payload)
    return [
        event if isinstance(event, dict) else dict(zip(STORED if event[0] == "BlockStored" else REMOVED, event, strict=False))
        for event in raw
    ]


Prompt = tuple[str, str, tuple[int, ...]]
"""LoRA, salt, tokens."""


class Engine:
    """What one engine has, by its own account."""

    def __init__(self) -> None:
        self.copies: Counter[Any] = Counter()
        self.prompts: dict[Any, Prompt] = {}
        self.ever: dict[Prompt, int] = {}
        """Every prompt a block was stored of -> tokens a block."""

    def take(self, event: dict[str, Any]) -> None:
        if event["type"] == "AllBlocksCleared":
            self.copies.clear()
            self.prompts.clear()
        elif event["type"] == "BlockRemoved":
            for name in event["block_hashes"]:
                if self.copies[name] == 1:
                    del self.prompts[name]
                if self.copies[name] > 0:
                    self.copies[name] -= 1
        else:
            self.stored(event)

    def stored(self, event: dict[str, Any]) -> None:
        lora, size, parent = event.get("lora_name") or "", event["block_size"], event.get("parent_block_hash")
        if parent is None:
            extra = [key for key in (event.get("extra_keys") or [None])[0] or [] if key != lora]
            before: Prompt = (lora, event.get("cache_salt") or (extra[0] if extra else ""), ())
        elif parent in self.prompts:
            before = self.prompts[parent]
        else:
            return
        for number, name in enumerate(event["block_hashes"]):
            before = (*before[:2], before[2] + tuple(event["token_ids"][number * size : (number + 1) * size]))
            self.copies[name] += 1
            self.prompts[name] = before
            self.ever[before] = size

    def cached_tokens(self, prompt: Prompt, have: set[Prompt]) -> int:
        """Of the prompt's beginning, block by block; `have` are the prompts held."""
        lora, salt, tokens = prompt
        size, depth = self.ever[prompt], 0
        while depth < len(tokens) and (lora, salt, tokens[: depth + size]) in have:
            depth += size
        return depth
