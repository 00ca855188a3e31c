"""Engines that publish KV-cache events as vLLM does, without engines: frames for the index to read.

Half of the prompts are documents many endpoints see, half nobody has seen before. Each engine's cache is full after `fill`; from then on
every block stored costs an old one, children first, each in an event of its own.
"""

import random
from collections import deque
from collections.abc import Iterator

import msgspec
import numpy as np

BLOCK_TOKENS = 16
PROMPT_BLOCKS = 64
"""A prompt of 1 024 tokens."""
LONG_BLOCKS = 512
"""What one step of an engine stores of a long prompt: 8 192 tokens."""
LONG_SHARE = 0.02
DOCUMENTS = 500
VOCABULARY = 128_000
EVENTS_PER_FRAME_MAX = 256

Prompt = tuple[list[int], list[int]]
"""Tokens, and the engine's hash of each block."""


class Engines:
    """`endpoints` of them, which hold `blocks` together."""

    def __init__(self, endpoints: int, blocks: int, seed: int) -> None:
        self.endpoints = endpoints
        self._random = random.Random(seed)
        self._numbers = np.random.default_rng(seed)
        self._capacity_blocks = max(2 * LONG_BLOCKS, blocks // endpoints)
        self.documents = [self._new(PROMPT_BLOCKS) for _ in range(DOCUMENTS)]
        self._held: list[deque[list[int]]] = [deque() for _ in range(endpoints)]
        self._held_blocks = [0] * endpoints
        self._encode = msgspec.msgpack.Encoder().encode

    def _new(self, blocks: int) -> Prompt:
        tokens: list[int] = self._numbers.integers(0, VOCABULARY, blocks * BLOCK_TOKENS).tolist()
        hashes: list[int] = self._numbers.integers(0, 1 << 64, blocks, dtype=np.uint64).tolist()
        return tokens, hashes

    def prompt(self) -> Prompt:
        if self._random.random() < LONG_SHARE:
            return self._new(LONG_BLOCKS)
        return self._random.choice(self.documents) if self._random.random() < 0.5 else self._new(PROMPT_BLOCKS)

    @property
    def kept_bytes(self) -> int:
        """Memory of these stand-ins that grew with `fill`: a list slot a block and, but for documents, a number."""
        shared = {hashes[0] for _, hashes in self.documents}
        return sum((8 if hashes[0] in shared else 56) * len(hashes) for held in self._held for hashes in held)

    def fill(self) -> Iterator[tuple[int, bytes]]:
        """(endpoint, frame) until every cache is full."""
        for endpoint in range(self.endpoints):
            while self._held_blocks[endpoint] < self._capacity_blocks:
                yield endpoint, self.step(endpoint)[0]

    def step(self, endpoint: int) -> tuple[bytes, int, int]:
        """A prompt is computed there: the frame, blocks stored and removed."""
        tokens, hashes = self.prompt()
        held = self._held[endpoint]
        while hashes[:1] in ([kept[0]] for kept in held):  # a document it has: that would be a hit, and no event
            tokens, hashes = self._new(PROMPT_BLOCKS)
        events: list[object] = []
        removed = 0
        while held and self._held_blocks[endpoint] + len(hashes) > self._capacity_blocks and len(events) < EVENTS_PER_FRAME_MAX:
            oldest = held[0]
            events.append({"type": "BlockRemoved", "block_hashes": [oldest.pop()], "medium": "GPU", "group_idx": 0})
            removed += 1
            self._held_blocks[endpoint] -= 1
            if not oldest:
                held.popleft()
        events.append(
            {
                "type": "BlockStored",
                "block_hashes": hashes,
                "parent_block_hash": None,
                "token_ids": tokens,
                "block_size": BLOCK_TOKENS,
                "lora_id": None,
                "medium": "GPU",
                "lora_name": None,
                "extra_keys": [None] * len(hashes),
                "group_idx": 0,
                "kv_cache_spec_kind": "full_attention",
            }
        )
        held.append(list(hashes))
        self._held_blocks[endpoint] += len(hashes)
        return self._encode([0.0, events, 0]), len(hashes), removed
