"""Every refusal as the client, a gRPC client and the operator's error counter see it; the limits and deadlines that lead to one."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable

import pytest

from epp import errors
from epp._pb import epp_ext_proc_pb2 as pb
from epp.errors import EppError
from epp.extproc import codec
from epp.extproc.answers import immediate
from epp.extproc.messages import BodyMode
from tests.builders import (
    Core,
    Stream,
    chat,
    chat_of,
    core,
    kinds,
    request_body,
    request_headers,
    request_trailers,
    response_headers,
    set_headers,
)

DROPPED = "x-llm-d-request-dropped-reason"
EVERY_ERROR = sorted(
    (c for _, c in inspect.getmembers(errors, inspect.isclass) if issubclass(c, EppError)), key=lambda c: (c.http_status, c.__name__)
)
TABLE = {
    # class: (HTTP status, gRPC status, type, code, dropped reason, retry-after, code name of the error metric)
    "BadRequestError": (400, 3, "invalid_request_error", "bad_request", None, None, "BadRequest"),
    "NotFoundError": (404, 5, "invalid_request_error", "not_found", None, None, "NotFound"),
    "ModelNotFoundError": (404, 5, "invalid_request_error", "model_not_found", None, None, "NotFound"),
    "DecisionTimeoutError": (408, 4, "invalid_request_error", "decision_timeout", None, None, "RequestTimeout"),
    "PreconditionFailedError": (412, 9, "invalid_request_error", "prefix_not_cached", None, None, "PreconditionFailed"),
    "BodyTooLargeError": (413, 8, "invalid_request_error", "body_too_large", None, None, "PayloadTooLarge"),
    "SaturatedError": (429, 8, "rate_limit_error", "saturated", "rejected-saturated", "1", "ResourceExhausted"),
    "TooManyHeadersError": (431, 8, "invalid_request_error", "too_many_headers", None, None, "RequestHeaderFieldsTooLarge"),
    "EppError": (500, 13, "server_error", "internal_error", None, None, "Internal"),
    "GatewayError": (500, 13, "server_error", "gateway_misconfigured", None, None, "Internal"),
    "NoEndpointsError": (503, 14, "service_unavailable_error", "no_endpoints", "rejected-no-endpoints", None, "ServiceUnavailable"),
    "BuffersFullError": (503, 14, "service_unavailable_error", "buffers_full", "rejected-saturated", None, "ServiceUnavailable"),
    "ShuttingDownError": (503, 14, "service_unavailable_error", "shutting_down", "rejected-shutting-down", None, "ServiceUnavailable"),
}


def answered(error: EppError, *, grpc: bool = False) -> pb.ProcessingResponse:
    return pb.ProcessingResponse.FromString(codec.encode(immediate(error, grpc=grpc)))


def test_the_table_names_every_error() -> None:
    assert {each.__name__ for each in EVERY_ERROR} == set(TABLE)


@pytest.mark.parametrize("error", EVERY_ERROR, ids=lambda each: each.__name__)
def test_every_error_has_its_answer(error: type[EppError]) -> None:
    status, grpc_status, kind, code, dropped, retry_after, code_name = TABLE[error.__name__]
    reply = answered(error('what\n"happened" to ü'))
    answer = reply.immediate_response
    assert answer.status.code == status
    assert json.loads(answer.body) == {"error": {"message": 'what\n"happened" to ü', "type": kind, "code": code}}
    expected = {"content-type": b"application/json"}
    expected |= {DROPPED: dropped.encode()} if dropped else {}
    expected |= {"retry-after": retry_after.encode()} if retry_after else {}
    assert set_headers(reply) == expected
    assert answer.details == f"epp_{code}"
    assert not answer.HasField("grpc_status")
    assert answered(error("x"), grpc=True).immediate_response.grpc_status.status == grpc_status
    assert error.code_name == code_name


# Each refusal on a real stream


def saturated() -> Core:
    """A pool whose filters leave nobody."""
    world = core()
    world.built.scheduler._only._filters = (Nobody(),)
    return world


class Nobody:
    """A filter, as a third party may write one."""

    def keep(self, _request: object, _endpoints: object) -> list[object]:
        return []


def full() -> Core:
    world = core(buffered_bytes_max=1_000)
    Stream(world.session()).send(request_headers(), request_body(b"x" * 1_000))
    return world


def few_headers() -> Core:
    world = core()
    world.limits.header_count_max = 8
    return world


BODY_END = request_body(chat(), end_of_stream=True)
REFUSALS: dict[str, tuple[Callable[[], Core], list[pb.ProcessingRequest], str, str]] = {
    # what happens: the world, the messages, the class of the error, the model it is counted for
    "bad JSON": (core, [request_headers(), request_body(b"{", end_of_stream=True)], "BadRequestError", ""),
    "no model": (core, [request_headers(), request_body(b"{}", end_of_stream=True)], "BadRequestError", ""),
    "no messages": (core, [request_headers(), request_body(b'{"model":"m"}', end_of_stream=True)], "BadRequestError", "m"),
    "a header that is not UTF-8": (core, [request_headers(headers={"x": b"\xff"})], "BadRequestError", ""),
    "a long model": (core, [request_headers(), request_body(chat(model="m" * 513), end_of_stream=True)], "BadRequestError", ""),
    "an unknown path": (core, [request_headers(path="/nowhere")], "NotFoundError", ""),
    "an unknown path, GET": (core, [request_headers(path="/nowhere", end_of_stream=True)], "NotFoundError", ""),
    "a large body": (lambda: core(body_bytes_max=9), [request_headers(), BODY_END], "BodyTooLargeError", ""),
    "a large body, buffered": (
        lambda: core(body_bytes_max=9),
        [request_headers(modes=(BodyMode.BUFFERED, BodyMode.NONE)), BODY_END],
        "BodyTooLargeError",
        "",
    ),
    "many headers": (few_headers, [request_headers(headers={f"x-{n}": "" for n in range(9)})], "TooManyHeadersError", ""),
    "no endpoint": (lambda: core(0), [request_headers(), BODY_END], "NoEndpointsError", "m"),
    "no endpoint, GET": (lambda: core(0), [request_headers(path="/v1/models", end_of_stream=True)], "NoEndpointsError", ""),
    "nobody left": (saturated, [request_headers(), BODY_END], "SaturatedError", "m"),
    "buffers full": (full, [request_headers(), BODY_END], "BuffersFullError", ""),
    "a body without headers": (core, [BODY_END], "GatewayError", ""),
}


@pytest.mark.parametrize("grpc", [False, True], ids=["http", "grpc"])
@pytest.mark.parametrize("name", REFUSALS)
def test_a_refusal_is_one_answer_counted_once_and_holds_nothing(name: str, grpc: bool) -> None:
    make, script, error, model = REFUSALS[name]
    status, grpc_status, _, code, dropped, retry_after, code_name = TABLE[error]
    world = make()
    before = world.inflight
    stream = Stream(world.session())
    for message in script:
        sent = pb.ProcessingRequest.FromString(message.SerializeToString())
        for header in sent.request_headers.headers.headers if grpc and sent.HasField("request_headers") else ():
            if header.key == "content-type":
                header.raw_value = b"application/grpc+proto"
        stream.send(sent)
    counted = world.errors(model)
    assert stream.send(request_body(b"more"), request_body(end_of_stream=True), request_trailers(), response_headers()) == []
    stream.half_close()
    stream.close()
    assert kinds(stream.got) == ["immediate_response"][: len(stream.got)] or kinds(stream.got) == ["request_headers", "immediate_response"]
    answer = stream.got[-1].immediate_response
    assert (answer.status.code, json.loads(answer.body)["error"]["code"]) == (status, code)
    headers = set_headers(stream.got[-1])
    assert headers.get(DROPPED) == (dropped.encode() if dropped else None)
    assert headers.get("retry-after") == (retry_after.encode() if retry_after else None)
    if grpc and script[0].HasField("request_headers"):
        assert answer.grpc_status.status == grpc_status
    else:
        assert not answer.HasField("grpc_status")
    assert counted == world.errors(model) == {code_name: 1}
    everywhere = [sum(series.errors.values()) for series in world.metrics._series.values()]
    assert sum(everywhere) == 1, "and nowhere else"
    assert world.inflight == before


def test_a_bug_of_ours_is_counted_too() -> None:
    """It is the one error an operator most wants to see on a dashboard."""

    class Broken:
        def keep(self, _request: object, _endpoints: object) -> list[object]:
            raise RuntimeError("a plugin's bug")

    world = core()
    world.built.scheduler._only._filters = (Broken(),)
    stream = Stream(world.session())
    (reply,) = stream.send(request_headers(), BODY_END)
    assert reply.immediate_response.status.code == 500
    assert sum(series.errors["Internal"] for series in world.metrics._series.values()) == 1
    stream.close()
    assert world.inflight == (0, 0, 0, 0)


# Limits


def test_as_many_headers_as_the_limit_are_taken_and_one_more_is_not() -> None:
    world = core()
    world.limits.header_count_max = 10
    base = len(request_headers().request_headers.headers.headers)
    for extra, taken in [(10 - base, True), (11 - base, False)]:
        stream = Stream(world.session())
        replies = stream.send(request_headers(path="/v1/models", end_of_stream=True, headers={f"x-{n}": "v" for n in range(extra)}))
        assert kinds(replies) == ["request_headers" if taken else "immediate_response"]
    assert world.metrics.limit_hits == {"header_count_max": 1}


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", ""])
def test_a_models_name_may_have_512_characters(path: str) -> None:
    for name, status in [("ü" * 512, 0), ("m" * 513, 400)]:
        stream = Stream(core().session())
        body = json.dumps({"model": name, "messages": [{}], "prompt": "x"}).encode()
        reply = stream.send(request_headers(path=path), request_body(body, end_of_stream=True))[0]
        assert reply.immediate_response.status.code == status
        assert name.encode() not in reply.immediate_response.body


# Deadlines


@pytest.mark.parametrize("modes", [(BodyMode.FULL_DUPLEX_STREAMED,) * 2, (BodyMode.BUFFERED, BodyMode.NONE), None])
def test_a_request_whose_body_stops_coming_is_given_up(modes: tuple[BodyMode, BodyMode] | None) -> None:
    world = core()
    stream = Stream(world.session())
    stream.send(request_headers(modes=modes))
    if modes is None:
        stream.send(request_body(chat()[:5]))
    world.clock.advance(world.limits.decision_s - 0.1)
    assert stream.session.expire(world.clock.now_s()) == []
    world.clock.advance(0.1)
    (reply,) = stream.session.expire(world.clock.now_s())
    answer = pb.ProcessingResponse.FromString(codec.encode(reply)).immediate_response
    assert (answer.status.code, json.loads(answer.body)["error"]["code"]) == (408, "decision_timeout")
    assert stream.session.answered
    assert world.metrics.limit_hits == {"decision_s": 1}
    assert world.errors("") == {"RequestTimeout": 1}
    assert stream.session.expire(world.clock.now_s() + 1_000) == []
    assert stream.send(request_body(chat(), end_of_stream=True)) == []
    stream.close()
    assert world.inflight == (0, 0, 0, 0)


def test_every_piece_of_a_body_gives_it_more_time() -> None:
    world = core()
    stream = Stream(world.session())
    stream.send(request_headers())
    body = chat_of(1_000)
    for at in range(0, 1_000, 100):
        world.clock.advance(world.limits.decision_s - 1)
        assert stream.session.expire(world.clock.now_s()) == []
        stream.send(request_body(body[at : at + 100]))
    assert kinds(stream.send(request_body(end_of_stream=True))) == ["request_headers", "request_body"]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/audio/transcriptions"])
def test_a_routed_request_is_not_given_up_however_long_it_takes(path: str) -> None:
    world = core()
    stream = Stream(world.session())
    stream.send(request_headers(path=path), request_body(chat(), end_of_stream=path.endswith("completions")))
    world.clock.advance(100_000)
    assert stream.session.expire(world.clock.now_s()) == []
    assert world.inflight[0] == 1


def test_the_time_is_an_operators_choice() -> None:
    world = core()
    world.limits.decision_s = 0.5
    stream = Stream(world.session())
    stream.send(request_headers())
    world.clock.advance(0.5)
    assert len(stream.session.expire(world.clock.now_s())) == 1
