"""What the numbers of a publisher's frames say: the next one, one seen before, some lost, or a new process that began anew.

Every frame has a number, from 0 up by 1 for as long as the engine's process lives. A connection delivers them in order, but a publisher
drops what a slow subscriber leaves lying, and frames sent while there was no connection never come. Frames come a second time when a
replay, or the shared backend, brought them first. Not here: what is done about it (stream, subscriber).

A process that began anew is told by a number that went back; or, where its numbers have already passed the last one, by the replay, which
is asked for one frame more than is needed: that frame's content must be what it was. The shared backend may hold frames of a process that
is gone, so of those it brought every one that comes a second time must be what it was.
"""

from __future__ import annotations

from array import array
from enum import Enum

import xxhash

DIGESTS_MAX = 1_024
"""Of the last frames the shared backend brought: those may still come by the connection, which was made a moment before. 8 KB."""


class Verdict(Enum):
    NEXT = "next"
    SEEN = "seen"
    LOST = "lost"
    """Frames before it are missing."""
    RESTARTED = "restarted"


class Numbering:
    """Of one publisher. `judge` first; `passed` once the frame is taken."""

    __slots__ = ("_covered", "_covered_from", "_digest", "_live", "_shared", "_shared_at", "_shared_from", "expected")

    def __init__(self) -> None:
        self.expected: int | None = None
        """The next one's; None while nothing was heard."""
        self._digest = 0
        """Of the last frame's content."""
        self._live = -1
        """The last one that came by this connection itself."""
        self._covered_from, self._covered = 0, 0
        """Frames from one and below the other came by a replay, or from the shared backend, since it was made."""
        self._shared_from, self._shared_at = 0, 0
        self._shared: array[int] = array("Q")
        """Digests of those of them, from `_shared_at` on, that the shared backend brought from `_shared_from` on; 0 where it had none."""

    def connected(self) -> None:
        """By another connection than before: it sends nothing twice."""
        self._live, self._covered_from, self._covered, self._shared = -1, 0, 0, array("Q")

    def restarted(self) -> None:
        """It is another process: it begins at 0."""
        self.expected = 0
        self.connected()

    def replayed(self, first: int) -> None:
        """A replay brought frames from this one on: they may still come."""
        self._covered_from = min(first, self._covered_from) if self._covered else first
        self._covered = self.expected or 0

    def mended(self, first: int, digests_from: int, digests: array[int]) -> None:
        """So did the shared backend; these are the digests of the last ones."""
        self.replayed(first)
        self._shared_from, self._shared_at, self._shared = first, digests_from, digests

    @property
    def digest(self) -> int:
        """Of the last frame that passed."""
        return self._digest

    @property
    def replay_from(self) -> int:
        """The first frame to ask for: the last one again, to see that it is the same process."""
        return max(0, (self.expected or 0) - 1)

    def lost(self, number: int) -> int:
        """Frames missing before this one."""
        return number - (self.expected or 0)

    def judge(self, number: int, payload: bytes) -> Verdict:
        """Of a frame that came by the connection."""
        expected = self.expected or 0
        if number <= self._live:
            same = number == self._live and (number < expected - 1 or xxhash.xxh3_64_intdigest(payload) == self._digest)
            return Verdict.SEEN if same else Verdict.RESTARTED
        if number == expected:
            return Verdict.NEXT
        if number > expected:
            return Verdict.LOST
        return Verdict.SEEN if self._covered_from <= number < self._covered and self._same(number, payload) else Verdict.RESTARTED

    def _same(self, number: int, payload: bytes) -> bool:
        """Whether the shared backend, if it brought this frame, brought the same."""
        place = number - self._shared_at
        if number < self._shared_from or place >= len(self._shared):
            return True
        if place < 0:
            return False  # published long before this connection was made
        digest = self._shared[place]
        return not digest or digest == xxhash.xxh3_64_intdigest(payload)

    def judge_replayed(self, number: int, payload: bytes) -> Verdict:
        """Of a frame that came by a replay."""
        expected = self.expected or 0
        if number == expected:
            return Verdict.NEXT
        if number > expected:
            return Verdict.LOST
        if number == expected - 1 and xxhash.xxh3_64_intdigest(payload) != self._digest:
            return Verdict.RESTARTED
        return Verdict.SEEN

    def passed(self, number: int, payload: bytes) -> None:
        """The frame is taken, whatever was missing before it."""
        self.expected = number + 1
        self._digest = xxhash.xxh3_64_intdigest(payload)

    def came(self, number: int) -> None:
        """The frame came by the connection itself; after `judge`."""
        self._live = number
        if self._shared and number >= self._shared_at + len(self._shared) - 1:
            self._shared = array("Q")
