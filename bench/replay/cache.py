"""One replica's KV cache: a budget of tokens, prefix blocks shared by reference count, free blocks kept until room is needed.

As vLLM does it: what running requests hold is not evictable; blocks nobody holds stay cached, least recently used first to go, a
prompt's tail before its head. An optional second tier (CPU memory) takes what is evicted. Not here: when requests run (engine).

Only full blocks of prompts are cached: a trace does not say which later blocks contain a generated answer. Cost: 0.1-0.2 µs a block.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from bench.replay.job import BLOCK_TOKENS, Job


class KVCache:
    """See the module. Amounts are tokens."""

    __slots__ = ("_free", "_tier_blocks", "capacity", "evicted_blocks", "refs", "tier", "used")

    def __init__(self, capacity: int, offload: int = 0) -> None:
        """`offload`: tokens of CPU memory behind it."""
        self.capacity = capacity
        self.used = 0
        """Held by running requests, promised ones included. The rest is free, cached or not."""
        self.refs: dict[int, int] = {}
        """Cached block -> running requests that hold it."""
        self.evicted_blocks = 0
        self._free: OrderedDict[int, None] = OrderedDict()
        """Cached blocks nobody holds, least recently used first."""
        self.tier: OrderedDict[int, None] = OrderedDict()
        self._tier_blocks = offload // BLOCK_TOKENS

    @property
    def cached(self) -> int:
        """Tokens kept for nobody in particular."""
        return len(self._free) * BLOCK_TOKENS

    @property
    def offloaded(self) -> int:
        return len(self.tier) * BLOCK_TOKENS

    def matched(self, blocks: Sequence[int]) -> int:
        """Leading blocks found in either tier."""
        refs, tier = self.refs, self.tier
        count = 0
        for block in blocks:
            if block not in refs and block not in tier:
                break
            count += 1
        return count

    def admit(self, job: Job, room: int) -> bool:
        """Hold what is cached of the job's context and promise it the rest, if that and `room` more fit."""
        refs, free = self.refs, self._free
        matched = self.matched(job.blocks)
        hits = job.blocks[:matched]
        reused = taken = 0
        for block in hits:
            if block in refs:
                reused += 1
                taken += block in free
        context = job.context()
        need = context - (reused - taken) * BLOCK_TOKENS
        if self.used + need + room > self.capacity:
            return False
        for block in hits:
            if block in refs:
                if not refs[block]:
                    del free[block]
                refs[block] += 1
            else:  # from the second tier
                self.tier.move_to_end(block)
                refs[block] = 1
        self.used += need
        job.held = matched
        job.load_tokens = (matched - reused) * BLOCK_TOKENS
        job.computed = min(matched * BLOCK_TOKENS, context - 1)
        self.evict()
        return True

    def register(self, job: Job) -> None:
        """Blocks the job has computed by now can be found by others."""
        refs = self.refs
        blocks = job.blocks
        for position in range(job.held, min(job.computed // BLOCK_TOKENS, len(blocks))):
            block = blocks[position]
            count = refs.get(block)
            if count is None:
                refs[block] = 1
            elif count:  # another computed the same meanwhile: one copy is kept
                refs[block] = count + 1
                self.used -= BLOCK_TOKENS
            else:
                refs[block] = 1
                del self._free[block]
            job.held = position + 1

    def release(self, job: Job, context: int) -> None:
        """The job holds nothing any more; `context`: tokens it had or was promised."""
        self.used -= context - job.held * BLOCK_TOKENS
        refs, free = self.refs, self._free
        for position in range(job.held - 1, -1, -1):
            block = job.blocks[position]
            count = refs[block] - 1
            refs[block] = count
            if not count:
                free[block] = None
                self.used -= BLOCK_TOKENS
        job.held = 0

    def evict(self) -> None:
        """Forget free blocks until what is held fits."""
        free = self._free
        excess = self.used + len(free) * BLOCK_TOKENS - self.capacity
        while excess > 0 and free:
            block, _ = free.popitem(last=False)
            del self.refs[block]
            excess -= BLOCK_TOKENS
            self.evicted_blocks += 1
            if self._tier_blocks:
                self.tier[block] = None
                self.tier.move_to_end(block)
                if len(self.tier) > self._tier_blocks:
                    self.tier.popitem(last=False)

    def clear(self) -> None:
        """The process restarted; CPU memory goes with it."""
        self.used = 0
        self.refs.clear()
        self._free.clear()
        self.tier.clear()
