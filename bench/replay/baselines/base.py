"""What a baseline sees and how it is driven. A baseline is one small class with `choose`; everything else is kept for it here."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

from bench.replay.engine import Engine, Gauges
from bench.replay.index import ApproximateIndex
from bench.replay.job import Job
from bench.replay.policy import RejectedError
from bench.replay.profiles import Profile


class Seen:
    """One replica, as the picker sees it."""

    __slots__ = ("gauges", "healthy", "prefill_tokens", "replica", "requests")

    def __init__(self, replica: int) -> None:
        self.replica = replica
        self.requests = 0
        """In flight: sent and not ended."""
        self.prefill_tokens = 0
        """Uncached prompt tokens of those whose first token has not come back; uncached by the index's word when they were sent."""
        self.gauges = Gauges(0, 0, 0.0)
        """The last reading."""
        self.healthy = True
        """Its last scrape was answered."""


class Baseline:
    """Base of every policy here. `choose` is the policy."""

    scrapes: ClassVar[bool] = True
    """All of them are scraped, if only to know which replicas are alive."""
    indexed: ClassVar[bool] = False
    """Whether it looks at prefixes."""

    def index_tokens(self, profile: Profile) -> int:
        """What the index remembers of each replica; the engine's own cache unless the policy publishes something else."""
        return profile.kv_tokens

    def bind(self, profile: Profile, engines: Sequence[Engine], rng: random.Random) -> None:
        """`engines`: their state is for the clairvoyant alone, their profiles are known to all; `profile`: where there are none."""
        self.profile = profile
        self.engines = engines
        self.rng = rng
        profiles = [engine.profile for engine in engines] or [profile]
        self.index = ApproximateIndex(*[self.index_tokens(each) for each in profiles])
        self.pool: dict[int, Seen] = {}
        self._candidates: list[Seen] = []
        self._replicas: list[int] = []
        self._charged: dict[Job, tuple[Seen, int]] = {}

    def profile_of(self, replica: int) -> Profile:
        return self.engines[replica].profile if self.engines else self.profile

    def choose(self, job: Job, candidates: Sequence[Seen], matched: Mapping[int, int], now_s: float) -> Seen:
        """`matched`: replica -> prompt tokens it should have cached; empty for policies that are not `indexed`."""
        raise NotImplementedError

    def sent(self, job: Job, seen: Seen, uncached: int, now_s: float) -> None:
        """It was chosen."""

    def over(self, job: Job, seen: Seen) -> None:
        """The request ended."""

    # the simulation's calls

    def joined(self, replica: int, now_s: float) -> None:
        del now_s
        self.pool[replica] = Seen(replica)
        self._refresh()

    def left(self, replica: int, now_s: float) -> None:
        del now_s
        del self.pool[replica]
        self.index.forget(replica)
        self._refresh()

    def asked(self, replica: int, now_s: float) -> object:
        del replica, now_s
        return None

    def read(self, replica: int, gauges: Gauges | None, asked: object, now_s: float) -> None:
        del asked, now_s
        seen = self.pool[replica]
        if gauges is not None:
            seen.gauges = gauges
        if seen.healthy is not (gauges is not None):
            seen.healthy = gauges is not None
            self._refresh()

    def route(self, job: Job, now_s: float) -> int:
        if not self._candidates:
            raise RejectedError
        matched = self.index.matched(job.blocks, self._replicas) if self.indexed else {}
        seen = self.choose(job, self._candidates, matched, now_s)
        uncached = max(1, job.prompt_tokens - matched.get(seen.replica, 0))
        seen.requests += 1
        seen.prefill_tokens += uncached
        self._charged[job] = seen, uncached
        if self.indexed:
            self.index.record(seen.replica, job.blocks)
        self.sent(job, seen, uncached, now_s)
        return seen.replica

    def first_token(self, job: Job, now_s: float) -> None:
        del now_s
        seen, uncached = self._charged[job]
        seen.prefill_tokens -= uncached
        self._charged[job] = seen, 0

    def finished(self, job: Job, now_s: float) -> None:
        del now_s
        seen, uncached = self._charged.pop(job)
        seen.prefill_tokens -= uncached
        seen.requests -= 1
        self.over(job, seen)

    def least(self, candidates: Sequence[Seen], cost: Callable[[Seen], float]) -> Seen:
        """The cheapest; one of them at random where several are."""
        costs = [cost(seen) for seen in candidates]
        lowest = min(costs)
        if costs.count(lowest) == 1:
            return candidates[costs.index(lowest)]
        return self.rng.choice([seen for seen, each in zip(candidates, costs, strict=True) if each == lowest])

    def _refresh(self) -> None:
        everyone = [self.pool[replica] for replica in sorted(self.pool)]
        self._candidates = [seen for seen in everyone if seen.healthy] or everyone
        self._replicas = [seen.replica for seen in self._candidates]
