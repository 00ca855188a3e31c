"""Which views have a block: masks by tier, one column a view, and the walk along a prompt.

A view that is cleared goes on with a new column at once; what it had stays in its old one, which nobody asks about, until it is dropped in
slices. Not here: what events mean, limits, trust (precise, views).

Cost: of the masks; all views are walked together.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import reduce
from operator import and_, or_
from typing import NamedTuple

from epp.prefix.index import slots_of
from epp.prefix.masks import Masks
from epp.prefix.views import Leaving, Names, View

CHUNK_BLOCKS = 64
"""Compared at once by a walk."""
MASKS_MAX = 256
"""Sets of slots and of columns kept spelled out."""


class Cached(NamedTuple):
    """What endpoints have of a prompt: slot -> its leading tokens (or blocks)."""

    tokens: dict[int, int]
    """In any tier: need not be computed."""
    gpu_tokens: dict[int, int]
    """Need not even be fetched. The same dict where nothing is in another tier."""
    weighted_tokens: dict[int, float]
    """Each by the weight of its best tier."""


class Columns:
    """See the module. `dropped_total` counts blocks taken out of columns nobody uses any more, what was speculated not included."""

    def __init__(self, media: Iterable[str]) -> None:
        self.masks = {medium: Masks() for medium in media}
        self.speculative = Masks()
        self.slot_of: list[int] = []
        """By column."""
        self.dropped_total = 0
        self._free: list[int] = []
        self._leaving: deque[Leaving] = deque()
        self._of_slots: dict[int, int] = {}
        """Mask of slots -> mask of their columns."""
        self._spelled: dict[int, tuple[int, ...]] = {}

    def __len__(self) -> int:
        """Distinct blocks, one in two tiers counted twice."""
        return sum(masks.blocks for masks in self.masks.values())

    @property
    def due(self) -> int:
        """Blocks to be dropped."""
        return sum(map(len, self._leaving))

    def take(self, slot: int) -> int:
        """A column nobody has."""
        self._of_slots.clear()
        if self._free:
            column = self._free.pop()
            self.slot_of[column] = slot
            return column
        self.slot_of.append(slot)
        return len(self.slot_of) - 1

    def leave(self, view: View) -> None:
        """What the view has is to be dropped; its column goes with that."""
        self._of_slots.clear()
        self._leaving.append(Leaving(view))

    def of(self, mask: int, views: Mapping[int, Mapping[str, View]]) -> int:
        """The columns of the slots in `mask`."""
        columns = self._of_slots.get(mask)
        if columns is None:
            if len(self._of_slots) >= MASKS_MAX:
                self._of_slots.clear()
            columns = 0
            for slot in slots_of(mask):
                for view in views.get(slot, {}).values():
                    columns |= 1 << view.column
            self._of_slots[mask] = columns
        return columns

    def spelled(self, mask: int) -> tuple[int, ...]:
        """The columns in the mask, kept for the next time."""
        spelled = self._spelled.get(mask)
        if spelled is None:
            if len(self._spelled) >= MASKS_MAX:
                self._spelled.clear()
            spelled = self._spelled[mask] = slots_of(mask)
        return spelled

    def sources(self) -> list[Masks]:
        """All that say somebody has something."""
        return [masks for masks in (*self.masks.values(), self.speculative) if masks.blocks]

    @property
    def tiered(self) -> bool:
        """Whether anything is in a tier other than the GPUs."""
        return any(masks.blocks for medium, masks in self.masks.items() if medium != "gpu")

    def by_tier(self, hashes: Sequence[int], wanted: int, sizes: Sequence[int], weights: Mapping[str, float]) -> Cached:
        """What the slots of those columns have; a slot with several columns by the one that has most."""
        slot_of, spelled = self.slot_of, self.spelled
        deepest = {slot_of[column]: (column, depth) for ended, depth in walk(hashes, wanted, self.sources()) for column in spelled(ended)}
        fast = [masks for masks in (self.masks["gpu"], self.speculative) if masks.blocks]
        on_gpu = {column: depth for ended, depth in walk(hashes, wanted, fast) for column in spelled(ended)}
        found = Cached({}, {}, {})
        beyond: list[tuple[int, int, int, int]] = []
        for slot, (column, depth) in deepest.items():
            gpu = on_gpu.get(column, 0)
            before = sizes[gpu - 1] if gpu else 0
            if gpu:
                found.gpu_tokens[slot] = before
            found.tokens[slot], found.weighted_tokens[slot] = sizes[depth - 1], weights["gpu"] * before
            if gpu < depth:
                beyond.append((slot, column, gpu, depth))
        if beyond:
            self._add_slower(beyond, found.weighted_tokens, hashes, sizes, weights)
        return found

    def _add_slower(
        self,
        beyond: Sequence[tuple[int, int, int, int]],
        values: dict[int, float],
        hashes: Sequence[int],
        sizes: Sequence[int],
        weights: Mapping[str, float],
    ) -> None:
        """`beyond`: slot, column, where it is no longer on the GPU, where it ends. Blocks that are in the same tiers go together."""
        first, last = min(gpu for _, _, gpu, _ in beyond), max(depth for *_, depth in beyond)
        columns = reduce(or_, [1 << column for _, column, _, _ in beyond])
        layers = [(weights[medium], masks) for medium, masks in self.masks.items() if masks.blocks]
        layers += [(weights["gpu"], self.speculative)] if self.speculative.blocks else []
        layers.sort(key=lambda layer: -layer[0])
        part = hashes[first:last]
        runs = list(_runs([[mask & columns for mask in masks.of_all(part)] for _, masks in layers], first))
        for slot, column, gpu, depth in beyond:
            value = values[slot]
            for start, end, masks in runs:
                if end <= gpu:
                    continue
                if start >= depth:
                    break
                low, high = max(start, gpu), min(end, depth)
                best = next((weight for (weight, _), mask in zip(layers, masks, strict=True) if mask >> column & 1), 0.0)
                value += (sizes[high - 1] - (sizes[low - 1] if low else 0)) * best
            values[slot] = value

    def unset(self, medium: str, names: Names, column: int, block: int) -> None:
        """One of the view's names for the block is gone; with the last its bit."""
        shared = names.shared
        if shared and block in shared:
            left = shared[block] - 1
            if left == 1:
                del shared[block]
            else:
                shared[block] = left
        else:
            self.masks[medium].clear(block, 1 << column)

    def drop(self, budget: int) -> int:
        """Take up to `budget` blocks out of columns nobody uses any more; returns how many."""
        dropped = 0
        while self._leaving and dropped < budget:
            leaving = self._leaving[0]
            bit = 1 << leaving.column
            for medium, names in leaving.names.items():
                masks = self.masks[medium]
                for part in (names.held, names.before):
                    here = min(budget - dropped, len(part))
                    for _ in range(here):
                        masks.clear(part.popitem()[1], bit)
                    dropped += here
                    self.dropped_total += here
            here = min(budget - dropped, len(leaving.speculative))
            for _ in range(here):
                self.speculative.clear(leaving.speculative.popitem()[0], bit)
            dropped += here
            if not len(leaving):
                self._leaving.popleft()
                self._free.append(leaving.column)
        return dropped


def _runs(layers: Sequence[Sequence[int]], first: int) -> Iterator[tuple[int, int, tuple[int, ...]]]:
    """Start, end and masks of neighbouring blocks with equal ones; the first block is number `first`."""
    start, before = first, tuple(layer[0] for layer in layers)
    number = first
    for number, here in enumerate(zip(*layers, strict=True), first):
        if here != before:
            yield start, number, before
            start, before = number, here
    yield start, number + 1, before


def walk(hashes: Sequence[int], current: int, sources: Sequence[Masks]) -> list[tuple[int, int]]:
    """(columns, leading blocks of `hashes` they have in `sources` together), shallowest first; those that have none are left out."""
    found: list[tuple[int, int]] = []
    depth, blocks = 0, len(hashes)
    if not sources:
        return found
    while current and depth < blocks:
        chunk = hashes[depth : depth + CHUNK_BLOCKS if depth else 1]  # what nobody has is usually seen by the first
        masks = sources[0].of_all(chunk)
        for source in sources[1:]:
            masks = list(map(or_, masks, source.of_all(chunk)))
        if reduce(and_, masks, current) == current:  # all have all of it
            depth += len(chunk)
            continue
        for mask in masks:
            left = mask & current
            if left != current:
                if depth:
                    found.append((current & ~left, depth))
                current = left
                if not left:
                    break
            depth += 1
    if current and depth:
        found.append((current, depth))
    return found
