"""The doctor's exchange with pickers that answer wrongly, over real gRPC: what each did is seen for what it is."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import grpc.aio
import pytest

from epp._pb import epp_ext_proc_pb2 as pb
from epp._pb import epp_health_pb2 as health_pb
from epp.doctor import exchange
from epp.doctor.exchange import BUFFERED, FULL_DUPLEX, Exchange
from epp.doctor.findings import Finding, Status
from epp.doctor.grpc_client import GrpcError, HostPort, PortFacts, connected, look_at
from epp.doctor.picker_checks import exchanged

HERE = "127.0.0.1"
DESTINATION = "x-gateway-destination-endpoint"
SERVICE = "envoy.service.ext_proc.v3.ExternalProcessor"
HEALTH = "/grpc.health.v1.Health/Check"

Behaviour = Callable[[Any], Awaitable[None]]


def route(*, raw: bool = True, metadata: object = "10.0.0.5:8000", header: str = "10.0.0.5:8000") -> bytes:
    reply = pb.ProcessingResponse(request_headers=pb.HeadersResponse())
    if header:
        value = {"raw_value" if raw else "value": header.encode()}
        reply.request_headers.response.header_mutation.set_headers.add(header=pb.HeaderValue(key=DESTINATION, **value))
    if metadata is not None:
        reply.dynamic_metadata.update({"envoy.lb": {DESTINATION: metadata}})
    return reply.SerializeToString()


def body_reply(body: bytes, *, streamed: bool = True, last: bool = True) -> bytes:
    reply = pb.ProcessingResponse(request_body=pb.BodyResponse())
    mutation = reply.request_body.response.body_mutation
    if streamed:
        mutation.streamed_response.body, mutation.streamed_response.end_of_stream = body, last
    else:
        mutation.body = body
    return reply.SerializeToString()


async def whole_body(context: Any) -> bytes:
    body = b""
    while True:
        message = pb.ProcessingRequest.FromString(await context.read())
        body += message.request_body.body
        if message.request_body.end_of_stream:
            return body


def answering(first: bytes, *, echo: Callable[[bytes], list[bytes]] = lambda body: [body_reply(body)]) -> Behaviour:
    async def behave(context: Any) -> None:
        body = await whole_body(context)
        for reply in [first, *echo(body)]:
            await context.write(reply)
        await context.read()

    return behave


async def silent(context: Any) -> None:
    await whole_body(context)
    await asyncio.Event().wait()


async def buffered(context: Any) -> None:
    """As it should be."""
    await context.read()
    await context.write(pb.ProcessingResponse(request_headers=pb.HeadersResponse()).SerializeToString())
    await context.read()
    reply = pb.ProcessingResponse.FromString(route())
    reply.request_body.CopyFrom(pb.BodyResponse(response=reply.request_headers.response))
    await context.write(reply.SerializeToString())


async def closes(context: Any) -> None:
    await whole_body(context)


async def garbage(context: Any) -> None:
    await whole_body(context)
    await context.write(b"\xff\xff\xff")


async def refuses(context: Any) -> None:
    await whole_body(context)
    refusal = pb.ImmediateResponse(status=pb.HttpStatus(code=503), body=b'{"error":"none"}')
    await context.write(pb.ProcessingResponse(immediate_response=refusal).SerializeToString())


async def chatters(context: Any) -> None:
    await whole_body(context)
    for _ in range(exchange.REPLIES_MAX + 1):
        await context.write(pb.ProcessingResponse(request_headers=pb.HeadersResponse()).SerializeToString())
    await context.read()


@contextlib.asynccontextmanager
async def picker(behave: Behaviour) -> AsyncIterator[PortFacts]:
    async def process(_requests: object, context: Any) -> None:
        await behave(context)

    server = grpc.aio.server()
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler(SERVICE, {"Process": grpc.stream_stream_rpc_method_handler(process)}),)
    )
    number = server.add_insecure_port(f"{HERE}:0")
    await server.start()
    try:
        yield await look_at(HostPort(HERE, number))
    finally:
        await server.stop(0)


async def outcome(behave: Behaviour, mode: str) -> tuple[Exchange, list[Finding]]:
    async with picker(behave) as port, connected(port) as connection:
        found = await exchange.ask(connection, mode, "m", lambda: 0.0)
    return found, list(exchanged(found))


def halved(body: bytes) -> list[bytes]:
    half = len(body) // 2
    return [body_reply(body[:half], last=False), body_reply(body[half:])]


CASES: list[tuple[str, Behaviour, str, Status, str]] = [
    ("good", answering(route()), FULL_DUPLEX, Status.OK, "body echoed"),
    ("in two pieces", answering(route(), echo=halved), FULL_DUPLEX, Status.OK, "body echoed"),
    ("good, buffered", buffered, BUFFERED, Status.OK, "body echoed"),
    ("value", answering(route(raw=False)), FULL_DUPLEX, Status.FAIL, "not in `raw_value`"),
    ("a list", answering(route(metadata=["10.0.0.5:8000"])), FULL_DUPLEX, Status.FAIL, "as list_value"),
    ("no metadata", answering(route(metadata=None)), FULL_DUPLEX, Status.FAIL, "in metadata not at all"),
    ("no header", answering(route(header="")), FULL_DUPLEX, Status.FAIL, "in dynamic metadata alone"),
    ("neither", answering(route(header="", metadata=None)), FULL_DUPLEX, Status.FAIL, "no destination"),
    ("another body", answering(route(), echo=lambda body: [body_reply(body[1:])]), FULL_DUPLEX, Status.FAIL, "did not come back whole"),
    ("a plain body", answering(route(), echo=lambda body: [body_reply(body, streamed=False)]), FULL_DUPLEX, Status.FAIL, "not as streamed_response"),
    ("hangs", silent, FULL_DUPLEX, Status.FAIL, "no answer after the whole body"),
    ("waits for the body", silent, BUFFERED, Status.FAIL, "no answer after the request headers"),
    ("closes", closes, FULL_DUPLEX, Status.FAIL, "closed the stream after the whole body"),
    ("garbage", garbage, FULL_DUPLEX, Status.FAIL, "no ext_proc answer"),
    ("refuses", refuses, FULL_DUPLEX, Status.FAIL, '503 {"error":"none"}'),
    ("never ends", chatters, FULL_DUPLEX, Status.FAIL, "more than 100 replies"),
]  # fmt: skip


@pytest.mark.parametrize(("behave", "mode", "status", "text"), [pytest.param(*case[1:], id=case[0]) for case in CASES])
async def test_what_a_picker_does_is_told(behave: Behaviour, mode: str, status: Status, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if behave is silent:
        monkeypatch.setattr(exchange, "SILENCE_S", 0.05)
    found, findings = await outcome(behave, mode)
    if status is Status.OK:
        assert found.body_echoed
        assert found.header == found.metadata == "10.0.0.5:8000"
    assert {finding.status for finding in findings} == {status}, findings
    assert any(text in finding.text for finding in findings), findings


async def test_a_server_without_ext_proc() -> None:
    server = grpc.aio.server()
    number = server.add_insecure_port(f"{HERE}:0")
    await server.start()
    try:
        async with connected(await look_at(HostPort(HERE, number))) as connection:
            found = await exchange.ask(connection, FULL_DUPLEX, "m", lambda: 0.0)
            with pytest.raises(GrpcError, match="status 12"):
                await connection.unary(HEALTH, health_pb.HealthCheckRequest().SerializeToString())
    finally:
        await server.stop(0)
    assert "gRPC status 12" in found.error


async def test_ports_that_are_no_picker_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("epp.doctor.grpc_client.HELLO_S", 0.05)

    async def hang_up(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    async def listen(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            await _reader.read(-1)
        writer.close()

    async def greet(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 mail.example.com ESMTP ready\r\n")
        await listen(_reader, writer)

    for connected_ in (hang_up, listen, greet):
        async with await asyncio.start_server(connected_, HERE, 0) as server:
            port = await look_at(HostPort(*server.sockets[0].getsockname()))
        assert (port.error, port.tls, port.http2) == ("", False, False)
    closed = await look_at(HostPort(HERE, server.sockets[0].getsockname()[1] if server.sockets else 1))
    assert closed.error
    with pytest.raises(GrpcError):
        async with connected(closed):
            raise AssertionError("connected to nobody")
