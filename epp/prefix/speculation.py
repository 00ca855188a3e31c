"""What endpoints are about to have: the blocks of prompts sent a moment ago.

Engines publish a block when it is computed. Until then the next turn of the same conversation, or the rest of a burst that shares a prompt,
would be sent elsewhere. Such a block counts for `ttl_s`, or until an event says it is gone; once stored it counts anyway. Not here: look-ups.

Bounded by `blocks_max`, counting a block as often as it was sent within the time; what is more is not taken. What is over is taken out a
little with every prompt added, and in slices by `expire`, so no call stalls the loop. 0.4 µs a block, half of it when its time is over.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

from epp.prefix.masks import Masks
from epp.prefix.views import View


class _Sent(NamedTuple):
    """Blocks of one prompt."""

    until_s: float
    number: int
    column: int
    speculative: dict[int, int]
    """The view's at that time: a clear gives the view another."""
    blocks: list[int]


class Speculation:
    """See the module. `blocks` are counted as above."""

    def __init__(self, masks: Masks, ttl_s: float, blocks_max: int) -> None:
        self.blocks = 0
        self._masks = masks
        self._ttl_s = ttl_s
        self._blocks_max = blocks_max
        self._sent: deque[_Sent] = deque()
        self._sent_total = 0

    @property
    def active(self) -> bool:
        return self._ttl_s > 0

    def add(self, view: View, blocks: list[int], now_s: float) -> int:
        """Count these as cached there; returns how many were not taken."""
        masks, bit = self._masks, 1 << view.column
        if not blocks:
            return 0
        self.expire(now_s, 2 * len(blocks))
        if self.blocks + len(blocks) > self._blocks_max:
            return len(blocks)
        self._sent_total += 1
        self.blocks += len(blocks)
        masks.add(blocks, bit)
        view.speculative.update(dict.fromkeys(blocks, self._sent_total))
        self._sent.append(_Sent(now_s + self._ttl_s, self._sent_total, view.column, view.speculative, blocks))
        return 0

    def gone(self, view: View, block: int) -> None:
        """An event says so."""
        if view.speculative.pop(block, None) is not None:
            self._masks.clear(block, 1 << view.column)

    def expire(self, now_s: float, budget: int) -> int:
        """Take out up to `budget` blocks whose time is over; returns how many."""
        expired = 0
        while self._sent and self._sent[0].until_s <= now_s and expired < budget:
            sent = self._sent[0]
            speculative, number, bit = sent.speculative, sent.number, 1 << sent.column
            leaving = sent.blocks[expired - budget :]
            del sent.blocks[expired - budget :]
            for block in leaving:
                if speculative.get(block) == number:  # neither sent again since, nor gone
                    del speculative[block]
                    self._masks.clear(block, bit)
            expired += len(leaving)
            if not sent.blocks:
                self._sent.popleft()
        self.blocks -= expired
        return expired
