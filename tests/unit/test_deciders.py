"""Deciders: whether a stage elsewhere is worth it."""

from __future__ import annotations

import msgspec
import pytest

from epp.plugins.base import Decider
from epp.plugins.deciders.always_disagg_multimodal import AlwaysDisaggMultimodalDecider
from epp.plugins.deciders.always_disagg_pd import AlwaysDisaggPdDecider
from epp.plugins.deciders.prefix_based_pd import PrefixBasedPdDecider
from epp.types import PrefixMatch
from tests.builders import llm_request, pool_of

ENDPOINT, OTHER = pool_of({}, {})


@pytest.mark.parametrize(
    ("parameters", "prompt", "cached", "split"),
    [
        ({}, 100_000, 0, False),
        ({"nonCachedTokens": 0, "promptTokens": 1}, 100_000, 0, False),
        ({"nonCachedTokens": 512}, 511, 0, False),
        ({"nonCachedTokens": 512}, 512, 0, True),
        ({"nonCachedTokens": 512}, 1024, 512, True),
        ({"nonCachedTokens": 512}, 1024, 513, False),
        ({"nonCachedTokens": 512, "promptTokens": 2000}, 1999, 0, False),
        ({"nonCachedTokens": 512, "promptTokens": 2000}, 2000, 0, True),
        ({"nonCachedTokens": 512, "promptTokens": 2000}, 2000, 1488, True),
        ({"nonCachedTokens": 512, "promptTokens": 2000}, 2000, 1489, False),
    ],
)
def test_enough_of_a_long_prompt_must_be_new(parameters: dict[str, object], prompt: int, cached: int, split: bool) -> None:
    decider = msgspec.convert(parameters, PrefixBasedPdDecider)
    assert isinstance(decider, Decider)
    match = PrefixMatch([], [], prompt, {ENDPOINT.slot: cached, OTHER.slot: prompt})
    assert decider.disaggregate(llm_request(prompt_tokens=prompt, prefix=match), ENDPOINT) is split


def test_what_is_cached_is_of_the_endpoint_that_decodes() -> None:
    decider = msgspec.convert({"nonCachedTokens": 512}, PrefixBasedPdDecider)
    request = llm_request(prompt_tokens=1000, prefix=PrefixMatch([], [], 1000, {OTHER.slot: 1000}))
    assert decider.disaggregate(request, ENDPOINT)
    assert not decider.disaggregate(request, OTHER)


def test_a_producer_can_be_named_and_one_that_failed_splits_nothing() -> None:
    decider = msgspec.convert({"nonCachedTokens": 512, "prefixMatchInfoProducerName": "precise"}, PrefixBasedPdDecider)
    everything = PrefixMatch([], [], 1000, {ENDPOINT.slot: 1000})
    nothing = PrefixMatch([], [], 1000, {})
    assert decider.disaggregate(llm_request(prompt_tokens=1000, prefix=everything, attributes={"precise": nothing}), ENDPOINT)
    assert not decider.disaggregate(llm_request(prompt_tokens=1000, prefix=nothing, attributes={"precise": everything}), ENDPOINT)
    assert not decider.disaggregate(llm_request(prompt_tokens=1000, prefix=nothing), ENDPOINT)
    assert "prefix-match" in PrefixBasedPdDecider.requires


@pytest.mark.parametrize("parameters", [{"nonCachedTokens": -1}, {"promptTokens": -1}, {"nonCachedTokens": "many"}, {"tokens": 1}])
def test_wrong_parameters(parameters: dict[str, object]) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(parameters, PrefixBasedPdDecider)


def test_always_is_always() -> None:
    assert msgspec.convert({}, AlwaysDisaggPdDecider).disaggregate(llm_request(), ENDPOINT)


@pytest.mark.parametrize(("media", "split"), [(0, False), (1, True), (7, True)])
def test_requests_with_media(media: int, split: bool) -> None:
    decider = msgspec.convert({}, AlwaysDisaggMultimodalDecider)
    assert decider.disaggregate(llm_request(media=media, prompt_tokens=9), ENDPOINT) is split


@pytest.mark.parametrize("cls", [AlwaysDisaggPdDecider, AlwaysDisaggMultimodalDecider])
def test_they_take_no_parameters(cls: type) -> None:
    with pytest.raises(msgspec.ValidationError, match="nonCachedTokens"):
        msgspec.convert({"nonCachedTokens": 1}, cls)
