"""The hand-written codec against upb: every reply, every size that changes a varint; every message kind; malformed input."""

from __future__ import annotations

import contextlib
import math
import struct
import warnings
from collections.abc import Mapping
from typing import Any

import pytest
from google.protobuf.struct_pb2 import Struct
from hypothesis import given, settings
from hypothesis import strategies as st

from epp._pb import epp_ext_proc_pb2 as pb
from epp.extproc import codec
from epp.extproc.messages import (
    BodyMode,
    ContinueBody,
    ContinueHeaders,
    ContinueTrailers,
    Immediate,
    Reply,
    RequestBody,
    RequestHeaders,
    RequestTrailers,
    ResponseBody,
    ResponseHeaders,
    ResponseTrailers,
    RouteReply,
    StreamedBody,
    UnknownMessage,
)
from tests.builders import DESTINATION, metadata, request_headers, response_headers

with warnings.catch_warnings():  # its generated classes use a decorator in a form that pydantic 2.12 deprecates
    warnings.simplefilter("ignore", DeprecationWarning)
    from envoy_data_plane.envoy.config.core import v3 as envoy_core
    from envoy_data_plane.envoy.extensions.filters.http.ext_proc import v3 as envoy_filter
    from envoy_data_plane.envoy.service.ext_proc import v3 as envoy

VARINT_EDGES = [edge + delta for edge in (0, 1 << 7, 1 << 14, 1 << 16) for delta in range(-32, 33) if edge + delta >= 0]


def parsed(reply: Reply) -> pb.ProcessingResponse:
    return pb.ProcessingResponse.FromString(codec.encode(reply))


def streamed(body: bytes, *, end_of_stream: bool, response: bool) -> pb.ProcessingResponse:
    mutation = pb.BodyMutation(streamed_response=pb.StreamedBodyResponse(body=body, end_of_stream=end_of_stream))
    part = pb.BodyResponse(response=pb.CommonResponse(body_mutation=mutation))
    return pb.ProcessingResponse(response_body=part) if response else pb.ProcessingResponse(request_body=part)


def option(key: str, value: bytes) -> pb.HeaderValueOption:
    return pb.HeaderValueOption(
        header=pb.HeaderValue(key=key, raw_value=value), append_action=pb.HeaderValueOption.OVERWRITE_IF_EXISTS_OR_ADD
    )


# Replies


@pytest.mark.parametrize("response", [False, True])
@pytest.mark.parametrize("end_of_stream", [False, True])
def test_body_replies_of_every_size_that_matters(response: bool, end_of_stream: bool) -> None:
    for size in sorted({*VARINT_EDGES, *range(0, 1_300, 7), 1_022, 1_023, 1_024, 1_025, 62_000, 70_000}):
        body = bytes(number % 251 for number in range(size))
        for given_as in (body, memoryview(body)):
            reply = StreamedBody(given_as, end_of_stream=end_of_stream, response=response)
            assert parsed(reply) == streamed(body, end_of_stream=end_of_stream, response=response), size


@settings(deadline=None, max_examples=200)
@given(st.integers(0, 70_000), st.booleans(), st.booleans())
def test_body_replies_of_any_size(size: int, end_of_stream: bool, response: bool) -> None:
    body = b"\x0a" * size
    reply = StreamedBody(body, end_of_stream=end_of_stream, response=response)
    assert parsed(reply) == streamed(body, end_of_stream=end_of_stream, response=response)


def test_a_streamed_reply_is_present_even_when_it_says_nothing() -> None:
    part = parsed(StreamedBody(b"", end_of_stream=False, response=False))
    assert part.request_body.response.body_mutation.HasField("streamed_response")


@pytest.mark.parametrize("in_body", [False, True])
@pytest.mark.parametrize("content_length", [-1, 0, 7, 5_000_000])
@pytest.mark.parametrize("request_id", ["", "id", "x" * 300])
@pytest.mark.parametrize("destination", ["10.0.0.1:8000", "[2001:db8::1]:65535", ",".join(f"10.0.0.{n}:8000" for n in range(200))])
def test_route_replies(in_body: bool, content_length: int, request_id: str, destination: str) -> None:
    mutation = pb.HeaderMutation(set_headers=[option(DESTINATION, destination.encode())])
    if content_length >= 0:
        mutation.set_headers.append(option("content-length", str(content_length).encode()))
    if request_id:
        mutation.set_headers.append(option("x-request-id", request_id.encode()))
    common = pb.CommonResponse(header_mutation=mutation)
    expected = pb.ProcessingResponse()
    if in_body:
        expected.request_body.response.CopyFrom(common)
    else:
        expected.request_headers.response.CopyFrom(common)
    expected.dynamic_metadata.update({"envoy.lb": {DESTINATION: destination}})
    assert parsed(RouteReply(destination, content_length, request_id, in_body=in_body)) == expected


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        (ContinueHeaders(response=False), pb.ProcessingResponse(request_headers=pb.HeadersResponse())),
        (ContinueHeaders(response=True), pb.ProcessingResponse(response_headers=pb.HeadersResponse())),
        (ContinueBody(response=False), pb.ProcessingResponse(request_body=pb.BodyResponse())),
        (ContinueBody(response=True), pb.ProcessingResponse(response_body=pb.BodyResponse())),
        (ContinueTrailers(response=False), pb.ProcessingResponse(request_trailers=pb.TrailersResponse())),
        (ContinueTrailers(response=True), pb.ProcessingResponse(response_trailers=pb.TrailersResponse())),
    ],
    ids=lambda value: type(value).__name__,
)
def test_replies_that_change_nothing(reply: Reply, expected: pb.ProcessingResponse) -> None:
    assert parsed(reply) == expected
    assert parsed(reply).WhichOneof("response") == expected.WhichOneof("response")


@pytest.mark.parametrize("in_body", [False, True])
@pytest.mark.parametrize("body", [None, b"", b"x", b"y" * 70_000])
@pytest.mark.parametrize("remove", [(), ("content-length", "x-gateway-inference-objective")])
def test_route_replies_that_change_the_body_or_remove_headers(in_body: bool, body: bytes | None, remove: tuple[str, ...]) -> None:
    mutation = pb.HeaderMutation(set_headers=[option(DESTINATION, b"10.0.0.1:8000")], remove_headers=remove)
    common = pb.CommonResponse(header_mutation=mutation)
    if body is not None:
        common.body_mutation.CopyFrom(pb.BodyMutation(body=body) if body else pb.BodyMutation(clear_body=True))
    expected = pb.ProcessingResponse()
    (expected.request_body if in_body else expected.request_headers).response.CopyFrom(common)
    expected.dynamic_metadata.update({"envoy.lb": {DESTINATION: "10.0.0.1:8000"}})
    assert parsed(RouteReply("10.0.0.1:8000", in_body=in_body, body=body, remove=remove)) == expected


@pytest.mark.parametrize("response", [False, True])
@pytest.mark.parametrize("body", [b"", b"x", b"y" * 200, b"z" * 70_000])
def test_replies_that_put_another_body_in_place(response: bool, body: bytes) -> None:
    mutation = pb.BodyMutation(body=body) if body else pb.BodyMutation(clear_body=True)
    part = pb.BodyResponse(response=pb.CommonResponse(body_mutation=mutation))
    expected = pb.ProcessingResponse(response_body=part) if response else pb.ProcessingResponse(request_body=part)
    assert parsed(ContinueBody(response=response, body=body)) == expected


@pytest.mark.parametrize("response", [False, True])
@pytest.mark.parametrize("changed", [{}, {"x-a": "b", "x-c": "d" * 300}])
@pytest.mark.parametrize("remove", [(), ("content-length",)])
@pytest.mark.parametrize("mode", [None, BodyMode.BUFFERED, BodyMode.STREAMED])
def test_headers_replies_that_change_something(
    response: bool, changed: dict[str, str], remove: tuple[str, ...], mode: BodyMode | None
) -> None:
    got = parsed(ContinueHeaders(response=response, set=changed, remove=remove, keep_request_mode=mode))
    assert got.WhichOneof("response") == ("response_headers" if response else "request_headers")
    mutation = (got.response_headers if response else got.request_headers).response.header_mutation
    assert list(mutation.set_headers) == [option(key, value.encode()) for key, value in changed.items()]
    assert tuple(mutation.remove_headers) == remove
    assert got.HasField("mode_override") == (mode is not None)
    if mode is not None:
        assert got.mode_override.request_body_mode == mode
        assert got.mode_override.response_body_mode == BodyMode.NONE
        assert got.mode_override.response_header_mode == pb.ProcessingMode.SEND


@settings(deadline=None, max_examples=100)
@given(
    st.sampled_from([400, 404, 413, 429, 500, 503]),
    st.binary(max_size=300),
    st.dictionaries(st.sampled_from(["content-type", "retry-after", "x-a"]), st.text(max_size=200)),
    st.one_of(st.none(), st.integers(0, 16)),
    st.text(max_size=200),
)
def test_immediate_replies(status: int, body: bytes, headers: dict[str, str], grpc_status: int | None, details: str) -> None:
    answer = pb.ImmediateResponse(status=pb.HttpStatus(code=status), body=body, details=details)
    answer.headers.set_headers.extend(option(key, value.encode()) for key, value in headers.items())
    if grpc_status is not None:
        answer.grpc_status.CopyFrom(pb.GrpcStatus(status=grpc_status))
    got = parsed(Immediate(status, body, headers, grpc_status=grpc_status, details=details))
    assert got.WhichOneof("response") == "immediate_response"
    assert got.immediate_response.HasField("grpc_status") == (grpc_status is not None)
    got.immediate_response.headers.SetInParent()
    answer.headers.SetInParent()
    assert got.immediate_response == answer


def test_framed_replies_are_grpc_messages_in_order() -> None:
    replies: list[Reply] = [
        RouteReply("10.0.0.1:8000", 70_000),
        StreamedBody(b"x" * 62_000, end_of_stream=False, response=False),
        StreamedBody(memoryview(b"y" * 8_000), end_of_stream=True, response=False),
        ContinueTrailers(response=False),
        StreamedBody(b"", end_of_stream=True, response=True),
        Immediate(503, b"{}", {"a": "b"}, grpc_status=14, details="d"),
    ]
    wire = codec.frame(replies)
    at, messages = 0, []
    while at < len(wire):
        assert wire[at] == 0
        length = int.from_bytes(wire[at + 1 : at + 5], "big")
        messages.append(wire[at + 5 : at + 5 + length])
        at += 5 + length
    assert at == len(wire)
    assert messages == [codec.encode(reply) for reply in replies]


# Any text, any number

TEXT = st.text(min_size=1, max_size=200)
NUMBERS = st.floats() | st.integers(-(1 << 64), 1 << 64)
MAPS = st.dictionaries(st.text(max_size=100), NUMBERS, max_size=12)
NAMESPACES = st.dictionaries(st.text(max_size=60), MAPS, min_size=1, max_size=4)


def numbers(values: Mapping[str, float]) -> Struct:
    """Field by field: not by the convenience the codec uses."""
    made = Struct()
    for name, value in values.items():
        made.fields[name].number_value = value
    return made


def in_order(message: pb.ProcessingResponse) -> bytes:
    """Equal for equal messages, also where a number in them is none, which equals nothing."""
    return message.SerializeToString(deterministic=True)


def same(reply: Reply, expected: pb.ProcessingResponse) -> None:
    """Our bytes say this, no more, and nothing twice: protobuf would write as many."""
    wire = codec.encode(reply)
    assert in_order(pb.ProcessingResponse.FromString(wire)) == in_order(expected)
    assert len(wire) == expected.ByteSize()
    assert codec.frame([reply, reply]) == 2 * (b"\0" + len(wire).to_bytes(4, "big") + wire)


@settings(deadline=None, max_examples=300)
@given(
    destination=TEXT,
    changed=st.dictionaries(TEXT, TEXT, max_size=6),
    remove=st.lists(TEXT, max_size=4),
    request_id=st.text(max_size=200),
    content_length=st.integers(-1, 1 << 40),
    scores=st.none() | MAPS,
    body=st.none() | st.binary(max_size=300),
    in_body=st.booleans(),
    mode=st.sampled_from([None, BodyMode.BUFFERED, BodyMode.BUFFERED_PARTIAL, BodyMode.STREAMED]),
)
def test_route_replies_of_any_text_and_scores(
    *,
    destination: str,
    changed: dict[str, str],
    remove: list[str],
    request_id: str,
    content_length: int,
    scores: dict[str, float] | None,
    body: bytes | None,
    in_body: bool,
    mode: BodyMode | None,
) -> None:
    mutation = pb.HeaderMutation(
        set_headers=[option(name, value.encode()) for name, value in [(DESTINATION, destination), *changed.items()]]
    )
    if content_length >= 0:
        mutation.set_headers.append(option("content-length", b"%d" % content_length))
    if request_id:
        mutation.set_headers.append(option("x-request-id", request_id.encode()))
    mutation.remove_headers.extend(remove)
    expected = pb.ProcessingResponse()
    common = (expected.request_body if in_body else expected.request_headers).response
    common.header_mutation.CopyFrom(mutation)
    if body is not None:
        common.body_mutation.CopyFrom(pb.BodyMutation(body=body) if body else pb.BodyMutation(clear_body=True))
    told = expected.dynamic_metadata.fields["envoy.lb"].struct_value.fields
    told[DESTINATION].string_value = destination
    if scores is not None:
        told[f"{DESTINATION}-scores"].struct_value.CopyFrom(numbers(scores))
    if mode is not None:
        skip, send = pb.ProcessingMode.SKIP, pb.ProcessingMode.SEND
        override = pb.ProcessingMode(response_header_mode=send, request_trailer_mode=skip, response_trailer_mode=skip)
        override.request_body_mode = int(mode)  # type: ignore[assignment]
        expected.mode_override.CopyFrom(override)
    same(
        RouteReply(
            destination,
            content_length,
            request_id,
            in_body=in_body,
            body=body,
            remove=tuple(remove),
            keep_request_mode=mode,
            set=changed,
            scores=scores,
        ),
        expected,
    )


@settings(deadline=None, max_examples=300)
@given(NAMESPACES, st.booleans(), st.booleans(), st.booleans(), st.binary(max_size=1_500))
def test_metadata_of_any_text_and_numbers(
    namespaces: dict[str, dict[str, float]], response: bool, handed_back: bool, end_of_stream: bool, body: bytes
) -> None:
    expected = pb.ProcessingResponse()
    reply: StreamedBody | ContinueBody
    if handed_back:
        expected = streamed(body, end_of_stream=end_of_stream, response=response)
        reply = StreamedBody(body, end_of_stream=end_of_stream, response=response, metadata=namespaces)
    else:
        part = expected.response_body if response else expected.request_body
        part.SetInParent()
        if body:
            part.response.body_mutation.body = body
        reply = ContinueBody(response=response, body=body or None, metadata=namespaces)
    for namespace, values in namespaces.items():
        expected.dynamic_metadata.fields[namespace].struct_value.CopyFrom(numbers(values))
    same(reply, expected)


@settings(deadline=None, max_examples=200)
@given(NAMESPACES, st.booleans())
def test_metadata_beside_trailers(namespaces: dict[str, dict[str, float]], response: bool) -> None:
    expected = pb.ProcessingResponse()
    (expected.response_trailers if response else expected.request_trailers).SetInParent()
    for namespace, values in namespaces.items():
        expected.dynamic_metadata.fields[namespace].struct_value.CopyFrom(numbers(values))
    same(ContinueTrailers(response=response, metadata=namespaces), expected)


@settings(deadline=None, max_examples=200)
@given(TEXT, st.none() | MAPS, st.booleans())
def test_a_destination_beside_trailers(destination: str, scores: dict[str, float] | None, response: bool) -> None:
    expected = pb.ProcessingResponse()
    (expected.response_trailers if response else expected.request_trailers).SetInParent()
    told = expected.dynamic_metadata.fields["envoy.lb"].struct_value.fields
    told[DESTINATION].string_value = destination
    if scores is not None:
        told[f"{DESTINATION}-scores"].struct_value.CopyFrom(numbers(scores))
    same(ContinueTrailers(response=response, destination=destination, scores=scores), expected)


@settings(deadline=None, max_examples=200)
@given(st.dictionaries(TEXT, TEXT, min_size=1, max_size=8), st.lists(TEXT, max_size=4), st.booleans())
def test_headers_replies_of_any_text(changed: dict[str, str], remove: list[str], response: bool) -> None:
    expected = pb.ProcessingResponse()
    mutation = (expected.response_headers if response else expected.request_headers).response.header_mutation
    mutation.set_headers.extend(option(name, value.encode()) for name, value in changed.items())
    mutation.remove_headers.extend(remove)
    same(ContinueHeaders(response=response, set=changed, remove=tuple(remove)), expected)


@pytest.mark.parametrize(
    "number", [math.nan, math.inf, -math.inf, -0.0, 0.0, 5e-324, 1.7976931348623157e308, 0.1 + 0.2, -1.0, 2**53 + 1, True], ids=repr
)
def test_a_number_arrives_to_the_bit_even_one_that_is_none(number: float) -> None:
    """What may be told at all is decided before: the codec takes what it is given, and fails for none of them."""
    bits = struct.pack("<d", number)
    route = parsed(RouteReply("10.0.0.1:8000", scores={"10.0.0.1:8000": float(number)}))
    (score,) = route.dynamic_metadata.fields["envoy.lb"].struct_value.fields[f"{DESTINATION}-scores"].struct_value.fields.values()
    last = parsed(StreamedBody(b"", end_of_stream=True, response=True, metadata={"n": {"x": float(number)}}))
    told = last.dynamic_metadata.fields["n"].struct_value.fields["x"]
    for value in (score, told):
        assert value.WhichOneof("kind") == "number_value"
        assert struct.pack("<d", value.number_value) == bits


@pytest.mark.parametrize("count", [0, 1, 100, 20_000])
def test_a_map_of_any_size(count: int) -> None:
    scores = {f"10.{n >> 16}.{n >> 8 & 255}.{n & 255}:8000": n / 7 for n in range(count)}
    expected = pb.ProcessingResponse()
    expected.request_headers.response.header_mutation.set_headers.append(option(DESTINATION, b"x:1"))
    told = expected.dynamic_metadata.fields["envoy.lb"].struct_value.fields
    told[DESTINATION].string_value = "x:1"
    told[f"{DESTINATION}-scores"].struct_value.CopyFrom(numbers(scores))
    same(RouteReply("x:1", scores=scores), expected)
    assert len(told[f"{DESTINATION}-scores"].struct_value.fields) == count


@pytest.mark.parametrize("size", [127, 128, 16_383, 16_384, 70_000, 3_000_000])
def test_text_of_any_length(size: int) -> None:
    name, value = "é" * (size // 2), "v" * size
    expected = pb.ProcessingResponse()
    expected.request_headers.response.header_mutation.set_headers.extend([option(DESTINATION, b"x:1"), option(name, value.encode())])
    expected.dynamic_metadata.update({"envoy.lb": {DESTINATION: "x:1"}})
    same(RouteReply("x:1", set={name: value}), expected)
    metadata_ = pb.ProcessingResponse(response_body=pb.BodyResponse())
    metadata_.dynamic_metadata.fields[name].struct_value.fields[value].number_value = 1.0
    same(ContinueBody(response=True, metadata={name: {value: 1.0}}), metadata_)


def test_a_header_may_be_set_to_nothing() -> None:
    got = parsed(RouteReply("x:1", set={"x-a": ""})).request_headers.response.header_mutation.set_headers
    assert [(each.header.key, each.header.raw_value) for each in got] == [(DESTINATION, b"x:1"), ("x-a", b"")]


# Envoy's own messages: the .proto here is our copy of a part of theirs


def plain(value: Any) -> Any:
    """A Struct or Value of theirs as Python has it."""
    if isinstance(value, dict):
        return {name: plain(each) for name, each in value.items()}
    if value.struct_value is not None:
        return plain(value.struct_value.fields)
    return value.string_value if value.string_value is not None else value.number_value


def set_by(mutation: Any) -> list[tuple[str, bytes]]:
    for each in mutation.set_headers:
        assert each.append_action is envoy_core.HeaderValueOptionHeaderAppendAction.OVERWRITE_IF_EXISTS_OR_ADD
        assert (each.header.value, each.keep_empty_value) == ("", False)
    return [(each.header.key, each.header.raw_value) for each in mutation.set_headers]


def envoys(reply: Reply) -> Any:
    """What Envoy makes of it. Its classes say of every part that it may be missing: one that is raises here all the same."""
    return envoy.ProcessingResponse.parse(codec.encode(reply))


@settings(deadline=None, max_examples=60)
@given(
    TEXT,
    st.dictionaries(TEXT, TEXT, max_size=4),
    st.lists(TEXT, max_size=3),
    st.dictionaries(TEXT, st.floats(allow_nan=False), min_size=1, max_size=5),
    st.binary(min_size=1, max_size=200),
)
def test_envoy_reads_what_a_route_reply_says(
    destination: str, changed: dict[str, str], remove: list[str], scores: dict[str, float], body: bytes
) -> None:
    set_ = [(DESTINATION, destination.encode()), *((name, value.encode()) for name, value in changed.items())]
    told = {"envoy.lb": {DESTINATION: destination, f"{DESTINATION}-scores": scores}}
    got = envoys(RouteReply(destination, set=changed, remove=tuple(remove), scores=scores, keep_request_mode=BodyMode.STREAMED))
    common = got.request_headers.response
    assert set_by(common.header_mutation) == set_
    assert common.header_mutation.remove_headers == remove
    assert plain(got.dynamic_metadata.fields) == told
    modes = got.mode_override
    send = envoy_filter.ProcessingModeHeaderSendMode
    assert (modes.response_header_mode, modes.request_trailer_mode, modes.response_trailer_mode) == (send.SEND, send.SKIP, send.SKIP)
    body_mode = envoy_filter.ProcessingModeBodySendMode
    assert (modes.request_body_mode, modes.response_body_mode) == (body_mode.STREAMED, body_mode.NONE)

    got = envoys(RouteReply(destination, 7, in_body=True, body=body, scores=scores))
    common = got.request_body.response
    assert set_by(common.header_mutation) == [set_[0], ("content-length", b"7")]
    assert common.body_mutation.body == body
    assert plain(got.dynamic_metadata.fields) == told


@settings(deadline=None, max_examples=60)
@given(
    st.binary(min_size=1, max_size=200),
    st.dictionaries(TEXT, st.dictionaries(TEXT, st.floats(allow_nan=False), min_size=1, max_size=4), min_size=1, max_size=3),
    st.booleans(),
    st.booleans(),
)
def test_envoy_reads_what_body_replies_say(
    body: bytes, namespaces: dict[str, dict[str, float]], response: bool, end_of_stream: bool
) -> None:
    got = envoys(StreamedBody(body, end_of_stream=end_of_stream, response=response, metadata=namespaces))
    part = got.response_body if response else got.request_body
    assert part.response.body_mutation.streamed_response == envoy.StreamedBodyResponse(body=body, end_of_stream=end_of_stream)
    assert plain(got.dynamic_metadata.fields) == namespaces
    got = envoys(ContinueBody(response=response, body=body, metadata=namespaces))
    part = got.response_body if response else got.request_body
    assert part.response.body_mutation.body == body
    assert plain(got.dynamic_metadata.fields) == namespaces
    got = envoys(ContinueBody(response=response, body=b""))
    part = got.response_body if response else got.request_body
    assert part.response.body_mutation.clear_body is True


def test_envoy_reads_what_the_other_replies_say() -> None:
    answer = envoys(Immediate(429, b"{}", {"retry-after": "1", "x-a": "ü"}, grpc_status=8, details="epp_saturated")).immediate_response
    assert (int(answer.status.code), answer.grpc_status.status, answer.body, answer.details) == (429, 8, b"{}", "epp_saturated")
    assert set_by(answer.headers) == [("retry-after", b"1"), ("x-a", "ü".encode())]
    for response in (False, True):
        headers = envoys(ContinueHeaders(response=response, set={"x-a": "ü"}, remove=("x-b",)))
        part = headers.response_headers if response else headers.request_headers
        assert set_by(part.response.header_mutation) == [("x-a", "ü".encode())]
        assert part.response.header_mutation.remove_headers == ["x-b"]
        trailers = envoys(ContinueTrailers(response=response, destination="10.0.0.1:8000"))
        assert (trailers.response_trailers if response else trailers.request_trailers) == envoy.TrailersResponse()
        assert (trailers.request_trailers if response else trailers.response_trailers) is None
        assert plain(trailers.dynamic_metadata.fields) == {"envoy.lb": {DESTINATION: "10.0.0.1:8000"}}
        trailers = envoys(ContinueTrailers(response=response, metadata={"envoy.lb": {"cost": 37.0}}))
        assert (trailers.response_trailers if response else trailers.request_trailers) == envoy.TrailersResponse()
        assert plain(trailers.dynamic_metadata.fields) == {"envoy.lb": {"cost": 37.0}}


def test_envoys_modes_are_ours() -> None:
    theirs = {mode.name: mode.value for mode in envoy_filter.ProcessingModeBodySendMode}
    assert {mode.name: mode.value for mode in BodyMode if mode is not BodyMode.GRPC} == {n: v for n, v in theirs.items() if n != "GRPC"}


# Messages


def decoded(message: pb.ProcessingRequest) -> object:
    return codec.decode(message.SerializeToString())


def theirs(**value: Any) -> Any:
    """A message as Envoy's own classes write it."""
    return codec.decode(bytes(envoy.ProcessingRequest(**value)))


def test_request_headers_as_envoy_writes_them() -> None:
    given_ = [envoy_core.HeaderValue(key=":path", raw_value=b"/p"), envoy_core.HeaderValue(key="x-a", value="ü")]
    modes = envoy_filter.ProcessingModeBodySendMode
    hint = Struct()
    hint.update({f"{DESTINATION}-subset": ["10.0.0.1:8000", "10.0.0.2"]})
    event = theirs(
        request_headers=envoy.HttpHeaders(headers=envoy_core.HeaderMap(headers=given_), end_of_stream=True),
        metadata_context=envoy_core.Metadata(
            filter_metadata={"envoy.lb.subset_hint": envoy_struct(hint)},
        ),
        protocol_config=envoy.ProtocolConfiguration(
            request_body_mode=modes.STREAMED,
            response_body_mode=modes.FULL_DUPLEX_STREAMED,
            send_body_without_waiting_for_header_response=True,
        ),
        observability_mode=True,
    )
    assert isinstance(event, RequestHeaders)
    assert (event.headers, event.end_of_stream) == ({":path": "/p", "x-a": "ü"}, True)
    assert (event.request_mode, event.response_mode, event.body_unasked) == (BodyMode.STREAMED, BodyMode.FULL_DUPLEX_STREAMED, True)
    assert event.subset == ("10.0.0.1:8000", "10.0.0.2")


def test_response_headers_as_envoy_writes_them() -> None:
    given_ = [(":status", b"503"), ("content-type", b"text/event-stream"), ("endpoint-load-metrics", b"TEXT x=1")]
    served, attributes = Struct(), Struct()
    served.update({f"{DESTINATION}-served": "10.0.0.1:8000"})
    attributes.update({"response.code_details": "via_upstream", "upstream.address": "10.0.0.2:8000"})
    headers = envoy_core.HeaderMap(headers=[envoy_core.HeaderValue(key=name, raw_value=value) for name, value in given_])
    event = theirs(
        response_headers=envoy.HttpHeaders(headers=headers),
        metadata_context=envoy_core.Metadata(filter_metadata={"envoy.lb": envoy_struct(served)}),
        attributes={"envoy.filters.http.ext_proc": envoy_struct(attributes)},
    )
    assert isinstance(event, ResponseHeaders)
    assert (event.status, event.event_stream, event.load, event.end_of_stream) == (503, True, "TEXT x=1", False)
    assert (event.served, event.code_details) == ("10.0.0.1:8000", "via_upstream")


def envoy_struct(message: Struct) -> Any:
    """As their classes have it."""
    field = envoy.ProcessingResponse.parse(pb.ProcessingResponse(dynamic_metadata=message).SerializeToString()).dynamic_metadata
    assert field is not None
    return field


def test_bodies_and_trailers_as_envoy_writes_them() -> None:
    body = envoy.HttpBody(body=b"abc", end_of_stream=True)
    for event, kind in ((theirs(request_body=body), RequestBody), (theirs(response_body=body), ResponseBody)):
        assert isinstance(event, RequestBody | ResponseBody)
        assert type(event) is kind
        assert (event.body, event.end_of_stream) == (b"abc", True)
    trailers = envoy.HttpTrailers(trailers=envoy_core.HeaderMap(headers=[envoy_core.HeaderValue(key="grpc-status", raw_value=b"0")]))
    assert isinstance(theirs(request_trailers=trailers), RequestTrailers)
    assert isinstance(theirs(response_trailers=trailers), ResponseTrailers)


def test_every_kind_of_message() -> None:
    body = pb.HttpBody(body=b"abc", end_of_stream=True)
    for kind, message in [
        (RequestHeaders, pb.ProcessingRequest(request_headers=pb.HttpHeaders())),
        (ResponseHeaders, pb.ProcessingRequest(response_headers=pb.HttpHeaders())),
        (RequestBody, pb.ProcessingRequest(request_body=body)),
        (ResponseBody, pb.ProcessingRequest(response_body=body)),
        (RequestTrailers, pb.ProcessingRequest(request_trailers=pb.HttpTrailers())),
        (ResponseTrailers, pb.ProcessingRequest(response_trailers=pb.HttpTrailers())),
        (UnknownMessage, pb.ProcessingRequest()),
    ]:
        assert type(decoded(message)) is kind


@pytest.mark.parametrize("end_of_stream", [False, True])
def test_bodies(end_of_stream: bool) -> None:
    for message in (
        pb.ProcessingRequest(request_body=pb.HttpBody(body=b"\0\xff" * 9, end_of_stream=end_of_stream)),
        pb.ProcessingRequest(response_body=pb.HttpBody(body=b"\0\xff" * 9, end_of_stream=end_of_stream)),
    ):
        event = decoded(message)
        assert isinstance(event, RequestBody | ResponseBody)
        assert (event.body, event.end_of_stream) == (b"\0\xff" * 9, end_of_stream)


def headers_of(*headers: tuple[str, bytes, bytes]) -> RequestHeaders:
    message = pb.ProcessingRequest()
    for key, value, raw_value in headers:
        message.request_headers.headers.headers.add(key=key, value=value, raw_value=raw_value)
    event = decoded(message)
    assert isinstance(event, RequestHeaders)
    return event


def test_headers_come_in_value_or_raw_value_and_any_case() -> None:
    event = headers_of((":path", b"/p", b""), ("Content-Type", b"", b"a/b"), ("X-Both", b"value", b"raw"), ("x-empty", b"", b""))
    assert event.headers == {":path": "/p", "content-type": "a/b", "x-both": "raw", "x-empty": ""}


def test_a_repeated_header_is_joined() -> None:
    assert headers_of(("x-a", b"", b"1"), ("X-A", b"", b"2"), ("x-a", b"3", b"")).headers == {"x-a": "1,2,3"}


def test_a_header_that_is_not_utf8_is_named_and_left_out() -> None:
    event = headers_of(("x-good", b"", "é".encode()), ("X-Bad", b"", b"\xff\xfe"))
    assert event.bad_header == "x-bad"
    assert event.headers == {"x-good": "é"}
    assert headers_of(("x-good", b"", b"a")).bad_header == ""


def test_the_modes_of_protocol_config() -> None:
    for request_mode in BodyMode:
        for response_mode in BodyMode:
            event = decoded(request_headers(modes=(request_mode, response_mode)))
            assert isinstance(event, RequestHeaders)
            assert (event.request_mode, event.response_mode, event.body_unasked) == (request_mode, response_mode, False)
    silent = decoded(request_headers(modes=None))
    assert isinstance(silent, RequestHeaders)
    assert (silent.request_mode, silent.response_mode) == (None, None)
    unasked = decoded(request_headers(body_unasked=True))
    assert isinstance(unasked, RequestHeaders)
    assert unasked.body_unasked
    future = pb.ProcessingRequest(request_headers=pb.HttpHeaders(), protocol_config=pb.ProtocolConfiguration(request_body_mode=99))
    event = decoded(future)
    assert isinstance(event, RequestHeaders)
    assert event.request_mode is None


@pytest.mark.parametrize(
    ("value", "subset"),
    [
        (["10.0.0.1:8000", " 10.0.0.2 "], ("10.0.0.1:8000", "10.0.0.2")),
        ("10.0.0.1:8000, 10.0.0.2,", ("10.0.0.1:8000", "10.0.0.2")),
        ([], ()),
        ("", ()),
        (" , ", ()),
        ([7, None, ["10.0.0.1"], "10.0.0.1"], ("10.0.0.1",)),
        (7, ()),
        (None, ()),
        ({"a": "b"}, ()),
    ],
)
def test_the_subset(value: object, subset: tuple[str, ...]) -> None:
    event = decoded(request_headers(filter_metadata={"envoy.lb.subset_hint": {f"{DESTINATION}-subset": value}}))
    assert isinstance(event, RequestHeaders)
    assert event.subset == subset


@pytest.mark.parametrize("filter_metadata", [None, {}, {"envoy.lb": {f"{DESTINATION}-subset": ["x"]}}, {"envoy.lb.subset_hint": {}}])
def test_no_subset(filter_metadata: dict[str, object] | None) -> None:
    event = decoded(request_headers(filter_metadata=filter_metadata))
    assert isinstance(event, RequestHeaders)
    assert event.subset is None


def response_of(message: pb.ProcessingRequest) -> ResponseHeaders:
    event = decoded(message)
    assert isinstance(event, ResponseHeaders)
    return event


def test_response_headers() -> None:
    event = response_of(response_headers(503, content_type="text/event-stream; charset=utf-8", end_of_stream=True))
    assert (event.status, event.event_stream, event.end_of_stream) == (503, True, True)
    assert (event.served, event.code_details) == ("", "")
    assert not response_of(response_headers(200)).event_stream
    assert not response_of(response_headers(200)).end_of_stream


@pytest.mark.parametrize(
    ("text", "status"),
    [(b"200", 200), (b"", 0), (b"abc", 0), (b"-1", 0), (b"2 0", 0), (b"\xb2", 0), (b"9" * 5_000, 0)],
    ids=lambda v: str(v)[:12],
)
@pytest.mark.parametrize("field", ["value", "raw_value"])
def test_a_status_is_a_number_or_none(text: bytes, status: int, field: str) -> None:
    message = pb.ProcessingRequest()
    message.response_headers.headers.headers.add(key=":status", **{field: text})
    assert response_of(message).status == status


def test_who_served_is_told_by_metadata_or_else_by_attributes() -> None:
    assert response_of(response_headers(served="10.0.0.1:8000")).served == "10.0.0.1:8000"
    assert response_of(response_headers(upstream_address="10.0.0.2:8000")).served == "10.0.0.2:8000"
    assert response_of(response_headers(served="10.0.0.1:8000", upstream_address="10.0.0.2:8000")).served == "10.0.0.1:8000"
    odd = response_headers()
    odd.metadata_context.CopyFrom(metadata({"envoy.lb": {f"{DESTINATION}-served": ["a", "list"]}}))
    assert response_of(odd).served == ""
    assert response_of(response_headers(code_details="via_upstream")).code_details == "via_upstream"


@pytest.mark.parametrize("data", [b"\xff", b"\x12\x05a", b"\x22\x7f", b"\x12\x02\x0a\x7f", b"\0", b"\x0b"])
def test_bytes_that_are_no_message(data: bytes) -> None:
    with pytest.raises(codec.MalformedMessageError):
        codec.decode(data)


@settings(deadline=None, max_examples=500)
@given(st.binary(max_size=60))
def test_noise_is_a_message_or_malformed_never_anything_else(data: bytes) -> None:
    with contextlib.suppress(codec.MalformedMessageError):
        codec.decode(data)


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_a_damaged_message_is_a_message_or_malformed_never_anything_else(data: st.DataObject) -> None:
    whole = bytearray(
        request_headers(filter_metadata={"envoy.lb.subset_hint": {f"{DESTINATION}-subset": ["10.0.0.1"]}}).SerializeToString()
    )
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(codec.MalformedMessageError):
        codec.decode(bytes(whole[: data.draw(st.integers(0, len(whole)))]))


def test_fields_we_do_not_know_are_skipped() -> None:
    message = request_headers().SerializeToString() + b"\xfa\x01\x02hi" + b"\x50\x01"  # field 31, observability_mode
    assert isinstance(codec.decode(message), RequestHeaders)
