"""The reference picker's two policies, as published: its built-in default on scraped metrics, and its guides' optimized baseline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from bench.replay.baselines.base import Baseline, Seen
from bench.replay.job import Job
from bench.replay.profiles import Profile

INDEX_BLOCKS_MAX = 31_250
INDEX_BLOCK_TOKENS = 64
ENGINE_BLOCK_TOKENS = 16


def index_tokens(profile: Profile) -> int:
    """What the reference picker's approximate index remembers of each replica, with its defaults."""
    return min(INDEX_BLOCKS_MAX, profile.kv_tokens // ENGINE_BLOCK_TOKENS) * INDEX_BLOCK_TOKENS


class LlmDDefault(Baseline):
    """argmax 2 * queue + 2 * (1 - kv) + 3 * matched / prompt; queue = (max - q) / (max - min) over the candidates, 1 if all are equal.

    q (waiting requests) and kv (usage) as last scraped, nothing added. Ties at random (max-score-picker). The index holds as many
    blocks as the engine says it has of 16 tokens (autoTune), at most 31 250, but its own blocks are of 64: four times the engine's cache.
    llm-d-router, pkg/epp/config/loader/defaults.go, the scorers of those names and approx-prefix-cache-producer.
    """

    indexed = True

    def index_tokens(self, profile: Profile) -> int:
        return index_tokens(profile)

    def choose(self, job: Job, candidates: Sequence[Seen], matched: Mapping[int, int], now_s: float) -> Seen:
        del now_s
        queues = [seen.gauges.waiting for seen in candidates]
        low, high = min(queues), max(queues)
        spread = high - low

        def cost(seen: Seen) -> float:
            queue = (high - seen.gauges.waiting) / spread if spread else 1.0
            return -(2 * queue + 2 * (1 - seen.gauges.kv_usage) + 3 * matched.get(seen.replica, 0) / job.prompt_tokens)

        return self.least(candidates, cost)


class LlmDOptimized(Baseline):
    """Of those with matched / prompt >= 0.80, else of all: argmin Q + u.

    Q = uncached prompt tokens in flight until their first token, u = this prompt's uncached tokens. All stay if waiting at the best of
    those costs more than 18 s over the best of the others, at 15 928 tokens a second. llm-d-router, prefix-cache-affinity-filter and
    token-load-scorer with their defaults (the scorer's limit of 4 194 304 tokens included); the index as above.
    """

    indexed = True
    threshold = 0.80
    penalty_s = 18.0
    tokens_per_s = 15_928.0
    tokens_max = 4_194_304

    def index_tokens(self, profile: Profile) -> int:
        return index_tokens(profile)

    def choose(self, job: Job, candidates: Sequence[Seen], matched: Mapping[int, int], now_s: float) -> Seen:
        del now_s
        prompt = job.prompt_tokens

        def tokens(seen: Seen) -> float:
            return min(self.tokens_max, seen.prefill_tokens + prompt - matched.get(seen.replica, 0))

        sticky = [seen for seen in candidates if matched.get(seen.replica, 0) >= self.threshold * prompt]
        if sticky and len(sticky) < len(candidates):
            others = [seen for seen in candidates if seen not in sticky]
            if (min(map(tokens, sticky)) - min(map(tokens, others))) / self.tokens_per_s <= self.penalty_s:
                candidates = sticky
        return self.least(candidates, tokens)
