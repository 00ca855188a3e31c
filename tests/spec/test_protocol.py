"""What ext_proc and the endpoint picker protocol demand, one test a sentence, on real messages (serialized both ways).

The numbers are the rules of the protocol reference: the contract between a gateway and an endpoint picker.
"""

from __future__ import annotations

import json

import pytest

from epp._pb import epp_ext_proc_pb2 as pb
from epp.extproc.messages import BodyMode
from tests.builders import (
    DESTINATION,
    FULL_DUPLEX,
    PATH,
    Core,
    Stream,
    chat,
    chat_of,
    core,
    destination_of,
    echoed,
    ends,
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

BUFFERED = (BodyMode.BUFFERED, BodyMode.NONE)
CHUNK_MAX = 62_000


def routed(world: Core, body: bytes = b"", **how: object) -> Stream:
    """A stream whose request phase is over: full duplex, the body in one message."""
    stream = Stream(world.session())
    stream.send(request_headers(**how), request_body(body or chat(), end_of_stream=True))  # type: ignore[arg-type]
    assert kinds(stream.got)[:1] == ["request_headers"]
    return stream


def metadata_of(response: pb.ProcessingResponse) -> dict[str, object]:
    return {namespace: dict(value.items()) for namespace, value in response.dynamic_metadata.items()}


# Rule 1: tell the mode from protocol_config in the first message; without it assume full duplex.


def test_rule_1_a_peer_without_protocol_config_is_taken_for_full_duplex() -> None:
    stream = Stream(core().session())
    body = chat()
    assert stream.send(request_headers(modes=None)) == []
    replies = stream.send(request_body(body, end_of_stream=True))
    assert kinds(replies) == ["request_headers", "request_body"]
    assert echoed(replies) == body


def test_rule_1_mode_none_is_told_from_no_protocol_config_though_proto3_omits_it() -> None:
    replies = Stream(core().session()).send(request_headers(modes=(BodyMode.NONE, BodyMode.NONE)))
    assert kinds(replies) == ["request_headers"]
    assert destination_of(replies[0]) == "10.0.0.1:8000"


# Rule 2


def test_rule_2_full_duplex_replies_nothing_until_end_of_stream() -> None:
    stream = Stream(core().session())
    assert stream.send(request_headers()) == []
    for piece in pieces(chat_of(5_000), 1_000):
        assert stream.send(request_body(piece)) == []
    assert stream.send(request_body(end_of_stream=True)) != []


def test_rule_2_full_duplex_replies_headers_then_body_then_trailers() -> None:
    stream = Stream(core().session())
    stream.send(request_headers(), request_body(chat_of(130_000)), request_trailers())
    assert kinds(stream.got) == ["request_headers", *["request_body"] * 3, "request_trailers"]


def test_rule_2_request_trailers_are_answered_only_if_received() -> None:
    assert "request_trailers" not in kinds(routed(core()).got)


# Rule 3


@pytest.mark.parametrize("size", [60, CHUNK_MAX, CHUNK_MAX + 1, 1_000_000])
@pytest.mark.parametrize("received", [700, 32_768, 1_000_000])
def test_rule_3_the_body_is_echoed_even_when_unchanged(size: int, received: int) -> None:
    stream = Stream(core().session())
    body = chat_of(size)
    stream.send(request_headers(), *[request_body(piece) for piece in pieces(body, received)], request_body(end_of_stream=True))
    assert echoed(stream.got) == body
    part = stream.got[-1].request_body.response.body_mutation
    assert part.WhichOneof("mutation") == "streamed_response"


def test_rule_3_the_last_chunk_says_end_of_stream_unless_trailers_follow() -> None:
    stream = Stream(core().session())
    stream.send(request_headers(), request_body(chat_of(130_000)), request_body(end_of_stream=True))
    assert ends(stream.got) == [False, False, True]
    with_trailers = Stream(core().session())
    with_trailers.send(request_headers(), request_body(chat_of(130_000)), request_trailers())
    assert ends(with_trailers.got) == [False, False, False]


def test_rule_3_an_empty_last_chunk_does_not_replace_the_accumulated_body() -> None:
    body = chat("agentgateway splits in two")
    stream = Stream(core().session())
    stream.send(request_headers(), request_body(body), request_body(b"", end_of_stream=True))
    assert echoed(stream.got) == body


# Rule 4


def test_rule_4_buffered_headers_are_answered_at_once() -> None:
    replies = Stream(core().session()).send(request_headers(modes=BUFFERED))
    assert kinds(replies) == ["request_headers"]
    assert set_headers(replies[0]) == {}


def test_rule_4_buffered_destination_is_in_the_body_reply() -> None:
    stream = Stream(core().session())
    stream.send(request_headers(modes=BUFFERED))
    (reply,) = stream.send(request_body(chat(), end_of_stream=True))
    assert reply.WhichOneof("response") == "request_body"
    assert destination_of(reply) == "10.0.0.1:8000"
    assert metadata_of(reply) == {"envoy.lb": {DESTINATION: "10.0.0.1:8000"}}
    assert not reply.request_body.response.HasField("body_mutation"), "the body is kept; streamed_response here is a 500"


def test_rule_4_buffered_partial_cut_at_the_limit_is_routed_on_what_there_is() -> None:
    stream = Stream(core().session())
    stream.send(request_headers(modes=(BodyMode.BUFFERED_PARTIAL, BodyMode.NONE)))
    (reply,) = stream.send(request_body(chat_of(5_000)[:4_000]))
    assert reply.WhichOneof("response") == "request_body"
    assert destination_of(reply) == "10.0.0.1:8000"


def test_rule_4_a_buffered_body_is_whole_whatever_its_end_of_stream_says_for_trailers_wait_behind_it() -> None:
    """With trailers Envoy sends the buffered body with end_of_stream false, and the trailers only after the reply to it."""
    stream = Stream(core().session())
    stream.send(request_headers(modes=BUFFERED))
    replies = stream.send(request_body(chat()))
    assert kinds(replies) == ["request_body"]
    assert destination_of(replies[0]) == "10.0.0.1:8000"
    assert kinds(stream.send(request_trailers())) == ["request_trailers"]


def test_rule_4_streamed_is_decided_on_headers_and_every_chunk_gets_one_plain_reply() -> None:
    stream = Stream(core().session())
    replies = stream.send(request_headers(modes=(BodyMode.STREAMED, BodyMode.STREAMED)))
    assert kinds(replies) == ["request_headers"]
    assert destination_of(replies[0]) == "10.0.0.1:8000"
    for piece in pieces(chat_of(3_000), 1_000):
        (reply,) = stream.send(request_body(piece))
        assert reply.WhichOneof("response") == "request_body"
        assert not reply.request_body.response.HasField("body_mutation")
    assert kinds(stream.send(request_body(end_of_stream=True))) == ["request_body"]


def test_rule_4_streamed_with_the_body_unasked_is_decided_on_the_body() -> None:
    stream = Stream(core().session())
    assert stream.send(request_headers(modes=(BodyMode.STREAMED, BodyMode.NONE), body_unasked=True)) == []
    parts = pieces(chat_of(3_000), 1_000)
    assert stream.send(*map(request_body, parts)) == []
    replies = stream.send(request_body(end_of_stream=True))
    assert kinds(replies) == ["request_headers", *["request_body"] * (len(parts) + 1)]


def test_rule_4_mode_none_is_decided_on_headers() -> None:
    stream = Stream(core().session())
    assert kinds(stream.send(request_headers(modes=(BodyMode.NONE, BodyMode.FULL_DUPLEX_STREAMED)))) == ["request_headers"]
    assert kinds(stream.send(response_headers())) == ["response_headers"]


# Rule 5


def test_rule_5_the_destination_is_in_the_header_and_in_the_metadata_the_same() -> None:
    route = routed(core()).got[0]
    assert set_headers(route)[DESTINATION] == b"10.0.0.1:8000"
    assert metadata_of(route) == {"envoy.lb": {DESTINATION: "10.0.0.1:8000"}}


def test_rule_5_the_metadata_value_is_a_string() -> None:
    value = routed(core()).got[0].dynamic_metadata.fields["envoy.lb"].struct_value.fields[DESTINATION]
    assert value.WhichOneof("kind") == "string_value"


def test_rule_5_headers_are_set_with_raw_value() -> None:
    for option in routed(core()).got[0].request_headers.response.header_mutation.set_headers:
        assert option.header.raw_value
        assert not option.header.value


def test_section_4_headers_are_overwritten_so_that_a_client_can_not_choose_the_endpoint() -> None:
    stream = routed(core(), headers={DESTINATION: "10.6.6.6:666"})
    options = stream.got[0].request_headers.response.header_mutation.set_headers
    assert {option.append_action for option in options} == {pb.HeaderValueOption.OVERWRITE_IF_EXISTS_OR_ADD}
    assert destination_of(stream.got[0]) == "10.0.0.1:8000"


def test_section_4_an_ipv6_destination_is_in_brackets() -> None:
    world = core([spec(1, host="2001:db8::1")])
    route = routed(world).got[0]
    assert destination_of(route) == "[2001:db8::1]:8000"
    assert metadata_of(route)["envoy.lb"] == {DESTINATION: "[2001:db8::1]:8000"}


def test_section_4_content_length_is_that_of_what_is_echoed() -> None:
    body = chat_of(100_000)
    assert set_headers(routed(core(), body).got[0])["content-length"] == b"100000"


# Rule 6


def test_rule_6_one_endpoint_by_default() -> None:
    assert "," not in destination_of(routed(core(5)).got[0])


def test_rule_6_a_list_is_opt_in_best_first_and_distinct() -> None:
    world = core(
        3,
        config="""
        apiVersion: llm-d.ai/v1alpha1
        kind: EndpointPickerConfig
        plugins: [{type: queue-scorer}, {type: max-score-picker, parameters: {maxNumOfEndpoints: 2}}]
        """,
    )
    for number, waiting in enumerate([5.0, 9.0, 1.0], 1):
        world.read(number, waiting=waiting)
    assert destination_of(routed(world).got[0]) == "10.0.0.3:8000,10.0.0.1:8000"


# Rule 7


def test_rule_7_the_stream_is_not_ended_before_the_response_is_echoed() -> None:
    stream = routed(core())
    assert not stream.session.answered
    stream.send(response_headers(), response_body(b"abc", end_of_stream=True))
    assert not stream.session.answered, "only the peer ends a routed stream"


# Rule 8


def test_rule_8_response_headers_are_answered_at_once_and_changed_in_nothing() -> None:
    (reply,) = routed(core()).send(response_headers())
    assert reply == pb.ProcessingResponse(response_headers=pb.HeadersResponse())


def test_rule_8_every_response_chunk_is_echoed_at_once_with_its_own_end_of_stream() -> None:
    stream = routed(core())
    stream.send(response_headers(content_type="text/event-stream"))
    for body, end in [(b"data: 1\n\n", False), (b"", False), (b"x" * 200_000, False), (b"", True)]:
        (reply,) = stream.send(response_body(body, end_of_stream=end))
        assert echoed([reply], "response_body") == body
        assert ends([reply], "response_body") == [end]


def test_rule_8_response_trailers_are_answered() -> None:
    stream = routed(core())
    stream.send(response_headers(), response_body(b"abc"))
    assert kinds(stream.send(response_trailers())) == ["response_trailers"]


@pytest.mark.parametrize("mode", [BodyMode.BUFFERED, BodyMode.STREAMED, BodyMode.BUFFERED_PARTIAL])
def test_rule_8_a_response_body_in_a_mode_that_is_not_full_duplex_gets_a_plain_reply(mode: BodyMode) -> None:
    stream = routed(core(), modes=(BodyMode.FULL_DUPLEX_STREAMED, mode))
    stream.send(response_headers())
    (reply,) = stream.send(response_body(b"abc", end_of_stream=True))
    assert reply.WhichOneof("response") == "response_body"
    assert not reply.response_body.response.HasField("body_mutation")


@pytest.mark.parametrize(
    "body",
    [
        b'{"usage":{"prompt_tokens":' + b"9" * 400 + b',"completion_tokens":1}}',
        b" " * 20_000 + b'"usage":' + b'{"a":' * 3_000,
        b'{"usage":{"prompt_tokens":-1,"completion_tokens":-7}}',
        b"\xff\xfe\0" * 7_000,
    ],
    ids=["a number beyond any float", "nested beyond any stack", "negative", "not text"],
)
def test_rule_8_whatever_the_response_says_it_is_echoed(body: bytes) -> None:
    stream = routed(core())
    stream.send(response_headers())
    (reply,) = stream.send(response_body(body, end_of_stream=True))
    assert echoed([reply], "response_body") == body


# Rule 9


def test_rule_9_half_close_is_not_a_cancel() -> None:
    """NGINX Gateway Fabric: one header message, one body message, half-close; no protocol_config, no pseudo headers, plain `value`."""
    world = core()
    body = chat()
    stream = Stream(world.session())
    message = pb.ProcessingRequest()
    message.request_headers.headers.headers.add(key="Content-Type", value=b"application/json")
    message.request_headers.headers.headers.add(key="x-request-id", value=b"from-nginx")
    assert stream.send(message) == []
    stream.send(request_body(body, end_of_stream=True))
    assert stream.half_close() == []
    assert kinds(stream.got) == ["request_headers", "request_body"]
    assert destination_of(stream.got[0]) == "10.0.0.1:8000"
    assert echoed(stream.got) == body
    assert world.metrics.series("m", "m").requests == 1, "the model is found though there is no path"


def test_rule_9_a_half_close_before_end_of_stream_ends_the_body() -> None:
    stream = Stream(core().session())
    body = chat()
    stream.send(request_headers(modes=None), request_body(body))
    assert kinds(stream.half_close()) == ["request_headers", "request_body"]
    assert echoed(stream.got) == body
    assert ends(stream.got) == [True]


def test_rule_9_a_half_close_without_any_body_gets_no_body_reply() -> None:
    stream = Stream(core().session())
    stream.send(request_headers(modes=None, path="/v1/models"))
    stream.half_close()
    assert kinds(stream.got) == ["request_headers"]


def test_rule_9_the_end_of_the_stream_gives_back_everything() -> None:
    world = core()
    stream = routed(world)
    assert world.inflight[0] == 1
    stream.close()
    assert world.inflight == (0, 0, 0, 0)


# Rule 10

SUBSET = f"{DESTINATION}-subset"


def route_in_subset(world: Core, subset: object) -> pb.ProcessingResponse:
    stream = Stream(world.session())
    stream.send(request_headers(filter_metadata={"envoy.lb.subset_hint": {SUBSET: subset}}), request_body(chat(), end_of_stream=True))
    return stream.got[0]


@pytest.mark.parametrize(
    "subset",
    [
        ["10.0.0.2:8000"],
        ["10.0.0.2"],
        "10.0.0.2:8000",
        "10.0.0.2",
        " 10.9.9.9:8000 , 10.0.0.2:8000 ",
        ["10.9.9.9", "10.0.0.2"],
        "10.9.9.9,10.0.0.2:8000",
    ],
)
def test_rule_10_the_subset_may_be_a_list_or_a_comma_string_of_ip_or_ip_and_port(subset: object) -> None:
    for _ in range(8):
        assert destination_of(route_in_subset(core(4), subset)) == "10.0.0.2:8000"


def test_rule_10_a_bare_ip_allows_all_its_ports_and_ip_with_port_only_that_one() -> None:
    specs = [spec(1, host="10.0.0.1", port=8000), spec(2, host="10.0.0.1", port=8001), spec(3)]
    world = core(specs)
    assert {destination_of(route_in_subset(world, ["10.0.0.1"])) for _ in range(40)} == {"10.0.0.1:8000", "10.0.0.1:8001"}
    assert {destination_of(route_in_subset(core(specs), ["10.0.0.1:8001"])) for _ in range(20)} == {"10.0.0.1:8001"}


@pytest.mark.parametrize("written", ["[2001:db8::1]:8000", "2001:db8::1", "[2001:db8::1]"])
def test_rule_10_ipv6_in_a_subset(written: str) -> None:
    world = core([spec(1, host="2001:db8::1"), spec(2, host="2001:db8::2")])
    for _ in range(8):
        assert destination_of(route_in_subset(world, [written])) == "[2001:db8::1]:8000"


@pytest.mark.parametrize("subset", [[], "", ["10.9.9.9"], "10.9.9.9:8000", ["10.0.0.1:9"], 7, [7], None])
def test_rule_10_a_subset_that_is_empty_or_matches_nothing_is_a_503(subset: object) -> None:
    reply = route_in_subset(core(2), subset)
    assert reply.immediate_response.status.code == 503


@pytest.mark.parametrize("namespaces", [None, {}, {"envoy.lb": {}}, {"envoy.lb.subset_hint": {}}, {"envoy.lb.subset_hint": {"else": "x"}}])
def test_rule_10_no_hint_is_no_restriction(namespaces: dict[str, object] | None) -> None:
    stream = routed(core(), filter_metadata=namespaces)
    assert destination_of(stream.got[0]) == "10.0.0.1:8000"


# Rule 11 and section 5


def error_of(reply: pb.ProcessingResponse) -> tuple[int, dict[str, str]]:
    answer = reply.immediate_response
    assert reply.WhichOneof("response") == "immediate_response"
    assert set_headers(reply)["content-type"] == b"application/json"
    return answer.status.code, json.loads(answer.body)["error"]


def test_rule_11_no_ready_endpoint_is_an_immediate_response_503() -> None:
    stream = Stream(core(0).session())
    (reply,) = stream.send(request_headers(), request_body(chat(), end_of_stream=True))
    status, error = error_of(reply)
    assert (status, error["code"]) == (503, "no_endpoints")
    assert set_headers(reply)["x-llm-d-request-dropped-reason"] == b"rejected-no-endpoints"
    assert stream.session.answered


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        (PATH, b"{", 400),
        (PATH, b"", 400),
        (PATH, b"\xff", 400),
        (PATH, b'{"messages":[{"role":"user"}]}', 400),
        (PATH, b'{"model":"m"}', 400),
        (PATH, b'{"model":"m","messages":[]}', 400),
        (PATH, b'{"model":"m","stream":"yes"', 400),
        (PATH, b'{"stream":"yes","model":"\xff"}', 400),
        (PATH, b'{"stream":"yes","model":"m","x":' + b"[" * 200_000, 400),
        (PATH, b'{"model":"m","x":' + b"[" * 200_000, 400),
        ("/nowhere", b"", 404),
    ],
)
def test_rule_11_client_faults_are_immediate_responses(path: str, body: bytes, status: int) -> None:
    stream = Stream(core().session())
    (reply,) = stream.send(request_headers(path=path), request_body(body, end_of_stream=True))
    assert error_of(reply)[0] == status


def test_rule_11_a_body_over_the_limit_is_a_413_mid_stream() -> None:
    world = core(body_bytes_max=10_000)
    stream = Stream(world.session())
    assert stream.send(request_headers(), request_body(b"x" * 10_000)) == []
    (reply,) = stream.send(request_body(b"x"))
    assert error_of(reply)[0] == 413
    assert stream.send(request_body(b"x"), request_body(end_of_stream=True), request_trailers()) == []
    assert world.metrics.limit_hits == {"body_bytes_max": 1}


def test_rule_11_too_many_bodies_at_once_is_a_503() -> None:
    world = core(buffered_bytes_max=15_000)
    first, second = Stream(world.session()), Stream(world.session())
    first.send(request_headers(), request_body(b"x" * 10_000))
    (reply,) = second.send(request_headers(), request_body(b"x" * 10_000))
    assert error_of(reply)[0] == 503
    assert set_headers(reply)["x-llm-d-request-dropped-reason"] == b"rejected-saturated"
    first.close()
    assert kinds(Stream(world.session()).send(request_headers(), request_body(chat_of(10_000), end_of_stream=True))) != [
        "immediate_response"
    ]


def test_rule_11_a_header_that_is_not_utf8_is_a_400_that_names_it() -> None:
    stream = Stream(core().session())
    (reply,) = stream.send(request_headers(headers={"x-odd": b"\xff"}))
    status, error = error_of(reply)
    assert status == 400
    assert "x-odd" in error["message"]


def test_section_2_6_a_grpc_client_gets_a_grpc_status() -> None:
    stream = Stream(core(0).session())
    (reply,) = stream.send(
        request_headers(path="/v1/audio/transcriptions", headers={"content-type": "application/grpc"}),
        request_body(b"x", end_of_stream=True),
    )
    assert reply.immediate_response.grpc_status.status == 14
    plain = Stream(core(0).session())
    (reply,) = plain.send(request_headers(), request_body(chat(), end_of_stream=True))
    assert not reply.immediate_response.HasField("grpc_status")


# Rule 12


@pytest.mark.parametrize("size", [CHUNK_MAX - 1, CHUNK_MAX, CHUNK_MAX + 1, 2 * CHUNK_MAX, 5_000_000])
def test_rule_12_chunks_are_at_most_62000_bytes_and_messages_less_than_64_kib(size: int) -> None:
    stream = routed(core(), chat_of(size))
    lengths = [len(reply.request_body.response.body_mutation.streamed_response.body) for reply in stream.got[1:]]
    assert sum(lengths) == size
    assert max(lengths) <= CHUNK_MAX
    assert max(reply.ByteSize() for reply in stream.got) < 1 << 16
    assert len(lengths) == -(-size // CHUNK_MAX), "no chunk more than it takes"


# Rule 14


def test_rule_14_a_request_body_after_the_first_end_of_stream_is_ignored() -> None:
    world = core()
    stream = routed(world)
    assert stream.send(request_body(chat(), end_of_stream=True), request_body(b"x"), request_body(end_of_stream=True)) == []
    assert world.metrics.series("m", "m").requests == 1


def test_rule_14_a_request_body_after_the_buffered_one_is_ignored() -> None:
    stream = Stream(core().session())
    stream.send(request_headers(modes=BUFFERED), request_body(chat(), end_of_stream=True))
    assert stream.send(request_body(chat(), end_of_stream=True)) == []


def test_rule_14_unknown_message_kinds_are_ignored() -> None:
    world = core()
    stream = Stream(world.session())
    unknown = pb.ProcessingRequest.FromString(b"\xfa\x01\x02hi")  # field 31
    assert unknown.WhichOneof("request") is None
    assert stream.send(unknown, request_headers(), unknown) == []
    assert kinds(stream.send(request_body(chat(), end_of_stream=True))) == ["request_headers", "request_body"]
    assert stream.send(unknown) == []


def test_rule_14_no_request_body_is_sent_when_none_was_received() -> None:
    stream = Stream(core().session())
    stream.send(request_headers(path="/v1/audio/transcriptions"), request_trailers())
    assert kinds(stream.got) == ["request_headers", "request_trailers"]


@pytest.mark.parametrize("modes", [FULL_DUPLEX, BUFFERED, (BodyMode.STREAMED, BodyMode.NONE), (BodyMode.NONE, BodyMode.NONE), None])
def test_section_2_1_a_get_is_answered_with_request_headers_alone(modes: tuple[BodyMode, BodyMode] | None) -> None:
    stream = Stream(core().session())
    replies = stream.send(request_headers(path="/v1/models", end_of_stream=True, modes=modes, headers={":method": "GET"}))
    assert kinds(replies) == ["request_headers"]
    assert destination_of(replies[0]) == "10.0.0.1:8000"
    assert "content-length" not in set_headers(replies[0])


# Rule 15


def test_rule_15_only_changed_headers_are_set() -> None:
    many = {f"x-{number}": "v" for number in range(150)}
    route = routed(core(), headers={**many, "transfer-encoding": "chunked"}).got[0]
    assert set(set_headers(route)) == {DESTINATION, "content-length"}
    assert not route.request_headers.response.header_mutation.remove_headers
    assert not route.request_headers.response.clear_route_cache


def test_rule_15_a_request_id_is_made_only_when_there_is_none() -> None:
    assert "x-request-id" not in set_headers(routed(core()).got[0])
    without = routed(core(), headers={"x-request-id": ""}).got[0]
    assert len(set_headers(without)["x-request-id"]) == 36


def test_rule_15_no_header_value_has_a_newline_whatever_the_client_sent() -> None:
    stream = Stream(core(0).session())
    stream.send(request_headers(path="/nowhere\r\nx: y"), request_body(b"", end_of_stream=True))
    for reply in stream.got:
        assert not any(b"\n" in value or b"\r" in value for value in set_headers(reply).values())
        assert "\n" not in reply.immediate_response.details


# Section 4, served elsewhere


@pytest.mark.parametrize("told", ["served", "upstream_address"])
def test_section_4_the_in_flight_count_moves_to_the_endpoint_that_served(told: str) -> None:
    world = core(2)
    stream = routed(world)
    chosen = destination_of(stream.got[0])
    first, second = (world.datastore.by_destination[d] for d in (chosen, ({"10.0.0.1:8000", "10.0.0.2:8000"} - {chosen}).pop()))
    assert (first.inflight_requests, second.inflight_requests) == (1, 0)
    stream.send(response_headers(**{told: second.destination}))
    assert (first.inflight_requests, second.inflight_requests) == (0, 1)
    assert (first.inflight_tokens, second.inflight_tokens > 0) == (0, True)
    stream.send(response_body(b"x", end_of_stream=True))
    assert (first.inflight_requests, second.inflight_requests) == (0, 0)
    stream.close()
    assert world.inflight == (0, 0, 0, 0)


def test_section_4_an_endpoint_we_do_not_know_may_have_served() -> None:
    world = core(2)
    stream = routed(world)
    assert kinds(stream.send(response_headers(served="10.9.9.9:1"))) == ["response_headers"]
    stream.close()
    assert world.inflight == (0, 0, 0, 0)


# Section 2.5


def test_section_2_5_a_response_may_come_before_the_request_is_over() -> None:
    world = core()
    body = chat_of(3_000)
    stream = Stream(world.session())
    stream.send(request_headers(), request_body(body[:1_000]))
    assert kinds(stream.send(response_headers(413))) == ["response_headers"]
    assert echoed(stream.send(response_body(b"too large", end_of_stream=True)), "response_body") == b"too large"
    stream.send(request_body(body[1_000:], end_of_stream=True))
    assert echoed(stream.got) == body
    stream.close()
    assert world.inflight == (0, 0, 0, 0)


def test_section_2_5_a_response_without_any_request_is_answered() -> None:
    """Envoy's own local replies pass the filter too."""
    stream = Stream(core().session())
    assert kinds(stream.send(response_headers(503), response_body(b"no", end_of_stream=True))) == ["response_headers", "response_body"]
