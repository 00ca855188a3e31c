"""What the simulation asks of a policy, whoever wrote it: the product (product) and the baselines alike (baselines)."""

from __future__ import annotations

from typing import Protocol

from bench.replay.engine import Gauges
from bench.replay.job import Job


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
        """The replica. Raises RejectedError."""
        ...

    def first_token(self, job: Job, now_s: float) -> None: ...

    def finished(self, job: Job, now_s: float) -> None:
        """It was answered in full, or `job.error` says why not: `refused` (no connection), `lost` (it broke off), `status 500`."""
