"""The rules of the protocol over the wire: one script a rule through both real servers, answered to the byte as the session alone does."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import grpc
import pytest

from epp._pb import epp_ext_proc_pb2 as pb
from epp.extproc import codec
from epp.extproc.messages import BodyMode
from tests.builders import (
    FULL_DUPLEX,
    PATH,
    Core,
    chat,
    chat_of,
    core,
    pieces,
    request_body,
    request_headers,
    request_trailers,
    response_body,
    response_headers,
    response_trailers,
    spec,
)
from tests.integration.test_transports import TRANSPORTS, channel_to, eventually, play, serving
from tests.spec.test_refusals import REFUSALS

Script = Sequence[pb.ProcessingRequest]
BUFFERED, STREAMED, PARTIAL, NONE, FULL = (
    BodyMode.BUFFERED,
    BodyMode.STREAMED,
    BodyMode.BUFFERED_PARTIAL,
    BodyMode.NONE,
    BodyMode.FULL_DUPLEX_STREAMED,
)
END = request_body(end_of_stream=True)
WHOLE = request_body(chat(), end_of_stream=True)
SSE = [
    response_headers(content_type="text/event-stream"),
    response_body(b"data: 1\n\n"),
    response_body(b""),
    response_body(end_of_stream=True),
]
RENAME = {"x-llm-d-model-name-rewrite": "target"}
NAMED = [response_headers(), response_body(b'{"model":"tar'), response_body(b'get"}"model":"t'), response_trailers()]
HINT = {"envoy.lb.subset_hint": {"x-gateway-destination-endpoint-subset": ["10.0.0.2"]}}
UNKNOWN = pb.ProcessingRequest.FromString(b"\xfa\x01\x02hi")


def one() -> Core:
    return core()


SCRIPTS: dict[str, tuple[Callable[[], Core], Script]] = {
    "rule 1: no protocol_config": (one, [request_headers(modes=None), WHOLE]),
    "rule 1: mode none": (one, [request_headers(modes=(NONE, NONE)), response_headers()]),
    "rule 2: headers, body, trailers": (one, [request_headers(), request_body(chat_of(130_000)), request_trailers()]),
    "rule 3: everything is echoed": (one, [request_headers(), *map(request_body, pieces(chat_of(200_000), 999)), END]),
    "rule 4: buffered": (one, [request_headers(modes=(BUFFERED, NONE)), WHOLE, response_headers()]),
    "rule 4: buffered, response declined": (one, [request_headers(modes=(BUFFERED, BUFFERED)), WHOLE, response_headers()]),
    "rule 4: buffered, trailers alone": (one, [request_headers(path="", modes=(BUFFERED, NONE)), request_trailers()]),
    "rule 4: buffered, passing by": (one, [request_headers(path="/v1/audio/transcriptions", modes=(BUFFERED, NONE)), WHOLE]),
    "rule 4: buffered partial": (one, [request_headers(modes=(PARTIAL, NONE)), request_body(b"{")]),
    "rule 4: streamed": (one, [request_headers(modes=(STREAMED, STREAMED)), request_body(b"{"), END, *SSE]),
    "rule 4: streamed, unasked": (one, [request_headers(modes=(STREAMED, STREAMED), body_unasked=True), *map(request_body, pieces(chat(), 20)), END]),
    "rule 5: the destination of IPv6": (lambda: core([spec(1, host="2001:db8::1")]), [request_headers(), WHOLE]),
    "rule 6: the best of many": (lambda: core(5), [request_headers(), WHOLE]),
    "rule 8: a stream": (one, [request_headers(), WHOLE, *SSE]),
    "rule 8: trailers": (one, [request_headers(), WHOLE, response_headers(), response_body(b"x"), response_trailers()]),
    "rule 8: served elsewhere": (lambda: core(2), [request_headers(), WHOLE, response_headers(served="10.0.0.2:8000")]),
    "rule 9: half-close mid-body": (one, [request_headers(modes=None), request_body(chat())]),
    "rule 9: half-close while passing by": (one, [request_headers(modes=None, path="/v1/audio/transcriptions"), request_body(b"x")]),
    "rule 10: a subset": (lambda: core(3), [request_headers(filter_metadata=HINT), WHOLE]),
    "rule 12: a large body": (one, [request_headers(), request_body(chat_of(1_000_000), end_of_stream=True)]),
    "rule 14: a second end": (one, [request_headers(), WHOLE, WHOLE]),
    "rule 14: unknown kinds": (one, [UNKNOWN, request_headers(), UNKNOWN, WHOLE, UNKNOWN]),
    "rule 14: trailers alone": (one, [request_headers(path="/v1/audio/transcriptions"), request_trailers()]),
    "section 2.1: a GET": (one, [request_headers(path="/v1/models", end_of_stream=True, headers={":method": "GET"})]),
    "section 2.5: an early response": (
        one,
        [request_headers(), request_body(chat()[:9]), response_headers(413), response_body(b"no", end_of_stream=True), request_body(chat()[9:]), END],
    ),
    "section 2.5: a response alone": (one, [response_headers(503), response_body(b"no", end_of_stream=True)]),
    "pitfall 9: an upgrade": (
        one,
        [request_headers(path=PATH, headers={"upgrade": "websocket"}), request_body(), response_headers(101), request_body(b"a"), response_body(b"b")],
    ),
    "a large upload passing by": (one, [request_headers(path="/v1/audio/transcriptions"), *map(request_body, pieces(chat_of(900_000), 300_000)), END]),
    "a rename": (one, [request_headers(headers=RENAME), WHOLE, *NAMED]),
    "a rename, buffered": (one, [request_headers(modes=(BUFFERED, BUFFERED), headers=RENAME), WHOLE, *NAMED]),
    "a rename, streamed": (one, [request_headers(modes=(STREAMED, STREAMED), headers=RENAME, body_unasked=True), WHOLE, *NAMED]),
    "the conformance suite's headers": (
        lambda: core(3, test_headers=True),
        [request_headers(headers={"test-epp-endpoint-selection": "10.0.0.3"}), WHOLE, response_headers(served="10.0.0.3:8000")],
    ),
    **{f"refused: {name}": (make, script) for name, (make, script, _, _) in REFUSALS.items()},
}  # fmt: skip


def alone(world: Core, script: Script) -> list[bytes]:
    """The session's answers, no transport."""
    session = world.session()
    replies = []
    for message in script:
        replies += session.receive(codec.decode(message.SerializeToString()))
    replies += session.half_closed()
    session.closed()
    return [codec.encode(reply) for reply in replies]


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("name", SCRIPTS)
async def test_over_the_wire_every_rule_holds_to_the_byte(name: str, transport: str) -> None:
    make, script = SCRIPTS[name]
    expected = alone(make(), script)
    world = make()
    before = world.inflight
    async with serving(transport, world) as server, channel_to(server) as channel:
        replies, status = await play(channel, script)
        assert status is grpc.StatusCode.OK
        assert len(replies) == len(expected)
        assert [pb.ProcessingResponse.FromString(reply) for reply in replies] == [
            pb.ProcessingResponse.FromString(reply) for reply in expected
        ]
        assert replies == expected
        await eventually(lambda: world.inflight == before, "everything given back")
        assert server.open_streams == 0


def test_every_script_is_answered() -> None:
    assert FULL_DUPLEX == (FULL, FULL)
    for name, (make, script) in SCRIPTS.items():
        assert alone(make(), script), name
