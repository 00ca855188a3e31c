"""Policies that decide for the cache first and give way to load at a limit: SGLang, AIBrix, Preble."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Mapping, Sequence

from bench.replay.baselines.base import Baseline, Seen
from bench.replay.job import Job, pairs_of
from bench.replay.profiles import Profile


class SglangCacheAware(Baseline):
    """Least n if max - min > 64 and max > 1.5 * min; else the longest match if matched / prompt > 0.3; else least n.

    n = requests in flight. SGLang's router and SMG, cache_aware with the command line's defaults. Its tree is bounded by 2^26 characters a
    worker, taken as 4 to a token. Ties at random.
    """

    indexed = True
    threshold = 0.3
    load_abs = 64
    load_rel = 1.5

    def index_tokens(self, profile: Profile) -> int:
        del profile
        return (1 << 26) // 4

    def choose(self, job: Job, candidates: Sequence[Seen], matched: Mapping[int, int], now_s: float) -> Seen:
        del now_s
        loads = [seen.requests for seen in candidates]
        balanced = max(loads) - min(loads) <= self.load_abs or max(loads) <= self.load_rel * min(loads)
        if balanced and matched:
            longest = max(matched.values())
            if longest > self.threshold * job.prompt_tokens:
                candidates = [seen for seen in candidates if matched.get(seen.replica) == longest]
        return self.least(candidates, lambda seen: seen.requests)


class AibrixPrefixCache(Baseline):
    """Least n if max - min > 16; else by match (longest first) and n the first with n <= mean + 2 sigma; else least n.

    n = requests in flight, counted by the gateway. AIBrix, prefix-cache with its defaults; its index holds 200 000 blocks of 128
    characters in all, 6.4 M tokens.
    """

    indexed = True
    spread_max = 16
    sigmas = 2.0

    def index_tokens(self, profile: Profile) -> int:
        del profile
        return 200_000 * 128 // 4 // max(1, len(self.engines))

    def choose(self, job: Job, candidates: Sequence[Seen], matched: Mapping[int, int], now_s: float) -> Seen:
        del job, now_s
        loads = [seen.requests for seen in candidates]
        if max(loads) - min(loads) <= self.spread_max:
            limit = statistics.fmean(loads) + self.sigmas * statistics.pstdev(loads)
            able = [seen for seen in candidates if seen.requests <= limit]
            if able:
                longest = max(matched.get(seen.replica, 0) for seen in able)
                candidates = [seen for seen in able if matched.get(seen.replica, 0) == longest]
        return self.least(candidates, lambda seen: seen.requests)


class Preble(Baseline):
    """If more of the prompt is cached than not: the least loaded of those with the longest match; else the lowest cost.

    Load of a replica = seconds of work sent to it in the last 3 minutes: prefill of what was uncached, and the median reply's decoding.
    Cost = load + this prompt's uncached prefill + what its blocks would evict, times the share of prompts that hit. When the chosen
    one's load is above 1.5 times the least, by more than computing the whole prompt takes, the least loaded takes it, and so holds the
    prefix too. Preble (ICLR'25), E2; with each replica's profile in place of its fitted latencies, and its per-node bookkeeping folded
    into sums per replica.
    """

    indexed = True
    window_s = 180.0
    imbalance_max = 1.5

    def __init__(self) -> None:
        self._window: deque[tuple[float, int, float, int]] = deque()
        """(time, replica, seconds of work, uncached tokens)."""
        self._load_s: dict[int, float] = {}
        self._tokens: dict[int, int] = {}
        self._prompts = 0
        self._hits = 0
        self._outputs: deque[int] = deque(maxlen=500)

    def choose(self, job: Job, candidates: Sequence[Seen], matched: Mapping[int, int], now_s: float) -> Seen:
        window = self._window
        while window and window[0][0] < now_s - self.window_s:
            _, replica, work_s, tokens = window.popleft()
            self._load_s[replica] -= work_s
            self._tokens[replica] -= tokens
        load_s = self._load_s

        def load(seen: Seen) -> float:
            return load_s.get(seen.replica, 0.0)

        def cost(seen: Seen) -> float:
            cached = matched.get(seen.replica, 0)
            profile = self.profile_of(seen.replica)
            over = min(job.prompt_tokens - cached, self._tokens.get(seen.replica, 0) + job.prompt_tokens - cached - profile.kv_tokens)
            hit_share = self._hits / self._prompts if self._prompts else 0.0
            evicted_s = max(0, over) * profile.prefill_token_s * hit_share
            return load(seen) + prefill_s(profile, cached, job.prompt_tokens - cached) + evicted_s

        self._prompts += 1
        longest = max(matched.values(), default=0)
        self._hits += longest > 0
        if longest * 2 <= job.prompt_tokens:
            return self.least(candidates, cost)
        chosen = self.least([seen for seen in candidates if matched.get(seen.replica) == longest], load)
        idlest = self.least(candidates, load)
        whole_s = prefill_s(self.profile_of(idlest.replica), 0, job.prompt_tokens)
        return idlest if load(chosen) > self.imbalance_max * load(idlest) + whole_s else chosen

    def sent(self, job: Job, seen: Seen, uncached: int, now_s: float) -> None:
        output = statistics.median(self._outputs) if self._outputs else 0.0
        profile = self.profile_of(seen.replica)
        work_s = prefill_s(profile, job.prompt_tokens - uncached, uncached) + output * profile.step_base_s
        self._window.append((now_s, seen.replica, work_s, uncached))
        self._load_s[seen.replica] = self._load_s.get(seen.replica, 0.0) + work_s
        self._tokens[seen.replica] = self._tokens.get(seen.replica, 0) + uncached

    def over(self, job: Job, seen: Seen) -> None:
        del seen
        self._outputs.append(job.output_tokens)


def prefill_s(profile: Profile, before: int, tokens: int) -> float:
    return tokens * profile.prefill_token_s + pairs_of(before, tokens) * profile.attention_pair_s
