"""LoRA on one replica: adapters that are loaded, and the slots they run in."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from bench.replay.job import Job


class Adapters(NamedTuple):
    """How many adapters run at once, and what it takes to load one that is not there."""

    slots: int = 4
    load_s: float = 0.3


class AdapterSlots:
    """As vLLM: an adapter stays loaded until its slot is needed; a request whose adapter finds no slot lets others pass."""

    __slots__ = ("_loaded", "adapters")

    def __init__(self, adapters: Adapters) -> None:
        self.adapters = adapters
        self._loaded: dict[str, None] = {}
        """Least recently used first."""

    def fits(self, adapter: str, running: Iterable[Job]) -> bool:
        in_use = {job.adapter for job in running if job.adapter}
        return not adapter or adapter in in_use or len(in_use) < self.adapters.slots

    def admit(self, adapter: str, running: Iterable[Job]) -> float:
        """Seconds to load it."""
        if not adapter:
            return 0.0
        load_s = 0.0 if adapter in self._loaded else self.adapters.load_s
        self._loaded.pop(adapter, None)
        self._loaded[adapter] = None
        in_use = {job.adapter for job in running}
        for each in list(self._loaded):
            if len(self._loaded) <= self.adapters.slots:
                break
            if each not in in_use:
                del self._loaded[each]
        return load_s

    def wait_s(self, adapter: str, left: Iterable[tuple[Job, int]], step_s: float) -> float:
        """Until it runs here: until one of those that take the slots has nothing to do, and loading it. `left`: decode steps of each job."""
        if not adapter or adapter in self._loaded:
            return 0.0
        last: dict[str, int] = {}
        for job, steps in left:
            if job.adapter:
                last[job.adapter] = max(last.get(job.adapter, 0), steps)
        return (min(last.values()) * step_s if len(last) >= self.adapters.slots else 0.0) + self.adapters.load_s

    def clear(self) -> None:
        self._loaded.clear()
