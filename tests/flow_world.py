"""A pool and its flow control in virtual time: what tests of admission stand on.

Everything of flow control is the real thing; the director is played by `World.route`, the event loop by `Timers`.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from itertools import count
from typing import Any

import pytest

from epp.admission.control import FlowControl
from epp.admission.queues import Waiting
from epp.admission.settings import Settings
from epp.arrival import Arrival
from epp.clock import VirtualClock
from epp.errors import EppError, ModelNotFoundError, NoEndpointsError
from epp.plugins.base import Finished
from epp.plugins.detectors.concurrency import ConcurrencyDetector
from epp.types import Decision, Endpoint, LLMRequest, Snapshot, Usage
from tests.builders import pool_of


class Timers:
    """`call_at` in virtual time: each `run` is one iteration of an event loop."""

    def __init__(self, clock: VirtualClock) -> None:
        self.clock = clock
        self.heap: list[tuple[float, int, list[Callable[[], None]]]] = []
        self.numbers = count()

    def call_at(self, when_s: float, call: Callable[[], None]) -> Cancel:
        calls = [call]
        heapq.heappush(self.heap, (when_s, next(self.numbers), calls))
        return Cancel(calls)

    def run(self) -> int:
        """What is due; what that asks for is for the next time."""
        due = []
        while self.heap and self.heap[0][0] <= self.clock.now_s():
            due += heapq.heappop(self.heap)[2]
        for call in due:
            call()
        return len(due)

    @property
    def pending(self) -> int:
        return sum(bool(calls) for _, _, calls in self.heap)


class Cancel:
    def __init__(self, calls: list[Callable[[], None]]) -> None:
        self.calls = calls

    def cancel(self) -> None:
        self.calls.clear()


class Running:
    """As much of an Exchange as flow control looks at."""

    def __init__(self, request: LLMRequest, endpoint: Endpoint) -> None:
        self.request = request
        self.decision = Decision(endpoint, (), "default")


class Pool:
    """Who may take which request; subsets are names of endpoints, models too."""

    def __init__(self, endpoints: Sequence[Endpoint]) -> None:
        self.endpoints = list(endpoints)
        self.serving: dict[str, list[str]] = {}
        self._kept: dict[tuple[str, ...], Snapshot] = {}

    @property
    def epoch(self) -> object:
        return [e.name for e in self.endpoints], {model: list(names) for model, names in self.serving.items()}

    def of(self, subset: Sequence[str] | None, _pool: str, model: str) -> Snapshot:
        found = [e for e in self.endpoints if subset is None or e.name in subset]
        if model == "unknown":
            raise ModelNotFoundError("no such model")
        if model in self.serving:
            found = [e for e in found if e.name in self.serving[model]]
        if not found:
            raise NoEndpointsError("nobody")
        return self._kept.setdefault(tuple(e.name for e in found), Snapshot.of(found))


class World:
    """A pool, its flow control, and what became of each request."""

    def __init__(self, endpoints: int = 1, *, each: int = 1, detector: Any = None, **settings: Any) -> None:
        self.clock = VirtualClock(1_000.0)
        self.timers = Timers(self.clock)
        self.all = pool_of(*[{}] * endpoints)
        self.pool = Pool(self.all)
        self.detector = detector or ConcurrencyDetector(max_concurrency=each)
        self.woken: list[str] = []
        self.where: dict[str, Endpoint] = {}
        self.evicted: list[LLMRequest] = []
        self.flow = FlowControl(
            Settings(**settings),
            self.pool,
            self.clock,
            self.timers.call_at,
            detector=self.detector,
            evict=self._evict,
        )
        self.waits: dict[str, Waiting] = {}
        self.requests: dict[str, LLMRequest] = {}

    def _evict(self, exchange: object) -> bool:
        self.evicted.append(exchange.request)  # type: ignore[attr-defined]
        return True

    def ask(self, name: str, **fields: Any) -> Waiting | None:
        """A request comes; one that passes is charged at once, as the director does."""
        request = LLMRequest(id=name, path="/", headers=fields.pop("headers", {}))
        subset = fields.pop("subset", None)
        for field, value in fields.items():
            setattr(request, field, value)
        arrival = Arrival(
            request,
            b"",
            subset,
            self.clock.now_s(),
            understood=(None, ""),
            wake=lambda: self.woken.append(name),
            stages=(self.flow,),
        )
        self.requests[name] = request
        wait = self.flow.begin(arrival)
        if wait is None:
            self.route(name)
        else:
            self.waits[name] = wait
        return wait

    def route(self, name: str, endpoint: Endpoint | None = None) -> None:
        chosen = endpoint or min(self.pool.endpoints, key=lambda e: (e.inflight_tokens, e.inflight_requests))
        chosen.inflight_requests += 1
        chosen.inflight_tokens += self.requests[name].prompt_tokens
        self.where[name] = chosen
        self.flow.routed(self.requests[name], Running(self.requests[name], chosen))

    def end(self, name: str, usage: Usage | None = None) -> None:
        endpoint = self.where.pop(name)
        endpoint.inflight_requests -= 1
        endpoint.inflight_tokens -= self.requests[name].prompt_tokens
        self.flow.finished(self.requests[name], endpoint, Finished(200, 0.1, 1.0, usage, 0))

    def run(self, after_s: float = 0.0) -> list[str]:
        """Time passes; then one loop iteration, and those it woke without an error are routed. Who they are."""
        self.clock.advance(after_s)
        before = len(self.woken)
        self.timers.run()
        woken = self.woken[before:]
        for name in woken:
            if self.waits[name].error is None:
                self.route(name)
        return woken

    def outcomes(self) -> dict[str, int]:
        found: dict[str, int] = {}
        for (outcome, _, _), number in self.flow.counts.outcomes.items():
            found[outcome] = found.get(outcome, 0) + number
        return found


def error_of(world: World, name: str, **fields: object) -> EppError:
    """What a request is refused with at once."""
    with pytest.raises(EppError) as raised:
        world.ask(name, **fields)
    return raised.value


def told(error: EppError | None) -> tuple[int, str, bool]:
    """Status, reason, and whether it says when to come back."""
    assert error is not None
    return error.http_status, error.dropped_reason, 1 <= getattr(error, "retry_after_s", 0) <= 60
