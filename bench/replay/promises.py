"""What a clairvoyant knows of an engine's queue: how much prompt work waits there, and which blocks will be cached once it is done."""

from __future__ import annotations

from bench.replay.cache import KVCache
from bench.replay.job import BLOCK_TOKENS, Job, pairs_of


class Promises:
    """Prompt work in an engine's queue, as sure as one can be of it when a request joins: what is cached, or will be by those before it."""

    __slots__ = ("_blocks", "pairs", "tokens")

    def __init__(self) -> None:
        self.tokens = 0
        """Prompt tokens of waiting requests that will have to be computed."""
        self.pairs = 0.0
        self._blocks: dict[int, int] = {}

    def expected(self, job: Job, cache: KVCache) -> tuple[int, float]:
        """Tokens and attention pairs this request would have to compute."""
        refs, blocks, matched = cache.refs, self._blocks, 0
        for block in job.blocks:
            if block not in refs and block not in blocks:
                break
            matched += 1
        if matched < len(job.blocks):  # the second tier, for what comes after
            matched += cache.matched(job.blocks[matched:])
        context = job.context()
        cached = min(matched * BLOCK_TOKENS, context - 1)
        return context - cached, pairs_of(cached, context - cached)

    def add(self, job: Job, cache: KVCache) -> None:
        job.promised_tokens, job.promised_pairs = self.expected(job, cache)
        self.tokens += job.promised_tokens
        self.pairs += job.promised_pairs
        for block in job.blocks:
            self._blocks[block] = self._blocks.get(block, 0) + 1

    def begun(self, job: Job) -> None:
        """It waits no longer."""
        self.tokens -= job.promised_tokens
        self.pairs -= job.promised_pairs

    def done(self, job: Job) -> None:
        """What it promised is in the cache, or will not be."""
        for block in job.blocks:
            left = self._blocks[block] - 1
            if left:
                self._blocks[block] = left
            else:
                del self._blocks[block]
