"""The approximate prefix index: block hash -> bitmask of the endpoints that should have that block cached.

Approximate: it learns from what was routed where, not from the engines. Prefix-closed per endpoint: whoever has a block has all
before it, which makes the cached length findable by bisection (1-3 µs) instead of a walk. Three rules keep it so:

* a prompt is recorded root first, and whole: all its blocks enter the endpoint's young generation together;
* therefore a block's parent is never in an older generation than the block, and never later in a generation's order;
* what leaves, leaves newest-inserted first, so a child goes before its parent.

Bounded per endpoint by blocks (memory) and, where the size of the engine's KV cache is known, by tokens: two generations; when the
young one is full it becomes old, and what was old is dropped: a little with every prompt recorded, and in slices of `SLICE_BLOCKS` by
`tick`, so no call stalls the loop.

Cost: lookup O(distinct lengths x log blocks); record O(log blocks + new blocks), about 0.25 µs a new block. About 200 bytes a block.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

SLICE_BLOCKS = 2_000
"""Blocks dropped per tick: under a millisecond."""


class _Held:
    """The blocks one endpoint holds: ordered sets of hashes, parents before children."""

    __slots__ = ("capacity_blocks", "capacity_tokens", "dropping", "old", "young", "young_tokens")

    def __init__(self, capacity_blocks: int) -> None:
        self.young: dict[int, None] = {}
        self.old: dict[int, None] = {}
        self.dropping: dict[int, None] = {}
        self.young_tokens = 0
        self.capacity_blocks = capacity_blocks
        self.capacity_tokens = 0


class PrefixIndex:
    """See the module. `blocks` counts (block, endpoint) pairs held, `full_rotations` how often a generation filled up."""

    def __init__(self, capacity_blocks: int) -> None:
        if capacity_blocks < 2:
            raise ValueError("capacity_blocks must be at least 2")
        self._capacity_blocks = capacity_blocks
        self._masks: dict[int, int] = {}
        self._held: dict[int, _Held] = {}
        self._blind = 0
        """Slots whose engines were started anew: what they held does not count, until it is dropped."""
        self._retired: list[tuple[int, _Held, Callable[[int], None] | None]] = []
        self.rotations_total = 0

    def __len__(self) -> int:
        """Distinct blocks known."""
        return len(self._masks)

    @property
    def blocks(self) -> int:
        return sum(self.held_blocks(slot) for slot in self._held)

    def held_blocks(self, slot: int) -> int:
        """Blocks remembered for that endpoint; one that both generations hold counts twice, as it does in memory."""
        held = self._held.get(slot)
        return len(held.young) + len(held.old) if held else 0

    def lookup(self, hashes: Sequence[int], mask: int) -> dict[int, int]:
        """slot -> leading blocks of `hashes` that endpoint has, for the slots in `mask` that have any."""
        if not hashes:
            return {}
        masks = self._masks.get
        mask &= ~self._blind
        current = masks(hashes[0], 0) & mask
        found: dict[int, int] = {}
        depth, count = 1, len(hashes)  # every slot in `current` has at least `depth` blocks
        while current:
            low, high = depth, count
            if masks(hashes[-1], 0) & current == current:  # the usual case, a whole hit, costs no bisection
                low = count
            while low < high:  # the longest prefix that all of `current` have
                middle = (low + high + 1) >> 1
                if masks(hashes[middle - 1], 0) & current == current:
                    low = middle
                else:
                    high = middle - 1
            rest = masks(hashes[low], 0) & current if low < count else 0
            ended = current & ~rest
            while ended:
                lowest = ended & -ended
                found[lowest.bit_length() - 1] = low
                ended ^= lowest
            current, depth = rest, low + 1
        return found

    def record(self, slot: int, hashes: Sequence[int], cumulative_tokens: Sequence[int]) -> None:
        """The endpoint at `slot` was sent (and so will hold) the prompt with these blocks."""
        if not hashes:
            return
        held = self._held.get(slot)
        if held is None:
            held = self._held[slot] = _Held(self._capacity_blocks)
        half = held.capacity_blocks // 2
        hashes = hashes[:half]
        young = held.young
        low, high = 0, len(hashes)
        while low < high:  # young is prefix-closed too: find the first block not in it
            middle = (low + high) >> 1
            if hashes[middle] in young:
                low = middle + 1
            else:
                high = middle
        if low == len(hashes):
            return
        new_tokens = cumulative_tokens[len(hashes) - 1] - (cumulative_tokens[low - 1] if low else 0)
        if len(young) + len(hashes) - low > half or (
            held.capacity_tokens and held.young_tokens + new_tokens > held.capacity_tokens and young
        ):
            self._rotate(slot, held)
            young = held.young
            low, new_tokens = 0, cumulative_tokens[len(hashes) - 1]
        bit = 1 << slot
        masks = self._masks
        fresh = hashes[low:] if low else hashes
        for block in fresh:
            masks[block] = masks.get(block, 0) | bit
        young.update(dict.fromkeys(fresh))
        held.young_tokens += new_tokens
        if held.dropping:  # pay as you go: what a prompt adds, twice as much goes
            self._drop(slot, held, held.dropping, 2 * len(fresh))

    def set_capacity_tokens(self, slot: int, tokens: int) -> None:
        """The engine's KV cache holds this many tokens (0: unknown): remember about as much, not more."""
        held = self._held.get(slot)
        if held is None:
            held = self._held[slot] = _Held(self._capacity_blocks)
        held.capacity_tokens = tokens

    def reset(self, slot: int) -> None:
        """The engine was started anew: it has nothing of what it held. What it is sent from now on counts once that is dropped."""
        held = self._held.get(slot)
        if held is None:
            return
        held.dropping = {**held.dropping, **held.old, **held.young}  # newest last: it goes first
        held.old, held.young, held.young_tokens = {}, {}, 0
        if held.dropping:
            self._blind |= 1 << slot

    def forget(self, slot: int, then: Callable[[int], None] | None = None) -> None:
        """The endpoint is gone. Its blocks go slice by slice; `then(slot)` runs when the last one has.

        Until then the slot must be neither recorded nor given to another endpoint.
        """
        held = self._held.pop(slot, None)
        self._blind &= ~(1 << slot)
        if held is None:
            if then:
                then(slot)
            return
        self._retired.append((slot, held, then))

    def tick(self) -> int:
        """Drop at most `SLICE_BLOCKS` blocks that are due; returns how many are still due. Call it from a periodic loop."""
        budget = SLICE_BLOCKS
        for slot, held in self._held.items():
            if held.dropping:
                budget -= self._drop(slot, held, held.dropping, budget)
                if budget <= 0:
                    break
        while self._retired:
            slot, held, then = self._retired[0]
            # newest first: young, then old, then what was already being dropped
            generation = held.young or held.old or held.dropping
            if generation and budget <= 0:
                break
            if generation:
                budget -= self._clear(slot, generation, budget)
                continue
            self._retired.pop(0)
            if then:
                then(slot)
        return self.due

    @property
    def due(self) -> int:
        """Blocks waiting to be dropped."""
        retired = sum(len(h.young) + len(h.old) + len(h.dropping) for _, h, _ in self._retired)
        return retired + sum(len(h.dropping) for h in self._held.values())

    def _rotate(self, slot: int, held: _Held) -> None:
        if held.dropping:  # the ticks were too slow: finish now, the bound matters more
            self._drop(slot, held, held.dropping, len(held.dropping))
        held.dropping, held.old, held.young, held.young_tokens = held.old, held.young, {}, 0
        self.rotations_total += 1

    def _drop(self, slot: int, held: _Held, generation: dict[int, None], budget: int) -> int:
        """Take up to `budget` blocks, newest first, out of `generation`; those held again by a younger one keep their bit."""
        young, old, masks, bit = held.young, held.old, self._masks, 1 << slot
        count = min(budget, len(generation))
        take = generation.popitem
        for _ in range(count):
            block, _none = take()
            if block not in young and block not in old:
                mask = masks[block]
                if mask == bit:
                    del masks[block]
                else:
                    masks[block] = mask & ~bit
        if not generation:
            self._blind &= ~bit
        return count

    def _clear(self, slot: int, generation: dict[int, None], budget: int) -> int:
        masks, bit = self._masks, 1 << slot
        count = min(budget, len(generation))
        for _ in range(count):
            self._unset(masks, generation.popitem()[0], bit)
        return count

    @staticmethod
    def _unset(masks: dict[int, int], block: int, bit: int) -> None:
        mask = masks.get(block, 0) & ~bit
        if mask:
            masks[block] = mask
        else:
            masks.pop(block, None)
