"""Producers: what they put on a request."""

from __future__ import annotations

import logging
import random

import msgspec
import pytest

from epp.clock import VirtualClock
from epp.plugins.base import Context, Plugin
from epp.plugins.producers.agent_identity import AgentIdentity
from epp.plugins.producers.approx_prefix_cache import ApproxPrefixCacheProducer
from epp.plugins.producers.inflight_load import InflightLoadProducer
from epp.plugins.producers.precise_prefix_cache import PrecisePrefixCacheProducer
from epp.plugins.producers.session_id import SessionIdProducer
from epp.plugins.producers.token import EngineConfig, LocalConfig, LocalModel, TokenProducer, VllmConfig
from epp.types import Decision, LLMRequest, Snapshot
from tests.builders import llm_request, pool_of

CONTEXT = Context(VirtualClock(), random.Random(1), {})
TEXT = bytes(range(256)) * 8  # 512 tokens, 8 blocks of 64

PrefixProducer = ApproxPrefixCacheProducer | PrecisePrefixCacheProducer
PREFIX_PRODUCERS = [ApproxPrefixCacheProducer, PrecisePrefixCacheProducer]


def prompted(text: bytes, **values: object) -> LLMRequest:
    return llm_request(prompt=text, prompt_tokens=-(-len(text) // 4), target_model="m", **values)


# Prefix producers: what was sent where


@pytest.mark.parametrize("cls", PREFIX_PRODUCERS)
def test_an_endpoint_has_what_was_sent_to_it(cls: type[PrefixProducer]) -> None:
    made = cls()
    first, second = pool_of({}, {})
    both = Snapshot.of([first, second])
    request = prompted(TEXT)
    made.produce(request, both)
    assert request.prefix is not None
    assert request.attributes[made.name] is request.prefix
    assert (request.prefix.prompt_tokens, request.prefix.matched_tokens) == (512, {})
    made.picked(request, Decision(first, (), "default"))
    longer = prompted(TEXT + b"more" * 100)
    made.produce(longer, both)
    assert longer.prefix is not None
    assert longer.prefix.matched_tokens == {first.slot: 512}
    for candidates, other in [
        (Snapshot.of([second]), prompted(TEXT)),
        (both, prompted(TEXT, cache_salt="s")),
        (both, llm_request(prompt=TEXT, prompt_tokens=512, target_model="other")),
        (both, prompted(b"x" + TEXT)),
    ]:
        made.produce(other, candidates)
        assert other.prefix is not None
        assert other.prefix.matched_tokens == {}


@pytest.mark.parametrize("cls", PREFIX_PRODUCERS)
def test_who_prefills_a_prompt_has_it_too_and_who_served_it_in_the_end(cls: type[PrefixProducer]) -> None:
    made = cls()
    decode, prefill, encode, retry, other = pool = pool_of({}, {}, {}, {}, {})
    request = prompted(TEXT)
    made.produce(request, Snapshot.of(pool))
    made.picked(request, Decision(decode, (other,), "decode", {"prefill": prefill, "encode": encode}))
    made.served(request, retry)
    again = prompted(TEXT)
    made.produce(again, Snapshot.of(pool))
    assert again.prefix is not None
    assert again.prefix.matched_tokens == {decode.slot: 512, prefill.slot: 512, retry.slot: 512}


@pytest.mark.parametrize("cls", PREFIX_PRODUCERS)
def test_a_request_without_a_prompt_has_no_prefix(cls: type[PrefixProducer]) -> None:
    made = cls()
    (endpoint,) = pool_of({})
    request = llm_request()
    made.produce(request, Snapshot.of([endpoint]))
    assert (request.prefix, request.attributes) == (None, {})
    made.picked(request, Decision(endpoint, (), "default"))
    made.served(request, endpoint)
    assert made.index.blocks == 0


def test_the_first_producer_is_the_one_for_scorers_that_name_none() -> None:
    one, two = ApproxPrefixCacheProducer(), PrecisePrefixCacheProducer()
    one.named("one")
    (endpoint,) = pool_of({})
    for number in range(2):
        request = prompted(TEXT)
        one.produce(request, Snapshot.of([endpoint]))
        two.produce(request, Snapshot.of([endpoint]))
        assert request.prefix is request.attributes["one"]
        assert request.prefix is not request.attributes["precise-prefix-cache-producer"]
        matches = [request.attributes[name].matched_tokens for name in ("one", "precise-prefix-cache-producer")]
        assert matches == ([{}, {}] if number == 0 else [{0: 512}, {}]), "each knows what it was told"
        one.picked(request, Decision(endpoint, (), "default"))


@pytest.mark.parametrize("auto_tune", [True, False])
def test_the_engines_own_cache_bounds_what_is_remembered_if_auto_tune_is_on(auto_tune: bool) -> None:
    made = ApproxPrefixCacheProducer(auto_tune=auto_tune)
    (endpoint,) = pool_of({"kv_capacity_tokens": 64 * 10})
    for number in range(100):
        request = prompted(number.to_bytes(256, "big") + bytes(256))
        made.produce(request, Snapshot.of([endpoint]))
        made.picked(request, Decision(endpoint, (), "default"))
    assert made.index.held_blocks(0) <= 20 if auto_tune else made.index.held_blocks(0) == 200


@pytest.mark.parametrize(
    ("cls", "parameters", "blocks"),
    [
        (ApproxPrefixCacheProducer, {}, 128),
        (ApproxPrefixCacheProducer, {"blockGrowth": "uniform"}, 2_048),
        (ApproxPrefixCacheProducer, {"blockSizeTokens": 128, "blockGrowth": "uniform"}, 1_024),
        (ApproxPrefixCacheProducer, {"maxPrefixTokensToMatch": 6_400, "blockGrowth": "uniform"}, 100),
        (ApproxPrefixCacheProducer, {"maxPrefixTokensToMatch": 0, "maxPrefixBlocksToMatch": 50, "blockGrowth": "uniform"}, 50),
        (ApproxPrefixCacheProducer, {"maxPrefixTokensToMatch": 0, "maxPrefixBlocksToMatch": 0, "blockGrowth": "uniform"}, 2_048),
        (PrecisePrefixCacheProducer, {}, 2_048),
        (PrecisePrefixCacheProducer, {"tokenProcessorConfig": {"blockSizeTokens": 16}}, 2_048),
        (PrecisePrefixCacheProducer, {"tokenProcessorConfig": {"blockSizeTokens": 256}}, 512),
        (PrecisePrefixCacheProducer, {"tokenProcessorConfig": {"blockSize": 128}}, 1_024),
        (PrecisePrefixCacheProducer, {"tokenProcessorConfig": {"blockSize": 128, "blockSizeTokens": 256}}, 512),
    ],
)
def test_how_many_blocks_a_long_prompt_is_cut_into(cls: type[PrefixProducer], parameters: dict[str, object], blocks: int) -> None:
    made = msgspec.convert(parameters, cls)
    request = prompted(bytes(4 * 131_072))
    made.produce(request, Snapshot.of(pool_of({})))
    assert request.prefix is not None
    assert len(request.prefix.hashes) == blocks


EVERYTHING_PRECISE: dict[str, object] = {
    "tokenProcessorConfig": {"blockSizeTokens": 64, "hashSeed": "42", "hashAlgorithm": "cbor-fnv"},
    "indexerConfig": {
        "kvBlockIndexConfig": {
            "inMemoryConfig": {"size": 1_000, "podCacheSize": 20},
            "redisConfig": {"address": "redis://10.0.0.1:6379", "backendType": "redis", "enableRDMA": False},
            "costAwareMemoryConfig": {"size": "2GiB"},
            "enableMetrics": True,
            "metricsLoggingInterval": 60_000_000_000,
        },
        "kvCacheBackendConfigs": [{"name": "gpu", "weight": 1.0}, {"name": "cpu", "weight": 0.8}],
    },
    "kvEventsConfig": {
        "zmqEndpoint": "tcp://*:5557",
        "topicFilter": "kv@",
        "concurrency": 8,
        "engineType": "sglang",
        "discoverPods": False,
        "podDiscoveryConfig": {"podLabelSelector": "app=vllm", "podNamespace": "x", "socketPort": 5556, "replaySocketPort": 5558},
    },
    "speculativeIndexing": True,
    "speculativeTTL": "2s",
}


def test_every_parameter_of_the_precise_producer_is_accepted() -> None:
    made = msgspec.convert(EVERYTHING_PRECISE, PrecisePrefixCacheProducer)
    assert made.kv_events_config.pod_discovery_config is not None
    assert made.kv_events_config.pod_discovery_config.socket_port == 5556
    assert [tier.weight for tier in made.indexer_config.kv_cache_backend_configs] == [1.0, 0.8]


@pytest.mark.parametrize(
    ("parameters", "place"),
    [
        ({"blockSize": 16}, "blockSize"),
        ({"tokenProcessorConfig": {"blockSizes": 16}}, "blockSizes"),
        ({"tokenProcessorConfig": {"hashAlgorithm": "md5"}}, "hashAlgorithm"),
        ({"indexerConfig": {"tokenizersPoolConfig": {}}}, "tokenizersPoolConfig"),
        ({"indexerConfig": {"kvBlockIndexConfig": {"costAwareMemoryConfig": {"size": "2 gigs"}}}}, "size"),
        ({"indexerConfig": {"kvCacheBackendConfigs": [{"weight": 1.0}]}}, "name"),
        ({"kvEventsConfig": {"engineType": "triton"}}, "engineType"),
        ({"kvEventsConfig": {"podDiscoveryConfig": {"socketPort": 70_000}}}, "socketPort"),
        ({"speculativeTTL": "soon"}, "speculativeTTL"),
    ],
)
def test_wrong_parameters_of_the_precise_producer(parameters: dict[str, object], place: str) -> None:
    with pytest.raises(msgspec.ValidationError, match=place):
        msgspec.convert(parameters, PrecisePrefixCacheProducer)


# inflight-load-producer


@pytest.mark.parametrize(
    ("parameters", "output_max", "tokens"),
    [
        ({}, None, 300),
        ({"addEstimatedOutputTokens": True}, None, 300 + 1500),
        ({"addEstimatedOutputTokens": True, "outputRatio": 0.5}, None, 300 + 500),
        ({"addEstimatedOutputTokens": True, "maxEstimatedOutputTokens": 100}, None, 300 + 100),
        ({"addEstimatedOutputTokens": True}, 64, 300 + 64),
        ({"addEstimatedOutputTokens": True, "maxEstimatedOutputTokens": 32}, 64, 300 + 32),
    ],
)
def test_what_a_request_weighs(parameters: dict[str, object], output_max: int | None, tokens: int) -> None:
    made = msgspec.convert(parameters, InflightLoadProducer)
    assert made.charge(llm_request(prompt_tokens=1000, max_output_tokens=output_max), 300) == tokens


# token-producer


@pytest.mark.parametrize(
    ("parameters", "warnings"),
    [
        ({}, 0),
        ({"estimate": {}}, 0),
        ({"backend": "estimate"}, 0),
        ({"estimate": {"image": {"mode": "static", "static": {"staticToken": 256}}}}, 1),
        ({"modelName": "m"}, 0),
        ({"backend": "vllm", "modelName": "m", "vllm": {"url": "http://localhost:8000", "timeout": "5s", "mmTimeout": "30s"}}, 0),
        ({"local": {"models": [{"name": "m", "path": "/models/m"}]}}, 0),
        ({"modelName": "m", "udsTokenizerConfig": {"socketFile": "/tmp/s", "useTCP": False}}, 1),
        ({"backend": "uds"}, 1),
        ({"udsTokenizerConfig": {}}, 0),
    ],
)
def test_a_tokenizer_that_does_not_run_is_told_of_once(
    parameters: dict[str, object], warnings: int, caplog: pytest.LogCaptureFixture
) -> None:
    made = msgspec.convert(parameters, TokenProducer)
    with caplog.at_level(logging.WARNING, "epp"):
        made.bind(CONTEXT)
    assert len(caplog.records) == warnings
    request = prompted(TEXT)
    made.produce(request, Snapshot.of(pool_of({})))
    assert (request.prompt_tokens, request.attributes) == (512, {}), "the parser has counted"


@pytest.mark.parametrize(
    ("parameters", "exact"),
    [
        ({}, None),
        ({"estimate": {}}, None),
        ({"backend": "estimate"}, None),
        ({"modelName": "m"}, VllmConfig()),
        ({"backend": "vllm"}, VllmConfig()),
        ({"vllm": {"url": "https://render:8000", "timeout": "1s"}, "modelName": "m"}, VllmConfig(url="https://render:8000", timeout="1s")),
        ({"backend": "engine"}, EngineConfig()),
        ({"engine": {"timeout": "100ms", "inFlightMax": 8}}, EngineConfig(timeout="100ms", in_flight_max=8)),
        (
            {"backend": "local", "local": {"models": [{"name": "m", "path": "/m", "aliases": ["a"], "chatTemplate": "/t"}], "workers": 4}},
            LocalConfig(models=(LocalModel(name="m", path="/m", aliases=("a",), chat_template="/t"),), workers=4),
        ),
        ({"modelName": "m", "udsTokenizerConfig": {"socketFile": "/tmp/s"}}, None),
    ],
)
def test_how_a_configuration_wants_its_prompts_tokenized(parameters: dict[str, object], exact: object) -> None:
    assert msgspec.convert(parameters, TokenProducer).exact == exact


@pytest.mark.parametrize(
    "parameters",
    [
        {"estimate": {}, "modelName": "m"},
        {"estimate": {}, "vllm": {}, "modelName": "m"},
        {"vllm": {}, "modelName": "m", "udsTokenizerConfig": {"socketFile": "/tmp/s"}},
        {"vllm": {}},
        {"vllm": {"timeout": "5 seconds"}, "modelName": "m"},
        {"vllm": {"timeout": "0s"}, "modelName": "m"},
        {"vllm": {"url": "localhost:8000"}, "modelName": "m"},
        {"vllm": {"uri": "x"}, "modelName": "m"},
        {"backend": "hf"},
        {"backend": "local"},
        {"local": {}},
        {"local": {"models": []}},
        {"local": {"models": [{"name": "m"}]}},
        {"local": {"models": [{"name": "m", "path": "/a"}, {"name": "n", "path": "/b", "aliases": ["m"]}]}},
        {"local": {"models": [{"name": "m", "path": "/a"}], "workers": 0}},
        {"local": {"models": [{"name": "m", "path": "/a"}]}, "modelName": "m"},
        {"local": {"models": [{"name": "m", "path": "/a"}]}, "engine": {}},
        {"engine": {"scheme": "ftp"}},
        {"model": "m"},
    ],
)
def test_wrong_parameters_of_the_token_producer(parameters: dict[str, object]) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(parameters, TokenProducer)


def test_the_old_name_of_the_token_producer() -> None:
    assert TokenProducer.aliases == ("tokenizer",)
    assert TokenProducer.produces == ("tokens",)


# session-id-producer


@pytest.mark.parametrize(
    ("parameters", "headers", "session"),
    [
        ({}, {"x-session-id": "s"}, "s"),
        ({}, {"x-other": "s"}, None),
        ({"headerName": "X-Chat"}, {"x-chat": " s ", "x-session-id": "t"}, "s"),
        ({"headerName": "X-Chat"}, {"x-session-id": "t"}, None),
        ({"headerName": "X-Chat"}, {"x-chat": "  "}, None),
        ({"cookieName": "sid"}, {"cookie": "a=1; sid=s; b=2"}, "s"),
        ({"cookieName": "sid"}, {"cookie": "sid=first;sid=second"}, "first"),
        ({"cookieName": "sid"}, {"cookie": "sid=a=b"}, "a=b"),
        ({"cookieName": "sid"}, {"cookie": "SID=s; sids=t; xsid=u; sid"}, None),
        ({"cookieName": "sid"}, {"x-session-id": "t"}, None),
    ],
)
def test_a_request_belongs_to_a_session(parameters: dict[str, object], headers: dict[str, str], session: str | None) -> None:
    made = msgspec.convert(parameters, SessionIdProducer)
    made.named("mine")
    request = llm_request(headers=headers)
    made.produce(request, Snapshot.of(pool_of({})))
    assert request.attributes == ({"session-id": session, "mine": session} if session else {})


def test_the_first_session_producer_that_finds_one_decides() -> None:
    by_cookie = msgspec.convert({"cookieName": "sid"}, SessionIdProducer)
    by_header = msgspec.convert({}, SessionIdProducer)
    by_cookie.named("by-cookie")
    request = llm_request(headers={"cookie": "sid=c", "x-session-id": "h"})
    for made in (by_cookie, by_header):
        made.produce(request, Snapshot.of(()))
    assert request.attributes == {"session-id": "c", "by-cookie": "c", "session-id-producer": "h"}


def test_a_session_has_one_source() -> None:
    with pytest.raises(msgspec.ValidationError, match="either headerName or cookieName"):
        msgspec.convert({"headerName": "a", "cookieName": "b"}, SessionIdProducer)


# agent-identity


@pytest.mark.parametrize(
    ("parameters", "headers", "given", "fairness_id", "identity"),
    [
        ({}, {}, "", "", None),
        ({}, {"x-claude-code-session-id": "1", "x-session-affinity": "2"}, "", "1", "1"),
        ({}, {"x-session-affinity": "2", "session-id": "3"}, "", "2", "2"),
        ({}, {"session-id": "3", "session_id": "4"}, "", "3", "3"),
        ({}, {"session_id": "4"}, "", "4", "4"),
        ({}, {"session_id": ""}, "", "", None),
        ({}, {"session_id": "x" * 300}, "", "x" * 256, "x" * 256),
        ({}, {"session_id": "4"}, "team", "team", "4"),
        ({"additionalSessionHeaders": ["X-Mine", "x-other"]}, {"x-mine": "0", "x-claude-code-session-id": "1"}, "", "0", "0"),
        ({"additionalSessionHeaders": ["X-Mine", "x-other"]}, {"x-claude-code-session-id": "1"}, "", "1", "1"),
    ],
)
def test_an_agents_session_is_its_fairness_id(
    *, parameters: dict[str, object], headers: dict[str, str], given: str, fairness_id: str, identity: str | None
) -> None:
    request = llm_request(headers=headers, fairness_id=given)
    msgspec.convert(parameters, AgentIdentity).produce(request, Snapshot.of(()))
    assert request.fairness_id == fairness_id
    assert request.attributes.get("agent-identity") == identity


@pytest.mark.parametrize("cls", [*PREFIX_PRODUCERS, InflightLoadProducer, TokenProducer, SessionIdProducer, AgentIdentity])
def test_every_producer_says_what_it_produces_and_refuses_what_it_does_not_know(cls: type[Plugin]) -> None:
    assert cls.produces
    assert cls.stability == "beta"
    with pytest.raises(msgspec.ValidationError, match="noSuchParameter"):
        msgspec.convert({"noSuchParameter": 1}, cls)
