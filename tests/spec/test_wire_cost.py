"""request-attribute-reporter: a number of a response's cost, with its last piece."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from epp.resources import Choice, Rewrite, Rule
from tests.builders import (
    FULL_DUPLEX,
    Stream,
    chat,
    core,
    echoed,
    kinds,
    pieces,
    request_headers,
    request_trailers,
    response_body,
    response_headers,
    response_trailers,
)
from tests.spec.wire import (
    BUFFERED,
    FULL,
    IDLE,
    JSON_ANSWER,
    NONE,
    PARTIAL,
    SSE_ANSWER,
    STREAMED,
    Modes,
    configuration,
    failures,
    request,
    respond,
    told,
)


def reporter(name: str, expression: str, *, condition: str = "", **key: str) -> dict[str, Any]:
    attribute = {"key": {"name": name, **key}, "expression": expression, "condition": condition}
    return {"name": f"{name}-reporter", "type": "request-attribute-reporter", "parameters": {"attributes": [attribute]}}


COST = configuration({"type": "queue-scorer"}, reporter("cost", "usage.prompt_tokens + 10 * usage.completion_tokens"))
RESPONSES_SSE = (
    b'event: response.created\ndata: {"type":"response.created","response":{"id":"r","usage":null}}\n\n'
    b'event: response.completed\ndata: {"type":"response.completed","response":{"usage":{"input_tokens":7,"output_tokens":3}}}\n\n'
)
ANTHROPIC_SSE = (
    b'event: message_start\ndata: {"type":"message_start","message":{"usage":{"input_tokens":7,"output_tokens":1}}}\n\n'
    b'event: message_delta\ndata: {"type":"message_delta","delta":{},"usage":{"output_tokens":3}}\n\n'
    b'event: message_stop\ndata: {"type":"message_stop"}\n\n'
)
ANTHROPIC_JSON = b'{"type":"message","content":[],"usage":{"input_tokens":7,"output_tokens":3}}'
RESPONSES_REQUEST, MESSAGES_REQUEST = b'{"model":"m","input":"hi"}', chat(max_tokens=9)
ANSWERS = {
    # path, request, content type, answer
    "whole": ("/v1/chat/completions", chat(), "application/json", JSON_ANSWER),
    "streamed": ("/v1/chat/completions", chat(stream=True), "text/event-stream; charset=utf-8", SSE_ANSWER),
    "responses, streamed": ("/v1/responses", RESPONSES_REQUEST, "text/event-stream", RESPONSES_SSE),
    "messages, streamed": ("/v1/messages", MESSAGES_REQUEST, "text/event-stream", ANTHROPIC_SSE),
    "messages, whole": ("/v1/messages", MESSAGES_REQUEST, "application/json", ANTHROPIC_JSON),
}
RESPONSE_MODES = [
    FULL_DUPLEX,
    (FULL, STREAMED),
    (FULL, BUFFERED),
    (FULL, PARTIAL),
    (BUFFERED, FULL),
    (BUFFERED, STREAMED),
    (BUFFERED, BUFFERED),
    (PARTIAL, PARTIAL),
    (STREAMED, STREAMED),
    None,
]
WHOLE_MODES = (BUFFERED, PARTIAL)
"""In these the gateway sends a response's body in one message."""


def cost(usage: str, *plugins: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What is told of a response that has this `usage`."""
    world = core(config=configuration({"type": "queue-scorer"}, *plugins))
    found = told(respond(request(world), b'{"usage":%s}' % usage.encode()))
    assert world.inflight == IDLE
    return found


@pytest.mark.parametrize("size", [1, 7, 64, 100_000])
@pytest.mark.parametrize("modes", RESPONSE_MODES, ids=str)
@pytest.mark.parametrize("answer", ANSWERS)
def test_what_a_response_cost_is_told_with_its_last_piece(answer: str, modes: Modes, size: int) -> None:
    path, asked, content_type, body = ANSWERS[answer]
    whole = modes is not None and modes[1] in WHOLE_MODES
    world = core(config=COST)
    stream = request(world, asked, modes=modes, path=path)
    parts = [body] if whole else [*pieces(body, size), b""]  # over HTTP/1 the end is a piece of its own
    replies = respond(stream, *parts, content_type=content_type)
    assert kinds(replies) == ["response_headers", *["response_body"] * len(parts)]
    *before, last = replies
    assert told(before) == []
    assert told([last]) == [{"envoy.lb": {"cost": 37.0}}]
    if modes is None or modes[1] is FULL:
        assert echoed(replies, "response_body") == body
    else:
        assert all(not reply.response_body.HasField("response") for reply in replies[1:]), "the body stays as it is"
    stream.close()
    assert world.inflight == IDLE
    assert world.errors("m") == {}


@pytest.mark.parametrize("modes", RESPONSE_MODES, ids=str)
def test_the_last_piece_may_have_the_whole_answer_in_it(modes: Modes) -> None:
    assert told(respond(request(core(config=COST), modes=modes), JSON_ANSWER)) == [{"envoy.lb": {"cost": 37.0}}]


def test_a_cost_is_told_once() -> None:
    stream = request(core(config=COST))
    respond(stream, JSON_ANSWER)
    assert told(stream.send(response_body(end_of_stream=True), response_body(JSON_ANSWER, end_of_stream=True), response_trailers())) == []


@pytest.mark.parametrize(
    ("status", "content_type", "parts"),
    [
        (200, "application/json", [b'{"choices":[]}']),
        (200, "application/json", [b'{"usage":null}']),
        (200, "application/json", [b'{"usage":{}}']),
        (200, "application/json", [b'{"usage":{"prompt_tokens":7}}']),
        (200, "application/json", [b'{"usage":{"prompt_tokens":-1,"completion_tokens":3}}']),
        (200, "application/json", [b'{"usage":{"prompt_tokens":1e3,"completion_tokens":"3"}}']),
        (200, "application/json", [b"not JSON"]),
        (200, "application/json", [b""]),
        (200, "application/json", [JSON_ANSWER[:-2]]),
        (200, "text/event-stream", [b"data: {}\n\n", b"data: [DONE]\n\n"]),
        (200, "text/event-stream", [JSON_ANSWER]),
        (500, "application/json", [JSON_ANSWER]),
        (400, "text/event-stream", [SSE_ANSWER]),
    ],
)
def test_nothing_is_told_of_a_response_that_does_not_say_what_it_cost(status: int, content_type: str, parts: list[bytes]) -> None:
    world = core(config=COST)
    stream = request(world)
    assert told(respond(stream, *parts, content_type=content_type, status=status)) == []
    assert world.inflight == IDLE


def test_nothing_is_told_of_a_response_that_has_no_body_or_no_end() -> None:
    world = core(config=COST)
    alone = request(world)
    cut = request(world)
    replies = alone.send(response_headers(end_of_stream=True))
    replies += cut.send(response_headers(), response_body(JSON_ANSWER))
    alone.close()
    cut.close()
    assert told(replies) == []
    assert world.inflight == IDLE


def test_nothing_is_told_without_a_reporter() -> None:
    assert told(respond(request(core()), JSON_ANSWER)) == []


@pytest.mark.parametrize("modes", [FULL_DUPLEX, (FULL, BUFFERED), (BUFFERED, BUFFERED), (STREAMED, STREAMED)], ids=str)
def test_a_response_that_ends_with_trailers_has_a_cost_too(modes: Modes) -> None:
    """Every gRPC engine's do, and then no piece of the body says that it is the last."""
    world = core(config=COST)
    stream = request(world, modes=modes)
    replies = stream.send(response_headers(), response_body(JSON_ANSWER), response_trailers())
    assert told(replies) == [{"envoy.lb": {"cost": 37.0}}]
    assert kinds(replies) == ["response_headers", "response_body", "response_trailers"]
    stream.close()
    assert (world.inflight, world.errors("m")) == (IDLE, {})


def test_a_name_that_is_held_back_for_the_trailers_comes_before_the_cost() -> None:
    world = core(config=COST)
    world.resources.apply([], [Rewrite("r", rules=(Rule(("m",), (Choice("target"),)),))])
    answer = JSON_ANSWER + b'"model":"tar'
    stream = request(world, chat(stream=True))
    replies = stream.send(response_headers(content_type="text/event-stream"), response_body(SSE_ANSWER + answer), response_trailers())
    assert kinds(replies) == ["response_headers", "response_body", "response_body", "response_trailers"]
    assert echoed(replies, "response_body") == SSE_ANSWER + answer
    assert told(replies[-1:]) == told(replies) == [{"envoy.lb": {"cost": 37.0}}]


@pytest.mark.parametrize("modes", [(FULL, BUFFERED), (BUFFERED, BUFFERED), (NONE, BUFFERED)], ids=str)
def test_a_buffered_response_is_whole_even_if_its_end_is_left_to_trailers_we_are_not_shown(modes: Modes) -> None:
    world = core(config=COST)
    stream = request(world, modes=modes)
    replies = stream.send(response_headers(), response_body(JSON_ANSWER))
    assert told(replies) == [{"envoy.lb": {"cost": 37.0}}]
    assert world.inflight == IDLE
    stream.close()
    series = world.metrics.series(*["m" if modes != (NONE, BUFFERED) else ""] * 2)
    assert (dict(series.errors), series.duration_s.count, series.output_tokens.sum) == ({}, 1, 3)


@pytest.mark.parametrize("part", [JSON_ANSWER[:40], SSE_ANSWER[:150]], ids=["whole", "streamed"])
@pytest.mark.parametrize("modes", [(FULL, PARTIAL), (PARTIAL, PARTIAL), (BUFFERED, PARTIAL)], ids=str)
def test_of_a_response_that_is_shown_in_part_the_rest_is_no_clients_leaving(modes: Modes, part: bytes) -> None:
    """It passes by, longer than the gateway's buffer. What it cost in the end, and when that was, is not known."""
    world = core(config=COST)
    stream = request(world, modes=modes)
    content_type = "text/event-stream" if part.startswith(b"data:") else "application/json"
    replies = stream.send(response_headers(content_type=content_type), response_body(part))
    assert kinds(replies) == ["response_headers", "response_body"]
    assert told(replies) == []
    assert world.inflight[0] == 1, "it is still coming"
    world.clock.advance(5.0)
    stream.close()
    series = world.metrics.series("m", "m")
    assert (world.inflight, dict(series.errors)) == (IDLE, {})
    assert (series.duration_s.count, series.response_bytes.count, series.output_tokens.count) == (0, 0, 0)


def test_a_response_that_is_shown_in_part_may_end_with_trailers() -> None:
    world = core(config=COST)
    stream = request(world, modes=(FULL, PARTIAL))
    assert told(stream.send(response_headers(), response_body(JSON_ANSWER), response_trailers())) == [{"envoy.lb": {"cost": 37.0}}]
    assert (world.inflight, world.errors("m")) == (IDLE, {})


@pytest.mark.parametrize(("config", "declined"), [("", True), (COST, False)], ids=["no reporter", "reporter"])
@pytest.mark.parametrize("modes", [(BUFFERED, BUFFERED), (BUFFERED, PARTIAL), (STREAMED, BUFFERED)], ids=str)
def test_a_gateway_that_holds_a_response_back_is_asked_to_show_it_where_its_cost_is_wanted(
    modes: Modes, config: str, declined: bool
) -> None:
    stream = request(core(config=config), modes=modes)
    assert [reply.HasField("mode_override") for reply in stream.got].count(True) == declined


@pytest.mark.parametrize(("before", "after"), [("", COST), (COST, "")], ids=["a reporter comes", "a reporter goes"])
def test_how_a_response_is_shown_is_settled_with_its_request(before: str, after: str) -> None:
    """The gateway was told so then; a configuration that changes in between must not make a client that stayed one that left, or the reverse."""
    world = core(config=before)
    stream = request(world, modes=(BUFFERED, BUFFERED))
    world.use(after)
    stream.send(response_headers())
    stream.close()
    assert world.errors("m") == ({"ClientDisconnected": 1} if before else {})


@pytest.mark.parametrize(("before", "after"), [("", COST), (COST, "")], ids=["a reporter comes", "a reporter goes"])
def test_how_a_response_is_shown_is_settled_with_the_requests_headers(before: str, after: str) -> None:
    """No later reply of the request's can ask for it, even where the configuration changes before the decision."""
    world = core(config=before)
    stream = Stream(world.session())
    stream.send(request_headers(path="", modes=(BUFFERED, BUFFERED)))
    world.use(after)
    stream.send(request_trailers(), response_headers())
    assert [reply.HasField("mode_override") for reply in stream.got] == [not before, False, False]
    stream.close()
    assert sum(series.errors["ClientDisconnected"] for series in world.metrics._series.values()) == (1 if before else 0)


def test_a_request_is_reported_as_it_was_decided() -> None:
    world = core(config=COST)
    stream = request(world)
    world.use(configuration({"type": "queue-scorer"}, reporter("other", "1")))
    assert told(respond(stream, JSON_ANSWER)) == [{"envoy.lb": {"cost": 37.0}}]
    assert told(respond(request(world), JSON_ANSWER)) == [{"envoy.lb": {"other": 1.0}}]


def test_responses_that_come_side_by_side_have_each_their_own_cost() -> None:
    world = core(2, config=COST)
    streams = [request(world) for _ in range(5)]
    for stream in streams:
        stream.send(response_headers(content_type="text/event-stream"), response_body(b'data: {"usage":{"prompt_'))
    for number, stream in enumerate(streams):
        stream.send(response_body(b'tokens":%d,"completion_tokens":1}}\n' % (number + 1)))
    costs = [told(stream.send(response_body(b"\n", end_of_stream=True))) for stream in streams]
    assert costs == [[{"envoy.lb": {"cost": number + 11.0}}] for number in range(5)]
    assert world.inflight == IDLE


def test_several_reporters_are_told_together() -> None:
    usage = '{"prompt_tokens":7,"completion_tokens":3,"prompt_tokens_details":{"cached_tokens":5}}'
    reporters = [
        reporter("in", "usage.prompt_tokens"),
        reporter("out", "usage.completion_tokens"),
        reporter("saved", "usage.cached_tokens", namespace="my.bills"),
        reporter("nothing", "usage.reasoning_tokens"),
        reporter("unless", "usage.prompt_tokens", condition="usage.prompt_tokens > 7"),
    ]
    assert cost(usage, *reporters) == [{"envoy.lb": {"in": 7.0, "out": 3.0}, "my.bills": {"saved": 5.0}}]
    same = [{**reporter("in", "1"), "name": "first"}, {**reporter("in", "2"), "name": "second"}]
    assert cost(usage, *same) == [{"envoy.lb": {"in": 2.0}}], "of two of one name, the last"
    assert cost(usage, reporter("nothing", "0"), reporter("neither", "usage.what")) == []


@pytest.mark.parametrize(
    ("usage", "expression", "value"),
    [
        ('{"prompt_tokens":0,"completion_tokens":0}', "usage.total_tokens", None),
        ('{"prompt_tokens":0,"completion_tokens":0}', "usage.total_tokens + 1", 1),
        ('{"prompt_tokens":0,"completion_tokens":0}', "usage.completion_tokens == 0 ? 4 : 5", 4),
        ('{"prompt_tokens":0,"completion_tokens":0}', "has(usage.completion_tokens) ? 4 : 5", 4),
        ('{"prompt_tokens":0,"completion_tokens":0}', "has(usage.cached_tokens) ? 4 : 5", 5),
        ('{"prompt_tokens":0,"completion_tokens":0,"prompt_tokens_details":{"cached_tokens":0}}', "has(usage.cached_tokens) ? 4 : 5", 4),
        ('{"prompt_tokens":0,"completion_tokens":0,"prompt_tokens_details":{}}', "has(usage.cached_tokens) ? 4 : 5", 5),
        ('{"prompt_tokens":7,"completion_tokens":0}', "usage.prompt_tokens / usage.completion_tokens", None),
        ('{"prompt_tokens":7,"completion_tokens":0}', "usage.prompt_tokens / 0", None),
        ('{"prompt_tokens":7,"completion_tokens":0}', "usage.prompt_tokens > 0 ? 3 : 1 / 0", 3),
        ('{"prompt_tokens":7,"completion_tokens":0}', "usage.completion_tokens - 5", -5),
        ('{"prompt_tokens":7,"completion_tokens":3}', "usage.prompt_tokens * 0.5", 3),
        ('{"prompt_tokens":7,"completion_tokens":3}', "usage.completion_tokens / 4", None),
        ('{"prompt_tokens":7,"completion_tokens":3}', "0 - usage.completion_tokens / 4", None),
        ('{"completion_tokens":3}', "usage.total_tokens", 3),
        ('{"completion_tokens":3}', "usage.prompt_tokens", None),
        ('{"prompt_tokens":9007199254740992,"completion_tokens":0}', "usage.prompt_tokens * 1000", 9007199254740992000),
        ('{"prompt_tokens":9007199254740993,"completion_tokens":0}', "1", None),
        ('{"prompt_tokens":9007199254740992,"completion_tokens":0}', "usage.prompt_tokens" + " * 999999999999999" * 20, None),
    ],
)
def test_what_expressions_come_to_at_the_edges(usage: str, expression: str, value: float | None, caplog: pytest.LogCaptureFixture) -> None:
    expected = [] if value is None else [{"envoy.lb": {"cost": float(value)}}]
    assert cost(usage, reporter("cost", expression)) == expected
    assert failures(caplog) == [], "an answer like any other"


@pytest.mark.parametrize("size", [1, 5, 100_000])
def test_a_model_that_was_renamed_and_a_cost_travel_in_one_last_piece(size: int) -> None:
    world = core(config=COST)
    world.resources.apply([], [Rewrite("r", rules=(Rule(("m",), (Choice("target"),)),))])
    replies = respond(request(world), *pieces(JSON_ANSWER[:-1] + b',"model":"target"}', size), b"")
    assert echoed(replies, "response_body") == JSON_ANSWER[:-1] + b',"model":"m"}'
    assert told(replies) == told(replies[-1:]) == [{"envoy.lb": {"cost": 37.0}}]
