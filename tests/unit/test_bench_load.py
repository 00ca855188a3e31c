"""`bench load`: the times it keeps, what it counts, and real runs against servers that do as they should and that do not."""

import asyncio
import json
import re
import time
from collections import Counter

import grpc
import grpc.aio
import pytest

from bench import BenchError, echo
from bench.__main__ import main
from bench.exchange import GrpcMessages, Wait
from bench.load import figures
from bench.load.exchange import LoadError, PickExchange
from bench.load.generator import Generator, Meter, Target, arrivals
from bench.processes import Child, free_ports
from bench.workload import Asked, Workload
from epp._pb import epp_ext_proc_pb2 as pb

ENDPOINT = "10.0.0.7:8000"
STREAMED = Workload.of_tokens(100, 2, prefixes=2)
WHOLE = Workload.of_tokens(100, 2, stream=False, prefixes=2)


# Times


def test_even_arrivals_are_evenly_spaced():
    assert list(arrivals(4, 1.0, seed=1, even=True)) == [0, 0.25, 0.5, 0.75]


def test_random_arrivals_have_the_rate_and_are_those_of_the_seed():
    times = list(arrivals(100, 50, seed=1, even=False))
    assert len(times) == pytest.approx(5000, rel=0.05)
    assert times == sorted(times) == list(arrivals(100, 50, seed=1, even=False))
    assert times != list(arrivals(100, 50, seed=2, even=False))


# What is sent


def test_prompts_have_the_tokens_asked_for():
    conversation = Workload.of_tokens(1000, 5, prefixes=1).next_conversation()
    content = "".join(message["content"] for message in json.loads(conversation.body)["messages"])
    assert len(content) == pytest.approx(4000, rel=0.02)


def test_usage_and_length_of_the_answer_are_those_asked_for():
    asked = Asked.tokens(100, 7)
    stream = Workload.of_tokens(100, 7, prefixes=1, asked=asked)
    assert len(stream.response) == 7 + 2  # the usage, the end
    assert b'"completion_tokens":7' in stream.response[-2].body
    whole = json.loads(Workload.of_tokens(100, 7, stream=False, prefixes=1, asked=asked).response[0].body)
    assert len(whole["choices"][0]["message"]["content"].split()) == 7
    assert whole["usage"]["prompt_tokens"] == 100


def test_the_subset_is_with_every_message_of_the_request():
    workload = Workload.of_tokens(100, 2, prefixes=1, asked=Asked.tokens(100, 2, subset=("10.0.0.1:8000", "10.0.0.2:8000")))
    messages = [pb.ProcessingRequest.FromString(raw) for raw in GrpcMessages().feed(workload.next_conversation().request)]
    for message in messages:
        hint = message.metadata_context.filter_metadata["envoy.lb.subset_hint"]["x-gateway-destination-endpoint-subset"]
        assert list(hint) == ["10.0.0.1:8000", "10.0.0.2:8000"]
    assert len(messages) > 2
    plain = pb.ProcessingRequest.FromString(GrpcMessages().feed(STREAMED.next_conversation().request)[0])
    assert not plain.HasField("metadata_context")


# One exchange


def _headers(header="", metadata=""):
    reply = pb.ProcessingResponse(request_headers=pb.HeadersResponse())
    if header:
        option = reply.request_headers.response.header_mutation.set_headers.add()
        option.header.key, option.header.raw_value = "x-gateway-destination-endpoint", header.encode()
    if metadata:
        reply.dynamic_metadata.update({"envoy.lb": {"x-gateway-destination-endpoint": metadata}})
    return reply.SerializeToString()


def _body(kind="request_body", body=b"", *, last=True):
    reply = pb.ProcessingResponse()
    streamed = getattr(reply, kind).response.body_mutation.streamed_response
    streamed.body, streamed.end_of_stream = body, last
    return reply.SerializeToString()


RESPONSE_HEADERS = pb.ProcessingResponse(response_headers=pb.HeadersResponse()).SerializeToString()
NOTHING_TO_SAY = pb.ProcessingResponse(request_body=pb.BodyResponse()).SerializeToString()
NO_ECHO = pb.ProcessingResponse(response_body=pb.BodyResponse()).SerializeToString()


@pytest.mark.parametrize(("header", "metadata"), [(ENDPOINT, ""), ("", ENDPOINT), (ENDPOINT, ENDPOINT), (f"{ENDPOINT},10.0.0.8:8000", "")])
def test_the_destination_is_taken_from_where_it_is(header, metadata):
    exchange = PickExchange(STREAMED, time.monotonic())
    assert exchange.advance(_headers(header, metadata)) == b""
    assert exchange.destination == ENDPOINT
    assert exchange.decided_s >= exchange.intended_s
    assert exchange.advance(_body(last=False)) == b""
    assert exchange.advance(_body()) == STREAMED.response_headers


def test_a_streamed_answer_goes_a_part_at_a_time():
    exchange = PickExchange(STREAMED, 0.0)
    exchange.advance(_headers(ENDPOINT))
    exchange.advance(_body())
    assert exchange.advance(RESPONSE_HEADERS) == STREAMED.response[0].request
    for chunk, following in zip(STREAMED.response, STREAMED.response[1:], strict=False):
        assert exchange.advance(chunk.plain_reply) == following.request
    assert exchange.advance(STREAMED.response[-1].plain_reply) == b""
    assert exchange.wait is Wait.END


@pytest.mark.parametrize(
    "replies", [[_body("response_body", b"{}")], [_body("response_body", b"{", last=False), _body("response_body")], [NO_ECHO] * 2]
)
def test_a_whole_answer_may_come_back_as_the_picker_likes(replies):
    exchange = PickExchange(WHOLE, 0.0)
    exchange.advance(_headers(ENDPOINT))
    exchange.advance(NOTHING_TO_SAY)
    sent = exchange.advance(RESPONSE_HEADERS)
    assert len(GrpcMessages().feed(sent)) == 2
    for reply in replies:
        assert exchange.wait is Wait.CHUNK
        assert exchange.advance(reply) == b""
    assert exchange.wait is Wait.END


def test_without_a_response_phase_the_body_is_the_end():
    exchange = PickExchange(STREAMED, 0.0, with_response=False)
    exchange.advance(_headers(ENDPOINT))
    exchange.advance(_body())
    assert exchange.wait is Wait.END


def _refusal():
    reply = pb.ProcessingResponse()
    reply.immediate_response.status.code = 503
    reply.immediate_response.body = b"no endpoints"
    return reply.SerializeToString()


@pytest.mark.parametrize(
    ("replies", "kind"),
    [
        ([_headers(ENDPOINT, "10.0.0.8:8000")], "wrong reply"),
        ([_headers(), _body()], "no destination"),
        ([_refusal()], "immediate 503"),
        ([RESPONSE_HEADERS], "wrong reply"),
        ([b"\xff\xff"], "wrong reply"),
    ],
)
def test_what_is_wrong_has_a_kind(replies, kind):
    exchange = PickExchange(STREAMED, 0.0)
    *before, last = replies
    for reply in before:
        exchange.advance(reply)
    with pytest.raises(LoadError) as failed:
        exchange.advance(last)
    assert failed.value.kind == kind


def test_figures_are_nearest_ranks_in_milliseconds():
    meter = Meter(
        decision_s=[i / 1000 for i in range(100, 0, -1)], exchange_s=[1.0] * 100, late_s=[0.0] * 102, first_sent_s=1.0, last_done_s=11.0
    )
    meter.errors, meter.destinations = Counter({"timeout": 2}), Counter({ENDPOINT: 100})
    row = figures(meter, rps=10.2)
    assert (row["decision_p50_ms"], row["decision_p90_ms"], row["decision_p99_ms"], row["decision_max_ms"]) == (50, 90, 99, 100)
    assert (row["rps"], row["requests"], row["answered"], row["errors"]) == (10, 102, 100, 2)
    assert (row["errors_by_kind"], row["picks"]) == ({"timeout": 2}, {ENDPOINT: 100})


# Real servers


async def _load(port, times, *, workload=STREAMED, timeout_s=5.0, warmup_s=0.0, in_flight_max=1000):
    generator = Generator(
        Target("127.0.0.1", port), workload, connections=2, with_response=True, timeout_s=timeout_s, in_flight_max=in_flight_max
    )
    return await generator.run(iter(times), warmup_s=warmup_s)


@pytest.mark.parametrize("workload", [STREAMED, WHOLE], ids=["streamed", "whole"])
async def test_a_server_that_works(workload):
    server, port = await echo.start(0, ENDPOINT)
    try:
        meter = await _load(port, [i / 200 for i in range(20)], workload=workload, warmup_s=0.026)
    finally:
        await server.stop(None)
    assert (meter.destinations, meter.errors) == ({ENDPOINT: 14}, {})
    assert len(meter.decision_s) == len(meter.exchange_s) == len(meter.late_s) == 14
    assert all(0 < decision < whole < 5 for decision, whole in zip(meter.decision_s, meter.exchange_s, strict=True))
    assert all(late >= 0 for late in meter.late_s)


def _server(process):
    server = grpc.aio.server()
    method = grpc.stream_stream_rpc_method_handler(process)
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler("envoy.service.ext_proc.v3.ExternalProcessor", {"Process": method}),)
    )
    return server, server.add_insecure_port("127.0.0.1:0")


async def test_latency_counts_from_the_time_a_request_was_meant_to_leave():
    """Nobody is answered before the last has come: a client that waits would hang, and the first must be charged for all the time."""
    arrived, everybody = 0, asyncio.Event()

    async def process(_requests, context):
        nonlocal arrived
        await context.read()
        arrived += 1
        if arrived == 10:
            everybody.set()
        await everybody.wait()
        await context.write(_headers(ENDPOINT))
        await context.write(_body())
        while await context.read() is not grpc.aio.EOF:
            pass

    server, port = _server(process)
    await server.start()
    try:
        generator = Generator(
            Target("127.0.0.1", port), STREAMED, connections=1, with_response=False, timeout_s=5, in_flight_max=100
        )  # fmt: skip
        meter = await generator.run(iter([i / 100 for i in range(10)]))
    finally:
        await server.stop(None)
    assert len(meter.decision_s) == 10
    assert max(meter.decision_s) > 0.09
    assert max(meter.decision_s) - min(meter.decision_s) > 0.05


async def _refuses(_requests, context):
    await context.read()
    await context.write(_refusal())


async def _aborts(_requests, context):
    await context.abort(grpc.StatusCode.UNAVAILABLE, "not now")


async def _says_nothing(_requests, context):
    while await context.read() is not grpc.aio.EOF:
        pass


@pytest.mark.parametrize(("process", "kind"), [(_refuses, "immediate 503"), (_aborts, "grpc-status 14"), (_says_nothing, "timeout")])
async def test_errors_are_counted_and_the_load_goes_on(process, kind):
    server, port = _server(process)
    await server.start()
    try:
        meter = await _load(port, [i / 100 for i in range(6)], timeout_s=0.2 if kind == "timeout" else 5)
    finally:
        await server.stop(None)
    assert meter.errors == {kind: 6}
    assert meter.examples[kind]
    assert not meter.decision_s


async def test_more_than_may_be_under_way_is_not_sent():
    server, port = _server(_says_nothing)
    await server.start()
    try:
        meter = await _load(port, [0.0] * 5, timeout_s=0.2, in_flight_max=3)
    finally:
        await server.stop(None)
    assert meter.errors == {"not sent": 2, "timeout": 3}


async def test_a_server_that_goes_away_and_comes_back():
    server, port = await echo.start(0, ENDPOINT)
    generator = Generator(Target("127.0.0.1", port), STREAMED, connections=2, with_response=True, timeout_s=1.0, in_flight_max=100)
    loading = asyncio.create_task(generator.run(i / 50 for i in range(60)))
    async with asyncio.timeout(10):
        while generator.meter.destinations[ENDPOINT] < 5:  # noqa: ASYNC110 - nothing tells
            await asyncio.sleep(0.01)
    await server.stop(None)
    async with asyncio.timeout(10):
        while not generator.meter.errors:  # noqa: ASYNC110 - nothing tells
            await asyncio.sleep(0.01)
    again, _ = await echo.start(port, ENDPOINT)
    try:
        meter = await loading
    finally:
        await again.stop(None)
    assert meter.destinations[ENDPOINT] > 10
    assert 0 < sum(meter.errors.values()) < 50
    assert meter.destinations[ENDPOINT] + sum(meter.errors.values()) == 60


async def test_a_server_that_speaks_something_else_is_told_and_not_asked_without_end(capfd):
    """An engine's port in the place of the picker's."""
    connected = 0

    async def http(reader, writer):
        nonlocal connected
        connected += 1
        await reader.read(1)
        writer.write(b"HTTP/1.1 400 Bad Request\r\nconnection: close\r\n\r\n")
        writer.close()

    server = await asyncio.start_server(http, "127.0.0.1", 0)
    async with server, asyncio.timeout(20):
        meter = await _load(server.sockets[0].getsockname()[1], [i / 100 for i in range(40)])
    assert set(meter.errors) <= {"not connected", "connection lost"}
    assert sum(meter.errors.values()) == 40
    assert all(re.search("HTTP/2|the server closed", text) for text in meter.examples.values()), meter.examples
    assert connected < 20, "a pause before each that follows one that did not last"
    assert capfd.readouterr().err == ""


def test_nobody_there_is_told(capsys):
    (port,) = free_ports(1)
    assert main(["load", "--target", f"127.0.0.1:{port}", "--rps", "10"]) == 2
    assert "can't connect" in capsys.readouterr().err


def test_the_command_against_a_real_picker_over_tls(tmp_path, capsys):
    ports = free_ports(3)
    flags = [f"--{name}-port={port}" for name, port in zip(("grpc", "grpc-health", "metrics"), ports, strict=True)]
    with Child(["bench", "metrics-stub", "--count", "3"], announces=True) as stub:
        engines = [f"127.0.0.1:{port}" for port in stub.announced["ports"]]
        with Child(
            ["epp", "serve", *(f"--endpoint={engine}" for engine in engines), *flags, "--bind-address=127.0.0.1", "--drain-timeout=0"]
        ) as picker:
            load = ["load", f"--target=127.0.0.1:{ports[0]}", "--rps=60", "--duration=0.5", "--warmup=0.2", "--prompt-tokens=50", "--tls"]
            more = ["--output-tokens=3", f"--pid={picker.pid}", f"--json={tmp_path / 'load.json'}"]
            give_up_s = time.monotonic() + 15
            while main([*load, *more, f"--endpoints-subset={engines[1]}"]) and time.monotonic() < give_up_s:
                picker.check()
    (row,) = json.loads((tmp_path / "load.json").read_text())["rows"]
    assert row["errors"] == 0, row
    assert row["picks"] == {engines[1]: row["answered"]}
    assert row["target_cpu_us_per_request"] > 0
    assert "CPU of the target" in capsys.readouterr().out


@pytest.mark.parametrize("target", ["nowhere", ":9002", "host:port"])
def test_a_target_must_be_an_address(target, capsys):
    assert main(["load", "--target", target, "--rps", "1"]) == 2
    assert "HOST:PORT" in capsys.readouterr().err


def test_errors_are_bench_errors():
    assert issubclass(LoadError, BenchError)
