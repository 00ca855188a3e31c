"""The approximate prefix index: block hash -> bitmask of the endpoints that should have that block cached.

Approximate: it learns from what was routed where, not from the engines. Prefix-closed per endpoint: whoever has a block has all
before it, which makes the cached length findable by bisection (1-3 µs) instead of a walk. Three rules keep it so:

* a prompt is recorded root first, and whole: all its blocks enter the endpoint's young generation together;
* therefore a block's parent is never in an older generation than the block, and never later in a generation's order;
* generations leave oldest first, each newest-inserted first, so a child goes before its parent.

Bounded per endpoint by blocks (memory) and, where the size of the engine's KV cache is known, by tokens: what was not used again while
the endpoint used as much as its cache holds is taken for evicted, as engines evict the least recently used. A prompt is in use until
its answer ends (`used`): of the tenth that goes next, engines have lost 3 to 16 % by that order, 22 to 51 % by that of sending.
`GENERATIONS` say how fine it is. What leaves is dropped a little with every prompt recorded, and in slices of `SLICE_BLOCKS` by `tick`, so
no call stalls the loop.

Cost: lookup O(distinct lengths x log blocks); record O(log blocks) Python steps for what the endpoint was sent before, 0.3 µs a new block,
half of which is its being dropped later; 0.25 µs a block when an answer ends. About 150 bytes a block.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from itertools import compress, count

SLICE_BLOCKS = 2_000
"""Blocks dropped per tick: under a millisecond."""
GENERATIONS = 32
"""Parts of an endpoint's capacity that age together."""
LISTED_MAX = 2
"""Times the capacity in blocks: so much is listed at most, counting what was used again in every generation it was used in."""
MASKS_MAX = 256
"""Masks whose slots are kept spelled out: a pool has few sets of endpoints that hold the same prefix."""
OUTLIVES = 1.05
"""Of the tokens an engine's cache holds, so much is remembered: engines evict a prompt's end before its beginning, here both go together,
and a generation at a time."""
_TRUTH = bytes.maketrans(b"01", b"\0\1")


class _Generation:
    """Blocks that were last sent at about the same time: their hashes, parents before children."""

    __slots__ = ("blocks", "live_blocks", "live_tokens", "number")

    def __init__(self, number: int) -> None:
        self.number = number
        self.blocks: list[int] = []
        self.live_blocks = 0
        """Those not sent again since."""
        self.live_tokens = 0


class _Held:
    """The blocks one endpoint holds."""

    __slots__ = (
        "capacity_blocks",
        "capacity_tokens",
        "dropping",
        "engine_tokens",
        "generations",
        "latest",
        "listed_blocks",
        "live_blocks",
        "live_tokens",
        "young",
    )

    def __init__(self, capacity_blocks: int) -> None:
        self.latest: dict[int, int] = {}
        """Block -> number of the generation in which it was sent last, which may be one that is being dropped. (The garbage collector does
        not look into a dict of numbers.)"""
        self.young = _Generation(0)
        self.generations: deque[_Generation] = deque([self.young])
        """Oldest first; `young` is the last."""
        self.dropping: deque[_Generation] = deque()
        self.live_blocks = 0
        self.live_tokens = 0
        self.listed_blocks = 0
        """In `generations`, those sent again since as often as they were sent."""
        self.capacity_blocks = capacity_blocks
        self.engine_tokens = self.capacity_tokens = 0
        """What the engine's cache holds, and what is remembered of that; 0: not known."""

    @property
    def due(self) -> int:
        return sum(len(generation.blocks) for generation in self.dropping)

    def leave(self) -> None:
        """The oldest generation is to be dropped."""
        oldest = self.generations.popleft()
        self.live_blocks -= oldest.live_blocks
        self.live_tokens -= oldest.live_tokens
        self.listed_blocks -= len(oldest.blocks)
        if oldest.blocks:
            self.dropping.append(oldest)

    def fit(self) -> None:
        """What is too much leaves, but never what was sent last."""
        while len(self.generations) > 1 and (
            self.live_blocks > self.capacity_blocks
            or self.listed_blocks > LISTED_MAX * self.capacity_blocks
            or (self.capacity_tokens and self.live_tokens > self.capacity_tokens)
        ):
            self.leave()

    def begin(self) -> None:
        """A new young generation."""
        self.young = _Generation(self.young.number + 1)
        self.generations.append(self.young)


class PrefixIndex:
    """See the module. `blocks` counts (block, endpoint) pairs held, `rotations_total` how often a generation filled up."""

    def __init__(self, capacity_blocks: int) -> None:
        if capacity_blocks < 2:
            raise ValueError("capacity_blocks must be at least 2")
        self._capacity_blocks = capacity_blocks
        self._masks: dict[int, int] = {}
        self._held: dict[int, _Held] = {}
        self._blind = 0
        """Slots whose engines were started anew: what they held does not count, until it is dropped."""
        self._retired: list[tuple[int, _Held, Callable[[int], None] | None]] = []
        self._slots: dict[int, tuple[int, ...]] = {}
        """Mask -> its slots."""
        self.rotations_total = 0

    def __len__(self) -> int:
        """Distinct blocks known."""
        return len(self._masks)

    @property
    def blocks(self) -> int:
        return sum(self.held_blocks(slot) for slot in self._held)

    def held_blocks(self, slot: int) -> int:
        """Blocks remembered for that endpoint."""
        held = self._held.get(slot)
        return held.live_blocks if held else 0

    def lookup(self, hashes: Sequence[int], mask: int, cumulative_tokens: Sequence[int] = ()) -> dict[int, int]:
        """slot -> leading blocks of `hashes` that endpoint has, or the tokens in them; for the slots in `mask` that have any."""
        found: dict[int, int] = {}
        if not hashes:
            return found
        masks, slots = self._masks.get, self._slots.get
        current = masks(hashes[0], 0) & mask & ~self._blind
        last = masks(hashes[-1], 0)
        depth, blocks = 1, len(hashes)  # every slot in `current` has at least `depth` blocks
        while current:
            low, high = depth, blocks
            if last & current == current:  # the usual case, a whole hit, costs no bisection
                low = blocks
            while low < high:  # the longest prefix that all of `current` have
                middle = (low + high + 1) >> 1
                if masks(hashes[middle - 1], 0) & current == current:
                    low = middle
                else:
                    high = middle - 1
            rest = masks(hashes[low], 0) & current if low < blocks else 0
            ended = current & ~rest
            here = dict.fromkeys(slots(ended) or self._spelled(ended), cumulative_tokens[low - 1] if cumulative_tokens else low)
            found = found | here if found else here
            current, depth = rest, low + 1
        return found

    def _spelled(self, mask: int) -> tuple[int, ...]:
        """The mask's slots, kept for the next time."""
        if len(self._slots) >= MASKS_MAX:
            self._slots.clear()
        slots = self._slots[mask] = slots_of(mask)
        return slots

    def record(self, slot: int, hashes: Sequence[int], cumulative_tokens: Sequence[int]) -> None:
        """The endpoint at `slot` was sent (and so will hold) the prompt with these blocks."""
        if not hashes:
            return
        held = self._held.get(slot)
        if held is None:
            held = self._held[slot] = _Held(self._capacity_blocks)
        hashes = hashes[: held.capacity_blocks // 2]
        latest, young = held.latest, held.young
        number = young.number
        low, high = 0, len(hashes)
        while low < high:  # young is prefix-closed too: find the first block not in it
            middle = (low + high) >> 1
            if latest.get(hashes[middle]) == number:
                low = middle + 1
            else:
                high = middle
        if low == len(hashes):
            return
        new_tokens = cumulative_tokens[len(hashes) - 1] - (cumulative_tokens[low - 1] if low else 0)
        if young.blocks and (
            (len(young.blocks) + len(hashes) - low) * GENERATIONS > held.capacity_blocks
            or (held.capacity_tokens and (young.live_tokens + new_tokens) * GENERATIONS > held.capacity_tokens)
        ):
            held.begin()
            low = 0
            self.rotations_total += 1
        self._enter(held, 1 << slot, hashes, low, cumulative_tokens)
        if held.dropping:  # pay as you go: what a prompt adds, twice as much goes
            self._drop(slot, held, 2 * (len(hashes) - low))
        held.fit()
        if held.dropping and held.due > held.capacity_blocks // 2:  # the ticks were too slow: the bound matters more
            self._drop(slot, held, SLICE_BLOCKS)

    def used(self, slot: int, hashes: Sequence[int], cumulative_tokens: Sequence[int]) -> None:
        """The answer to a prompt recorded for `slot` has ended: engines evict by when a prompt was in use last. Nothing for an endpoint that is gone."""
        held = self._held.get(slot)
        if held is None or not hashes:
            return
        last = hashes[min(len(hashes), held.capacity_blocks // 2) - 1]
        if held.latest.get(last) != held.young.number:
            self.record(slot, hashes, cumulative_tokens)

    def _enter(self, held: _Held, bit: int, hashes: Sequence[int], low: int, cumulative_tokens: Sequence[int]) -> None:
        """The blocks from `low` on are in the young generation now."""
        latest, young, masks = held.latest, held.young, self._masks
        known = low + _leading(hashes, low, latest)  # what it ever had is prefix-closed as well: from here on all is new to it
        moved_blocks, moved_tokens = self._move(held, hashes, low, known, cumulative_tokens) if known > low else (0, 0)
        if known < len(hashes):
            shared = known + _leading(hashes, known, masks)
            for block in hashes[known:shared]:
                masks[block] |= bit
            masks.update(dict.fromkeys(hashes[shared:], bit))  # new to everyone
        entered = hashes[low:] if low else hashes
        latest.update(dict.fromkeys(entered, young.number))
        young.blocks.extend(entered)
        blocks, tokens = len(entered), cumulative_tokens[len(hashes) - 1] - (cumulative_tokens[low - 1] if low else 0)
        held.listed_blocks += blocks
        young.live_blocks += blocks
        young.live_tokens += tokens
        held.live_blocks += blocks - moved_blocks
        held.live_tokens += tokens - moved_tokens

    @staticmethod
    def _move(held: _Held, hashes: Sequence[int], low: int, known: int, cumulative_tokens: Sequence[int]) -> tuple[int, int]:
        """Take the blocks from `low` to `known` out of the generations they are in; returns how many, and their tokens.

        The deeper a block, the older its generation: those of one are in a row, whose end is found by bisection.
        """
        latest, generations = held.latest, held.generations
        oldest = generations[0].number
        start = low
        before_tokens = first_tokens = cumulative_tokens[low - 1] if low else 0
        while start < known:
            number = latest[hashes[start]]
            if number < oldest:  # from here on all are being dropped
                break
            end, high = start + 1, known
            if latest[hashes[known - 1]] == number:
                end = known
            while end < high:
                middle = (end + high) >> 1
                if latest[hashes[middle]] == number:
                    end = middle + 1
                else:
                    high = middle
            generation, tokens = generations[number - oldest], cumulative_tokens[end - 1]
            generation.live_blocks -= end - start
            generation.live_tokens -= tokens - before_tokens
            start, before_tokens = end, tokens
        return start - low, before_tokens - first_tokens

    def set_capacity_tokens(self, slot: int, tokens: int) -> None:
        """The engine's KV cache holds this many tokens (0: unknown): remember about as much, not more."""
        held = self._held.get(slot)
        if held is None:
            held = self._held[slot] = _Held(self._capacity_blocks)
        if held.engine_tokens != tokens:
            held.engine_tokens, held.capacity_tokens = tokens, int(OUTLIVES * tokens)
            held.fit()

    def reset(self, slot: int) -> None:
        """The engine was started anew: it has nothing of what it held. What it is sent from now on counts once that is dropped."""
        held = self._held.get(slot)
        if held is None:
            return
        while held.generations:
            held.leave()
        held.begin()
        if held.due:
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
        while held.generations:
            held.leave()
        self._retired.append((slot, held, then))

    def tick(self) -> int:
        """Drop at most `SLICE_BLOCKS` blocks that are due; returns how many are still due. Call it from a periodic loop."""
        budget = SLICE_BLOCKS
        for slot, held in self._held.items():
            if held.dropping:
                budget -= self._drop(slot, held, budget)
                if budget <= 0:
                    break
        while self._retired:
            slot, held, then = self._retired[0]
            if held.dropping and budget <= 0:
                break
            if held.dropping:
                budget -= self._drop(slot, held, budget)
                continue
            self._retired.pop(0)
            if then:
                then(slot)
        return self.due

    @property
    def due(self) -> int:
        """Blocks waiting to be dropped."""
        return sum(held.due for _, held, _ in self._retired) + sum(held.due for held in self._held.values())

    def _drop(self, slot: int, held: _Held, budget: int) -> int:
        """Take up to `budget` blocks out of what is to be dropped; those sent again since keep their bit."""
        latest, masks, bit, dropped = held.latest, self._masks, 1 << slot, 0
        while held.dropping and dropped < budget:
            generation = held.dropping[0]
            number = generation.number
            here = min(budget - dropped, len(generation.blocks))
            leaving = generation.blocks[-here:]
            del generation.blocks[-here:]
            for block in [each for each in leaving if latest[each] == number]:  # the others were used again since
                del latest[block]
                mask = masks[block]
                if mask == bit:
                    del masks[block]
                else:
                    masks[block] = mask & ~bit
            dropped += here
            if not generation.blocks:
                held.dropping.popleft()
        if not held.dropping:
            self._blind &= ~bit
        return dropped


def slots_of(mask: int) -> tuple[int, ...]:
    """Positions of the bits that are set: 1 µs for 16 of them, 10 for 1 000."""
    return tuple(compress(count(), f"{mask:b}"[::-1].encode().translate(_TRUTH)))


def _leading(hashes: Sequence[int], low: int, known: Mapping[int, int]) -> int:
    """From `low` on, so many are in `known`, and none after those."""
    first, high = low, len(hashes)
    while low < high:
        middle = (low + high) >> 1
        if hashes[middle] in known:
            low = middle + 1
        else:
            high = middle
    return low - first
