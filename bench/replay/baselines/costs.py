"""Policies that charge uncached prompt tokens when they decide and release them at the first token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from bench.replay.baselines.base import Baseline, Seen
from bench.replay.job import BLOCK_TOKENS, Job


class LeastPrefillWorkLeft(Baseline):
    """argmin Q + u, then n.

    Q = uncached prompt tokens in flight until their first token, u = this prompt's uncached tokens there, n = requests in flight.
    """

    indexed = True

    def choose(self, job: Job, candidates: Sequence[Seen], matched: Mapping[int, int], now_s: float) -> Seen:
        del now_s
        prompt = job.prompt_tokens
        return self.least(
            candidates, lambda seen: seen.prefill_tokens + max(1, prompt - matched.get(seen.replica, 0)) + seen.requests * 1e-6
        )


class LMetric(Baseline):
    """argmin (Q + u) * (n + 1). LMetric, OSDI'26 (arXiv 2603.15202); n + 1 because an idle replica would cost nothing at n = 0."""

    indexed = True

    def choose(self, job: Job, candidates: Sequence[Seen], matched: Mapping[int, int], now_s: float) -> Seen:
        del now_s
        prompt = job.prompt_tokens
        return self.least(
            candidates, lambda seen: (seen.prefill_tokens + max(1, prompt - matched.get(seen.replica, 0))) * (seen.requests + 1.0)
        )


class Dynamo(Baseline):
    """argmin s * (Q + u) / b + blocks; s = 1.

    Q and u as above; blocks = different prompt blocks of the requests in flight there, this one's included; b = block size. Ties at random.
    NVIDIA Dynamo's KV router with its defaults (prefill_load_scale 1, overlap credit 1, temperature 0, output blocks not tracked).
    """

    indexed = True
    scale = 1.0

    def __init__(self) -> None:
        self._active: dict[int, dict[int, int]] = {}
        """Replica -> block -> requests in flight that have it."""
        self._partial: dict[int, int] = {}
        """Replica -> blocks only partly filled, which nobody shares."""

    def choose(self, job: Job, candidates: Sequence[Seen], matched: Mapping[int, int], now_s: float) -> Seen:
        del now_s
        prompt = job.prompt_tokens

        def cost(seen: Seen) -> float:
            active = self._active.setdefault(seen.replica, {})
            new = sum(block not in active for block in job.blocks)
            blocks = len(active) + new + self._partial.get(seen.replica, 0)
            return self.scale * (seen.prefill_tokens + prompt - matched.get(seen.replica, 0)) / BLOCK_TOKENS + blocks

        return self.least(candidates, cost)

    def sent(self, job: Job, seen: Seen, uncached: int, now_s: float) -> None:
        del uncached, now_s
        active = self._active.setdefault(seen.replica, {})
        for block in job.blocks:
            active[block] = active.get(block, 0) + 1
        self._partial[seen.replica] = self._partial.get(seen.replica, 0) + len(job.offered) - len(job.blocks)

    def over(self, job: Job, seen: Seen) -> None:
        active = self._active[seen.replica]
        for block in job.blocks:
            if active[block] == 1:
                del active[block]
            else:
                active[block] -= 1
        self._partial[seen.replica] -= len(job.offered) - len(job.blocks)


class Dynamo4(Dynamo):
    """Dynamo with prefill_load_scale 4, which its own offline replay finds better on the conversation trace."""

    scale = 4.0
