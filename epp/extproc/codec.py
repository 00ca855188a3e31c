"""Wire bytes <-> events and replies. The one place (with health) that touches generated protobuf.

Messages from the peer are parsed by upb. Replies are few and simple, and one is sent for every streamed chunk, so they are written
by hand, body last so that one join copies it once; a test holds every one of them against upb. Field numbers: proto/epp_ext_proc.proto.
Cost: about 1 µs to read a body message, 8 µs for 15 request headers, 1 µs to write a body reply.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import cache, lru_cache
from typing import Any

from google.protobuf.message import DecodeError

from epp._pb import epp_ext_proc_pb2 as pb
from epp.extproc.messages import (
    BodyMode,
    ContinueBody,
    ContinueHeaders,
    ContinueTrailers,
    Event,
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

DESTINATION = "x-gateway-destination-endpoint"
SCORES = "x-gateway-destination-endpoint-scores"
SERVED = "x-gateway-destination-endpoint-served"
LOAD = "endpoint-load-metrics"
SUBSET = "x-gateway-destination-endpoint-subset"
LB_NAMESPACE = "envoy.lb"
SUBSET_NAMESPACE = "envoy.lb.subset_hint"
ATTRIBUTES = "envoy.filters.http.ext_proc"
STATUS_DIGITS = 3

_from_string: Callable[[bytes], pb.ProcessingRequest] = pb.ProcessingRequest.FromString
_OVERWRITE = b"\x18\x02"  # HeaderValueOption.append_action: OVERWRITE_IF_EXISTS_OR_ADD


class MalformedMessageError(Exception):
    """The peer sent bytes that are not a ProcessingRequest."""


def decode(data: bytes) -> Event:
    """One ProcessingRequest. Raises MalformedMessageError."""
    try:
        message = _from_string(data)
    except DecodeError as error:
        raise MalformedMessageError(str(error)) from None
    kind = message.WhichOneof("request")
    if kind == "response_body":
        part = message.response_body
        return ResponseBody(part.body, part.end_of_stream)
    if kind == "request_body":
        part = message.request_body
        return RequestBody(part.body, part.end_of_stream)
    read = _READERS.get(kind) if kind else None
    return read(message) if read else UnknownMessage()


def _request_headers(message: pb.ProcessingRequest) -> RequestHeaders:
    part = message.request_headers
    headers: dict[str, str] = {}
    bad = ""
    for header in part.headers.headers:
        key = header.key.lower()
        try:
            value = (header.raw_value or header.value).decode()
        except UnicodeDecodeError:
            bad = key
            continue
        headers[key] = f"{headers[key]},{value}" if key in headers else value
    event = RequestHeaders(headers, end_of_stream=part.end_of_stream)
    event.bad_header = bad
    if message.HasField("protocol_config"):
        config = message.protocol_config
        event.request_mode = _MODES.get(config.request_body_mode)
        event.response_mode = _MODES.get(config.response_body_mode)
        event.body_unasked = config.send_body_without_waiting_for_header_response
    if message.HasField("metadata_context"):
        event.subset = _subset(message.metadata_context.filter_metadata)
    return event


_MODES: dict[int, BodyMode] = {mode.value: mode for mode in BodyMode}


def _subset(filter_metadata: Any) -> tuple[str, ...] | None:
    """A list or a comma string (header_to_metadata makes one); None when the gateway gave no hint (rule 10)."""
    if SUBSET_NAMESPACE not in filter_metadata:
        return None
    fields = filter_metadata[SUBSET_NAMESPACE].fields
    if SUBSET not in fields:
        return None
    value = fields[SUBSET]
    if value.WhichOneof("kind") == "list_value":
        texts = [item.string_value for item in value.list_value.values]
    else:
        texts = value.string_value.split(",")
    return tuple(text.strip() for text in texts if text.strip())


def _response_headers(message: pb.ProcessingRequest) -> ResponseHeaders:
    part = message.response_headers
    status, event_stream, load = 0, False, ""
    for header in part.headers.headers:
        key = header.key
        if key == ":status":
            text = header.raw_value or header.value
            status = int(text) if len(text) == STATUS_DIGITS and text.isdigit() else 0
        elif key == "content-type":
            event_stream = (header.raw_value or header.value).startswith(b"text/event-stream")
        elif key == LOAD:
            load = bytes(header.raw_value or header.value).decode("ascii", "replace")
    served, details = _served(message)
    return ResponseHeaders(
        status, event_stream=event_stream, served=served, code_details=details, end_of_stream=part.end_of_stream, load=load
    )


def _served(message: pb.ProcessingRequest) -> tuple[str, str]:
    """Who answered, and Envoy's `response.code_details`; empty where the gateway does not say."""
    served, details = "", ""
    if message.HasField("metadata_context"):
        filter_metadata = message.metadata_context.filter_metadata
        if LB_NAMESPACE in filter_metadata:
            fields = filter_metadata[LB_NAMESPACE].fields
            if SERVED in fields:
                served = fields[SERVED].string_value
    if ATTRIBUTES in message.attributes:
        fields = message.attributes[ATTRIBUTES].fields
        if not served and "upstream.address" in fields:
            served = fields["upstream.address"].string_value
        if "response.code_details" in fields:
            details = fields["response.code_details"].string_value
    return served, details


_READERS: dict[str, Callable[[pb.ProcessingRequest], Event]] = {
    "request_headers": _request_headers,
    "response_headers": _response_headers,
    "request_trailers": lambda _message: RequestTrailers(),
    "response_trailers": lambda _message: ResponseTrailers(),
}


def encode(reply: Reply) -> bytes:
    """One ProcessingResponse."""
    return b"".join(_parts(reply))


def frame(replies: Iterable[Reply]) -> bytes:
    """ProcessingResponses as gRPC messages: each a zero byte, four bytes of length, and the message."""
    out: list[bytes | memoryview] = []
    for reply in replies:
        parts = _parts(reply)
        out.append(b"\0" + sum(map(len, parts)).to_bytes(4, "big"))
        out += parts
    return b"".join(out)


def _parts(reply: Reply) -> list[bytes | memoryview]:
    return _WRITERS[type(reply)](reply)


_REQUEST_CONTINUE = pb.ProcessingResponse(request_headers=pb.HeadersResponse()).SerializeToString()
_RESPONSE_CONTINUE = pb.ProcessingResponse(response_headers=pb.HeadersResponse()).SerializeToString()
_REQUEST_BODY = pb.ProcessingResponse(request_body=pb.BodyResponse()).SerializeToString()
_RESPONSE_BODY = pb.ProcessingResponse(response_body=pb.BodyResponse()).SerializeToString()
_REQUEST_TRAILERS = pb.ProcessingResponse(request_trailers=pb.TrailersResponse()).SerializeToString()
_RESPONSE_TRAILERS = pb.ProcessingResponse(response_trailers=pb.TrailersResponse()).SerializeToString()


def _varint(number: int) -> bytes:
    if number < 0x80:
        return _ONE_BYTE[number]
    out = bytearray()
    while number >= 0x80:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


_ONE_BYTE = tuple(bytes((number,)) for number in range(0x80))


def _field(tag: bytes, payload: bytes) -> bytes:
    return tag + _varint(len(payload)) + payload


def _streamed_body(reply: StreamedBody) -> list[bytes | memoryview]:
    """ProcessingResponse.{request,response}_body.response.body_mutation.streamed_response{end_of_stream, body}."""
    body = reply.body
    size = len(body)
    if size < _HEADS_MAX:
        head = _HEADS[reply.response][reply.end_of_stream][size]
        parts: list[bytes | memoryview] = [head, body] if size else [head]
    else:
        parts = [_streamed_head(size, reply.end_of_stream, reply.response), body]
    if reply.metadata is not None:
        parts.append(_metadata(reply.metadata))
    return parts


def _metadata(namespaces: Mapping[str, Mapping[str, Any]]) -> bytes:
    """ProcessingResponse.dynamic_metadata."""
    message = pb.ProcessingResponse()
    message.dynamic_metadata.update({namespace: dict(values) for namespace, values in namespaces.items()})
    return message.SerializeToString()


def _streamed_head(size: int, end_of_stream: bool, response: bool) -> bytes:
    inner = b"\x10\x01" if end_of_stream else b""
    if size:
        inner += b"\x0a" + _varint(size)
    mutation = b"\x1a" + _varint(len(inner) + size) + inner
    common = b"\x1a" + _varint(len(mutation) + size) + mutation
    part = b"\x0a" + _varint(len(common) + size) + common
    return (b"\x22" if response else b"\x1a") + _varint(len(part) + size) + part


_HEADS_MAX = 1_024
"""Heads of body replies up to this many bytes are made once: streamed tokens are small and many."""
_HEADS = tuple(
    tuple(tuple(_streamed_head(size, eos, response) for size in range(_HEADS_MAX)) for eos in (False, True)) for response in (False, True)
)


@lru_cache(maxsize=20_000)
def _destination_parts(destination: str) -> tuple[bytes, bytes]:
    """The header option and the dynamic metadata for one destination: the same for every request that goes there."""
    option = _header_option(DESTINATION, destination)
    message = pb.ProcessingResponse()
    message.dynamic_metadata.update({LB_NAMESPACE: {DESTINATION: destination}})
    return option, message.SerializeToString()


def _header_option(key: str, value: str) -> bytes:
    """HeaderMutation.set_headers: the value as raw_value (rule 5), always overwriting (section 4)."""
    header = _field(b"\x0a", key.encode()) + _field(b"\x1a", value.encode())
    return _field(b"\x0a", _field(b"\x0a", header) + _OVERWRITE)


def _route(reply: RouteReply) -> bytes:
    """ProcessingResponse.{request_headers,request_body}.response.header_mutation.set_headers, and dynamic_metadata."""
    options, metadata = _destination_parts(reply.destination)
    if reply.scores is not None:
        metadata = _scored(reply.destination, reply.scores)
    if reply.set:
        options += b"".join(_header_option(name, value) for name, value in reply.set.items())
    if reply.content_length >= 0:
        options += _header_option("content-length", str(reply.content_length))
    if reply.request_id:
        options += _header_option("x-request-id", reply.request_id)
    if reply.remove:
        options += _removed(reply.remove)
    common = _field(b"\x12", options)
    if reply.body is not None:
        common += _replaced(reply.body)
    message = _field(b"\x1a" if reply.in_body else b"\x0a", _field(b"\x0a", common)) + metadata
    return message if reply.keep_request_mode is None else message + _override(reply.keep_request_mode)


def _scored(destination: str, scores: Mapping[str, float]) -> bytes:
    """The dynamic metadata for a destination, with the scores it was chosen by."""
    return _metadata({LB_NAMESPACE: {DESTINATION: destination, SCORES: dict(scores)}})


def _removed(names: Iterable[str]) -> bytes:
    """HeaderMutation.remove_headers."""
    return b"".join(_field(b"\x12", name.encode()) for name in names)


def _replaced(body: bytes) -> bytes:
    """CommonResponse.body_mutation: another body, or none."""
    return _field(b"\x1a", _field(b"\x0a", body) if body else b"\x10\x01")


def _continue_headers(reply: ContinueHeaders) -> bytes:
    """ProcessingResponse.{request_headers,response_headers}[.response.header_mutation] and mode_override."""
    if not reply.set and not reply.remove and reply.keep_request_mode is None:
        return _RESPONSE_CONTINUE if reply.response else _REQUEST_CONTINUE
    mutation = b"".join(_header_option(name, value) for name, value in reply.set.items()) if reply.set else b""
    if reply.remove:
        mutation += _removed(reply.remove)
    if mutation:
        message = _field(b"\x12" if reply.response else b"\x0a", _field(b"\x0a", _field(b"\x12", mutation)))
    else:
        message = _RESPONSE_CONTINUE if reply.response else _REQUEST_CONTINUE
    if reply.keep_request_mode is not None:
        message += _override(reply.keep_request_mode)
    return message


@cache
def _override(request_mode: BodyMode) -> bytes:
    """ProcessingResponse.mode_override: all as it is, but no response body."""
    mode = pb.ProcessingMode(
        response_header_mode=pb.ProcessingMode.SEND,
        request_body_mode=request_mode.name,
        response_body_mode=pb.NONE,
        request_trailer_mode=pb.ProcessingMode.SKIP,
        response_trailer_mode=pb.ProcessingMode.SKIP,
    )
    return pb.ProcessingResponse(mode_override=mode).SerializeToString()


def _continue_body(reply: ContinueBody) -> bytes:
    """ProcessingResponse.{request_body,response_body}[.response.body_mutation]."""
    metadata = b"" if reply.metadata is None else _metadata(reply.metadata)
    if reply.body is None:
        return (_RESPONSE_BODY if reply.response else _REQUEST_BODY) + metadata
    return _field(b"\x22" if reply.response else b"\x1a", _field(b"\x0a", _replaced(reply.body))) + metadata


def _immediate(reply: Immediate) -> bytes:
    message = pb.ImmediateResponse(status=pb.HttpStatus(code=reply.status), body=reply.body, details=reply.details)
    if reply.grpc_status is not None:
        message.grpc_status.status = reply.grpc_status
    options = b"".join(_header_option(key, value) for key, value in reply.headers.items())
    message.headers.MergeFromString(options)
    return pb.ProcessingResponse(immediate_response=message).SerializeToString()


def _trailers(reply: ContinueTrailers) -> bytes:
    metadata = b""
    if reply.metadata is not None:
        metadata = _metadata(reply.metadata)
    elif reply.scores is not None:
        metadata = _scored(reply.destination, reply.scores)
    elif reply.destination:
        metadata = _destination_parts(reply.destination)[1]
    return (_RESPONSE_TRAILERS if reply.response else _REQUEST_TRAILERS) + metadata


_WRITERS: dict[type[Reply], Callable[[Any], list[bytes | memoryview]]] = {
    StreamedBody: _streamed_body,
    RouteReply: lambda reply: [_route(reply)],
    ContinueHeaders: lambda reply: [_continue_headers(reply)],
    ContinueBody: lambda reply: [_continue_body(reply)],
    ContinueTrailers: lambda reply: [_trailers(reply)],
    Immediate: lambda reply: [_immediate(reply)],
}
