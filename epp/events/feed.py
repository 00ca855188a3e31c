"""Turns of reading: everything that arrived is worked off a little at a time, publisher by publisher, between requests.

One loop for all publishers. A turn goes on for `TURN_S`, one step of one publisher after the other (a frame taken, or at most
`PIECE_BLOCKS` blocks of one applied), then everything else on the event loop has its turn: a large batch stalls no decision, and a
publisher that floods delays no other. Not here: what a step does. Cost: 1 µs a step.

Not bounded by it: reading one event of a frame, 10 ms a megabyte; an event has the tokens of one step of its engine, some 10 000.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Protocol

from epp.clock import Clock

TURN_S = 0.5e-3
PIECE_BLOCKS = 500
"""0.3 ms at most."""


class Work(Protocol):
    def step(self) -> bool:
        """Do a little; False if there is nothing to do until it is offered again."""
        ...


class Feed:
    """`run` it once; `offer` work whenever there may be some."""

    def __init__(self, clock: Clock, *, turn_s: float = TURN_S) -> None:
        self._clock = clock
        self._turn_s = turn_s
        self._waiting: deque[Work] = deque()
        self._known: set[int] = set()
        """Identities of those in `_waiting`."""
        self._news = asyncio.Event()

    def __len__(self) -> int:
        """Publishers with something to be read."""
        return len(self._waiting)

    def offer(self, work: Work) -> None:
        if id(work) not in self._known:
            self._known.add(id(work))
            self._waiting.append(work)
            self._news.set()

    def once(self) -> bool:
        """One turn. True if there is more to do."""
        now_s, waiting = self._clock.now_s, self._waiting
        end_s = now_s() + self._turn_s
        while waiting:
            work = waiting.popleft()
            if work.step():
                waiting.append(work)
            else:
                self._known.discard(id(work))
            if now_s() >= end_s:
                break
        return bool(waiting)

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await self._news.wait()
            self._news.clear()
            while self.once():  # noqa: ASYNC110 - not waiting for anything: others have their turn
                await asyncio.sleep(0)
