"""The simulated engine: schedules worked out by hand, and what must hold in any."""

import dataclasses
import random

import pytest

from bench.replay.adapters import Adapters
from bench.replay.engine import NEVER, Engine
from bench.replay.job import BLOCK_TOKENS, Job, pairs_of
from bench.replay.profiles import PROFILES, Profile, profile_of

TINY = Profile(
    name="tiny",
    source="round numbers",
    kv_tokens=8 * BLOCK_TOKENS,
    step_base_s=1.0,
    prefill_token_s=0.001,
    attention_pair_s=0.0,
    sequence_s=0.0,
    kv_token_s=0.0,
    batch_tokens=1_000,
    running_max=8,
)


def job(index: int, prompt: int, output: int, blocks: tuple[int, ...] = (), *, at_s: float = 0.0, adapter: str = "") -> Job:
    """Blocks of its own unless some are given."""
    count = -(-prompt // BLOCK_TOKENS)
    return Job(index, at_s, prompt, output, blocks or tuple(range(1_000 * index, 1_000 * index + count)), adapter=adapter)


def work_off(engine: Engine, *later: Job) -> None:
    """Until it is idle; `later` arrive at their times."""
    waiting = sorted(later, key=lambda each: each.arrival_s)
    while engine.next_s != NEVER or waiting:
        if waiting and waiting[0].arrival_s < engine.next_s:
            arriving = waiting.pop(0)
            engine.submit(arriving, arriving.arrival_s)
        else:
            engine.advance()


def test_one_request_takes_what_the_formula_says():
    profile = profile_of("qwen3-32b-2xh100")
    engine = Engine(profile)
    only = job(1, 5_000, 11)
    work_off(engine, only)
    ttft_s = 0.0
    before = 0
    for chunk in (2_048, 2_048, 904):
        ttft_s += (
            profile.step_base_s + profile.sequence_s + chunk * profile.prefill_token_s + pairs_of(before, chunk) * profile.attention_pair_s
        )
        before += chunk
    decode_s = sum(profile.step_base_s + profile.sequence_s + (5_000 + said) * profile.kv_token_s for said in range(10))
    assert only.ttft_s == pytest.approx(ttft_s)
    assert only.e2e_s == pytest.approx(ttft_s + decode_s)
    assert only.tpot_s == pytest.approx(decode_s / 10)


def test_a_schedule_worked_out_by_hand():
    engine = Engine(TINY)
    first, second = job(1, 1_500, 3), job(2, 700, 2, at_s=0.5)
    work_off(engine, first, second)
    # 0.0-2.0: 1000 of first. 2.0-4.0: its other 500, 500 of second. 4.0-5.2: first decodes, 200 of second. 5.2-6.2: both decode.
    assert [first.first_token_s, first.finished_s] == pytest.approx([4.0, 6.2])
    assert [second.first_token_s, second.finished_s] == pytest.approx([5.2, 6.2])


def test_speed_divides_time():
    whole, half = job(1, 1_500, 5), job(1, 1_500, 5)
    work_off(Engine(TINY), whole)
    work_off(Engine(TINY, speed=0.5), half)
    assert half.finished_s == pytest.approx(2 * whole.finished_s)


def test_interrupting_decode_does_not_change_it():
    profile = dataclasses.replace(PROFILES["qwen3-32b-2xh100"], running_max=1)
    alone, disturbed = job(1, 3_000, 400), job(1, 3_000, 400)
    work_off(Engine(profile), alone)
    others = [job(number, 600, 1, at_s=0.3 + number * 0.37) for number in range(2, 8)]  # no room beside it: they only interrupt
    work_off(Engine(profile), disturbed, *others)
    assert disturbed.finished_s == pytest.approx(alone.finished_s, rel=1e-12)
    assert all(other.first_token_s > disturbed.finished_s for other in others)


def test_a_prompt_seen_before_is_computed_from_where_it_differs():
    engine = Engine(TINY)
    work_off(engine, job(1, 1_100, 1, (1, 2, 3)))
    again, longer, other = job(2, 1_024, 1, (1, 2), at_s=10.0), job(3, 1_536, 1, (1, 2, 9), at_s=20.0), job(4, 1_024, 1, (7, 2), at_s=30.0)
    work_off(engine, again, longer, other)
    assert again.cached_tokens == 1_023  # the last token is always computed
    assert again.ttft_s == pytest.approx(1.001)
    assert longer.cached_tokens == 1_024
    assert other.cached_tokens == 0  # a block counts only behind the same beginning


def test_a_partly_filled_block_is_not_cached():
    engine = Engine(TINY)
    work_off(engine, job(1, 700, 1, (1, 2)), job(2, 700, 1, (1, 2), at_s=10.0))
    third = job(3, 700, 1, (1, 2), at_s=20.0)
    work_off(engine, third)
    assert third.cached_tokens == 512


def test_the_least_recently_used_goes_first_and_a_prompts_end_before_its_beginning():
    engine = Engine(TINY)  # 8 blocks
    work_off(engine, job(1, 1_536, 1, (1, 2, 3)))
    work_off(engine, job(2, 1_536, 1, (4, 5, 6), at_s=10.0))
    work_off(engine, job(3, 1_536, 1, (1, 2, 3), at_s=20.0))  # used again: 4, 5, 6 are the oldest now
    work_off(engine, job(4, 2_048, 1, (7, 8, 9, 10), at_s=30.0))
    assert sorted(engine.cache.refs) == [1, 2, 3, 4, 7, 8, 9, 10]
    assert engine.cache.evicted_blocks == 2
    assert engine.cache.matched((4, 5, 6)) == 1


def test_blocks_in_use_are_not_evicted():
    engine = Engine(TINY)
    holding = job(1, 2_048, 200, (1, 2, 3, 4))
    work_off(engine, holding, job(2, 1_536, 1, (5, 6, 7), at_s=5.0), job(3, 1_536, 1, (8, 9, 10), at_s=30.0))
    assert engine.cache.matched((1, 2, 3, 4)) == 4


def test_a_request_waits_until_its_context_fits():
    engine = Engine(TINY)  # 4096 tokens
    first, second = job(1, 3_000, 50), job(2, 2_000, 1, at_s=0.1)
    work_off(engine, first, second)
    assert second.first_token_s > first.finished_s


def test_the_youngest_is_preempted_and_both_finish():
    engine = Engine(TINY)
    old, young = job(1, 2_000, 200), job(2, 1_900, 200, at_s=0.1)  # 4300 tokens by the end, of 4096
    work_off(engine, old, young)
    # prompts until 7.9 (2.0 + 2.0 + 1.999 + 1.901), the old one decoding in the last two steps; 194 tokens of room: 97 steps for both.
    # Then the old one alone, its last 100 tokens: there is no room for the young one's 1998. At 204.9 that one finds its three blocks,
    # computes the other 462 tokens, which says its 99th token, and the last 101.
    assert engine.preemptions == 1
    assert [young.first_token_s, old.finished_s, young.finished_s] == pytest.approx([7.9, 204.9, 204.9 + 1.462 + 101])
    assert young.cached_tokens == 0  # of its first admission
    assert engine.cache.used == 0


def test_cpu_memory_gives_back_what_was_evicted():
    profile = dataclasses.replace(TINY, offload_token_s=1e-4)
    engine = Engine(profile, offload_tokens=16 * BLOCK_TOKENS)
    work_off(engine, job(1, 2_560, 1, (1, 2, 3, 4, 5)), job(2, 4_000, 1, tuple(range(20, 28)), at_s=20.0))
    assert engine.cache.matched((1, 2, 3, 4, 5)) == 5
    back = job(3, 2_560, 1, (1, 2, 3, 4, 5), at_s=40.0)
    work_off(engine, back)
    assert back.cached_tokens == 2_559
    assert 1.1 < back.ttft_s < 1.3  # a step, and the load of those that were gone: at most 2560 tokens


def test_adapters_wait_for_a_slot_and_let_others_pass():
    engine = Engine(TINY, adapters=Adapters(slots=1, load_s=2.0))
    red, blue, also_red = job(1, 100, 10, adapter="red"), job(2, 100, 1, at_s=0.1, adapter="blue"), job(3, 100, 1, at_s=0.2, adapter="red")
    work_off(engine, red, blue, also_red)
    assert red.ttft_s == pytest.approx(3.1)  # 2 s to load it
    assert also_red.first_token_s < red.finished_s < blue.first_token_s


def test_a_process_that_dies_loses_everything():
    engine = Engine(TINY)
    running, waiting = job(1, 3_000, 50, (1, 2, 3, 4, 5, 6)), job(2, 3_000, 50, at_s=0.1)
    engine.submit(running, 0.0)
    engine.advance()
    engine.submit(waiting, engine.next_s - 0.5)
    assert engine.stop() == [running, waiting]
    assert (engine.next_s, engine.up, engine.cache.used, engine.cache.cached) == (NEVER, False, 0, 0)
    engine.up = True
    again = job(3, 3_000, 2, (1, 2, 3, 4, 5, 6), at_s=100.0)
    work_off(engine, again)
    assert again.cached_tokens == 0
    assert again.finished_s > 0


def test_gauges_between_steps():
    engine = Engine(dataclasses.replace(TINY, running_max=1))
    engine.submit(job(1, 1_000, 100), 0.0)
    engine.submit(job(2, 1_000, 1), 0.5)
    assert engine.gauges(1.0)[:3] == (1, 1, 1_000 / 4_096)
    engine.advance()  # at 2.0; from here on it decodes, one token a second
    assert engine.gauges(2.0).kv_usage == pytest.approx(1_000 / 4_096)
    assert engine.gauges(12.5).kv_usage == pytest.approx(1_010 / 4_096)


@pytest.mark.parametrize("seed", range(6))
def test_what_must_hold_in_any_schedule(seed):
    rng = random.Random(seed)
    profile = dataclasses.replace(TINY, kv_tokens=12 * BLOCK_TOKENS + rng.randrange(300), running_max=rng.choice([2, 5, 8]))
    engine = Engine(profile, offload_tokens=rng.choice([0, 10 * BLOCK_TOKENS]), promises=True)
    jobs = []
    now_s = 0.0
    for number in range(120):
        family, length = rng.randrange(4), rng.randrange(1, 3_000)
        shared = rng.randrange(1, 6)
        blocks = tuple(
            100 * family + place if place < shared else 10_000 + 10 * number + place for place in range(-(-length // BLOCK_TOKENS))
        )
        now_s += rng.expovariate(0.05)
        jobs.append(job(number + 1, length, rng.randrange(1, 400), blocks, at_s=now_s))
    ended = []
    first = []
    admitted_hits = {}
    arriving = list(jobs)
    while arriving or engine.next_s != NEVER:
        if arriving and arriving[0].arrival_s < engine.next_s:
            each = arriving.pop(0)
            engine.submit(each, each.arrival_s)
        else:
            events = engine.advance()
            first += events.first_tokens
            ended += events.finished
        cache = engine.cache
        assert 0 <= cache.used <= cache.capacity
        assert cache.used + cache.cached <= cache.capacity
        assert len(engine.running) <= profile.running_max
        computed = {block for each in jobs for block in each.blocks[: each.computed // BLOCK_TOKENS]}
        for each in jobs:
            if each.cached_tokens >= 0 and each not in admitted_hits:
                admitted_hits[each] = each.cached_tokens
                assert each.cached_tokens < each.prompt_tokens
                assert computed.issuperset(each.blocks[: each.cached_tokens // BLOCK_TOKENS])
    assert sorted(ended, key=lambda each: each.index) == jobs
    assert sorted(first, key=lambda each: each.index) == jobs
    assert engine.cache.used == 0
    assert not any(engine.cache.refs.values())
    assert all(each.arrival_s < each.first_token_s <= each.finished_s for each in jobs)
    assert {each: each.cached_tokens for each in jobs} == admitted_hits
    if not engine.preemptions:
        assert engine.prefilled_tokens == sum(each.prompt_tokens - each.cached_tokens for each in jobs)
    assert engine.promises is not None
    assert (engine.promises.tokens, engine.promises.pairs) == (0, pytest.approx(0.0, abs=1e-3))


def test_every_profile_says_where_it_comes_from():
    assert all(profile.name == name and len(profile.source) > 50 for name, profile in PROFILES.items())
    assert profile_of("qwen3-32b-2xh100").prefill_tokens_per_s == pytest.approx(15_928, rel=0.01)


def test_profiles_without_sense_are_refused():
    with pytest.raises(ValueError, match="above 0"):
        dataclasses.replace(TINY, step_base_s=0.0)
    with pytest.raises(ValueError, match="batch_tokens"):
        dataclasses.replace(TINY, batch_tokens=8)
