"""One ext_proc exchange as a gateway would have it, up to the decision; then the client "leaves", so that no engine is reached.

The request is real to the picker: it is parsed, admitted, scheduled, and taken back when the stream is reset. Beside `extproc.codec`, which
speaks the server's side, this is the one place that touches the generated messages. Not here: what is right or wrong about an answer
(picker_checks).
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass

from google.protobuf.message import DecodeError

from epp._pb import epp_ext_proc_pb2 as pb
from epp.doctor.grpc_client import Call, Connection, GrpcError
from epp.extproc.codec import DESTINATION, LB_NAMESPACE
from epp.extproc.h2 import PROCESS

FULL_DUPLEX, BUFFERED = "FULL_DUPLEX_STREAMED", "BUFFERED"
PATH = "/v1/chat/completions"
SAMPLE_TEXT = "epp doctor: where would this go?"
IMMEDIATE_TEXT_CHARS_MAX = 200
REPLIES_MAX = 100
"""Of one exchange of a body this small."""
SILENCE_S = 2.0
"""A picker that decides takes milliseconds; one that waits for what a gateway will not send waits for ever."""


@dataclass(slots=True, kw_only=True)
class Exchange:
    """What came back."""

    mode: str
    error: str = ""
    """Why it came to no end; empty: it did."""
    silent_after: str = ""
    """What had been sent when the picker fell silent."""
    header: str | None = None
    """The destination in header_mutation; None: there was none."""
    header_in: str = ""
    """Which reply had it: `request_headers` or `request_body`."""
    raw: bool = True
    """The header's value is in `raw_value`."""
    metadata: str | None = None
    """The destination in dynamic_metadata under `envoy.lb`."""
    metadata_kind: str = ""
    """`string_value` or what it was instead."""
    body_echoed: bool = False
    streamed: bool = False
    """The body came back as `streamed_response`."""
    replies: list[str] | None = None
    immediate_status: int = 0
    immediate_text: str = ""
    latency_s: float = 0.0
    """From the last byte sent to the first answer that decides."""


def sample_body(model: str) -> bytes:
    asked = {"model": model, "messages": [{"role": "user", "content": SAMPLE_TEXT}], "max_tokens": 1}
    return json.dumps(asked).encode()


async def ask(connection: Connection, mode: str, model: str, now_s: Callable[[], float]) -> Exchange:
    """Never raises for what a server does: it is in the Exchange."""
    exchange = Exchange(mode=mode, replies=[])
    body = sample_body(model)
    call = None
    try:
        call = await connection.call(PROCESS.decode())
        await _play(call, exchange, body, now_s)
    except GrpcError as error:
        exchange.error = str(error)
    except (DecodeError, ValueError) as error:
        exchange.error = f"no ext_proc answer: {error}"
    finally:
        if call is not None:
            await call.leave()
    return exchange


async def _play(call: Call, exchange: Exchange, body: bytes, now_s: Callable[[], float]) -> None:
    full_duplex = exchange.mode == FULL_DUPLEX
    await call.send(_headers(exchange.mode, len(body)))
    if not full_duplex:
        reply = await _receive(call, exchange, "the request headers")
        if reply is None or _read(reply, exchange) is None:
            return
    else:
        await call.send(_body(body[: len(body) // 2], last=False))
    asked_s = now_s()
    await call.send(_body(body[len(body) // 2 :] if full_duplex else body, last=True))
    echoed = bytearray()
    for number in range(REPLIES_MAX):
        reply = await _receive(call, exchange, "the whole body")
        if not number:
            exchange.latency_s = now_s() - asked_s
        if reply is None or _read(reply, exchange) is None:
            return
        if reply.WhichOneof("response") == "request_body":
            mutation = reply.request_body.response.body_mutation
            kind = mutation.WhichOneof("mutation")
            if not full_duplex:
                exchange.body_echoed = kind is None or mutation.body == body
                return
            exchange.streamed = kind == "streamed_response"
            echoed += mutation.streamed_response.body if exchange.streamed else mutation.body
            if not exchange.streamed or mutation.streamed_response.end_of_stream:
                exchange.body_echoed = bytes(echoed) == body
                return
    raise ValueError(f"more than {REPLIES_MAX} replies")


async def _receive(call: Call, exchange: Exchange, sent: str) -> pb.ProcessingResponse | None:
    try:
        async with asyncio.timeout(SILENCE_S):
            data = await call.receive()
    except TimeoutError:
        exchange.silent_after = sent
        return None
    if data is None:
        exchange.error = f"the picker closed the stream after {sent}"
        return None
    return pb.ProcessingResponse.FromString(data)


def _read(reply: pb.ProcessingResponse, exchange: Exchange) -> str | None:
    """The kind of reply; None where it was the last word."""
    kind: str | None = reply.WhichOneof("response")
    assert exchange.replies is not None
    exchange.replies.append(kind or "nothing")
    if kind == "immediate_response":
        exchange.immediate_status = reply.immediate_response.status.code
        exchange.immediate_text = reply.immediate_response.body[:IMMEDIATE_TEXT_CHARS_MAX].decode(errors="replace")
        return None
    if kind in ("request_headers", "request_body"):
        for option in getattr(reply, kind).response.header_mutation.set_headers:
            if option.header.key.lower() == DESTINATION:
                exchange.raw = bool(option.header.raw_value)
                exchange.header = bytes(option.header.raw_value or option.header.value).decode(errors="replace")
                exchange.header_in = kind
    if LB_NAMESPACE in reply.dynamic_metadata.fields:
        fields = reply.dynamic_metadata.fields[LB_NAMESPACE].struct_value.fields
        if DESTINATION in fields:
            value = fields[DESTINATION]
            exchange.metadata_kind = value.WhichOneof("kind") or ""
            exchange.metadata = value.string_value
    return kind


def _headers(mode: str, body_bytes: int) -> bytes:
    headers = {
        ":method": "POST",
        ":path": PATH,
        ":authority": "epp-doctor",
        ":scheme": "http",
        "content-type": "application/json",
        "content-length": str(body_bytes),
        "x-request-id": "epp-doctor",
        "user-agent": "epp-doctor",
    }
    message = pb.ProcessingRequest()
    for key, value in headers.items():
        message.request_headers.headers.headers.add(key=key, raw_value=value.encode())
    message.protocol_config.request_body_mode = pb.FULL_DUPLEX_STREAMED if mode == FULL_DUPLEX else pb.BUFFERED
    message.protocol_config.response_body_mode = pb.FULL_DUPLEX_STREAMED if mode == FULL_DUPLEX else pb.NONE
    return bytes(message.SerializeToString())


def _body(data: bytes, *, last: bool) -> bytes:
    return bytes(pb.ProcessingRequest(request_body=pb.HttpBody(body=data, end_of_stream=last)).SerializeToString())
