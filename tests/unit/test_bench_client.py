"""The load generator: its framing, its checks, and whole exchanges with the echo server over real sockets."""

from collections import Counter

import grpc
import grpc.aio
import pytest

from bench import BenchError, echo
from bench.exchange import Exchange, GrpcMessages, Wait
from bench.extproc_client import Client
from bench.workload import Workload, framed
from epp._pb import epp_ext_proc_pb2 as pb

ENDPOINT = "10.0.0.7:8000"
WORKLOAD = Workload(1, 2, prefixes=2)


# Framing


@pytest.mark.parametrize("step", [1, 3, 5, 7, 1000])
def test_messages_are_found_however_the_bytes_are_cut(step):
    sent = [b"", b"a", b"bc" * 40, b"", b"d" * 300]
    wire = b"".join(map(framed, sent))
    messages = GrpcMessages()
    got = [message for start in range(0, len(wire), step) for message in messages.feed(wire[start : start + step])]
    assert got == sent
    assert messages.empty


def test_an_unfinished_message_is_kept():
    messages = GrpcMessages()
    assert messages.feed(framed(b"abc")[:-1]) == []
    assert not messages.empty


@pytest.mark.parametrize("wire", [b"\1\0\0\0\1x", b"\1\0\0\0\2x"])
def test_a_compressed_message_is_an_error(wire):
    with pytest.raises(BenchError, match="compressed"):
        GrpcMessages().feed(wire)


# Checks


def _destination(*, header=ENDPOINT, metadata=ENDPOINT):
    reply = pb.ProcessingResponse()
    option = reply.request_headers.response.header_mutation.set_headers.add()
    option.header.key, option.header.raw_value = "x-gateway-destination-endpoint", header.encode()
    reply.dynamic_metadata.update({"envoy.lb": {"x-gateway-destination-endpoint": metadata}})
    return reply.SerializeToString()


def _body(kind, body, last):
    reply = pb.ProcessingResponse()
    streamed = getattr(reply, kind).response.body_mutation.streamed_response
    streamed.body, streamed.end_of_stream = body, last
    return reply.SerializeToString()


HEADERS_REPLY = pb.ProcessingResponse(response_headers=pb.HeadersResponse()).SerializeToString()


def _opened():
    exchange = Exchange(WORKLOAD, Counter())
    request = GrpcMessages().feed(exchange.open())
    return exchange, b"".join(pb.ProcessingRequest.FromString(message).request_body.body for message in request)


def _answered():
    exchange, body = _opened()
    exchange.advance(_destination())
    exchange.advance(_body("request_body", body, last=True))
    exchange.advance(HEADERS_REPLY)
    return exchange


def test_an_exchange_from_front_to_back():
    destinations = Counter()
    exchange = Exchange(WORKLOAD, destinations)
    body = WORKLOAD.next_conversation().body
    body = GrpcMessages().feed(exchange.open())[1]
    body = pb.ProcessingRequest.FromString(body).request_body.body
    assert exchange.advance(_destination()) == b""
    assert destinations == {ENDPOINT: 1}
    assert exchange.advance(_body("request_body", body[:100], last=False)) == b""
    assert exchange.advance(_body("request_body", body[100:], last=True)) == WORKLOAD.response_headers
    assert exchange.advance(HEADERS_REPLY) == WORKLOAD.response[0].request
    for chunk, following in zip(WORKLOAD.response, WORKLOAD.response[1:], strict=False):
        assert exchange.advance(chunk.plain_reply) == following.request
    assert exchange.advance(WORKLOAD.response[-1].plain_reply) == b""
    assert exchange.wait is Wait.END


def test_an_echo_serialised_another_way_is_accepted():
    exchange = _answered()
    streamed = b"\x10\x00" + pb.StreamedBodyResponse(body=WORKLOAD.response[0].body).SerializeToString()  # an explicit `false` in front
    reply = streamed
    for field in (3, 3, 1, 4):  # streamed_response < body_mutation < response < response_body
        reply = bytes([field << 3 | 2]) + _varint(len(reply)) + reply
    assert reply != WORKLOAD.response[0].plain_reply
    assert exchange.advance(reply) == WORKLOAD.response[1].request


def _varint(number):
    return bytes([number]) if number < 128 else bytes([number & 127 | 128, number >> 7])


@pytest.mark.parametrize(
    "reply",
    [
        _destination(metadata="10.0.0.8:8000"),
        _destination(header="", metadata=""),
        pb.ProcessingResponse(request_headers=pb.HeadersResponse()).SerializeToString(),
    ],
    ids=["different", "empty", "absent"],
)
def test_a_destination_must_be_in_both_places(reply):
    with pytest.raises(BenchError, match="destination"):
        _opened()[0].advance(reply)


def test_a_refusal_is_told():
    refusal = pb.ProcessingResponse(immediate_response=pb.ImmediateResponse(status=pb.HttpStatus(code=503), body=b"no endpoint"))
    with pytest.raises(BenchError, match=r"ImmediateResponse 503 .*no endpoint"):
        _opened()[0].advance(refusal.SerializeToString())


def test_garbage_is_told():
    with pytest.raises(BenchError, match="no ProcessingResponse"):
        _opened()[0].advance(b"\xff\xff\xff")


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda body: (b"X" + body[1:], True), "came back changed"),
        (lambda body: (body[:-1], True), "1023 bytes of the body came back, of 1024"),
        (lambda body: (body + b"X", True), "came back changed"),
        (lambda _body: (b"X" * 70_000, False), "a streamed response of 70000 bytes"),
    ],
    ids=["other", "short", "long", "large"],
)
def test_a_body_must_come_back_whole(change, complaint):
    exchange, body = _opened()
    exchange.advance(_destination())
    piece, last = change(body)
    with pytest.raises(BenchError, match=complaint):
        exchange.advance(_body("request_body", piece, last=last))


def test_a_body_must_be_streamed():
    exchange, body = _opened()
    exchange.advance(_destination())
    reply = pb.ProcessingResponse()
    reply.request_body.response.body_mutation.body = body
    with pytest.raises(BenchError, match="not a streamed response"):
        exchange.advance(reply.SerializeToString())


@pytest.mark.parametrize("reply", [_body("response_body", b"", last=False), _body("response_body", WORKLOAD.response[0].body, last=True)])
def test_a_chunk_must_come_back_with_its_own_end(reply):
    with pytest.raises(BenchError, match="the echo of response chunk 0"):
        _answered().advance(reply)


def test_order_is_checked():
    with pytest.raises(BenchError, match="response_headers instead of request_headers"):
        _opened()[0].advance(HEADERS_REPLY)


def test_nothing_may_follow_the_last_reply():
    exchange = _answered()
    for chunk in WORKLOAD.response:
        exchange.advance(chunk.plain_reply)
    with pytest.raises(BenchError, match="after the last one"):
        exchange.advance(WORKLOAD.response[-1].plain_reply)


# Over real sockets


@pytest.fixture
async def echo_port():
    server, port = await echo.start(0, ENDPOINT)
    yield port
    await server.stop(None)


@pytest.mark.parametrize("prompt_kb", [1, 16, 128])
@pytest.mark.parametrize("graceful", [False, True])
async def test_the_echo_server_passes_every_check(echo_port, prompt_kb, graceful):
    async with Client(echo_port, streams=5, connections=2, graceful=graceful) as client:
        for chunks in (1, 4):
            result = await client.run(Workload(prompt_kb, chunks, prefixes=2), 12)
            assert result.requests == 12
            assert result.destinations == {ENDPOINT: 12}
            assert result.requests_per_s > 0


async def test_fewer_requests_than_streams(echo_port):
    async with Client(echo_port, streams=8, connections=2) as client:
        assert (await client.run(WORKLOAD, 1)).destinations.total() == 1


def _server(process):
    server = grpc.aio.server()
    method = grpc.stream_stream_rpc_method_handler(process)  # bytes in, bytes out
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(echo.SERVICE, {"Process": method}),))
    return server, server.add_insecure_port("127.0.0.1:0")


async def _ends_early(_requests, context):
    await context.read()


async def _refuses(_requests, context):
    await context.abort(grpc.StatusCode.UNAVAILABLE, "not now")


async def _says_nothing(_requests, context):
    while await context.read() is not grpc.aio.EOF:
        pass


async def _lies(_requests, context):
    await context.read()
    await context.write(_destination())
    await context.write(_body("request_body", b"{}", last=True))
    await context.read()


@pytest.mark.parametrize(
    ("process", "complaint"),
    [
        (_ends_early, "the server (ended|answered) a stream"),
        (_refuses, "the server (ended|answered) a stream.*14"),
        (_says_nothing, "no end after 0.3 s; streams wait for: {'the reply to the request headers': 2}"),
        (_lies, "came back changed"),
    ],
)
async def test_a_server_that_does_not_do_its_part_is_told(process, complaint):
    server, port = _server(process)
    await server.start()
    try:
        async with Client(port, streams=2, connections=1) as client:
            with pytest.raises(BenchError, match=complaint):
                await client.run(WORKLOAD, 4, timeout_s=0.3 if process is _says_nothing else 10)
    finally:
        await server.stop(None)


async def test_a_server_that_goes_away_is_told():
    server, port = await echo.start(0, ENDPOINT)
    async with Client(port, streams=2, connections=1) as client:
        await client.run(WORKLOAD, 4)
        await server.stop(None)
        with pytest.raises(BenchError, match=r"GOAWAY|closed the connection"):
            await client.run(WORKLOAD, 4)


@pytest.mark.parametrize(("streams", "connections"), [(1, 2), (4, 0)])
def test_streams_must_fill_connections(streams, connections):
    with pytest.raises(BenchError, match="connection"):
        Client(1, streams=streams, connections=connections)
