"""Prefix producers: what they find, what it remembers, how it cuts prompts."""

from __future__ import annotations

from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from epp.plugins.producers.approx_prefix_cache import ApproxPrefixCacheProducer
from epp.plugins.producers.precise_prefix_cache import PrecisePrefixCacheProducer
from epp.prefix.kv_events import BlockStored
from epp.types import TOKEN_IDS, Decision, Endpoint, LLMRequest, Snapshot
from tests.builders import llm_request, pool_of
from tests.contract.situations import built

ALONE = Snapshot.of(pool_of({}))
"""One candidate, in slot 0."""


def sent_to(endpoint: Endpoint) -> Decision:
    return Decision(endpoint, (), "default")


def producer(**parameters: object) -> ApproxPrefixCacheProducer:
    made = built(ApproxPrefixCacheProducer.type, **parameters)
    assert isinstance(made, ApproxPrefixCacheProducer)
    return made


def prompted(text: bytes, **values: object) -> LLMRequest:
    return llm_request(prompt=text, prompt_tokens=-(-len(text) // 4), target_model="m", **values)


def test_the_producer_finds_what_was_picked_before_and_only_that() -> None:
    made = producer()
    first, second = pool_of({}, {})
    text = bytes(range(256)) * 8  # 512 tokens, 8 blocks
    request = prompted(text)
    made.produce(request, Snapshot.of((first, second)))
    assert request.prefix is not None
    assert request.prefix.matched_tokens == {}
    made.picked(request, sent_to(first))
    longer = prompted(text + b"more" * 100)
    made.produce(longer, Snapshot.of((first, second)))
    assert longer.prefix is not None
    assert longer.prefix.matched_tokens == {first.slot: 512}
    for other in (prompted(text, cache_salt="s"), llm_request(prompt=text, prompt_tokens=512, target_model="other")):
        made.produce(other, Snapshot.of((first, second)))
        assert other.prefix is not None
        assert other.prefix.matched_tokens == {}, "another tenant or model shares nothing"
    only_second = prompted(text)
    made.produce(only_second, Snapshot.of((second,)))
    assert only_second.prefix is not None
    assert only_second.prefix.matched_tokens == {}


def test_the_producer_says_nothing_of_a_request_without_a_prompt() -> None:
    made = producer()
    request = llm_request()
    made.produce(request, ALONE)
    assert request.prefix is None
    made.picked(request, sent_to(pool_of({})[0]))
    assert made.index.blocks == 0


def test_a_prompt_shorter_than_a_block_matches_nothing() -> None:
    made = producer()
    request = prompted(b"x" * 255)
    made.produce(request, ALONE)
    made.picked(request, sent_to(pool_of({})[0]))
    assert request.prefix is not None
    assert (request.prefix.hashes, request.prefix.matched_tokens) == ([], {})


@pytest.mark.parametrize("auto_tune", [True, False])
def test_the_size_of_the_engines_cache_bounds_what_is_remembered_if_auto_tune_is_on(auto_tune: bool) -> None:
    made = producer(autoTune=auto_tune)
    (endpoint,) = pool_of({"kv_capacity_tokens": 64 * 10})
    for number in range(100):
        request = prompted(number.to_bytes(256, "big") + bytes(256))
        made.produce(request, ALONE)
        made.picked(request, sent_to(endpoint))
    assert made.index.held_blocks(0) <= 20 if auto_tune else made.index.held_blocks(0) == 200


def test_an_endpoint_that_takes_over_a_slot_is_bounded_by_its_cache_as_the_one_before() -> None:
    """The slot was forgotten in the index, its bound with it; the newcomer's cache has the same size."""
    made = producer()
    for _ in range(2):
        (endpoint,) = pool_of({"kv_capacity_tokens": 64 * 10})
        for number in range(100):
            request = prompted(number.to_bytes(256, "big") + bytes(256))
            made.produce(request, ALONE)
            made.picked(request, sent_to(endpoint))
        assert made.index.held_blocks(0) <= 20
        made.index.forget(endpoint.slot)
        while made.index.tick():
            pass


@pytest.mark.parametrize(
    ("parameters", "blocks"),
    [
        ({}, 128),
        ({"blockGrowth": "uniform"}, 2_048),
        ({"blockSizeTokens": 128, "blockGrowth": "uniform"}, 1_024),
        ({"maxPrefixTokensToMatch": 6_400}, 57),
        ({"maxPrefixTokensToMatch": 6_400, "blockGrowth": "uniform"}, 100),
        ({"maxPrefixTokensToMatch": 0, "maxPrefixBlocksToMatch": 50, "blockGrowth": "uniform"}, 50),
    ],
)
def test_how_many_blocks_a_long_prompt_is_cut_into(parameters: dict[str, object], blocks: int) -> None:
    made = producer(**parameters)
    request = prompted(bytes(4 * 131_072))
    made.produce(request, ALONE)
    assert request.prefix is not None
    assert len(request.prefix.hashes) == blocks


def test_an_endpoint_that_prefilled_or_served_in_anothers_stead_has_the_prompt_too() -> None:
    made = producer()
    decode, prefill, retried, other = pool_of({}, {}, {}, {})
    request = prompted(bytes(range(256)) * 2)
    everybody = Snapshot.of((decode, prefill, retried, other))
    made.produce(request, everybody)
    made.picked(request, Decision(decode, (), "decode", {"prefill": prefill}))
    made.served(request, retried)
    again = prompted(bytes(range(256)) * 2)
    made.produce(again, everybody)
    assert again.prefix is not None
    assert again.prefix.matched_tokens.keys() == {decode.slot, prefill.slot, retried.slot}


def test_each_producer_keeps_its_match_and_the_first_ones_is_the_requests() -> None:
    one, two = producer(), producer(blockSizeTokens=128)
    two.named("coarse")
    request = prompted(bytes(2048))
    one.produce(request, ALONE)
    two.produce(request, ALONE)
    assert request.prefix is request.attributes["approx-prefix-cache-producer"]
    assert request.attributes["coarse"] is not request.prefix
    assert len(request.attributes["coarse"].hashes) == 4


# precise-prefix-cache-producer where engines tell nothing


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3), st.integers(1, 12), st.booleans()), max_size=30))
def test_without_events_the_precise_producer_is_the_approximate_one(requests: list[tuple[int, int, int, bool]]) -> None:
    approximate, precise = producer(blockGrowth="uniform"), built(PrecisePrefixCacheProducer.type)
    pool = pool_of({}, {}, {})
    for place, family, blocks, with_tokens in requests:
        text = b"".join(bytes([family, number]) * 128 for number in range(blocks))
        ours, theirs = prompted(text), prompted(text)
        if with_tokens:
            ours.attributes[TOKEN_IDS] = text
        for made, request in ((precise, ours), (approximate, theirs)):
            made.produce(request, Snapshot.of(pool))  # type: ignore[attr-defined]
            made.picked(request, sent_to(pool[place]))  # type: ignore[attr-defined]
        assert ours.prefix is not None
        assert theirs.prefix is not None
        assert ours.prefix.matched_tokens == theirs.prefix.matched_tokens
        assert ours.prefix.prompt_tokens == theirs.prefix.prompt_tokens


@given(
    st.lists(st.integers(0, 5), max_size=70),
    st.lists(st.tuples(st.integers(0, 2), st.lists(st.integers(0, 5), max_size=70)), max_size=6),
)
def test_where_engines_tell_whole_blocks_count_but_never_the_last_token(prompt: list[int], stored: list[tuple[int, list[int]]]) -> None:
    block = 4
    precise = built(PrecisePrefixCacheProducer.type)
    assert isinstance(precise, PrecisePrefixCacheProducer)
    pool = pool_of({}, {}, {})
    told: dict[int, list[tuple[int, ...]]] = {}
    for slot, tokens in stored:
        whole = len(tokens) // block * block
        names = [hash(tuple(tokens[: end + block])) for end in range(0, whole, block)]
        precise.index.precise.apply(slot, BlockStored(names, None, array("I", tokens[:whole]).tobytes(), block))
        if whole:
            told.setdefault(slot, []).append(tuple(tokens[:whole]))
    request = prompted(array("I", prompt).tobytes())
    request.attributes[TOKEN_IDS] = request.prompt
    precise.produce(request, Snapshot.of(pool))
    expected = {}
    for slot, everything in told.items():
        shared = max(next((i for i, (a, b) in enumerate(zip(prompt, one)) if a != b), min(len(prompt), len(one))) for one in everything)  # noqa: B905
        cached = min(shared, max(0, len(prompt) - 1)) // block * block
        if cached:
            expected[slot] = cached
    assert (request.prefix.matched_tokens if request.prefix is not None else {}) == expected
