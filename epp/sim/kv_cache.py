"""KV-cache blocks the way vLLM keeps them: counted references, a map from content hash to block, least recently used evicted first.

Why it is its own file: which prefixes an engine still holds is the whole point of prefix-aware routing, so it is simulated
exactly, not estimated. Not here: what a block's content is (engine). No I/O, no time: recency is the order of release.

Invariants: a block is either free (no references, in `_free`) or used. A free block may still be cached, and comes back to life on
a hit. As in vLLM one block of the total is the null block, never handed out. Cost: O(1) a block.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence


class KVCache:
    """Blocks are plain numbers, 0 to `usable` - 1."""

    def __init__(self, total_blocks: int) -> None:
        self.usable = total_blocks - 1
        self.evictions_total = 0
        """Cached blocks given away to new content."""
        self.evicted: Callable[[int], None] | None = None
        """Told the content hash of each."""
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(self.usable))
        """Next to be given away first."""
        self._references = [0] * self.usable
        self._hash_of: list[int | None] = [None] * self.usable
        self._block_of: dict[int, int] = {}

    def __repr__(self) -> str:
        return f"<KVCache {self.used}/{self.usable} used, {self.cached} cached>"

    @property
    def used(self) -> int:
        return self.usable - len(self._free)

    @property
    def cached(self) -> int:
        """Blocks with reusable content, in use or free."""
        return len(self._block_of)

    @property
    def usage(self) -> float:
        """0 to 1; cached-but-free blocks count as free."""
        return self.used / self.usable

    def match(self, hashes: Iterable[int]) -> list[int]:
        """The blocks of the longest cached prefix of `hashes`. Takes no references."""
        hits: list[int] = []
        block_of = self._block_of
        for block_hash in hashes:
            block = block_of.get(block_hash)
            if block is None:
                break
            hits.append(block)
        return hits

    def room_beside(self, hits: Sequence[int]) -> int:
        """Free blocks left once `hits` are in use."""
        references = self._references
        return len(self._free) - sum(1 for block in hits if not references[block])

    def hold(self, hits: Sequence[int]) -> None:
        """Take a reference to each block of a `match`."""
        for block in hits:
            if not self._references[block]:
                del self._free[block]
            self._references[block] += 1

    def allocate(self, count: int) -> list[int] | None:
        """`count` blank blocks, evicting the least recently used content; None, and nothing done, if that many are not free."""
        if count > len(self._free):
            return None
        blocks: list[int] = []
        for _ in range(count):
            block, _none = self._free.popitem(last=False)
            old_hash = self._hash_of[block]
            if old_hash is not None:
                del self._block_of[old_hash]
                self._hash_of[block] = None
                self.evictions_total += 1
                if self.evicted is not None:
                    self.evicted(old_hash)
            self._references[block] = 1
            blocks.append(block)
        return blocks

    def remember(self, block: int, block_hash: int) -> bool:
        """From now on `block` answers for this content. The first block with a content keeps answering; a twin stays anonymous (False)."""
        if self._block_of.setdefault(block_hash, block) != block:
            return False
        self._hash_of[block] = block_hash
        return True

    def release(self, blocks: Sequence[int]) -> None:
        """Drop a reference to each. The tail is freed first, so that a prefix outlives what was built on it."""
        for block in reversed(blocks):
            self._references[block] -= 1
            if not self._references[block]:
                self._free[block] = None
                if self._hash_of[block] is None:
                    self._free.move_to_end(block, last=False)

    def reset(self) -> bool:
        """Forget all cached content. As in vLLM refused (False) while any block is in use."""
        if self.used:
            return False
        self._block_of.clear()
        self._hash_of = [None] * self.usable
        return True
