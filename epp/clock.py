"""Time, handed in: production reads the monotonic clock, tests move a virtual one. Nothing else in `epp` asks what time it is."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    def now_s(self) -> float:
        """Monotonic seconds; only differences mean anything."""
        ...


class MonotonicClock:
    """The operating system's monotonic clock."""

    def __init__(self) -> None:
        self.now_s = time.monotonic  # bound once: called several times per request


class VirtualClock:
    """A clock that moves only when told: tests and simulations."""

    def __init__(self, start_s: float = 0.0) -> None:
        self._now_s = start_s

    def now_s(self) -> float:
        return self._now_s

    def advance(self, seconds: float) -> None:
        self._now_s += seconds
