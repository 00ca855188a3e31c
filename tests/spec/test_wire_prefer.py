"""`Prefer: if-available`: 412 where the endpoint that was chosen has nothing of the prompt cached."""

from __future__ import annotations

import json

import pytest

from tests.builders import (
    DESTINATION,
    FULL_DUPLEX,
    LLM_D,
    Stream,
    chat,
    core,
    destination_of,
    request_body,
    request_headers,
    request_trailers,
    response_headers,
)
from tests.spec.wire import (
    BUFFERED,
    IDLE,
    IF_AVAILABLE,
    JSON_ANSWER,
    LONG,
    NONE,
    ONE,
    PARTIAL,
    STREAMED,
    TWO,
    Modes,
    answer_of,
    configuration,
    not_available,
    request,
    respond,
    routed,
    told,
)

PRECISE = configuration({"type": "precise-prefix-cache-producer"}, {"type": "precise-prefix-cache-scorer"}, {"type": "queue-scorer"})


@pytest.mark.parametrize("modes", [FULL_DUPLEX, (BUFFERED, NONE), (PARTIAL, NONE), (STREAMED, STREAMED), None], ids=str)
@pytest.mark.parametrize("config", [LLM_D, PRECISE], ids=["approximate", "precise"])
def test_a_conditional_request_goes_only_where_its_prefix_is_cached(config: str, modes: Modes) -> None:
    world = core(3, config=config)
    for _ in range(2):  # a refusal teaches nothing
        refused = request(world, chat(LONG), modes=modes, headers=IF_AVAILABLE)
        assert not_available(refused)
        assert refused.send(request_body(b"more"), request_trailers(), response_headers()) == [], "the answer was the last word"
        refused.close()
    assert world.errors("m") == {"PreconditionFailed": 2}
    assert world.inflight == IDLE
    assert all(each.sent_requests == each.picks_total == 0 for each in world.datastore.endpoints.values())

    first = request(world, chat(LONG), modes=modes)
    cached_at = [each for each in world.datastore.endpoints.values() if each.inflight_requests]
    second = request(world, chat(LONG + "and more"), modes=modes, headers=IF_AVAILABLE)
    assert routed(second)
    assert told(second.got)[0]["envoy.lb"][DESTINATION] == cached_at[0].destination
    assert cached_at[0].inflight_requests == 2
    for stream in (first, second):
        respond(stream, JSON_ANSWER)
        stream.close()
    assert world.inflight == IDLE
    assert world.errors("m") == {"PreconditionFailed": 2}


@pytest.mark.parametrize("modes", [FULL_DUPLEX, (BUFFERED, NONE), (PARTIAL, NONE), (STREAMED, STREAMED), None], ids=str)
def test_nothing_has_to_be_configured_for_conditional_requests(modes: Modes) -> None:
    world = core(8)
    assert not_available(request(world, chat(LONG), modes=modes, headers=IF_AVAILABLE))
    first = request(world, chat(LONG), modes=modes)
    (cached_at,) = [each for each in world.datastore.endpoints.values() if each.inflight_requests]
    respond(first, JSON_ANSWER)
    first.close()
    for _ in range(8):
        stream = request(world, chat(LONG + "and more"), modes=modes, headers=IF_AVAILABLE)
        assert told(stream.got)[0]["envoy.lb"][DESTINATION] == cached_at.destination
        respond(stream, JSON_ANSWER)
        stream.close()
    assert world.inflight == IDLE


def test_who_does_not_ask_is_routed_whether_or_not_a_prefix_is_cached() -> None:
    for headers in ({}, {"prefer": "respond-async"}, {"prefer": ""}, {"x-prefer": "if-available"}):
        assert routed(request(core(3), chat(LONG), headers=headers))


@pytest.mark.parametrize(
    "value",
    [
        "if-available",
        "respond-async, if-available",
        "if-available; wait=1",
        "wait=9,if-available",
        'if-available=""',
        "if-available\t;x",
        'x="a;b, c", If-Available',
        'x="a\\", no"\t,\tif-available , y',
    ],
)
def test_the_preference_may_stand_among_others(value: str) -> None:
    assert not_available(request(core(), chat(LONG), headers={"prefer": value}))


@pytest.mark.parametrize(
    ("value", "asked"),
    [
        ("If-Available", True),
        ("IF-AVAILABLE; x", True),
        ("no-if-available", False),
        ("if-available-soon", False),
        ('x="if-available"', False),
        ('x="a, if-available"', False),
        ('x="a\\", if-available"', False),
        ('x="never ends, if-available', False),
        ("wait; if-available", False),
        ("\u0131f-available", False),
    ],
)
def test_the_preference_is_a_token_in_any_case(value: str, asked: bool) -> None:
    assert not_available(request(core(), chat(LONG), headers={"prefer": value})) == asked


def test_what_counts_is_the_cache_of_the_endpoint_that_was_chosen() -> None:
    world = core(2, config=LLM_D)
    world.read(2, waiting=9.0, kv_usage=0.9)
    assert destination_of(request(world, chat(LONG)).got[0]) == ONE
    world.read(1, waiting=9.0, kv_usage=1.0)
    world.read(2, waiting=0.0, kv_usage=0.0)
    other = request(world, chat(LONG), headers=IF_AVAILABLE)
    assert not_available(other), "the other one is chosen for its load"
    message = json.loads(answer_of(other).body)["error"]["message"]
    assert message == "the endpoint chosen for this request is not known to have a prefix of its prompt cached"
    world.read(1, waiting=0.0, kv_usage=0.0)
    assert routed(request(world, chat(LONG), headers=IF_AVAILABLE))


def test_a_prefix_that_is_cached_outside_the_subset_is_not_available() -> None:
    world = core(2, config=LLM_D)
    world.read(2, waiting=9.0)
    assert destination_of(request(world, chat(LONG)).got[0]) == ONE
    assert not_available(request(world, chat(LONG), headers=IF_AVAILABLE, subset=[TWO]))
    assert routed(request(world, chat(LONG), headers=IF_AVAILABLE, subset=[ONE]))


@pytest.mark.parametrize(
    "other", [chat(LONG, model="another"), chat(LONG, cache_salt="s"), chat("unlike " + LONG)], ids=["model", "salt", "prompt"]
)
def test_another_models_or_tenants_or_prompts_cache_does_not_count(other: bytes) -> None:
    world = core()
    request(world, chat(LONG))
    assert not_available(request(world, other, headers=IF_AVAILABLE))
    assert routed(request(world, chat(LONG), headers=IF_AVAILABLE))


def test_what_can_not_be_known_to_be_cached_is_not_available() -> None:
    """A prompt too short for the index, a request without a prompt, a gateway that does not show it, an index that is not configured."""
    short, world, blind = core(), core(), core(config=configuration({"type": "queue-scorer"}))
    request(short, chat("hi"))
    request(blind, chat(LONG))
    request(world, chat(LONG))
    assert not_available(request(short, chat("hi"), headers=IF_AVAILABLE))
    assert not_available(request(blind, chat(LONG), headers=IF_AVAILABLE))
    assert not_available(request(world, modes=(NONE, NONE), headers=IF_AVAILABLE))
    get = Stream(world.session())
    get.send(request_headers(path="/v1/models", end_of_stream=True, headers=IF_AVAILABLE))
    assert not_available(get)


def test_a_grpc_client_is_told_that_a_precondition_failed() -> None:
    stream = request(core(), chat(LONG), headers={**IF_AVAILABLE, "content-type": "application/grpc"})
    assert answer_of(stream).grpc_status.status == 9
