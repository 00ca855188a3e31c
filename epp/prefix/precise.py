"""The precise prefix index: which blocks every engine has cached, from what engines publish (kv_events).

Blocks go by hashes of our own (token_hashes), so the engines' algorithms and seeds do not matter: an engine's hash is only the name by which
it later removes a block. Every publisher (an endpoint, or a data-parallel rank of one) is a view with names of its own and a column, one
bit of the masks; an endpoint with several counts by the one that has most of a prompt, as a request runs on one rank.

Invariants:
* A view's bit is set in a tier's mask if and only if one of its names in that tier stands for the block.
* Engines announce and remove every copy of a block (vLLM keeps duplicates, SGLang one a namespace): copies are counted.
* A block whose parent is not known can't be placed: it is skipped and counted, as is everything under it.
* `bytes_used`, an estimate calibrated by `bench kv-events`, stays below the budget: what would pass it is skipped and counted.
* After `gap` an endpoint is not trusted until what it lacks and what it may hold wrongly is little (views).

Look-ups walk, which costs about as much as hashing the blocks did. Bisection differed from it in no state of any recording, but needs engines to
evict children first, which lower tiers do not and a lost frame undoes. With a million blocks, decoding and storing one and removing another
cost 5-6 µs together (`bench kv-events`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

from epp.prefix.columns import Cached, Columns, walk
from epp.prefix.kv_events import BlockRemoved, BlockStored, Event
from epp.prefix.speculation import Speculation
from epp.prefix.token_hashes import hashes_of, seed
from epp.prefix.views import NO_GROUP, SEEN_MAX, Names, View

__all__ = ["Cached", "PreciseIndex", "hashes_of", "seed"]

SLICE_BLOCKS = 2_000
"""Blocks dropped per tick: under a millisecond."""
PIECE_BLOCKS = 256
"""Blocks to be stored at a time: about 0.4 ms with decoding."""
VIEWS_MAX = 16
"""Publishers of one endpoint."""
BLOCK_SIZES_MAX = 8
"""Different block sizes: a request is hashed once for each."""
SPECULATIVE_BLOCKS_MAX = 1_000_000
ENTRY_BYTES = 150
"""A block of one view: a name, a hash, their place in a dict. With `BLOCK_BYTES`, 0.75-1 of it was resident memory in `bench kv-events`."""
BLOCK_BYTES = 70
"""A block anybody has: its place among the masks, and its mask but for the columns."""
TIER_WEIGHTS: Mapping[str, float] = MappingProxyType({"gpu": 1.0, "cpu": 0.8})
"""What a cached token is worth by where it is; media that are not named are skipped."""
UNNAMED_LOST_BLOCKS = 64
"""Taken for lost in a gap of unknown size: a prompt of a thousand tokens."""


class PreciseIndex:
    """See the module. `counts`: what came of events, by reason, in blocks; `blocks`: (block, view) pairs, those being dropped included."""

    def __init__(
        self,
        budget_bytes: int,
        *,
        tier_weights: Mapping[str, float] = TIER_WEIGHTS,
        speculative_ttl_s: float = 0.0,
        speculative_blocks_max: int = SPECULATIVE_BLOCKS_MAX,
    ) -> None:
        """`speculative_ttl_s`: how long a block counts as cached because a prompt with it was sent there; 0: not at all."""
        if budget_bytes < ENTRY_BYTES + BLOCK_BYTES:
            raise ValueError(f"budget_bytes must be at least {ENTRY_BYTES + BLOCK_BYTES}")
        if not tier_weights.get("gpu"):
            raise ValueError("tier_weights must give gpu a weight")
        self.budget_bytes = budget_bytes
        self.counts: Counter[str] = Counter()
        self.trusted_mask = 0
        """Slots for which `trusted` is true."""
        self._weights = dict(tier_weights)
        self._columns = Columns(("gpu", *(medium for medium in tier_weights if medium != "gpu")))
        self._speculation = Speculation(self._columns.speculative, speculative_ttl_s, speculative_blocks_max)
        self._views: dict[int, dict[str, View]] = {}
        self._sweeping: list[tuple[int, View]] = []
        self._sizes: Counter[int] = Counter()
        """Tokens a block -> views with such."""
        self._entries = 0
        """Stored less removed; what was dropped from columns nobody uses is counted there."""

    def __len__(self) -> int:
        """Distinct blocks known, one in two tiers counted twice."""
        return len(self._columns)

    @property
    def blocks(self) -> int:
        return self._entries - self._columns.dropped_total

    @property
    def bytes_used(self) -> int:
        block_bytes = BLOCK_BYTES + len(self._columns.slot_of) // 7
        return self.blocks * ENTRY_BYTES + len(self) * block_bytes + self._speculation.blocks * (ENTRY_BYTES + block_bytes)

    @property
    def block_sizes(self) -> tuple[int, ...]:
        """Tokens a block, as the engines publish; usually one: hash a request once for each."""
        return tuple(self._sizes)

    @property
    def due(self) -> int:
        """Blocks waiting to be dropped."""
        return self._columns.due

    def held_blocks(self, slot: int) -> int:
        """Blocks known to be at that endpoint, in all tiers and of all its publishers."""
        return sum(map(len, self._views.get(slot, {}).values()))

    # Events

    def apply(self, slot: int, event: Event, publisher: str = "") -> None:
        """What that publisher of the endpoint at `slot` says. Feed frames in `batch.pieces(PIECE_BLOCKS)`."""
        view = self._view(slot, publisher)
        if view is None:
            self.counts["skipped_publisher"] += 1
            return
        if isinstance(event, BlockStored):
            self._columns.drop(2 * len(event.hashes))  # pay as you go: what is stored, twice as much leaves
            self._store(view, event)
        elif isinstance(event, BlockRemoved):
            self._remove(view, event)
        else:
            self.counts["clears"] += 1
            self._clear(slot, view)
        if view.doubtful and view.sweeping is None and view.settle():
            self._sweeping.append((slot, view))

    def _store(self, view: View, event: BlockStored) -> None:
        hashes = event.hashes
        count = len(hashes)
        reason = self._refused(view, event)
        if reason:
            self.counts[reason] += count
            return
        names = view.names.setdefault(event.medium, Names())
        if not event.tokens:  # a tier that names blocks only: those the engine has elsewhere are known
            for name in hashes:
                block = view.block_of(name)
                self.counts["skipped_tokens" if block is None else "stored"] += 1
                if block is not None:
                    self._enter(view, event.medium, names, (name,), (block,))
            return
        start = seed(event.lora, event.salt, event.block_tokens) if event.parent is None else view.block_of(event.parent)
        if start is None:
            self.counts["skipped_parent"] += count
            return
        extras = dict(enumerate(event.extras)) if event.extras else None
        self._enter(view, event.medium, names, hashes, hashes_of(event.tokens, event.block_tokens, start, extras))
        self.counts["stored"] += count

    def _refused(self, view: View, event: BlockStored) -> str:
        """Why blocks are not taken; empty if they are."""
        if event.medium not in self._weights:
            return "skipped_medium"
        if view.group == NO_GROUP:
            view.group = event.group
        if event.group != view.group:
            return "skipped_group"
        if self.bytes_used + len(event.hashes) * (ENTRY_BYTES + BLOCK_BYTES) > self.budget_bytes:
            return "skipped_budget"
        size = event.block_tokens
        if event.tokens and size not in view.block_sizes:
            if len(self._sizes) >= BLOCK_SIZES_MAX and size not in self._sizes:
                return "skipped_block_size"
            view.block_sizes.add(size)
            self._sizes[size] += 1
        return ""

    def _enter(self, view: View, medium: str, names: Names, hashes: Sequence[int], blocks: Sequence[int]) -> None:
        """The engine has these blocks in that tier."""
        held, shared = names.held, names.shared
        if names.before or not held.keys().isdisjoint(hashes) or len(set(hashes)) != len(hashes):
            blocks = _new(names, hashes, blocks)
        else:
            held.update(zip(hashes, blocks, strict=True))
        self._entries += len(blocks)
        for block in self._columns.masks[medium].add(blocks, 1 << view.column):
            shared[block] = shared.get(block, 1) + 1

    def _remove(self, view: View, event: BlockRemoved) -> None:
        if event.group is not None and view.group not in (event.group, None, NO_GROUP):
            self.counts["removed_group"] += len(event.hashes)
            return
        if not event.medium:  # wherever they are
            for medium, names in view.names.items():
                here = [name for name in event.hashes if name in names.held or name in names.before]
                self._remove(view, event._replace(hashes=here, medium=medium))
            return
        names, left, removed, unknown = view.names.get(event.medium, Names()), event.left, 0, 0
        held, before, copies = names.held, names.before, names.copies
        for number, name in enumerate(event.hashes):
            if name not in held and name not in before:
                unknown += 1
                continue
            remaining = left[number] if left else copies.get(name, 1) - 1
            if remaining:
                copies[name] = remaining
                continue
            copies.pop(name, None)
            block = held.pop(name) if name in held else before.pop(name)
            removed += 1
            self._columns.unset(event.medium, names, view.column, block)
            if view.speculative:
                self._speculation.gone(view, block)
        self._entries -= removed
        self.counts["removed"] += removed
        self.counts["removed_unknown"] += unknown
        view.lacking_blocks -= unknown
        view.removed_blocks += removed + unknown

    # Look-ups

    def lookup(self, hashes: Sequence[int], mask: int, cumulative_tokens: Sequence[int] = ()) -> dict[int, int]:
        """slot -> leading blocks of `hashes` in any tier there, or the tokens in them; for the slots in `mask` that have any."""
        columns, found = self._columns, {}
        slot_of = columns.slot_of
        for ended, depth in walk(hashes, columns.of(mask, self._views), columns.sources()):
            value = cumulative_tokens[depth - 1] if cumulative_tokens else depth
            found.update(dict.fromkeys([slot_of[column] for column in columns.spelled(ended)], value))  # deeper ones come later
        return found

    def cached(self, hashes: Sequence[int], mask: int, cumulative_tokens: Sequence[int] = ()) -> Cached:
        """As `lookup`, by tier and weighted."""
        weight = self._weights["gpu"]
        if self._columns.tiered:
            sizes = cumulative_tokens or range(1, len(hashes) + 1)
            return self._columns.by_tier(hashes, self._columns.of(mask, self._views), sizes, self._weights)
        tokens = self.lookup(hashes, mask, cumulative_tokens)
        return Cached(tokens, tokens, {slot: weight * value for slot, value in tokens.items()})

    # Speculation and trust

    def speculate(self, slot: int, hashes: Sequence[int], now_s: float) -> None:
        """A prompt with these blocks was sent there: it counts as cached until the events say so, or `speculative_ttl_s` passed.

        Call it for every prompt sent, even where nothing is speculated: an endpoint in doubt proves by it what it still has.
        """
        views = list(self._views.get(slot, {}).values())
        for view in views:
            if view.doubtful and len(view.seen) + len(hashes) <= SEEN_MAX:
                view.seen.update(hashes)
        if not views or not self._speculation.active:
            return
        view = views[0]
        if len(views) > 1:  # the rank that has most of it is the likeliest
            among = {view.column: view for view in views}
            found = walk(hashes, sum(1 << column for column in among), self._columns.sources())
            view = among[self._columns.spelled(found[-1][0])[0]] if found else view
        held = walk(hashes, 1 << view.column, [self._columns.masks["gpu"]])
        self.counts["skipped_speculative"] += self._speculation.add(view, list(hashes[held[0][1] if held else 0 :]), now_s)

    def gap(self, slot: int, publisher: str = "", lost_blocks: int = UNNAMED_LOST_BLOCKS) -> None:
        """Frames were lost, with about so many stored blocks in them; also where a stream is joined in the middle."""
        view = self._view(slot, publisher)
        if view is not None:
            self.counts["gaps"] += 1
            view.doubt(lost_blocks)
            self._judge(slot)

    def trusted(self, slot: int) -> bool:
        """Whether what is known of that endpoint can be relied upon: some publisher has been heard, and none is in doubt."""
        return bool(self.trusted_mask >> slot & 1)

    def _judge(self, slot: int) -> None:
        views = self._views.get(slot)
        self.trusted_mask &= ~(1 << slot)
        if views and not any(view.doubtful for view in views.values()):
            self.trusted_mask |= 1 << slot

    def _sweep(self, budget: int) -> None:
        """Go through what is in doubt where doubt is over: keep it, or what of it was proven."""
        while self._sweeping and budget > 0:
            slot, view = self._sweeping[0]
            keep = view.sweeping
            if keep is not None:
                for medium, names in view.names.items():
                    while names.before and budget > 0:
                        budget -= 1
                        name, block = names.before.popitem()
                        if keep or block in view.seen:
                            names.held[name] = block
                            continue
                        names.copies.pop(name, None)
                        self._columns.unset(medium, names, view.column, block)
                        self._entries -= 1
                        self.counts["doubted"] += 1
                if any(names.before for names in view.names.values()):
                    return
                view.certain()
                self._judge(slot)
            self._sweeping.pop(0)

    # Coming and going

    def _view(self, slot: int, publisher: str) -> View | None:
        views = self._views.setdefault(slot, {})
        view = views.get(publisher)
        if view is None and len(views) < VIEWS_MAX:
            view = views[publisher] = View(self._columns.take(slot))
            self._judge(slot)
        return view

    def _clear(self, slot: int, view: View) -> None:
        """The view has nothing; what it had is dropped later, from the column it had it in."""
        if len(view) or view.speculative:
            self._leave(view)
            view.column, view.names, view.speculative = self._columns.take(slot), {}, {}
        view.certain()
        self._judge(slot)

    def _leave(self, view: View) -> None:
        view.certain()
        self._columns.leave(view)
        self._sizes.subtract(view.block_sizes)
        self._sizes = +self._sizes
        view.block_sizes = set()
        if self.due > SLICE_BLOCKS:  # clears may come faster than ticks
            self._columns.drop(SLICE_BLOCKS)

    def restarted(self, slot: int, publisher: str = "") -> None:
        """That publisher's sequence began anew: its engine has nothing."""
        view = self._view(slot, publisher)
        if view is not None:
            self.counts["restarts"] += 1
            view.restart_seen, view.reset_seen = not view.reset_seen, False
            view.another()
            self._clear(slot, view)

    def reset(self, slot: int) -> None:
        """Its metrics say the engine was started anew. What the new one published before they did is kept."""
        for view in self._views.get(slot, {}).values():
            if view.restart_seen:
                view.restart_seen = False
            else:
                view.reset_seen = True
                view.another()
                self._clear(slot, view)

    def forget(self, slot: int, then: Callable[[int], None] | None = None) -> None:
        """The endpoint is gone; the slot may be used again at once: `then(slot)` is called before this returns."""
        for view in self._views.pop(slot, {}).values():
            self._leave(view)
        self._judge(slot)
        if then:
            then(slot)

    def tick(self, now_s: float | None = None) -> int:
        """Drop at most `SLICE_BLOCKS` blocks that are due or were speculated too long ago; returns how many are still due."""
        budget = SLICE_BLOCKS
        if now_s is not None:
            budget -= self._speculation.expire(now_s, SLICE_BLOCKS // 2)
        self._sweep(budget - self._columns.drop(budget))
        return self.due


def _new(names: Names, hashes: Sequence[int], blocks: Sequence[int]) -> list[int]:
    """Enter names, some of which are known; the blocks of those that are not."""
    held, before, copies, fresh = names.held, names.before, names.copies, []
    for name, block in zip(hashes, blocks, strict=True):
        if name in held:
            copies[name] = copies.get(name, 1) + 1
        elif name in before:  # that it was removed in the gap is likelier than that this is a second copy
            held[name] = before.pop(name)
            copies.pop(name, None)
        else:
            held[name] = block
            fresh.append(block)
    return fresh
