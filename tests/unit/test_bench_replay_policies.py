"""The baselines decide as their formulas say, on pools small enough to work out by hand."""

import dataclasses
import random

import pytest

from bench.replay.baselines import BASELINES
from bench.replay.baselines.affinity import AibrixPrefixCache, Preble, SglangCacheAware
from bench.replay.baselines.clairvoyant import Clairvoyant, predicted_s
from bench.replay.baselines.costs import Dynamo, Dynamo4, LeastPrefillWorkLeft, LMetric
from bench.replay.baselines.llmd import LlmDDefault, LlmDOptimized, index_tokens
from bench.replay.baselines.load import LeastRequest, RandomChoice, RoundRobin
from bench.replay.engine import NEVER, Engine, Gauges
from bench.replay.index import ApproximateIndex
from bench.replay.job import BLOCK_TOKENS, Job
from bench.replay.policy import RejectedError
from bench.replay.profiles import profile_of

PROFILE = profile_of("qwen3-32b-2xh100")


def pool(policy, replicas=3, *, engines=()):
    policy.bind(PROFILE, engines, random.Random(1))
    for replica in range(replicas):
        policy.joined(replica, 0.0)
    return policy


def job(prompt=1_024, blocks=(), output=10, index=0, at_s=0.0):
    return Job(index, at_s, prompt, output, blocks or tuple(range(10_000, 10_000 + -(-prompt // BLOCK_TOKENS))))


def read(policy, replica, waiting=0, running=0, kv_usage=0.0):
    policy.read(replica, Gauges(waiting, running, kv_usage), None, 0.0)


def holds(policy, replica, blocks):
    policy.index.record(replica, blocks)


def test_every_baseline_says_its_formula():
    assert all(policy.__doc__ for policy in BASELINES.values())


def test_round_robin_goes_round():
    policy = pool(RoundRobin())
    assert [policy.route(job(), 0.0) for _ in range(7)] == [0, 1, 2, 0, 1, 2, 0]


def test_random_is_everywhere():
    policy = pool(RandomChoice())
    picks = [policy.route(job(), 0.0) for _ in range(300)]
    assert all(70 < picks.count(replica) < 130 for replica in range(3))


def test_least_request_counts_until_the_end():
    policy = pool(LeastRequest(), 2)
    first = job(index=1)
    chosen = policy.route(first, 0.0)
    assert policy.route(job(), 0.0) == 1 - chosen
    policy.first_token(first, 1.0)
    policy.finished(first, 2.0)
    assert policy.route(job(), 3.0) == chosen


@pytest.mark.parametrize(
    ("states", "held", "chosen"),
    [
        # queue 2*(3-q)/3, kv 2*(1-k), prefix 3*m
        ([(0, 0.5), (3, 0.0), (3, 0.0)], {}, 0),  # 2+1 against 0+2
        ([(0, 0.9), (1, 0.2), (3, 0.0)], {}, 1),  # 2+0.2, 1.33+1.6, 0+2
        ([(0, 0.5), (0, 0.5), (3, 0.4)], {2: 1}, 0),  # 3.0, 3.0, 0+1.2+1.5: a tie, at random between 0 and 1
        ([(0, 0.5), (3, 0.4), (3, 0.4)], {1: 2}, 1),  # a whole hit beats any queue: 3.0 against 0+1.2+3
        ([(7, 0.5), (7, 0.5), (7, 0.4)], {}, 2),  # equal queues count 1 for all
    ],
)
def test_llm_d_weighs_what_was_scraped(states, held, chosen):
    policy = pool(LlmDDefault())
    for replica, (waiting, kv_usage) in enumerate(states):
        read(policy, replica, waiting, 5, kv_usage)
    for replica, count in held.items():
        holds(policy, replica, (1, 2)[:count])
    picked = policy.route(job(blocks=(1, 2)), 0.0)
    assert picked == chosen or states[picked] == states[chosen]


def test_llm_d_does_not_see_what_it_sent():
    policy = pool(LlmDDefault(), 2)
    read(policy, 0, 0, 0, 0.1)
    read(policy, 1, 0, 0, 0.2)
    assert [policy.route(job(blocks=(number, number + 1)), 0.0) for number in range(100, 120, 2)] == [0] * 10


def test_llm_d_index_is_four_times_the_engines_cache():
    assert index_tokens(PROFILE) == pytest.approx(4 * PROFILE.kv_tokens, rel=0.001)
    assert index_tokens(dataclasses.replace(PROFILE, kv_tokens=10**7)) == 2_000_000


def test_llm_d_optimized_sticks_until_the_wait_costs_too_much():
    policy = pool(LlmDOptimized(), 2)
    holds(policy, 1, tuple(range(10)))
    assert policy.route(job(5_120, (*tuple(range(8)), 50, 51)), 0.0) == 1  # 80 % of it
    policy.pool[1].prefill_tokens = 5_000
    assert policy.route(job(5_120, (*tuple(range(7)), 60, 61, 62)), 0.0) == 0  # 70 %: 5000 and 1536 against 5120
    policy.pool[1].prefill_tokens = 18 * 15_928 + 1_000
    policy.pool[0].prefill_tokens = 0
    assert policy.route(job(5_120, tuple(range(10))), 0.0) == 1  # 18 s and 1000 tokens of queue, against computing 5120
    policy.pool[1].prefill_tokens += 5_000
    assert policy.route(job(5_120, tuple(range(10))), 0.0) == 0


def test_lpwl_takes_the_least_work_then_the_fewest_requests():
    policy = pool(LeastPrefillWorkLeft())
    holds(policy, 2, (1, 2))
    assert policy.route(job(2_048, (1, 2, 3, 4), index=1), 0.0) == 2  # 1024 against 2048
    assert policy.route(job(2_048, (1, 2, 30, 40), index=2), 0.0) in {0, 1}  # 1024 + 1024 there: a tie but for the requests
    assert policy.pool[2].prefill_tokens == 1_024


def test_lpwl_releases_at_the_first_token():
    policy = pool(LeastPrefillWorkLeft(), 1)
    sent = job(2_048, (1, 2, 3, 4))
    policy.route(sent, 0.0)
    assert policy.pool[0].prefill_tokens == 2_048
    policy.first_token(sent, 1.0)
    assert policy.pool[0].prefill_tokens == 0
    policy.finished(sent, 2.0)
    assert (policy.pool[0].prefill_tokens, policy.pool[0].requests) == (0, 0)


def test_lmetric_multiplies_work_and_batch():
    policy = pool(LMetric(), 2)
    policy.pool[0].requests, policy.pool[0].prefill_tokens = 3, 0
    policy.pool[1].requests, policy.pool[1].prefill_tokens = 1, 1_500
    assert policy.route(job(1_024), 0.0) == 0  # 1024 * 4 against 2524 * 2
    policy.pool[0].requests = 4
    assert policy.route(job(1_024), 0.0) == 1  # 1024 * 5 or more


@pytest.mark.parametrize(("policy", "chosen"), [(Dynamo(), 1), (Dynamo4(), 0)])
def test_dynamo_counts_a_shared_block_once(policy, chosen):
    pool(policy, 2)
    for number in range(6):  # the same 4 blocks six times on 0, the prefill done
        policy.sent(job(2_048, (1, 2, 3, 4), index=number), policy.pool[0], 0, 0.0)
    holds(policy, 0, (1, 2))
    # replica 0: 2 blocks to compute, 4 in use and 2 new ones; replica 1: 4 to compute, 4 new ones and 2 (1000 tokens) in use
    policy.sent(job(1_000, (30, 31), index=6), policy.pool[1], 0, 0.0)
    assert policy.route(job(2_048, (1, 2, 8, 9), index=7), 0.0) == 0  # 2 + 6 against 4 + 6
    policy.pool[0].prefill_tokens = 0
    policy.sent(job(1_536, (20, 21, 22), index=8), policy.pool[0], 0, 0.0)
    # now 2 to compute, 9 in use, 2 new ones: 13 against 10 at scale 1, 19 against 22 at scale 4
    assert policy.route(job(2_048, (1, 2, 10, 11), index=9), 0.0) == chosen


def test_sglang_prefers_the_cache_unless_loads_are_far_apart():
    policy = pool(SglangCacheAware(), 2)
    holds(policy, 1, (1, 2))
    policy.pool[1].requests = 60
    assert policy.route(job(2_048, (1, 2, 3, 4)), 0.0) == 1
    policy.pool[1].requests = 65
    assert policy.route(job(2_048, (1, 2, 3, 4)), 0.0) == 0  # 65 - 0 > 64
    policy.pool[1].requests = 20
    assert policy.route(job(4_096, (1, 2, *range(70, 76))), 0.0) == 0  # a quarter of it is not enough


def test_aibrix_skips_who_has_too_many():
    policy = pool(AibrixPrefixCache(), 8)
    holds(policy, 7, (1, 2))
    policy.pool[7].requests = 10  # mean 1.25, sigma 3.3: 7.9 at most
    assert policy.route(job(1_024, (1, 2)), 0.0) != 7
    holds(policy, 7, (3, 4))
    policy.pool[7].requests = 1
    assert policy.route(job(1_024, (3, 4)), 0.0) == 7
    policy.pool[0].requests = 18
    policy.pool[7].requests = 2
    assert policy.route(job(1_024, (3, 4)), 0.0) != 7  # further than 16 apart: least request


def test_preble_exploits_a_long_match_and_explores_otherwise():
    policy = pool(Preble(), 2)
    holds(policy, 1, (1, 2, 3))
    assert policy.route(job(2_048, (1, 2, 3, 4), index=1), 0.0) == 1
    assert policy.route(job(20_480, tuple(range(100, 140)), index=2), 1.0) == 0  # 1 has worked already
    for number in range(3, 9):
        policy.sent(job(20_480, index=number), policy.pool[1], 20_480, 2.0)
    assert policy.route(job(2_048, (1, 2, 3, 4), index=10), 3.0) == 0  # out of balance: a second copy
    assert policy.route(job(2_048, (1, 2, 3, 4), index=11), 200.0) in {0, 1}  # three minutes later nothing of it counts
    assert sum(policy._tokens.values()) == policy._window[-1][3]


def test_a_failing_replica_is_left_out_until_it_answers_scrapes():
    policy = pool(RoundRobin(), 2)
    policy.read(0, None, None, 1.0)
    assert {policy.route(job(), 1.0) for _ in range(4)} == {1}
    policy.read(1, None, None, 2.0)
    assert {policy.route(job(), 2.0) for _ in range(4)} == {0, 1}  # none answers: any may be the one that works
    policy.left(0, 3.0)
    policy.left(1, 3.0)
    with pytest.raises(RejectedError):
        policy.route(job(), 4.0)


def test_the_index_forgets_the_oldest_and_a_prompts_end_first():
    index = ApproximateIndex(4 * BLOCK_TOKENS)
    index.record(0, (1, 2, 3))
    index.record(0, (1, 7))
    index.record(0, (9,))
    assert index.matched((1, 2, 3), (0, 1)) == {0: 2 * BLOCK_TOKENS}
    index.forget(0)
    assert index.matched((1, 2, 3), (0, 1)) == {}


def test_the_clairvoyant_predicts_what_then_happens():
    rng = random.Random(3)
    errors = []
    for _ in range(60):
        engine = Engine(PROFILE, promises=True)
        now_s = 0.0
        for number in range(rng.randrange(1, 25)):
            now_s += rng.expovariate(1.0)
            while engine.next_s <= now_s:
                engine.advance()
            length, shared = rng.randrange(100, 30_000), rng.randrange(6)
            blocks = tuple(
                100 * shared + place if place < 8 else 10**6 * (number + 1) + place for place in range(-(-length // BLOCK_TOKENS))
            )
            engine.submit(job(length, blocks, rng.randrange(1, 400), number, now_s), now_s)
        now_s += 0.5
        while engine.next_s <= now_s:
            engine.advance()
        last = job(rng.randrange(100, 20_000), (), 5, 100, now_s)
        predicted, _ = predicted_s(engine, last, now_s)
        engine.submit(last, now_s)
        while engine.next_s != NEVER:
            engine.advance()
        errors.append(abs(predicted - last.ttft_s) / last.ttft_s)
    assert sorted(errors)[30] < 0.03
    assert max(errors) < 0.3


def test_the_clairvoyant_knows_of_engines_that_fail():
    engines = [Engine(PROFILE, promises=True) for _ in range(3)]
    policy = pool(Clairvoyant(), engines=engines)
    engines[0].up = False
    engines[1].failing = True
    assert [policy.route(job(index=number), 0.0) for number in range(3)] == [2, 2, 2]
