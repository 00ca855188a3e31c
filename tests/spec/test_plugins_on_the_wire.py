"""What plugins and flags put on the wire, or keep from it: scores, numbers of a response's cost, 412, 429, and hooks that fail."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import random
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import grpc
import grpc.aio
import pytest
from google.protobuf import json_format

from epp._pb import epp_ext_proc_pb2 as pb
from epp.engines.models import ModelsView
from epp.errors import EppError
from epp.extproc.messages import BodyMode
from epp.plugins.base import Finished, Outcome, Plugin, RunProfile
from epp.resources import Choice, Objective, Rewrite, Rule
from epp.types import Decision, Endpoint, EndpointSpec, LLMRequest, Usage
from tests.builders import (
    DESTINATION,
    FULL_DUPLEX,
    LLM_D,
    Core,
    Stream,
    chat,
    core,
    destination_of,
    echoed,
    kinds,
    pieces,
    request_body,
    request_headers,
    request_trailers,
    response_body,
    response_headers,
    response_trailers,
    set_headers,
    spec,
)
from tests.integration.test_transports import PROCESS, TRANSPORTS, WAIT_S, channel_to, eventually, serving

NONE, STREAMED, BUFFERED, PARTIAL, FULL = (
    BodyMode.NONE,
    BodyMode.STREAMED,
    BodyMode.BUFFERED,
    BodyMode.BUFFERED_PARTIAL,
    BodyMode.FULL_DUPLEX_STREAMED,
)
Modes = tuple[BodyMode, BodyMode] | None
AUDIO = "/v1/audio/transcriptions"
"""A path whose bodies pass by."""
IDLE = (0, 0, 0, 0)
ONE, TWO, THREE = "10.0.0.1:8000", "10.0.0.2:8000", "10.0.0.3:8000"


def configuration(*plugins: Mapping[str, Any], profiles: Sequence[Mapping[str, Any]] = (), **more: object) -> str:
    document = {"apiVersion": "llm-d.ai/v1alpha1", "kind": "EndpointPickerConfig", "plugins": plugins, **more}
    return json.dumps({**document, "schedulingProfiles": profiles} if profiles else document)


def profile(name: str, **weights: float) -> dict[str, Any]:
    return {"name": name, "plugins": [{"pluginRef": ref, "weight": weight} for ref, weight in weights.items()]}


def request(
    world: Core,
    body: bytes | None = None,
    *,
    modes: Modes = FULL_DUPLEX,
    headers: Mapping[str, str] | None = None,
    path: str = "/v1/chat/completions",
    subset: Sequence[str] | None = None,
) -> Stream:
    """A POST up to its routing, as the gateway of that mode sends it."""
    hint = None if subset is None else {"envoy.lb.subset_hint": {f"{DESTINATION}-subset": list(subset)}}
    stream = Stream(world.session())
    stream.send(request_headers(path=path, modes=modes, headers=headers, body_unasked=modes == (STREAMED, STREAMED), filter_metadata=hint))
    if modes is None or modes[0] is not NONE:
        stream.send(request_body(chat() if body is None else body, end_of_stream=True))
    return stream


def told(replies: Sequence[pb.ProcessingResponse]) -> list[dict[str, Any]]:
    """The dynamic metadata of those replies that have any."""
    return [json_format.MessageToDict(reply.dynamic_metadata) for reply in replies if reply.HasField("dynamic_metadata")]


def answer_of(stream: Stream) -> pb.ImmediateResponse:
    assert stream.got[-1].WhichOneof("response") == "immediate_response", kinds(stream.got)
    return stream.got[-1].immediate_response


def routed(stream: Stream) -> bool:
    return "immediate_response" not in kinds(stream.got)


# --emit-endpoint-scores

SCORES = f"{DESTINATION}-scores"
REQUEST_MODES = [FULL_DUPLEX, (FULL, NONE), (BUFFERED, NONE), (PARTIAL, NONE), (STREAMED, STREAMED), (STREAMED, NONE), (NONE, NONE), None]


class Says(Plugin):
    """A third party's scorer: what it was told to say, by the last number of an endpoint's name."""

    type: ClassVar[str] = "says"
    per_request: ClassVar[bool] = True

    scores: list[float]

    def score(self, request: LLMRequest, endpoints: Sequence[Endpoint]) -> Sequence[float]:
        return [self.scores[int(endpoint.name.rpartition("-")[2]) - 1] for endpoint in endpoints]


def says(name: str, *scores: float) -> dict[str, Any]:
    return {"name": name, "type": f"{__name__}:Says", "parameters": {"scores": list(scores)}}


BY_HAND = configuration(says("a", 0.5, 1.0, 0.0), says("b", 0.25, 0.125, 7.0), profiles=[profile("default", a=2, b=4)])
TOTALS = {ONE: 2.0, TWO: 2.5, THREE: 4.0}
"""2 a + 4 b, each of them at most 1."""


@pytest.mark.parametrize("modes", REQUEST_MODES, ids=str)
def test_every_candidate_has_its_total_beside_the_destination(modes: Modes) -> None:
    stream = request(core(3, config=BY_HAND, emit_scores=True), modes=modes)
    assert told(stream.got) == [{"envoy.lb": {DESTINATION: THREE, SCORES: TOTALS}}]
    (route,) = [reply for reply in stream.got if reply.HasField("dynamic_metadata")]
    assert set_headers(route)[DESTINATION] == THREE.encode(), "the destination itself is as ever"
    assert SCORES not in set_headers(route), "engines need not know"


@pytest.mark.parametrize("modes", REQUEST_MODES, ids=str)
def test_scores_are_not_told_unasked(modes: Modes) -> None:
    stream = request(core(3, config=BY_HAND), modes=modes)
    assert told(stream.got) == [{"envoy.lb": {DESTINATION: THREE}}]


def test_requests_without_a_body_to_look_at_have_scores_too() -> None:
    world = core(3, config=BY_HAND, emit_scores=True)
    get = Stream(world.session())
    get.send(request_headers(path="/v1/models", end_of_stream=True, headers={":method": "GET"}))
    upload = Stream(world.session())
    upload.send(request_headers(path=AUDIO), request_body(b"RIFF"))
    trailers = Stream(world.session())
    trailers.send(request_headers(path=""), request_trailers())
    for stream in (get, upload, trailers):
        assert told(stream.got) == [{"envoy.lb": {DESTINATION: THREE, SCORES: TOTALS}}]


def test_trailers_alone_have_scores_where_only_their_reply_can_carry_them() -> None:
    stream = Stream(core(3, config=BY_HAND, emit_scores=True).session())
    stream.send(request_headers(path="", modes=(BUFFERED, NONE)), request_trailers())
    assert told(stream.got) == [{"envoy.lb": {DESTINATION: THREE, SCORES: TOTALS}}]


def test_scores_follow_load_and_cache_and_are_those_an_explanation_shows() -> None:
    world = core(2, config=LLM_D, emit_scores=True)
    world.read(1, kv_usage=0.5)
    world.read(2, kv_usage=0.1, waiting=4.0)
    asked = chat("word " * 2_000)
    first = request(world, asked)
    # queue 2 x (1, 0), KV cache 2 x (0.5, 0.9), nothing cached yet
    assert told(first.got)[0]["envoy.lb"][SCORES] == pytest.approx({ONE: 3.0, TWO: 1.8})
    world.clock.advance(1.0)
    world.read(1, kv_usage=0.5)
    world.read(2, kv_usage=0.1, waiting=4.0)
    again = request(world, asked)
    scores = told(again.got)[0]["envoy.lb"][SCORES]
    assert scores[TWO] == pytest.approx(1.8)
    assert 5.5 < scores[ONE] <= 6.0, "3 more for a prefix that is cached but for its last piece"
    assert world.director._decisions is not None
    (newest, *_) = world.director._decisions.tables(1)
    assert {row["address"]: row["total"] for row in newest["profiles"][0]["endpoints"]} == pytest.approx(scores, abs=1e-6)
    assert told(first.got)[0]["envoy.lb"][SCORES] == pytest.approx({ONE: 3.0, TWO: 1.8}), "what was told stays as it was told"


def test_a_decision_that_is_kept_stays_as_it_was_told() -> None:
    """Totals of load alone are kept from one decision to the next, and change in place where few endpoints did."""
    world = core(9, config=configuration({"type": "kv-cache-utilization-scorer"}), emit_scores=True)
    for first, second in [(0.25, 0.75), (0.5, 0.25)]:
        world.clock.advance(1.0)
        world.read(1, kv_usage=first)
        world.read(2, kv_usage=second)
        request(world)
    assert world.director._decisions is not None
    tables = world.director._decisions.tables(2)
    rows = [{row["address"]: row["total"] for row in table["profiles"][0]["endpoints"]} for table in tables]
    assert [(row[ONE], row[TWO], row[THREE]) for row in rows] == [(0.5, 0.75, 1.0), (0.75, 0.25, 1.0)], "the newest first"


def test_scores_are_told_of_every_request_even_where_no_decision_is_kept() -> None:
    """Explanations are made of one decision in 2 ms at most."""
    world = core(3, config=BY_HAND, emit_scores=True)
    for _ in range(5):
        assert told(request(world).got) == [{"envoy.lb": {DESTINATION: THREE, SCORES: TOTALS}}]
    assert world.director._decisions is not None
    assert len(world.director._decisions) == 1


def test_who_is_no_candidate_has_no_score() -> None:
    labelled = [EndpointSpec(f"pod-{n}", spec(n).address, labels={"tier": "a" if n < 3 else "b"}) for n in (1, 2, 3)]
    by_label = {"type": "by-label-selector", "name": "tier", "parameters": {"matchLabels": {"tier": "a"}}}
    config = configuration(by_label, says("a", 0.5, 1.0, 0.0), profiles=[profile("default", tier=1, a=2)])
    world = core(labelled, config=config, emit_scores=True)
    for _ in range(2):  # a filter of labels runs once for the same candidates
        assert told(request(world).got) == [{"envoy.lb": {DESTINATION: TWO, SCORES: {ONE: 1.0, TWO: 2.0}}}]
    only = request(world, subset=[ONE, THREE])
    assert told(only.got) == [{"envoy.lb": {DESTINATION: ONE, SCORES: {ONE: 1.0}}}]


def test_the_scores_are_those_of_the_profile_that_decided() -> None:
    handler = {"type": "header-profile-handler", "parameters": {"defaultProfile": "left"}}
    profiles = [profile("left", a=1), profile("right", b=1)]
    world = core(2, config=configuration(handler, says("a", 1.0, 0.5), says("b", 0.25, 0.75), profiles=profiles), emit_scores=True)
    assert told(request(world).got) == [{"envoy.lb": {DESTINATION: ONE, SCORES: {ONE: 1.0, TWO: 0.5}}}]
    right = request(world, headers={"epp-profile": "right"})
    assert told(right.got) == [{"envoy.lb": {DESTINATION: TWO, SCORES: {ONE: 0.25, TWO: 0.75}}}]


@pytest.mark.parametrize("order", ["decode-first", "prefill-first"])
def test_of_a_request_in_stages_the_scores_are_those_of_its_decoders(order: str) -> None:
    roles = [
        EndpointSpec(f"pod-{n}", spec(n).address, labels={"llm-d.ai/role": role})
        for n, role in enumerate(("prefill", "decode", "decode"), 1)
    ]
    deciders = {"deciders": {"prefill": "always-disagg-pd-decider"}} if order == "decode-first" else {}
    plugins: list[dict[str, Any]] = [
        {"type": "disagg-profile-handler", "parameters": {"stageOrder": order, **deciders}},
        *({"type": type_} for type_ in ("always-disagg-pd-decider", "prefill-filter", "decode-filter")),
        says("a", 1.0, 0.5, 0.25),
    ]
    profiles = [profile("prefill", **{"prefill-filter": 1, "a": 3}), profile("decode", **{"decode-filter": 1, "a": 2})]
    stream = request(core(roles, config=configuration(*plugins, profiles=profiles), emit_scores=True))
    assert told(stream.got) == [{"envoy.lb": {DESTINATION: TWO, SCORES: {TWO: 1.0, THREE: 0.5}}}]
    assert set_headers(stream.got[0])["x-prefiller-host-port"] == ONE.encode()


def test_scores_have_one_address_each_whatever_the_destination_is() -> None:
    picker = {"type": "max-score-picker", "parameters": {"maxNumOfEndpoints": 2}}
    stream = request(core(3, config=configuration(says("a", 0.5, 1.0, 0.0), picker), emit_scores=True))
    assert told(stream.got) == [{"envoy.lb": {DESTINATION: f"{TWO},{ONE}", SCORES: {ONE: 0.5, TWO: 1.0, THREE: 0.0}}}]
    ranks = [spec(n, host="10.0.0.9", port=8000 + n) for n in (1, 2)]
    config = configuration(says("a", 0.5, 1.0), {"type": "data-parallel-profile-handler"})
    stream = request(core(ranks, config=config, emit_scores=True))
    assert told(stream.got) == [{"envoy.lb": {DESTINATION: "10.0.0.9:8000", SCORES: {"10.0.0.9:8001": 0.5, "10.0.0.9:8002": 1.0}}}]
    six = request(core([spec(1, host="2001:db8::1")], config=configuration(says("a", 0.5)), emit_scores=True))
    assert told(six.got) == [{"envoy.lb": {DESTINATION: "[2001:db8::1]:8000", SCORES: {"[2001:db8::1]:8000": 0.5}}}]


def test_a_score_that_is_no_number_is_told_as_what_it_counted_for() -> None:
    class Odd(Says):
        def score(self, request: LLMRequest, endpoints: Sequence[Endpoint]) -> Sequence[float]:
            return [math.nan, math.inf, -math.inf]

    world = core(3, config=BY_HAND, emit_scores=True)
    only = world.built.scheduler._only
    assert only is not None
    only._per_request[0] = only._per_request[0].__class__(Odd(scores=[]), 2.0)
    assert told(request(world).got) == [{"envoy.lb": {DESTINATION: THREE, SCORES: {ONE: 1.0, TWO: 2.0 + 0.5, THREE: 4.0}}}]


def test_a_large_pools_scores_are_all_told() -> None:
    pool = [spec(n, host=f"10.1.{n // 250}.{n % 250}") for n in range(1, 1_001)]
    world = core(pool, config=configuration(says("a", *(n / 1_000 for n in range(1_000)))), emit_scores=True)
    (metadata,) = told(request(world).got)
    assert metadata["envoy.lb"][SCORES] == {each.destination: n / 1_000 for n, each in enumerate(world.datastore.endpoints.values())}
    assert metadata["envoy.lb"][DESTINATION] == "10.1.4.0:8000"


def test_a_refusal_tells_no_scores() -> None:
    for stream in (request(core(0, emit_scores=True)), request(core(2, emit_scores=True), headers={"prefer": "if-available"})):
        assert kinds(stream.got) == ["immediate_response"]
        assert told(stream.got) == []


# request-attribute-reporter


def reporter(name: str, expression: str, *, condition: str = "", **key: str) -> dict[str, Any]:
    attribute = {"key": {"name": name, **key}, "expression": expression, "condition": condition}
    return {"name": f"{name}-reporter", "type": "request-attribute-reporter", "parameters": {"attributes": [attribute]}}


COST = configuration({"type": "queue-scorer"}, reporter("cost", "usage.prompt_tokens + 10 * usage.completion_tokens"))
JSON_ANSWER = b'{"id":"1","choices":[{"message":{"content":"the \\"usage\\" of it"}}],"usage":{"prompt_tokens":7,"completion_tokens":3}}'
SSE_ANSWER = (
    b'data: {"choices":[{"delta":{"content":"usage: 9"}}],"usage":null}\n\n'
    b'data: {"choices":[],"usage":{"prompt_tokens":7,"completion_tokens":1}}\n\n'
    b'data: {"choices":[],"usage":{"prompt_tokens":7,"total_tokens":10,"completion_tokens":3}}\n\n'
    b"data: [DONE]\n\n"
)
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


def respond(stream: Stream, *parts: bytes, content_type: str = "application/json", status: int = 200) -> list[pb.ProcessingResponse]:
    """A response in these pieces, the last one ends it."""
    replies = stream.send(response_headers(status, content_type=content_type))
    for number, part in enumerate(parts, 1):
        replies += stream.send(response_body(part, end_of_stream=number == len(parts)))
    return replies


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


# Prefer: if-available

IF_AVAILABLE = {"prefer": "if-available"}
LONG = "conversation " * 300
PRECISE = configuration({"type": "precise-prefix-cache-producer"}, {"type": "precise-prefix-cache-scorer"}, {"type": "queue-scorer"})


def not_available(stream: Stream) -> bool:
    """Answered 412, in the client's words; anything else than that or a routed request fails."""
    if routed(stream):
        return False
    answer = answer_of(stream)
    assert (answer.status.code, json.loads(answer.body)["error"]["code"]) == (412, "prefix_not_cached")
    assert set_headers(stream.got[-1]) == {"content-type": b"application/json"}, "nothing to wait for: no retry-after"
    return True


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


# Shedding without flow control

OBJECTIVE = "x-llm-d-inference-objective"
SHEDDABLE = {OBJECTIVE: "batch"}
ONE_EACH = configuration(
    {"type": "queue-scorer"},
    {"type": "concurrency-detector", "parameters": {"maxConcurrency": 1}},
    profiles=[profile("default", **{"queue-scorer": 1})],  # all that may filter does so where there is no profile, and detectors may
    flowControl={"saturationDetector": {"pluginRef": "concurrency-detector"}},
)


def pool(*waiting: float, priority: int = -1) -> Core:
    """Endpoints with queues of these lengths, 5 counts as full; the objective `batch` may be shed."""
    world = core(len(waiting))
    world.resources.apply([Objective("batch", priority=priority), Objective("interactive", priority=1)], [])
    for number, length in enumerate(waiting, 1):
        world.read(number, waiting=length)
    return world


def shed(stream: Stream) -> bool:
    """Answered 429, in the client's words; anything else than that or a routed request fails."""
    if routed(stream):
        return False
    answer = answer_of(stream)
    assert answer.status.code == 429
    assert json.loads(answer.body) == {
        "error": {"message": "system saturated, sheddable request dropped", "type": "rate_limit_error", "code": "saturated"}
    }
    assert set_headers(stream.got[-1]) == {
        "content-type": b"application/json",
        "x-llm-d-request-dropped-reason": b"rejected-saturated",
        "retry-after": b"1",
    }
    assert told(stream.got) == []
    return True


@pytest.mark.parametrize("modes", REQUEST_MODES, ids=str)
@pytest.mark.parametrize("header", [OBJECTIVE, "x-gateway-inference-objective"])
def test_a_sheddable_request_is_dropped_while_the_pool_is_full(header: str, modes: Modes) -> None:
    world = pool(5.0, 5.0)
    state = [repr(each) for each in world.datastore.endpoints.values()]
    stream = request(world, chat(LONG), modes=modes, headers={header: "batch"})
    assert shed(stream)
    assert stream.session.answered
    assert stream.send(request_body(b"more", end_of_stream=True), request_trailers(), response_headers()) == []
    assert world.inflight == IDLE, "before the stream is over"
    stream.close()
    assert world.inflight == IDLE
    assert [repr(each) for each in world.datastore.endpoints.values()] == state
    assert all(each.sent_requests == each.picks_total == 0 for each in world.datastore.endpoints.values())
    assert sum(series.errors["ResourceExhausted"] for series in world.metrics._series.values()) == 1
    assert not_available(request(world, chat(LONG), headers=IF_AVAILABLE)), "no endpoint is thought to have its prompt"


@pytest.mark.parametrize(
    ("waiting", "dropped"), [((5.0,), True), ((4.0,), False), ((10.0, 0.0), True), ((9.0, 0.0), False), ((0.0, 0.0, 15.0), True)]
)
def test_full_is_a_mean_of_1_and_more(waiting: tuple[float, ...], dropped: bool) -> None:
    assert shed(request(pool(*waiting), headers=SHEDDABLE)) == dropped


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {OBJECTIVE: "interactive"},
        {OBJECTIVE: "nobody's"},
        {OBJECTIVE: ""},
        {OBJECTIVE: "interactive", "x-gateway-inference-objective": "batch"},
    ],
    ids=["none", "important", "unknown", "empty", "the new name first"],
)
def test_others_are_routed_however_full_the_pool_is(headers: dict[str, str]) -> None:
    world = pool(500.0, 500.0)
    stream = request(world, headers=headers)
    assert routed(stream)
    assert world.inflight[0] == 1
    respond(stream, JSON_ANSWER)
    assert world.inflight == IDLE


@pytest.mark.parametrize(("priority", "dropped"), [(-1, True), (-1_000, True), (0, False), (1, False)])
def test_it_is_the_priority_that_makes_a_request_sheddable(priority: int, dropped: bool) -> None:
    assert shed(request(pool(5.0, priority=priority), headers=SHEDDABLE)) == dropped


def test_an_objective_that_changes_counts_from_the_next_request_on() -> None:
    world = pool(5.0)
    assert shed(request(world, headers=SHEDDABLE))
    world.resources.apply([], [])
    assert routed(request(world, headers=SHEDDABLE))


@pytest.mark.parametrize("modes", [FULL_DUPLEX, (BUFFERED, NONE), (STREAMED, NONE), (NONE, NONE), None], ids=str)
def test_requests_without_a_body_are_shed_alike(modes: Modes) -> None:
    world = pool(5.0)
    for headers, dropped in [(SHEDDABLE, True), ({}, False)]:
        get = Stream(world.session())
        get.send(request_headers(path="/v1/models", modes=modes, end_of_stream=True, headers={":method": "GET", **headers}))
        assert shed(get) == dropped
        upload = Stream(world.session())
        upload.send(request_headers(path=AUDIO, modes=modes, headers=headers))
        assert shed(upload) == dropped, "at once, not after the upload"
        for stream in (get, upload):
            stream.close()
        assert world.inflight == IDLE


def test_the_sheddable_are_let_in_again_when_there_is_room() -> None:
    world = core(2, config=ONE_EACH)
    world.resources.apply([Objective("batch", priority=-1)], [])
    streams = [request(world), request(world, headers=SHEDDABLE)]
    assert all(map(routed, streams)), "half full"
    assert shed(request(world, headers=SHEDDABLE))
    assert shed(request(world, headers=SHEDDABLE)), "the first refusal took no place, and this one gives none back"
    more = request(world)
    assert routed(more), "beyond the limit, but not sheddable"
    respond(streams[0], JSON_ANSWER)
    assert shed(request(world, headers=SHEDDABLE))
    respond(more, JSON_ANSWER)
    last = request(world, headers=SHEDDABLE)
    assert routed(last)
    for stream in (streams[1], last):
        stream.close()
    assert world.inflight == IDLE


def test_the_engine_does_not_see_what_was_asked_of_us() -> None:
    stream = request(pool(0.0), headers=SHEDDABLE)
    assert list(stream.got[0].request_headers.response.header_mutation.remove_headers) == [OBJECTIVE]


def test_engines_that_were_never_or_long_ago_heard_of_count_as_full() -> None:
    """As in the reference picker, but not before 3 s: idle engines are read once a second."""
    world = pool(0.0)
    world.clock.advance(2.9)
    assert routed(request(world, headers=SHEDDABLE))
    world.clock.advance(0.2)
    assert shed(request(world, headers=SHEDDABLE))
    unheard = core(1)
    unheard.resources.apply([Objective("batch", priority=-1)], [])
    assert shed(request(unheard, headers=SHEDDABLE))


def test_engines_that_have_no_metrics_are_as_full_as_what_we_sent_them() -> None:
    """They are never read. The reference picker takes them for full, idle or not: no sheddable request would ever get to them."""
    world = core(2)
    world.resources.apply([Objective("batch", priority=-1)], [])
    assert shed(request(world, headers=SHEDDABLE)), "nobody knows yet"
    for number in (1, 2):
        world.datastore.record_answer(world.endpoint(number))
    world.clock.advance(3600.0)
    streams = [request(world, headers=SHEDDABLE) for _ in range(10)]
    assert all(map(routed, streams))
    assert shed(request(world, headers=SHEDDABLE)), "five on each count as five that wait"
    streams[0].close()
    assert routed(request(world, headers=SHEDDABLE))
    for number in (1, 2):  # they fall silent
        each = world.endpoint(number)
        each.scrape_failures += 1
        world.datastore.record_silence(each)
    for stream in streams:
        stream.close()
    assert shed(request(world, headers=SHEDDABLE))


def test_of_endpoints_that_lack_the_model_nobody_asks_how_full_they_are() -> None:
    world = pool(5.0, 0.0, 5.0)
    view = ModelsView()
    for number, models in ((1, {"m", "n"}), (2, {"n"}), (3, {"m"})):
        view.record(world.endpoint(number), frozenset(models))
    world.director.candidates.models = view
    assert shed(request(world, headers=SHEDDABLE))
    assert routed(request(world, chat(model="n"), headers=SHEDDABLE)), "half full"
    unheard_of = request(world, chat(model="x"), headers=SHEDDABLE, subset=[ONE, THREE])
    assert answer_of(unheard_of).status.code == 404, "no wait will change that"
    world.datastore.set_draining(world.endpoint(2), draining=True)
    world.datastore.set_draining(world.endpoint(1), draining=True)
    assert shed(request(world, chat(model="n"), headers=SHEDDABLE)), "nobody is left who serves it"
    assert answer_of(request(world, chat(model="n"))).status.code == 503


@pytest.mark.parametrize("subset", [[], ["10.9.9.9"]], ids=str)
def test_a_subset_without_endpoints_is_full_too(subset: list[str]) -> None:
    """The reference picker's detector is given what is in the subset, and nobody is 1 to it."""
    world = pool(0.0)
    assert shed(request(world, headers=SHEDDABLE, subset=subset))
    assert answer_of(request(world, subset=subset)).status.code == 503


def test_a_pool_without_endpoints_is_full_before_it_is_empty() -> None:
    """The reference picker's order: admission comes before it looks for endpoints."""
    world = pool()
    assert shed(request(world, headers=SHEDDABLE))
    assert answer_of(request(world)).status.code == 503


def test_what_can_not_be_understood_is_a_400_before_anything_is_shed() -> None:
    assert answer_of(request(pool(5.0), b"{", headers=SHEDDABLE)).status.code == 400


def test_a_grpc_client_is_told_that_a_resource_is_exhausted() -> None:
    stream = request(pool(5.0), headers={**SHEDDABLE, "content-type": "application/grpc"})
    assert answer_of(stream).grpc_status.status == 8


@pytest.mark.parametrize(("waiting", "dropped"), [((5.0, 0.0), True), ((0.0, 50.0), False)])
def test_within_a_subset_it_is_the_subset_that_is_full(waiting: tuple[float, ...], dropped: bool) -> None:
    """The reference picker gives its detector the candidates."""
    assert shed(request(pool(*waiting), headers=SHEDDABLE, subset=[ONE])) == dropped


# A third party's hooks that fail


class Listens(Plugin):
    """Has every hook of a request, and fails in those it is told to."""

    type: ClassVar[str] = "listens"
    roles: ClassVar[tuple[str, ...]] = ("reporter",)

    fails: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self.__dict__["heard"] = []

    @property
    def heard(self) -> list[str]:
        heard: list[str] = self.__dict__["heard"]
        return heard

    def _hear(self, hook: str) -> None:
        self.heard.append(hook)
        if hook in self.fails:
            raise RuntimeError(f"{hook} of a third party")

    def picked(self, request: LLMRequest, decision: Decision) -> None:
        self._hear("picked")

    def served(self, request: LLMRequest, endpoint: Endpoint) -> None:
        self._hear("served")

    def response_headers(self, request: LLMRequest, endpoint: Endpoint) -> Mapping[str, str] | None:
        self._hear("response_headers")
        return {f"x-{self.name}": endpoint.destination}

    def first_token(self, request: LLMRequest, endpoint: Endpoint, ttft_s: float) -> None:
        self._hear("first_token")

    def report(self, usage: Usage) -> tuple[str, str, float] | None:
        self._hear("report")
        return "envoy.lb", self.name, 5.0

    def finished(self, request: LLMRequest, endpoint: Endpoint, outcome: Finished) -> None:
        self._hear("finished")


class Returns(Plugin):
    """Answers as it is told to."""

    type: ClassVar[str] = "returns"
    roles: ClassVar[tuple[str, ...]] = ("reporter",)

    def response_headers(self, request: LLMRequest, endpoint: Endpoint) -> Any:
        return self.__dict__.get("headers")

    def report(self, usage: Usage) -> Any:
        return self.__dict__.get("report_")


IN_ORDER = ["picked", "served", "response_headers", "first_token", "finished", "report"]
LOGGERS = {hook: "epp.decision" if hook == "picked" else "epp.exchange" for hook in IN_ORDER}


def listening(*fails: str) -> Core:
    """Two endpoints; three plugins that listen, of which the middle one fails."""
    plugins = [
        {"name": name, "type": f"{__name__}:Listens", "parameters": {"fails": list(fails) if name == "second" else []}}
        for name in ("first", "second", "third")
    ]
    return core(2, config=configuration({"type": "queue-scorer"}, *plugins))


def play(world: Core, modes: Modes) -> Stream:
    """A request that the gateway sent elsewhere, and its streamed answer, whole."""
    stream = request(world, chat(stream=True), modes=modes)
    ours = told(stream.got)[0]["envoy.lb"][DESTINATION]
    stream.send(response_headers(content_type="text/event-stream", served=TWO if ours == ONE else ONE))
    for piece in [SSE_ANSWER] if modes is not None and modes[1] is BUFFERED else [*pieces(SSE_ANSWER, 50), b""]:
        stream.send(response_body(piece, end_of_stream=not piece or piece is SSE_ANSWER))
    stream.close()
    return stream


def failures(caplog: pytest.LogCaptureFixture) -> list[tuple[str, str]]:
    """Logger and cause of everything that was logged as a warning or worse."""
    return [(r.name, str(r.exc_info[1]) if r.exc_info else "") for r in caplog.records if r.levelno >= logging.WARNING]


@pytest.mark.parametrize("modes", [FULL_DUPLEX, (FULL, STREAMED), (BUFFERED, BUFFERED), (STREAMED, STREAMED), None], ids=str)
@pytest.mark.parametrize("fails", [*([hook] for hook in IN_ORDER), IN_ORDER, []], ids=" ".join)
def test_a_hook_that_fails_costs_its_request_nothing(fails: list[str], modes: Modes, caplog: pytest.LogCaptureFixture) -> None:
    world, fine = listening(*fails), listening()
    got, expected = play(world, modes).got, play(fine, modes).got
    for reply in expected:  # but for what the failed hook itself would have said
        if reply.HasField("response_headers") and "response_headers" in fails:
            options = reply.response_headers.response.header_mutation.set_headers
            kept = [option for option in options if option.header.key != "x-second"]
            del options[:]
            options.extend(kept)
        if reply.HasField("response_body") and reply.HasField("dynamic_metadata") and "report" in fails:
            reply.dynamic_metadata.fields["envoy.lb"].struct_value.fields.pop("second")
    assert got == expected
    told_last = {"first": 5.0, "third": 5.0, **({} if "report" in fails else {"second": 5.0})}
    assert told(got)[1:] == [{"envoy.lb": told_last}]
    assert failures(caplog) == [(LOGGERS[hook], f"{hook} of a third party") for hook in IN_ORDER if hook in fails]
    for name in ("first", "second", "third"):
        plugin = world.built.plugins[name]
        assert isinstance(plugin, Listens)
        assert plugin.heard == IN_ORDER, name
    assert world.inflight == IDLE
    assert world.errors("m") == {}
    assert world.metrics.series("m", "m").duration_s.count == 1
    assert world.metrics.series("m", "m").output_tokens.count == 1


@pytest.mark.parametrize("after", [0, 1, 2])
def test_a_hook_that_fails_as_its_client_leaves_keeps_nothing_charged(after: int, caplog: pytest.LogCaptureFixture) -> None:
    world = listening(*IN_ORDER)
    stream = request(world)
    stream.send(*[response_headers(), response_body(b"{")][:after])
    stream.close()
    assert world.inflight == IDLE
    assert world.errors("m") == {"ClientDisconnected": 1}
    hooks = ["picked", *["response_headers", "first_token"][:after], "finished"]
    assert failures(caplog) == [(LOGGERS[hook], f"{hook} of a third party") for hook in hooks]


def test_a_failing_hook_is_logged_for_every_request_it_fails(caplog: pytest.LogCaptureFixture) -> None:
    world = listening("report")
    for _ in range(3):
        assert told(respond(request(world), JSON_ANSWER)) == [{"envoy.lb": {"first": 5.0, "third": 5.0}}]
    assert failures(caplog) == [("epp.exchange", "report of a third party")] * 3


def returning(**answers: Any) -> Core:
    plugins = [{"name": "odd", "type": f"{__name__}:Returns"}, {"name": "after", "type": f"{__name__}:Listens"}]
    world = core(config=configuration({"type": "queue-scorer"}, *plugins))
    world.built.plugins["odd"].__dict__.update(answers)
    return world


FINE = {"envoy.lb": {"after": 5.0}}


@pytest.mark.parametrize(
    "report",
    [("ns", "name"), ("ns", "name", "many"), ("ns", "name", None), ("ns", "name", [1]), ("ns", "name", 10**400), 7, (), {}],
    ids=str,
)
def test_a_report_that_is_none_is_left_out_and_logged(report: object, caplog: pytest.LogCaptureFixture) -> None:
    assert told(respond(request(returning(report_=report)), JSON_ANSWER)) == [FINE]
    assert [name for name, _ in failures(caplog)] == ["epp.exchange"]


@pytest.mark.parametrize(
    ("report", "value"),
    [(("ns", "n", 3), 3.0), (("ns", "n", True), 1.0), (("ns", "n", 0), 0.0), (("ns", "n", 2**60 + 1), 2.0**60), (None, None)],
)
def test_a_report_is_a_number(report: object, value: float | None, caplog: pytest.LogCaptureFixture) -> None:
    expected = FINE if value is None else {**FINE, "ns": {"n": value}}
    assert told(respond(request(returning(report_=report)), JSON_ANSWER)) == [expected]
    assert failures(caplog) == []


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_report_that_is_no_finite_number_is_left_out(value: float) -> None:
    replies = respond(request(returning(report_=("ns", "n", value))), JSON_ANSWER)
    assert [dict(reply.dynamic_metadata).keys() for reply in replies[-1:]] == [{"envoy.lb"}]


@pytest.mark.parametrize("headers", [["x-a"], "x-a: b", 7, [("x-a", "b")]], ids=str)
def test_response_headers_that_are_none_are_left_out_and_logged(headers: object, caplog: pytest.LogCaptureFixture) -> None:
    world = returning(headers=headers)
    stream = request(world)
    (reply,) = stream.send(response_headers())
    assert set_headers(reply) == {"x-after": ONE.encode()}
    assert [name for name, _ in failures(caplog)] == ["epp.exchange"]
    assert told(stream.send(response_body(JSON_ANSWER, end_of_stream=True))) == [FINE]
    assert world.inflight == IDLE


@pytest.mark.parametrize("headers", [None, {}, {"x-a": "ü", "x-b": "", "x-c": 1}], ids=str)
def test_response_headers_are_texts(headers: dict[str, object] | None, caplog: pytest.LogCaptureFixture) -> None:
    (reply,) = request(returning(headers=headers)).send(response_headers())
    assert set_headers(reply) == {"x-after": ONE.encode(), **{name: str(value).encode() for name, value in (headers or {}).items()}}
    assert failures(caplog) == []


HALF = b"\xff".decode("utf-8", "surrogateescape")
"""Text that UTF-8 can't say, as `surrogateescape` makes it of bytes that were none."""


@pytest.mark.parametrize(
    "answers",
    [{"headers": {"x-a": HALF}}, {"headers": {HALF: "b"}}, {"report_": (HALF, "n", 1.0)}, {"report_": ("ns", HALF, 1.0)}],
    ids=["value", "name", "namespace", "key"],
)
def test_text_of_a_plugins_that_is_no_utf8_costs_its_request_nothing(answers: dict[str, object]) -> None:
    world = returning(**answers)
    stream = request(world)
    (reply,) = stream.send(response_headers())
    assert set_headers(reply)["x-after"] == ONE.encode()
    replies = stream.send(response_body(JSON_ANSWER, end_of_stream=True))
    assert echoed(replies, "response_body") == JSON_ANSWER
    assert told(replies)[0]["envoy.lb"] == FINE["envoy.lb"]
    assert world.inflight == IDLE


UNSENDABLE = {
    "a line": {"x-a": "b\r\nx-c: d"},
    "a return": {"x-a": "b\rc"},
    "a NUL": {"x-a": "b\0"},
    "a DEL": {"x-a": "\x7f"},
    "half a character": {"x-a": HALF},
    "half a character in the name": {HALF: "b"},
    "no name": {"": "b"},
    "a blank in the name": {"x a": "b"},
    "a line in the name": {"x-a\n": "b"},
    "letters beyond ASCII in the name": {"x-ü": "b"},
    "a pseudo-header": {":status": "200"},
    "a length": {"Content-Length": "3"},
    "a framing": {"transfer-encoding": "chunked"},
}
"""Headers for which Envoy answers the client with a 500, or which break the response for it."""
SENDABLE = {"x-a": "b\tc ü\xa0€", "X-Upper": "B", "x-empty": "", "x-number": 7, "x!#$%&'*+.^_`|~": '"'}
SENT = {"x-a": "b\tc ü\xa0€".encode(), "x-upper": b"B", "x-empty": b"", "x-number": b"7", "x!#$%&'*+.^_`|~": b'"'}


@pytest.mark.parametrize("headers", UNSENDABLE.values(), ids=UNSENDABLE)
def test_response_headers_that_can_not_be_sent_are_left_out_and_logged(headers: dict[str, str], caplog: pytest.LogCaptureFixture) -> None:
    stream = request(returning(headers={**headers, "x-fine": "1"}))
    (reply,) = stream.send(response_headers())
    assert set_headers(reply) == {"x-fine": b"1", "x-after": ONE.encode()}
    assert failures(caplog) == [("epp.exchange", "")]


def test_any_other_response_header_is_sent(caplog: pytest.LogCaptureFixture) -> None:
    (reply,) = request(returning(headers=SENDABLE)).send(response_headers())
    assert set_headers(reply) == {**SENT, "x-after": ONE.encode()}
    assert failures(caplog) == []


class Handles(Plugin):
    """A third party's profile handler: says what it is told to."""

    type: ClassVar[str] = "handles"
    own_headers: ClassVar[tuple[str, ...]] = ("x-mine", "x-a")

    def check(self, profiles: Sequence[str]) -> None:
        """It works with any."""

    def schedule(self, request: LLMRequest, run: RunProfile, profiles: Sequence[str]) -> Outcome:
        says = self.__dict__
        return Outcome(profiles[0], run(profiles[0]), headers=says.get("headers", {}), instead=says.get("instead", ""))


def handled(**says: Any) -> Core:
    world = core(config=configuration({"type": f"{__name__}:Handles", "name": "handler"}, {"type": "queue-scorer"}))
    world.built.plugins["handler"].__dict__.update(says)
    return world


def only_ours(reply: pb.ProcessingResponse) -> dict[str, bytes]:
    """The request headers a routing reply sets beside its own."""
    return {name: value for name, value in set_headers(reply).items() if name not in {DESTINATION, "content-length", "x-request-id"}}


@pytest.mark.parametrize("modes", REQUEST_MODES, ids=str)
@pytest.mark.parametrize("headers", UNSENDABLE.values(), ids=UNSENDABLE)
def test_a_handlers_headers_that_can_not_be_sent_are_left_out_and_logged(
    headers: dict[str, str], modes: Modes, caplog: pytest.LogCaptureFixture
) -> None:
    """A decode worker that is not told of its prefill worker does that part itself: less is lost than with the request."""
    world = handled(headers={**headers, "x-mine": "1"})
    stream = request(world, modes=modes, headers={"x-a": "the client's", "x-mine": "the client's too"})
    (route,) = [reply for reply in stream.got if reply.HasField("dynamic_metadata")]
    assert only_ours(route) == {"x-mine": b"1"}
    mutation = getattr(route, route.WhichOneof("response") or "").response.header_mutation
    assert list(mutation.remove_headers) == ["x-a"], "what only a handler may set is no client's to set in its place"
    assert set_headers(route)[DESTINATION] == ONE.encode()
    assert failures(caplog) == [("epp.exchange", "")]
    stream.close()
    assert world.inflight == IDLE


def test_any_other_header_of_a_handlers_is_sent(caplog: pytest.LogCaptureFixture) -> None:
    for headers, sent in ((SENDABLE, SENT), ({"x-mine": "1"}, {"x-mine": b"1"})):
        assert only_ours(request(handled(headers=headers)).got[0]) == sent
    assert failures(caplog) == []


@pytest.mark.parametrize("instead", [HALF, "10.0.0.1:8000\r\nx-a: b", "10.0.0.1:8000\0", 7], ids=ascii)
def test_a_request_whose_handler_names_a_destination_that_is_none_is_refused(instead: object, caplog: pytest.LogCaptureFixture) -> None:
    """No other place is known to be where the handler wanted it."""
    world = handled(instead=instead)
    stream = request(world)
    answer = answer_of(stream)
    assert (answer.status.code, json.loads(answer.body)["error"]["message"]) == (500, "internal error in the endpoint picker")
    assert [name for name, _ in failures(caplog)] == ["epp.decision"]
    assert (world.inflight, world.errors("m")) == (IDLE, {"Internal": 1})
    assert told(request(handled(instead="10.0.0.1:9000")).got) == [{"envoy.lb": {DESTINATION: "10.0.0.1:9000"}}]


class OddError(EppError):
    """A third party's own."""

    http_status = 429
    code_name = "Odd"


class UnsayableError(OddError):
    dropped_reason = HALF


class Refuses(Plugin):
    """Turns away who asks for it, in words of its own."""

    type: ClassVar[str] = "refuses"

    def admit(self, request: LLMRequest, candidates: Sequence[Endpoint]) -> None:
        if "x-odd" in request.headers:
            raise OddError(f"half {HALF} a character")
        if "x-unsayable" in request.headers:
            raise UnsayableError("no")


REFUSING = configuration({"type": f"{__name__}:Refuses"}, {"type": "queue-scorer"})


def test_a_refusal_in_a_plugins_words_is_an_answer_whatever_they_are() -> None:
    world = core(config=REFUSING)
    answer = answer_of(request(world, headers={"x-odd": "1"}))
    assert (answer.status.code, json.loads(answer.body)["error"]["message"]) == (429, "half ? a character")
    assert (world.inflight, world.errors("m")) == (IDLE, {"Odd": 1})


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_a_reply_that_can_not_be_written_ends_its_own_call_and_no_other(transport: str, caplog: pytest.LogCaptureFixture) -> None:
    world = core(config=REFUSING)
    async with serving(transport, world) as server, channel_to(server) as channel, asyncio.timeout(WAIT_S):
        process = channel.stream_stream(PROCESS)
        fine, refused = process(), process()
        await fine.write(request_headers().SerializeToString())
        await fine.write(request_body(chat(), end_of_stream=True).SerializeToString())
        route = pb.ProcessingResponse.FromString(await fine.read())
        assert destination_of(route) == ONE
        get = request_headers(path="/v1/models", end_of_stream=True, headers={":method": "GET", "x-unsayable": "1"})
        await refused.write(get.SerializeToString())
        with pytest.raises(grpc.aio.AioRpcError):
            await refused.read()
        assert await refused.code() in {grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN}
        await fine.write(response_headers(end_of_stream=True).SerializeToString())
        assert kinds([pb.ProcessingResponse.FromString(await fine.read()) for _ in range(2)]) == ["request_body", "response_headers"]
        await fine.done_writing()
        assert await fine.read() is grpc.aio.EOF
        assert await fine.code() is grpc.StatusCode.OK
        await eventually(lambda: world.inflight == IDLE, "everything given back")
    if transport == "h2":
        assert [name for name, _ in failures(caplog)] == ["epp.h2"]


def test_failing_hooks_change_no_decision() -> None:
    world, fine = listening(*IN_ORDER), listening()
    rng = random.Random(5)
    for _ in range(50):
        prompt = f"{rng.randrange(5)} " * 300
        asked = [request(each, chat(prompt)) for each in (world, fine)]
        assert destination_of(asked[0].got[0]) == destination_of(asked[1].got[0])
        if rng.random() < 0.5:
            for stream in asked:
                respond(stream, JSON_ANSWER)
