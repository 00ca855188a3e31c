"""A prompt is in use until its answer ends: engines evict by that, and so does what is remembered of them."""

from __future__ import annotations

import pytest

from epp.plugins.base import Finished
from epp.plugins.producers.approx_prefix_cache import ApproxPrefixCacheProducer
from epp.plugins.producers.precise_prefix_cache import PrecisePrefixCacheProducer
from epp.prefix.index import OUTLIVES, PrefixIndex
from epp.types import Address, Changes, Decision, Endpoint, EndpointSpec, LLMRequest, Snapshot

Producer = ApproxPrefixCacheProducer | PrecisePrefixCacheProducer
BLOCK_TOKENS = 64
SIZES = tuple(BLOCK_TOKENS * (number + 1) for number in range(10))
CACHE_BLOCKS = 400
PROMPT_BYTES = 4 * 640  # ten blocks


def prompt(number: int) -> list[int]:
    return [1_000 * number + block for block in range(10)]


def index_of(first: int, count: int) -> PrefixIndex:
    """Of an engine whose cache holds 40 prompts; it was sent these."""
    index = PrefixIndex(10_000)
    index.set_capacity_tokens(0, CACHE_BLOCKS * BLOCK_TOKENS)
    for number in range(first, first + count):
        index.record(0, prompt(number), SIZES)
    return index


def test_the_last_use_counts_not_the_sending() -> None:
    index = index_of(0, 30)
    index.used(0, prompt(0), SIZES)
    for number in range(30, 60):
        index.record(0, prompt(number), SIZES)
    assert index.lookup(prompt(0), 1) == {0: 10}, "30 prompts have been sent since its answer ended"
    assert index.lookup(prompt(1), 1) == {}, "58 have been sent since that one was"
    assert index.lookup(prompt(25), 1) == {0: 10}


def test_what_is_in_use_takes_the_place_of_what_is_not() -> None:
    """However often each is used: as much is remembered as fits the engine's cache, and no less."""
    index = index_of(0, 40)
    for number in range(40, 400):
        index.record(0, prompt(number), SIZES)
        index.used(0, prompt(number - 10), SIZES)
    held = index.held_blocks(0)
    assert CACHE_BLOCKS * 0.9 < held <= CACHE_BLOCKS * OUTLIVES
    found = [number for number in range(400) if index.lookup(prompt(number), 1) == {0: 10}]
    assert set(range(366, 400)) <= set(found), "the ten in flight, and those answered last"
    assert min(found) > 355


def test_a_prompt_of_which_a_part_is_gone_is_whole_again() -> None:
    index = PrefixIndex(1_000)
    index.record(0, prompt(1)[:4], SIZES)
    index.used(0, prompt(1), SIZES)
    assert index.lookup(prompt(1), 1) == {0: 10}, "who answered it had all of it"


def test_an_endpoint_that_is_gone_gets_nothing_back() -> None:
    index = PrefixIndex(1_000)
    index.record(0, prompt(1), SIZES)
    freed: list[int] = []
    index.forget(0, freed.append)
    index.used(0, prompt(1), SIZES)
    while index.tick():
        pass
    index.used(0, prompt(1), SIZES)
    assert (freed, index.blocks, len(index)) == ([0], 0, 0)


# As the producer hears of it


def endpoint_at(slot: int, host: str = "10.0.0.1") -> Endpoint:
    endpoint = Endpoint(EndpointSpec(host, Address(host, 8000)), slot, Changes())
    endpoint.kv_capacity_tokens = 4_000  # six prompts
    return endpoint


def sent(producer: Producer, endpoint: Endpoint, number: int) -> LLMRequest:
    request = LLMRequest(id="r", path="/v1/completions", headers={})
    request.prompt = bytes([number]) * PROMPT_BYTES
    request.prompt_tokens = PROMPT_BYTES // 4
    producer.produce(request, Snapshot.of([endpoint]))
    producer.picked(request, Decision(endpoint, (), "default"))
    return request


def known(producer: Producer, endpoint: Endpoint, number: int) -> bool:
    request = LLMRequest(id="r", path="/v1/completions", headers={})
    request.prompt = bytes([number]) * PROMPT_BYTES
    request.prompt_tokens = PROMPT_BYTES // 4
    producer.produce(request, Snapshot.of([endpoint]))
    return request.prefix is not None and bool(request.prefix.matched_tokens)


@pytest.mark.parametrize("made", [ApproxPrefixCacheProducer, PrecisePrefixCacheProducer], ids=["approximate", "precise, of silent engines"])
def test_an_answer_renews_its_prompt(made: type[Producer]) -> None:
    producer, endpoint = made(), endpoint_at(0)
    first, second = sent(producer, endpoint, 1), sent(producer, endpoint, 2)
    for number in range(3, 7):
        sent(producer, endpoint, number)
    producer.finished(first, endpoint, Finished(200, 0.1, 9.0, None, 640))
    producer.finished(second, endpoint, Finished(0, 0.1, 9.0, None, 640))
    for number in range(7, 11):
        sent(producer, endpoint, number)
    assert known(producer, endpoint, 1)
    assert not known(producer, endpoint, 2), "it broke off: who knows why"


@pytest.mark.parametrize("status", [0, 400, 429, 500, 503])
def test_what_was_not_answered_is_not_renewed(status: int) -> None:
    producer, endpoint = ApproxPrefixCacheProducer(), endpoint_at(0)
    request = sent(producer, endpoint, 1)
    producer.index.reset(0)
    while producer.index.tick():
        pass
    producer.finished(request, endpoint, Finished(status, -1.0, 1.0, None, 640))
    assert not known(producer, endpoint, 1)


def test_the_next_endpoint_in_a_slot_has_nothing_of_the_one_before() -> None:
    producer, before, after = ApproxPrefixCacheProducer(), endpoint_at(0), endpoint_at(0, "10.0.0.2")
    request = sent(producer, before, 1)
    producer.index.forget(0)
    while producer.index.tick():
        pass
    sent(producer, after, 2)
    producer.finished(request, before, Finished(200, 0.1, 60.0, None, 640))
    assert not known(producer, after, 1)
    assert known(producer, after, 2)


def test_without_a_prompt_there_is_nothing_to_renew() -> None:
    producer, endpoint = ApproxPrefixCacheProducer(), endpoint_at(0)
    request = LLMRequest(id="r", path="/v1/completions", headers={})
    producer.produce(request, Snapshot.of([endpoint]))
    producer.finished(request, endpoint, Finished(200, 0.1, 1.0, None, 0))
    assert producer.index.blocks == 0
