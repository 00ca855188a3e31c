"""The hand-written codec against upb: every reply, every size that changes a varint; every message kind; malformed input."""

from __future__ import annotations

import contextlib

import pytest
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


# Messages


def decoded(message: pb.ProcessingRequest) -> object:
    return codec.decode(message.SerializeToString())


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
