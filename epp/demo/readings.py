"""What the engines and the picker say of themselves, out of their `/metrics` pages; and Linux of this process. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from epp.engines.exposition import find_all, labels_of

_ATTEMPTS = b"llm_d_epp_scheduler_attempts_total"


class EngineReading(NamedTuple):
    """One look at an engine; counters since it started."""

    running: int = 0
    waiting: int = 0
    kv_usage: float = 0.0
    finished: int = 0
    queried_tokens: int = 0
    hit_tokens: int = 0

    @property
    def received(self) -> int:
        return self.finished + self.running + self.waiting

    def since(self, start: EngineReading) -> EngineReading:
        """The same, its counters from `start` on."""
        return self._replace(
            finished=self.finished - start.finished,
            queried_tokens=self.queried_tokens - start.queried_tokens,
            hit_tokens=self.hit_tokens - start.hit_tokens,
        )


def engine_reading(page: bytes) -> EngineReading:
    return EngineReading(
        running=int(_sum(page, b"vllm:num_requests_running")),
        waiting=int(_sum(page, b"vllm:num_requests_waiting")),
        kv_usage=_sum(page, b"vllm:kv_cache_usage_perc"),
        finished=int(_sum(page, b"vllm:request_success_total")),
        queried_tokens=int(_sum(page, b"vllm:prefix_cache_queries_total")),
        hit_tokens=int(_sum(page, b"vllm:prefix_cache_hits_total")),
    )


def picks(page: bytes) -> dict[str, int]:
    """Endpoint name -> how often the picker chose it, from the picker's page."""
    found: dict[str, int] = {}
    for raw, value in find_all(page, _ATTEMPTS):
        labels = labels_of(raw)
        if labels.get("status") == "success" and "endpoint_name" in labels:
            found[labels["endpoint_name"]] = found.get(labels["endpoint_name"], 0) + int(value)
    return found


def picks_since(now: Mapping[str, int], start: Mapping[str, int]) -> dict[str, int]:
    return {name: count - start.get(name, 0) for name, count in now.items()}


def hit_rate(readings: Sequence[EngineReading]) -> float:
    """Of all prompt tokens; NaN before the first."""
    queried = sum(reading.queried_tokens for reading in readings)
    return sum(reading.hit_tokens for reading in readings) / queried if queried else math.nan


def _sum(page: bytes, family: bytes) -> float:
    return sum(value for _, value in find_all(page, family) if math.isfinite(value))


class CpuTime(NamedTuple):
    """Of a process since it started."""

    used_s: float
    waited_s: float
    """Ready to run, and others had the CPUs."""

    def crowded(self, start: CpuTime) -> float:
        """How many times as long as it ran it waited, since `start`."""
        return (self.waited_s - start.waited_s) / max(1e-9, self.used_s - start.used_s)


def cpu_time(schedstat: str) -> CpuTime:
    """From the text of a `/proc/PID/schedstat`. Raises ValueError."""
    used_ns, waited_ns, _slices = map(int, schedstat.split())
    return CpuTime(used_ns / 1e9, waited_ns / 1e9)
