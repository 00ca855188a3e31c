"""How fast an endpoint is, learned from what it did."""

from __future__ import annotations

import pytest

from epp.capacity import SAMPLES_MIN, WORK_TOKENS_MIN, Capacity
from epp.exchange import Exchange
from epp.types import LLMRequest
from tests.builders import PATH, chat, core


def test_a_rate_is_known_after_a_few_samples_and_follows_the_machine() -> None:
    capacity = Capacity()
    for _ in range(SAMPLES_MIN - 1):
        capacity.first_token(1_000, 0.1)
    assert capacity.prefill_tokens_per_s == 0.0
    capacity.first_token(1_000, 0.1)
    assert capacity.prefill_tokens_per_s == pytest.approx(10_000)
    for _ in range(200):
        capacity.first_token(1_000, 0.5)
    assert capacity.prefill_tokens_per_s == pytest.approx(2_000)


def test_small_prompts_and_impossible_times_say_nothing() -> None:
    capacity = Capacity()
    for _ in range(50):
        capacity.first_token(WORK_TOKENS_MIN - 1, 0.1)
        capacity.first_token(5_000, 0.0)
        capacity.finished(0, 1.0)
    assert (capacity.prefill_tokens_per_s, capacity.step_s) == (0.0, 0.0)


def test_requests_teach_it() -> None:
    world = core(1)
    endpoint = world.endpoint(1)
    for number in range(SAMPLES_MIN):
        request = LLMRequest(id="r", path=PATH, headers={})
        body = chat(f"{number} " + "x" * 8_000, stream=True)
        exchange = world.director.route(request, body, None, world.clock.now_s())
        world.clock.advance(0.25)
        exchange.response_headers(200, event_stream=True, served="", code_details="")
        exchange.response_chunk(b"data: 1\n\n")
        world.clock.advance(1.0)
        exchange.response_chunk(b'data: {"usage":{"prompt_tokens":2000,"completion_tokens":51}}\n\n')
        exchange.finish(complete=True)
    assert endpoint.capacity.prefill_tokens_per_s == pytest.approx(request.prompt_tokens / 0.25, rel=0.1)
    assert endpoint.capacity.step_s == pytest.approx(0.02)


def test_whole_answers_teach_nothing_of_prefill() -> None:
    world = core(1)
    for _ in range(2 * SAMPLES_MIN):
        request = LLMRequest(id="r", path=PATH, headers={})
        exchange = world.director.route(request, chat("x" * 8_000), None, world.clock.now_s())
        world.clock.advance(5.0)
        exchange.response_headers(200, event_stream=False, served="", code_details="")
        exchange.response_chunk(b"{}")
        exchange.finish(complete=True)
    assert world.endpoint(1).capacity.prefill_tokens_per_s == 0.0


def test_prompts_of_whole_answers_are_not_what_a_first_token_waited_for() -> None:
    world = core(1)
    endpoint = world.endpoint(1)

    def send(number: int, *, stream: bool) -> Exchange:
        request = LLMRequest(id="r", path=PATH, headers={})
        return world.director.route(request, chat(f"{number} " + "x" * 8_000, stream=stream), None, world.clock.now_s())

    whole = [send(number, stream=False) for number in range(50)]
    assert endpoint.untold_tokens == endpoint.inflight_tokens > 50 * 1_900
    for number in range(SAMPLES_MIN):
        streamed = send(1_000 + number, stream=True)
        world.clock.advance(0.25)
        streamed.response_headers(200, event_stream=True, served="", code_details="")
        streamed.response_chunk(b"data: {}\n\n")
        streamed.finish(complete=True)
    assert endpoint.capacity.prefill_tokens_per_s == pytest.approx(8_000, rel=0.1), "2 000 tokens in 0.25 s, not 100 000"
    for exchange in whole:
        exchange.finish(complete=True)
    assert (endpoint.untold_tokens, endpoint.inflight_tokens) == (0, 0)
