"""What the simulation asks of a policy, whoever wrote it: the product (product) and the baselines alike (baselines)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

from bench.replay.engine import Gauges
from bench.replay.job import Job

WAITS = -1
"""In the place of a replica: the policy has the request wait, and tells its `Ground` how that ends."""


class RejectedError(Exception):
    """The policy refused a request."""


class RoutingPolicy(Protocol):
    @property
    def scrapes(self) -> bool:
        """Whether it reads metrics, if only to know who is alive: if not, none are taken."""
        ...

    def joined(self, replica: int, now_s: float) -> None:
        """A replica is part of the pool from now on."""

    def left(self, replica: int, now_s: float) -> None: ...

    def asked(self, replica: int, now_s: float) -> object:
        """A scrape of it goes out; what is returned comes back with the answer."""

    def read(self, replica: int, gauges: Gauges | None, asked: object, now_s: float) -> None:
        """The scrape's answer; None: it failed."""

    def route(self, job: Job, now_s: float) -> int:
        """The replica, or WAITS. Raises RejectedError."""
        ...

    def first_token(self, job: Job, now_s: float) -> None: ...

    def finished(self, job: Job, now_s: float) -> None:
        """It was answered in full, or `job.error` says why not: `refused` (no connection), `lost` (it broke off), `status 500`."""


class Timer:
    """A call to come."""

    __slots__ = ("_call",)

    def __init__(self, call: Callable[[float], None]) -> None:
        self._call: Callable[[float], None] | None = call

    def cancel(self) -> None:
        self._call = None

    def fire(self, now_s: float) -> None:
        if self._call is not None:
            self._call(now_s)


class Ground(Protocol):
    """What the simulation does for a policy that has requests wait."""

    def call_at(self, when_s: float, call: Callable[[float], None]) -> Timer: ...

    def placed(self, job: Job, replica: int, now_s: float) -> None: ...

    def refused(self, job: Job, now_s: float) -> None: ...


@runtime_checkable
class Patient(Protocol):
    """A policy that has requests wait."""

    def play_on(self, ground: Ground) -> None:
        """Before anything happens."""
