"""session-affinity-filter and session-affinity-scorer: a session stays where it is."""

from __future__ import annotations

import base64
import random
from collections.abc import Sequence
from typing import Any

import pytest

from epp.clock import VirtualClock
from epp.plugins.base import Context
from epp.plugins.registry import Registry
from epp.plugins.session_binding import SWEPT_MAX, SessionBindings, SessionTokens
from epp.types import Decision, Endpoint, LLMRequest
from tests.builders import llm_request, pool_of
from tests.contract.situations import NOW_S, Case, built

BOTH = ["session-affinity-filter", "session-affinity-scorer"]
KEY = "a key of sixteen bytes or more"


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EPP_SESSION_KEY", KEY)


def plugin_of(case: Case, endpoints: Sequence[Endpoint] = (), *, clock: VirtualClock | None = None) -> Any:
    plugin: Any = built(case.type, **case.parameters)
    plugin.bind(Context(clock or VirtualClock(NOW_S), random.Random(1), {plugin.name: plugin}))
    for endpoint in endpoints:
        plugin.added(endpoint)
    return plugin


def chosen(plugin: Any, request: LLMRequest, endpoints: Sequence[Endpoint]) -> list[int]:
    """Slots the plugin is for; all when it has no opinion."""
    if plugin.type == "session-affinity-filter":
        return [e.slot for e in plugin.keep(request, tuple(endpoints))]
    scores = plugin.score(request, tuple(endpoints))
    return [e.slot for e, score in zip(endpoints, scores, strict=True) if score == 1.0] or [e.slot for e in endpoints]


def went_to(endpoint: Endpoint, profile: str = "default", **targets: Endpoint) -> Decision:
    return Decision(endpoint, (), profile, targets)


# Tokens


@pytest.mark.parametrize("type_", BOTH)
def test_a_response_carries_a_token_that_brings_the_client_back(type_: str) -> None:
    endpoints = pool_of({}, {}, {})
    plugin = plugin_of(Case(type_), endpoints)
    first = llm_request()
    assert chosen(plugin, first, endpoints) == [0, 1, 2]
    plugin.picked(first, went_to(endpoints[1]))
    (header, token), *_ = plugin.response_headers(first, endpoints[1]).items()
    assert header == "x-session-token"
    name, _, signature = token.partition(".")
    assert base64.b64decode(name) == b"default/pod-2"
    assert len(base64.urlsafe_b64decode(signature + "==")) == 16
    back = llm_request(headers={"x-session-token": token})
    assert chosen(plugin, back, endpoints) == [1]
    assert chosen(plugin, back, [endpoints[0], endpoints[2]]) == [0, 2], "no candidate: no opinion"


@pytest.mark.parametrize("type_", BOTH)
def test_the_token_is_of_whom_the_response_is_from(type_: str) -> None:
    endpoints = pool_of({}, {})
    plugin = plugin_of(Case(type_), endpoints)
    request = llm_request()
    plugin.picked(request, went_to(endpoints[0]))
    token = plugin.response_headers(request, endpoints[1])["x-session-token"]
    assert chosen(plugin, llm_request(headers={"x-session-token": token}), endpoints) == [1]


@pytest.mark.parametrize("type_", BOTH)
@pytest.mark.parametrize(
    "token",
    [
        "",
        base64.b64encode(b"default/pod-2").decode(),  # what the reference picker would take: nobody signed it
        base64.b64encode(b"default/pod-2").decode() + ".",
        base64.b64encode(b"default/pod-2").decode() + "." + "A" * 22,
        "." * 5,
        "\u20ac",
    ],
)
def test_a_token_that_is_not_ours_means_nothing(type_: str, token: str) -> None:
    endpoints = pool_of({}, {})
    plugin = plugin_of(Case(type_), endpoints)
    assert chosen(plugin, llm_request(headers={"x-session-token": token}), endpoints) == [0, 1]


@pytest.mark.parametrize("type_", BOTH)
def test_replicas_with_one_key_know_each_others_tokens_and_others_do_not(type_: str, monkeypatch: pytest.MonkeyPatch) -> None:
    here, there = pool_of({}, {}), pool_of({}, {})
    token = plugin_of(Case(type_), here).response_headers(llm_request(), here[1])["x-session-token"]
    back = llm_request(headers={"x-session-token": token})
    assert chosen(plugin_of(Case(type_), there), back, there) == [1]
    monkeypatch.setenv("EPP_SESSION_KEY", "another key of sixteen bytes")
    assert chosen(plugin_of(Case(type_), there), back, there) == [0, 1]
    monkeypatch.delenv("EPP_SESSION_KEY")
    one, two = plugin_of(Case(type_), there), plugin_of(Case(type_), there)
    tokens = {each.response_headers(llm_request(), there[0])["x-session-token"] for each in (one, two)}
    assert len(tokens) == 2, "without a key each process has its own"


@pytest.mark.parametrize("type_", BOTH)
def test_a_short_key_is_a_fault(type_: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EPP_SESSION_KEY", "short")
    with pytest.raises(ValueError, match="EPP_SESSION_KEY") as caught:
        plugin_of(Case(type_))
    assert "short" not in str(caught.value)


@pytest.mark.parametrize("type_", BOTH)
def test_an_endpoint_that_is_gone_has_no_token(type_: str) -> None:
    endpoints = pool_of({}, {})
    plugin = plugin_of(Case(type_), endpoints)
    token = plugin.response_headers(llm_request(), endpoints[0])["x-session-token"]
    plugin.removed(endpoints[0])
    assert chosen(plugin, llm_request(headers={"x-session-token": token}), endpoints) == [0, 1]
    assert plugin.response_headers(llm_request(), endpoints[0]) is None


def test_another_pod_at_the_same_address_is_not_the_one_before() -> None:
    """A relabelled endpoint stays the same object, under another name."""
    (endpoint,) = pool_of({})
    tokens = SessionTokens(b"key")
    tokens.add(endpoint)
    before = tokens.token_of(endpoint)
    assert tokens.endpoint_of(before) is endpoint
    endpoint.name = "pod-99"
    assert tokens.endpoint_of(before) is None
    assert tokens.endpoint_of(tokens.token_of(endpoint)) is endpoint


@pytest.mark.parametrize("type_", BOTH)
def test_a_prefill_and_a_decode_instance_pin_a_stage_each(type_: str) -> None:
    endpoints = pool_of({}, {}, {})
    decode = plugin_of(Case(type_), endpoints)
    prefill = plugin_of(
        Case(type_, {"profileName": "prefill", "encodedEndpointHeaderConfig": {"header": "X-Session-Token-Prefill"}}), endpoints
    )
    request, decision = llm_request(), went_to(endpoints[2], "decode", prefill=endpoints[0])
    headers: dict[str, str] = {}
    for each in (decode, prefill):
        each.picked(request, decision)
        headers |= each.response_headers(request, endpoints[2])
    assert headers.keys() == {"x-session-token", "x-session-token-prefill"}
    back = llm_request(headers=headers)
    assert chosen(decode, back, endpoints) == [2]
    assert chosen(prefill, back, endpoints) == [0]
    alone = llm_request()
    prefill.picked(alone, went_to(endpoints[2], "decode"))
    assert prefill.response_headers(alone, endpoints[2]) is None, "there was no prefill stage"
    named = plugin_of(Case(type_, {"profileName": "decode"}), endpoints)
    named.picked(alone, went_to(endpoints[2], "decode"))
    assert named.response_headers(alone, endpoints[2]) == decode.response_headers(alone, endpoints[2]), "the destination's own stage"


# Ids

BY_ID = {"strategy": "session_id"}


def of_session(name: str = "s1", **more: Any) -> LLMRequest:
    return llm_request(headers={"x-session-id": name}, **more)


@pytest.mark.parametrize("type_", BOTH)
def test_a_session_comes_back_to_where_it_went_and_nothing_is_written(type_: str) -> None:
    endpoints = pool_of({}, {}, {})
    plugin = plugin_of(Case(type_, BY_ID), endpoints)
    assert chosen(plugin, of_session(), endpoints) == [0, 1, 2]
    plugin.picked(of_session(), went_to(endpoints[1]))
    for _ in range(10):
        assert chosen(plugin, of_session(), endpoints) == [1]
        plugin.picked(of_session(), went_to(endpoints[1]))
    assert chosen(plugin, of_session("s2"), endpoints) == [0, 1, 2]
    assert chosen(plugin, llm_request(), endpoints) == [0, 1, 2]
    assert plugin.response_headers(of_session(), endpoints[1]) is None


@pytest.mark.parametrize("type_", BOTH)
def test_a_session_is_bound_anew_only_when_its_endpoint_is_gone(type_: str) -> None:
    endpoints = pool_of({}, {}, {})
    plugin = plugin_of(Case(type_, BY_ID), endpoints)
    plugin.picked(of_session(), went_to(endpoints[1]))
    plugin.picked(of_session(), went_to(endpoints[2]))  # outweighed, or filtered out, this once
    assert chosen(plugin, of_session(), endpoints) == [1]
    endpoints[1].healthy = False
    plugin.picked(of_session(), went_to(endpoints[2]))
    assert chosen(plugin, of_session(), endpoints) == [2], "one that fails takes no requests"
    endpoints[1].healthy = True
    plugin.picked(of_session(), went_to(endpoints[2]))
    assert chosen(plugin, of_session(), endpoints) == [2]
    plugin.removed(endpoints[2])
    assert chosen(plugin, of_session(), endpoints) == [0, 1, 2]
    plugin.picked(of_session(), went_to(endpoints[0]))
    assert chosen(plugin, of_session(), endpoints) == [0]
    plugin.served(of_session(), endpoints[1])
    assert chosen(plugin, of_session(), endpoints) == [1], "the gateway tried another, and that one has the session's cache now"


@pytest.mark.parametrize("type_", BOTH)
def test_a_session_is_forgotten_when_unused(type_: str) -> None:
    clock = VirtualClock(NOW_S)
    endpoints = pool_of({}, {})
    plugin = plugin_of(Case(type_, {**BY_ID, "sessionIdConfig": {"evictionTtlSeconds": 60}}), endpoints, clock=clock)
    plugin.picked(of_session(), went_to(endpoints[1]))
    clock.advance(59)
    assert chosen(plugin, of_session(), endpoints) == [1]
    plugin.picked(of_session(), went_to(endpoints[1]))
    clock.advance(59)
    assert chosen(plugin, of_session(), endpoints) == [1], "used since"
    clock.advance(2)
    assert chosen(plugin, of_session(), endpoints) == [0, 1]


@pytest.mark.parametrize("type_", BOTH)
def test_the_first_source_that_has_an_id_tells_the_session(type_: str) -> None:
    sources = [{"header": "X-Mine"}, {"attribute": "session-id", "producer": "mine"}, {"attribute": "agent-identity"}]
    endpoints = pool_of({}, {})
    plugin = plugin_of(Case(type_, {**BY_ID, "sessionIdConfig": {"sources": sources}}), endpoints)
    plugin.picked(llm_request(headers={"x-mine": "a"}), went_to(endpoints[1]))
    for headers, attributes, slots in (
        ({"x-mine": " a "}, {"agent-identity": "b"}, [1]),
        ({"x-mine": " "}, {"agent-identity": "a"}, [1]),
        ({}, {"mine": "a", "agent-identity": "b"}, [1]),
        ({}, {"session-id": "a"}, [1]),
        ({}, {"agent-identity": "b"}, [0, 1]),
        ({}, {"agent-identity": 7}, [0, 1]),
        ({"x-session-id": "a"}, {}, [0, 1]),
    ):
        assert chosen(plugin, llm_request(headers=headers, attributes=attributes), endpoints) == slots


@pytest.mark.parametrize("type_", BOTH)
def test_a_session_has_a_binding_per_stage(type_: str) -> None:
    endpoints = pool_of({}, {})
    decode = plugin_of(Case(type_, BY_ID), endpoints)
    prefill = plugin_of(Case(type_, {**BY_ID, "profileName": "prefill"}), endpoints)
    for each in (decode, prefill):
        each.picked(of_session(), went_to(endpoints[1], "decode", prefill=endpoints[0]))
    assert (chosen(decode, of_session(), endpoints), chosen(prefill, of_session(), endpoints)) == ([1], [0])
    prefill.picked(of_session("s2"), went_to(endpoints[1], "decode"))
    assert chosen(prefill, of_session("s2"), endpoints) == [0, 1], "there was no prefill stage"


def test_sessions_are_bounded_and_the_longest_unused_goes_first() -> None:
    (endpoint,) = pool_of({})
    bindings = SessionBindings(300.0, 3)
    bindings.add(endpoint)
    for number, session in enumerate(["a", "b", "c", "a", "d"]):
        bindings.bind(session, endpoint, float(number))
    assert [session for session in "abcd" if bindings.endpoint_of(session, 5.0)] == ["a", "c", "d"]
    assert (len(bindings), bindings.evicted_total) == (3, 1)


def test_expired_sessions_are_swept_a_few_at_a_time() -> None:
    (endpoint,) = pool_of({})
    bindings = SessionBindings(10.0, 1000)
    bindings.add(endpoint)
    for number in range(100):
        bindings.bind(f"s{number}", endpoint, 0.0)
    bindings.bind("later", endpoint, 11.0)
    assert len(bindings) == 101 - SWEPT_MAX
    for number in range(100):
        bindings.bind(f"t{number}", endpoint, 11.0)
    assert len(bindings) == 101
    assert bindings.evicted_total == 0


def test_a_long_id_is_an_id_too_but_not_kept() -> None:
    (endpoint,) = pool_of({})
    bindings = SessionBindings(10.0, 1000)
    bindings.add(endpoint)
    bindings.bind("x" * 5000 + "\udcff", endpoint, 0.0)
    assert bindings.endpoint_of("x" * 5000 + "\udcff", 1.0) is endpoint
    assert bindings.endpoint_of("x" * 5001 + "\udcff", 1.0) is None
    assert max(len(key) for key in bindings._bound) <= 64


@pytest.mark.parametrize(
    ("parameters", "at"),
    [
        ({"strategy": "cookie"}, "strategy"),
        ({"sessionIdConfig": {"sources": [{"header": "a", "attribute": "b"}]}}, "sessionIdConfig.sources[0]"),
        ({"sessionIdConfig": {"sources": [{}]}}, "sessionIdConfig.sources[0]"),
        ({"sessionIdConfig": {"evictionTtlSeconds": 0}}, "sessionIdConfig.evictionTtlSeconds"),
        ({"encodedEndpointHeaderConfig": {"header": ""}}, "encodedEndpointHeaderConfig.header"),
    ],
)
@pytest.mark.parametrize("type_", BOTH)
def test_parameters_that_make_no_sense_are_a_problem_where_they_stand(type_: str, parameters: dict[str, Any], at: str) -> None:
    (problem,) = Registry().problems(type_, parameters, "p")
    assert problem.path == f"p.parameters.{at}"
