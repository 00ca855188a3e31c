"""The simulated scheduler, on virtual time: what a router would see of vLLM."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from epp.sim.engine import VOCABULARY, ContextTooLongError, Engine, EngineProfile, Sequence, Step
from epp.sim.kv_cache import KVCache
from epp.types import TOKEN_BYTES

SMALL = EngineProfile(max_running=4, max_batched_tokens=64, kv_blocks=33, block_tokens=4)
BLOCK_BYTES = SMALL.block_tokens * TOKEN_BYTES


def text(tokens: int, tag: str) -> bytes:
    """A prompt of so many tokens, different from the first block on for each tag."""
    return (f"{tag:>4}".encode() + b"word" * tokens)[: tokens * TOKEN_BYTES]


def run(engine: Engine, steps_max: int = 10_000) -> list[Step]:
    """Step until idle."""
    steps: list[Step] = []
    now_s = 0.0
    while engine.busy:
        steps.append(engine.step(now_s))
        now_s = steps[-1].end_s
        assert len(steps) < steps_max, "the engine makes no progress"
    return steps


def finish(engine: Engine, prompt: bytes, max_tokens: int, salt: str = "") -> Sequence:
    sequence = engine.submit(prompt, max_tokens, 0.0, salt)
    run(engine)
    return sequence


def said(sequence: Sequence) -> bytes:
    return sequence.reply(0, sequence.generated_tokens)


class TestPrefixCache:
    @pytest.mark.parametrize(
        ("odd_bytes", "max_tokens", "cached_tokens"),
        [
            (0, 10, 16),  # the KV of the last token said was never computed: 19 tokens
            (0, 11, 20),
            (1, 10, 16),  # 20 tokens, but the prompt's last is three bytes short: the fifth block is not full
            (3, 10, 16),
            (3, 11, 20),
        ],
    )
    def test_next_turn_hits_prompt_and_answer(self, odd_bytes: int, max_tokens: int, cached_tokens: int) -> None:
        engine = Engine(SMALL)
        prompt = text(10, "a") + b"x" * odd_bytes
        first = finish(engine, prompt, max_tokens)
        second = finish(engine, prompt + said(first) + b"user: and then?", 1)
        assert (first.cached_tokens, second.cached_tokens) == (0, cached_tokens)

    def test_the_last_prompt_token_is_always_computed(self) -> None:
        engine = Engine(SMALL)
        prompt = text(8, "a")  # exactly two blocks
        finish(engine, prompt, 1)
        assert finish(engine, prompt, 1).cached_tokens == 4

    def test_a_difference_in_the_first_block_hides_all_that_follows(self) -> None:
        engine = Engine(SMALL)
        finish(engine, text(40, "a"), 1)
        assert finish(engine, text(40, "b"), 1).cached_tokens == 0

    def test_a_salt_separates(self) -> None:
        engine = Engine(SMALL)
        finish(engine, text(9, "a"), 1, "tenant-1")
        assert finish(engine, text(9, "a"), 1, "tenant-2").cached_tokens == 0
        assert finish(engine, text(9, "a"), 1, "tenant-1").cached_tokens == 8

    def test_requests_of_one_step_share(self) -> None:
        engine = Engine(SMALL)
        one, two = engine.submit(text(20, "a"), 2, 0.0), engine.submit(text(20, "a"), 2, 0.0)
        step = engine.step(0.0)
        assert step.admitted == [one, two]
        assert (one.cached_tokens, two.cached_tokens) == (0, 16)
        assert engine.cache.used == 5 + 1  # the second adds only its last block
        assert step.prefill_tokens == 20 + 4

    def test_least_recently_used_is_evicted_first(self) -> None:
        engine = Engine(SMALL)  # 32 blocks; each prompt fills 10
        for tag in "abc":
            finish(engine, text(40, tag), 1)
        assert finish(engine, text(40, "a"), 1).cached_tokens == 36  # now b is the oldest
        finish(engine, text(40, "d"), 1)
        assert engine.cache.evictions_total > 0
        assert finish(engine, text(40, "a"), 1).cached_tokens == 36
        assert finish(engine, text(40, "b"), 1).cached_tokens < 36

    def test_a_prefix_outlives_what_was_built_on_it(self) -> None:
        engine = Engine(EngineProfile(kv_blocks=11, block_tokens=4))
        finish(engine, text(36, "a"), 1)  # 9 of 10 blocks
        finish(engine, text(16, "b"), 1)  # needs 4: one blank, three from the tail of a
        assert finish(engine, text(36, "a")[: 24 * TOKEN_BYTES], 1).cached_tokens == 20

    def test_reset_forgets_all_but_not_while_in_use(self) -> None:
        engine = Engine(SMALL)
        finish(engine, text(20, "a"), 1)
        running = engine.submit(text(20, "b"), 5, 0.0)
        engine.step(0.0)
        assert not engine.cache.reset()
        engine.abort(running)
        assert engine.cache.reset()
        assert finish(engine, text(20, "a"), 1).cached_tokens == 0


class TestBatching:
    def test_a_long_prompt_is_prefilled_in_chunks(self) -> None:
        engine = Engine(EngineProfile())
        sequence = engine.submit(b"word" * 5000, 1, 0.0)
        steps = run(engine)
        assert [step.prefill_tokens for step in steps] == [2048, 2048, 904]
        assert [len(step.emitted) for step in steps] == [0, 0, 1]
        assert [step.duration_s for step in steps] == pytest.approx([0.008 + n * 60e-6 + 150e-6 for n in (2048, 2048, 904)])
        assert sequence.first_token_s == pytest.approx(3 * 0.00815 + 5000 * 60e-6)

    def test_decoding_goes_on_beside_a_prefill(self) -> None:
        engine = Engine(SMALL)
        chatty = engine.submit(text(4, "a"), 10, 0.0)
        engine.step(0.0)
        long = engine.submit(text(100, "b"), 1, 0.0)
        step = engine.step(0.0)
        assert step.emitted == [chatty]
        assert step.prefill_tokens == long.computed_tokens == 63  # the budget of 64 less the token decoded

    def test_prompts_share_the_budget_of_a_step(self) -> None:
        engine = Engine(SMALL)
        one, two = engine.submit(text(40, "a"), 1, 0.0), engine.submit(text(40, "b"), 1, 0.0)
        step = engine.step(0.0)
        assert (step.emitted, step.prefill_tokens, two.computed_tokens) == ([one], 64, 24)

    def test_decode_step_costs_base_and_each_request(self) -> None:
        engine = Engine(EngineProfile())
        for tag in "abc":
            engine.submit(text(5, tag), 5, 0.0)
        engine.step(0.0)
        step = engine.step(1.0)
        assert step.duration_s == pytest.approx(0.008 + 3 * 150e-6)
        assert step.end_s == pytest.approx(1.0 + step.duration_s)
        assert len(step.emitted) == 3

    def test_more_than_max_running_wait_in_order(self) -> None:
        engine = Engine(SMALL)
        sequences = [engine.submit(text(2, str(n)), 3, 0.0) for n in range(6)]
        step = engine.step(0.0)
        assert step.admitted == sequences[:4]
        assert engine.load == (4, 2, 4 / 32)
        run(engine)
        assert sequences[4].admitted_s > 0 == sequences[3].admitted_s
        assert all(sequence.finish_reason == "length" for sequence in sequences)

    def test_without_blocks_there_is_no_admission_and_no_overtaking(self) -> None:
        engine = Engine(EngineProfile(max_batched_tokens=512, kv_blocks=33, block_tokens=4))  # 32 blocks
        holder = engine.submit(text(80, "a"), 3, 0.0)  # 20 of them
        big = engine.submit(text(60, "b"), 1, 0.0)  # wants 15
        small = engine.submit(text(4, "c"), 1, 0.0)
        step = engine.step(0.0)
        assert step.emitted == [holder]
        assert engine.load == (1, 2, 20 / 32)
        engine.step(1.0)
        engine.step(2.0)
        assert holder.finish_reason == "length"
        assert engine.step(3.0).admitted == [big, small]


class TestPreemption:
    def test_the_youngest_makes_room_and_loses_nothing(self) -> None:
        profile = EngineProfile(kv_blocks=9, block_tokens=4)  # 8 blocks
        engine = Engine(profile)
        old, young = engine.submit(text(12, "a"), 12, 0.0), engine.submit(text(12, "b"), 12, 0.0)
        steps = run(engine)
        preempted = [sequence for step in steps for sequence in step.preempted]
        assert young in preempted
        assert old not in preempted
        assert old.first_token_s == young.first_token_s
        assert said(young) == said(finish(Engine(profile), text(12, "b"), 12))
        assert [step.emitted.count(young) for step in steps].count(1) == 12  # no token said twice
        assert [step.admitted.count(young) for step in steps].count(1) == 1
        assert engine.cache.used == 0

    def test_the_victim_goes_to_the_head_of_the_queue(self) -> None:
        engine = Engine(EngineProfile(kv_blocks=9, block_tokens=4))  # 8 blocks
        old, young = engine.submit(text(12, "a"), 12, 0.0), engine.submit(text(12, "b"), 12, 0.0)
        for _ in range(5):  # 16 tokens each: all 8 blocks full
            assert not engine.step(0.0).preempted
        small = engine.submit(text(1, "c"), 1, 0.0)  # would fit into what the victim leaves, and does not overtake it
        step = engine.step(0.0)
        assert (step.preempted, step.admitted) == ([young], [])
        assert engine.running == [old]
        assert list(engine.waiting) == [young, small]

    def test_a_lone_request_that_fills_the_cache_finishes(self) -> None:
        engine = Engine(SMALL)
        sequence = finish(engine, text(100, "a"), SMALL.context_tokens_max - 100)
        assert sequence.finish_reason == "length"

    def test_a_longer_one_is_refused(self) -> None:
        engine = Engine(SMALL)
        with pytest.raises(ContextTooLongError) as caught:
            engine.submit(text(100, "a"), 29, 0.0)
        assert (caught.value.prompt_tokens, caught.value.max_tokens, caught.value.context_tokens_max) == (100, 29, 128)
        assert not engine.busy


class TestAbort:
    def test_running(self) -> None:
        engine = Engine(SMALL)
        sequence = engine.submit(text(20, "a"), 5, 0.0)
        engine.step(0.0)
        assert engine.cache.used == 5
        assert engine.abort(sequence)
        assert engine.load == (0, 0, 0.0)
        assert not engine.abort(sequence)
        assert sequence.finish_reason == "abort"

    def test_waiting(self) -> None:
        engine = Engine(SMALL)
        sequence = engine.submit(text(20, "a"), 5, 0.0)
        assert engine.abort(sequence)
        assert not engine.busy

    def test_finished_stays_finished(self) -> None:
        engine = Engine(SMALL)
        sequence = finish(engine, text(3, "a"), 1)
        assert not engine.abort(sequence)
        assert sequence.finish_reason == "length"


class TestReplies:
    def test_depend_on_seed_and_prompt_only(self) -> None:
        one = finish(Engine(SMALL, seed=1), text(5, "a"), 20)
        again = Engine(SMALL, seed=1)
        finish(again, text(9, "z"), 3)
        assert said(finish(again, text(5, "a"), 20)) == said(one)
        assert said(finish(Engine(SMALL, seed=2), text(5, "a"), 20)) != said(one)
        assert said(finish(Engine(SMALL, seed=1), text(5, "b"), 20)) != said(one)

    def test_are_four_plain_characters_a_token(self) -> None:
        assert all(len(word) == TOKEN_BYTES and word.isascii() and not set(word) & set(b'"\\') for word in VOCABULARY)
        assert len(said(finish(Engine(SMALL), text(5, "a"), 20))) == 20 * TOKEN_BYTES

    def test_an_empty_prompt_counts_one_token(self) -> None:
        sequence = finish(Engine(SMALL), b"", 6)
        assert (sequence.prompt_tokens, sequence.generated_tokens) == (1, 6)


@pytest.mark.parametrize(
    "fault",
    [{"max_running": 0}, {"max_batched_tokens": 0}, {"block_tokens": 0}, {"kv_blocks": 1}, {"step_base_s": 0.0}, {"prefill_token_s": -1.0}],
)
def test_a_profile_that_cannot_run_is_refused(fault: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(fault))):
        EngineProfile(**fault)


def test_reprs_tell_the_state() -> None:
    engine = Engine(SMALL)
    sequence = engine.submit(text(20, "a"), 5, 0.0)
    engine.step(0.0)
    assert repr(engine) == "<Engine running=1 waiting=0 <KVCache 5/32 used, 5 cached>>"
    assert repr(sequence) == "<Sequence 20+1/5 computed=20 open>"


def test_a_twin_block_stays_anonymous_and_is_reused_first() -> None:
    cache = KVCache(4)
    first, twin = cache.allocate(2) or []
    cache.remember(first, 7)
    cache.remember(twin, 7)
    cache.release([first, twin])
    assert cache.match([7]) == [first]
    assert cache.allocate(1) == [twin]
    assert cache.allocate(3) is None


JOBS = st.lists(st.tuples(st.integers(1, 70), st.integers(1, 40), st.integers(0, 2), st.integers(0, 30)), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None)
@given(jobs=JOBS, kv_blocks=st.integers(29, 60), budget=st.integers(1, 80))
def test_whatever_comes_all_finish_and_all_blocks_return(jobs: list[tuple[int, int, int, int]], kv_blocks: int, budget: int) -> None:
    engine = Engine(EngineProfile(max_running=3, max_batched_tokens=budget, kv_blocks=kv_blocks, block_tokens=4))
    pending = sorted(jobs, key=lambda job: job[3])
    sequences: list[Sequence] = []
    emitted = 0
    for number in range(20_000):
        while pending and (pending[0][3] <= number or not engine.busy):
            prompt_tokens, max_tokens, tag, _ = pending.pop(0)
            sequences.append(engine.submit(text(prompt_tokens, str(tag)), max_tokens, float(number)))
        if not engine.busy:
            break
        step = engine.step(float(number))
        emitted += len(step.emitted)
        assert len(step.emitted) <= 3
        held = {block for sequence in engine.running for block in sequence.blocks}
        assert engine.cache.used == len(held)
        for sequence in engine.running:
            assert len(sequence.blocks) * 4 >= sequence.computed_tokens
    assert [sequence.finish_reason for sequence in sequences] == ["length"] * len(jobs)
    assert emitted == sum(job[1] for job in jobs)
    assert engine.load == (0, 0, 0.0)
