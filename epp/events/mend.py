"""Frames that another picker heard: read from the shared backend and applied, as far as they are surely this engine process's.

They are where nothing is known here yet, or where the last frame known here is there with the same content. What is there of another process
is taken only if the frame that waits here is among it: then the process known here is gone. So garbage, an older process, or an engine that
took a gone one's address brings at worst what the next live frame refutes (numbering). A frame is read whole before it is taken: one that
can't be read ends the reading. Frames are applied a turn at a time like all others.

Not here: when to read (subscriber), where from (valkey).
"""

from __future__ import annotations

import asyncio
from array import array
from collections import deque

import xxhash

from epp.events.feed import Feed
from epp.events.numbering import DIGESTS_MAX, Verdict
from epp.events.shared import Page, Shared
from epp.events.stream import Stream
from epp.events.valkey import Backend
from epp.prefix.kv_events import KvEventError, decode

PAGES_MAX = 1_000
"""Of one reading."""
Held = tuple[int, bytes]


class Mend:
    """One reading. The stream is nobody else's meanwhile."""

    def __init__(self, stream: Stream, shared: Shared, backend: Backend, feed: Feed, *, holes: bool) -> None:
        """`holes`: take frames after missing ones too."""
        self.frames = 0
        """Taken."""
        self.hole = False
        """There are more, after missing ones."""
        self._stream = stream
        self._shared = shared
        self._backend = backend
        self._feed = feed
        self._holes = holes
        self._page: deque[tuple[int, bytes]] = deque()
        self._ended = False
        self._epoch = 0
        self._first: int | None = None
        self._digests_from = 0
        self._digests: array[int] = array("Q")
        self._done = asyncio.Event()

    async def run(self, held: Held | None) -> None:
        """`held`: a frame of the process we are connected to."""
        numbering, shared = self._stream.numbering, self._shared
        first = numbering.replay_from
        page = await self._backend.read(shared, first)
        if page is None or not page.epoch:
            return
        there = await self._there(page, held)
        if there is False:
            return
        if numbering.expected and not self._continues(page, first):
            if not there:
                return
            self._stream.restarted()
            page = await self._backend.read(shared, 0)
            if page is None or not page.epoch:
                return
        try:
            await self._take(page)
        finally:
            self._ended = True
            self._page.clear()
            self._backend.frames_read += self.frames
            if self._first is not None:
                numbering.mended(self._first, self._digests_from, self._digests)

    async def _there(self, page: Page, held: Held | None) -> bool | None:
        """Whether the frame that waits here is there, with its content; None: no frame has its number."""
        if held is None or page.last < held[0]:
            return None
        found = await self._backend.read(self._shared, held[0], 1)
        if found is None or found.epoch != page.epoch or not found.frames or found.frames[0][0] != held[0]:
            return None
        return found.frames[0][1] == held[1]

    def _continues(self, page: Page, first: int) -> bool:
        """Whether it is the process that sent the last frame we know."""
        if page.frames and page.frames[0][0] == first:
            return xxhash.xxh3_64_intdigest(page.frames[0][1]) == self._stream.numbering.digest
        return page.epoch == self._shared.epoch

    async def _take(self, page: Page) -> None:
        epoch = self._epoch = page.epoch
        for _ in range(PAGES_MAX):
            self._page.extend(page.frames)
            self._done.clear()
            self._feed.offer(self)
            await self._done.wait()
            if self._ended or not page.frames or page.frames[-1][0] >= page.last:
                return
            found = await self._backend.read(self._shared, page.frames[-1][0] + 1)
            if found is None or found.epoch != epoch:
                return
            page = found

    def step(self) -> bool:
        """A `Work` of the feed."""
        if self._stream.step():
            return True
        if not self._page or self._ended:
            self._done.set()
            return False
        number, payload = self._page.popleft()
        numbering = self._stream.numbering
        verdict = numbering.judge_replayed(number, payload)
        if verdict is Verdict.SEEN:
            return True
        if verdict is Verdict.RESTARTED or (verdict is Verdict.LOST and not self._holes) or not self._readable(payload):
            self._ended = True
            self.hole = verdict is Verdict.LOST
            return True
        if verdict is Verdict.LOST:
            self._stream.lost(numbering.lost(number), "no picker has heard them")
        self._stream.take(number, payload, share=False)
        self._shared.met(self._epoch)
        self._note(number, numbering.digest)
        return True

    def _readable(self, payload: bytes) -> bool:
        try:
            for _ in decode(payload):
                pass
        except KvEventError:
            self._backend.frames_bad += 1
            return False
        return True

    def _note(self, number: int, digest: int) -> None:
        digests = self._digests
        if self._first is None:
            self._first = self._digests_from = number
        hole = number - self._digests_from - len(digests)
        if hole > DIGESTS_MAX or len(digests) >= 2 * DIGESTS_MAX:
            del digests[: max(0, len(digests) - DIGESTS_MAX) if hole <= DIGESTS_MAX else len(digests)]
            self._digests_from = number - hole - len(digests) if hole <= DIGESTS_MAX else number
            hole = number - self._digests_from - len(digests)
        digests.extend([0] * hole)
        digests.append(digest)
        self.frames += 1
