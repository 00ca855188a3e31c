"""The greedy upper bound: what a picker could do if it saw the engines themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from bench.replay.baselines.base import Baseline, Seen
from bench.replay.engine import NEVER, Engine
from bench.replay.job import Job


class Clairvoyant(Baseline):
    """argmin TTFT + 0.01 * harm.

    TTFT from the true state of the engine: the rest of its step, the prompt work before this one, its own uncached prompt, decoding beside
    it, and waiting for KV room until enough others finish (it knows when they will). Harm: seconds its prompt and its whole answer take
    from each sequence that decodes there now. Greedy: it does not know what comes next.
    """

    harm = 0.01
    """By trial: with 0 or twice as much TTFT is 1 % higher or lower on the conversation trace, and higher where prefixes are hot."""

    def choose(self, job: Job, candidates: Sequence[Seen], matched: Mapping[int, int], now_s: float) -> Seen:
        del matched
        return self.least(candidates, lambda seen: self.cost_s(self.engines[seen.replica], job, now_s))

    def cost_s(self, engine: Engine, job: Job, now_s: float) -> float:
        if not engine.up or engine.failing:
            return NEVER
        ttft_s, own_s = predicted_s(engine, job, now_s)
        profile = engine.profile
        context = job.prompt_tokens + job.output_tokens / 2
        decode_s = job.output_tokens * (profile.sequence_s + context * profile.kv_token_s) / engine.speed
        return ttft_s + self.harm * (own_s + decode_s) * engine.decoding


def predicted_s(engine: Engine, job: Job, now_s: float) -> tuple[float, float]:
    """TTFT if `job` went there now and nobody came after it; and the prompt work of its own in that."""
    assert engine.promises is not None
    profile, cache = engine.profile, engine.cache
    own_tokens, own_pairs = engine.promises.expected(job, cache)
    tokens, pairs = engine.prefill_left()
    tokens += engine.promises.tokens + own_tokens
    pairs += engine.promises.pairs + own_pairs
    overhead_s = engine.overhead_s
    rest_s = engine.step_left_s(now_s) if engine.next_s != NEVER else 0.0
    steps = -(-tokens // max(1, profile.batch_tokens - engine.decoding))
    work_s = (tokens * profile.prefill_token_s + pairs * profile.attention_pair_s) / engine.speed
    own_s = (own_tokens * profile.prefill_token_s + own_pairs * profile.attention_pair_s) / engine.speed
    wait_s = 0.0
    lacking = cache.used + engine.promises.tokens + own_tokens + engine.decoding - cache.capacity
    if lacking > 0:
        for decode_steps, held in engine.finishing():
            lacking -= held
            wait_s = decode_steps * overhead_s
            if lacking <= 0:
                break
        wait_s = max(0.0, wait_s - work_s)
    return rest_s + wait_s + engine.adapter_s(job.adapter) + steps * overhead_s + work_s, own_s
