"""Policies that look at no prompt: random, round robin, least request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from bench.replay.baselines.base import Baseline, Seen
from bench.replay.job import Job


class RandomChoice(Baseline):
    """Uniformly at random."""

    def choose(self, job: Job, candidates: Sequence[Seen], matched: Mapping[int, int], now_s: float) -> Seen:
        del job, matched, now_s
        return self.rng.choice(candidates)


class RoundRobin(Baseline):
    """One after the other. Envoy's ROUND_ROBIN, a Kubernetes Service through IPVS."""

    _turn = -1

    def choose(self, job: Job, candidates: Sequence[Seen], matched: Mapping[int, int], now_s: float) -> Seen:
        del job, matched, now_s
        self._turn += 1
        return candidates[self._turn % len(candidates)]


class LeastRequest(Baseline):
    """argmin n, n = requests in flight. Of all replicas, where Envoy's LEAST_REQUEST looks at two."""

    def choose(self, job: Job, candidates: Sequence[Seen], matched: Mapping[int, int], now_s: float) -> Seen:
        del job, matched, now_s
        return self.least(candidates, lambda seen: seen.requests)
