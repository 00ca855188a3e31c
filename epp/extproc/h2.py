"""The gRPC server of the request path: an asyncio protocol around libnghttp2 (ngh2).

One read from a socket may hold messages of many streams; their replies go out in one write, which is most of why this is cheap (also
for Envoy). HTTP/2 server policy lives here and nowhere else: windows, streams, resets, queued bytes, keepalive, drain. Not here: what
a message means (codec, session).

The trap: Envoy ends every ext_proc stream with RST_STREAM, and nghttp2's default rapid-reset limit (1000, then 33 a second) would
close the connection on it, failing every request in flight. The peer is our own gateway, so both abuse limits are far out of reach.

Cost: about 17 µs of transport per exchange with many streams at once; a further streamed chunk 7 µs.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import ngh2
from ngh2 import events as h2_events
from ngh2.config import Configuration, Role
from ngh2.enums import Setting

from epp.clock import Clock
from epp.errors import BodyTooLargeError
from epp.extproc import codec
from epp.extproc.messages import Reply
from epp.extproc.session import Limits, Session

_log = logging.getLogger("epp.h2")

PROCESS = b"/envoy.service.ext_proc.v3.ExternalProcessor/Process"
HEALTH_CHECK = b"/grpc.health.v1.Health/Check"
HEALTH_LIST = b"/grpc.health.v1.Health/List"

RESPONSE_HEADERS = ((b":status", b"200"), (b"content-type", b"application/grpc"))
GRPC_OK = ((b"grpc-status", b"0"),)
INTERNAL, UNIMPLEMENTED, INVALID_ARGUMENT, UNAVAILABLE = 13, 12, 3, 14

UNREACHABLE = (1 << 40, 1 << 40)
"""An abuse limit (burst, per second) that our own gateway can't reach."""


@dataclass(frozen=True, slots=True)
class H2Limits:
    """Server policy; every field is a limit with a name."""

    message_bytes_max: int
    """One gRPC message: a gateway may send a whole body as one (rule 12)."""
    streams_max: int = 10_000
    """Concurrent streams a connection; Envoy opens another connection beyond."""
    connections_max: int = 4_096
    stream_window_bytes: int = 1 << 20
    connection_window_bytes: int = 64 << 20
    frame_bytes_max: int = 1 << 18
    queued_bytes_max: int = 16 << 20
    """Replies a peer has not read yet, per connection; beyond it gets no more window to send in."""
    header_bytes_max: int = 1 << 16
    handshake_s: float = 10.0
    """From accept to the peer's first bytes."""
    keepalive_s: float = 60.0
    """Silence after which a PING asks whether the peer lives; as long again without an answer closes the connection."""


class _Stream:
    __slots__ = ("headers_sent", "id", "over", "parts", "parts_bytes", "replies", "session", "unary", "wanted_bytes")

    def __init__(self, stream_id: int, session: Session | None, unary: Callable[[bytes], bytes] | None) -> None:
        self.id = stream_id
        self.session = session
        self.unary = unary
        self.parts: list[bytes] = []
        self.parts_bytes = 0
        self.wanted_bytes = 0
        self.replies: list[Reply] = []
        self.headers_sent = False
        self.over = False
        """We ended our side."""


@dataclass
class Shared:
    """What all connections of one server have in common."""

    limits: H2Limits
    session_limits: Limits
    clock: Clock
    new_session: Callable[[], Session] | None
    """None: this port serves no ext_proc."""
    unary: dict[bytes, Callable[[bytes], bytes]]
    """path -> handler of one message; it raises ValueError for one it can't read."""
    connections: set[H2Connection] = field(default_factory=set)
    closing: bool = False
    """New calls are refused; those open go on."""
    emptied: asyncio.Event = field(default_factory=asyncio.Event)
    """Set while closing, once no stream is open."""

    @property
    def open_streams(self) -> int:
        return sum(connection.open_streams for connection in self.connections)

    def stream_ended(self) -> None:
        if self.closing and not self.open_streams:
            self.emptied.set()


class H2Connection(asyncio.BufferedProtocol):
    """One peer: bytes in, sessions fed, bytes out."""

    def __init__(self, shared: Shared) -> None:
        self._shared = shared
        self._limits = shared.limits
        self._buffer = bytearray(1 << 18)
        self._view = memoryview(self._buffer)
        self._streams: dict[int, _Stream] = {}
        self._dirty: list[_Stream] = []
        self._held: list[tuple[int, int]] = []
        """(bytes, stream) taken but not acknowledged: the peer must read our replies first."""
        self._transport: asyncio.Transport | None = None
        self._connection = ngh2.Connection(
            Role.SERVER,
            Configuration(
                auto_window_update=False,
                stream_reset_rate_limit=UNREACHABLE,
                glitch_rate_limit=UNREACHABLE,
                max_inbound_header_list_size=self._limits.header_bytes_max,
            ),
        )
        self._paused = False
        self.last_read_s = shared.clock.now_s()
        self.heard = False
        self._pinged_s = 0.0
        self._on: dict[type, Callable[[Any], None]] = {
            h2_events.RequestReceived: self._on_request,
            h2_events.DataReceived: self._on_data,
            h2_events.StreamReset: self._on_reset,
            h2_events.StreamClosed: self._on_reset,
            h2_events.TrailersReceived: self._on_trailers,
        }

    # asyncio's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is one in all but its class
        shared = self._shared
        if len(shared.connections) >= shared.limits.connections_max:
            shared.session_limits.hits("connections_max")
            self.abort()
            return
        shared.connections.add(self)
        limits = self._limits
        self._connection.initiate_connection(
            {
                Setting.MAX_CONCURRENT_STREAMS: limits.streams_max,
                Setting.INITIAL_WINDOW_SIZE: limits.stream_window_bytes,
                Setting.MAX_FRAME_SIZE: limits.frame_bytes_max,
            }
        )
        self._connection.set_local_window_size(limits.connection_window_bytes)
        self._flush()

    def get_buffer(self, _sizehint: int) -> bytearray:
        return self._buffer

    def buffer_updated(self, count: int) -> None:
        self.last_read_s = self._shared.clock.now_s()
        self.heard = True
        connection = self._connection
        try:
            connection.receive_data(self._view[:count])
        except ngh2.NGH2Error as error:
            _log.info("closing a connection: %s", error)
            self._flush()
            self.close()
            return
        handlers = self._on
        for event in connection.events():
            handle = handlers.get(type(event))
            if handle is not None:
                handle(event)
        self._flush()

    def eof_received(self) -> bool:
        return False  # close: a peer that can't hear us any more has no use for replies

    def connection_lost(self, _exc: Exception | None) -> None:
        self._shared.connections.discard(self)
        streams, self._streams = self._streams, {}
        for stream in streams.values():
            self._end_session(stream)
        self._shared.stream_ended()

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False
        self._flush()

    # HTTP/2's side

    def _on_request(self, event: h2_events.RequestReceived) -> None:
        path = b""
        for name, value in event.headers:
            if name == b":path":
                path = value
                break
        stream_id = event.stream_id
        new_session = self._shared.new_session
        if path == PROCESS and new_session is not None and not self._shared.closing:
            stream = _Stream(stream_id, new_session(), None)
        elif path in self._shared.unary:
            stream = _Stream(stream_id, None, self._shared.unary[path])
        else:
            closing = path == PROCESS and new_session is not None
            status, text = (UNAVAILABLE, b"shutting down") if closing else (UNIMPLEMENTED, b"unknown method")
            trailers = ((b"grpc-status", b"%d" % status), (b"grpc-message", text))
            self._connection.send_response(stream_id, (*RESPONSE_HEADERS, *trailers), end_stream=True)
            return
        self._streams[stream_id] = stream
        if event.end_stream:
            self._half_closed(stream)

    def _on_data(self, event: h2_events.DataReceived) -> None:
        data = event.data
        stream_id = event.stream_id
        self._held.append((len(data), stream_id))
        stream = self._streams.get(stream_id)
        if stream is None or stream.over:
            return
        if data:
            self._deframe(stream, data)
        if event.end_stream and not stream.over:
            self._half_closed(stream)

    def _on_reset(self, event: h2_events.StreamReset | h2_events.StreamClosed) -> None:
        stream = self._streams.pop(event.stream_id, None)
        if stream is not None:
            self._end_session(stream)
            self._shared.stream_ended()

    def _on_trailers(self, event: h2_events.TrailersReceived) -> None:
        stream = self._streams.get(event.stream_id)
        if stream is not None:
            self._half_closed(stream)

    # gRPC's side

    def _deframe(self, stream: _Stream, data: bytes) -> None:
        """gRPC messages out of DATA: a flag byte, four bytes of length, the message (gRPC over HTTP/2, Length-Prefixed-Message)."""
        limits = self._shared.session_limits
        if stream.parts:
            stream.parts.append(data)
            stream.parts_bytes += len(data)
            limits.buffered_bytes += len(data)
            if stream.parts_bytes < stream.wanted_bytes:
                return
            data = b"".join(stream.parts)
            self._drop_parts(stream)
        at, size = 0, len(data)
        while size - at >= 5 and not stream.over:
            length = int.from_bytes(data[at + 1 : at + 5], "big")
            if data[at]:
                self._fail(stream, UNIMPLEMENTED, b"compressed messages are not supported")
                return
            if length > self._limits.message_bytes_max:
                self._too_large(stream, length)
                return
            end = at + 5 + length
            if end > size:
                break
            self._message(stream, data[at + 5 : end])
            at = end
        if at < size and not stream.over:
            rest = data[at:] if at else data
            stream.parts = [rest]
            stream.parts_bytes = len(rest)
            limits.buffered_bytes += len(rest)
            stream.wanted_bytes = 5 + int.from_bytes(rest[1:5], "big") if len(rest) >= 5 else 5

    def _message(self, stream: _Stream, message: bytes) -> None:
        session = stream.session
        if session is None:
            self._unary(stream, message)
            return
        try:
            event = codec.decode(message)
        except codec.MalformedMessageError:
            self._fail(stream, INTERNAL, b"not a ProcessingRequest")
            return
        replies = session.receive(event)
        if replies:
            self._reply(stream, replies)

    def _unary(self, stream: _Stream, message: bytes) -> None:
        assert stream.unary is not None
        try:
            answer = stream.unary(message)
        except ValueError:
            self._fail(stream, INVALID_ARGUMENT, b"malformed request")
            return
        stream.over = True
        self._connection.send_response(stream.id, RESPONSE_HEADERS)
        self._connection.send_data(stream.id, b"\0" + len(answer).to_bytes(4, "big") + answer)
        self._connection.send_trailers(stream.id, GRPC_OK)

    def _half_closed(self, stream: _Stream) -> None:
        if stream.over:
            return
        if stream.session is None:
            self._fail(stream, INVALID_ARGUMENT, b"no request message")
            return
        self._reply(stream, stream.session.half_closed())
        self._send(stream)
        self._finish(stream, GRPC_OK)

    def _reply(self, stream: _Stream, replies: list[Reply]) -> None:
        if not stream.replies:
            self._dirty.append(stream)
        stream.replies += replies

    def _send(self, stream: _Stream) -> None:
        replies, stream.replies = stream.replies, []
        if stream.over:
            return
        if not stream.headers_sent:
            stream.headers_sent = True
            self._connection.send_response(stream.id, RESPONSE_HEADERS)
        if replies:
            self._connection.send_data(stream.id, codec.frame(replies))
        if stream.session is not None and stream.session.answered:
            self._finish(stream, GRPC_OK)

    def _finish(self, stream: _Stream, trailers: tuple[tuple[bytes, bytes], ...]) -> None:
        if not stream.over:
            stream.over = True
            self._drop_parts(stream)
            self._connection.send_trailers(stream.id, trailers)

    def _fail(self, stream: _Stream, status: int, message: bytes) -> None:
        """End the stream with a gRPC error: only for what is not a valid call at all."""
        trailers = ((b"grpc-status", b"%d" % status), (b"grpc-message", message))
        if stream.headers_sent:
            self._finish(stream, trailers)
        else:
            stream.over = True
            self._drop_parts(stream)
            self._connection.send_response(stream.id, (*RESPONSE_HEADERS, *trailers), end_stream=True)

    def _too_large(self, stream: _Stream, length: int) -> None:
        self._shared.session_limits.hits("message_bytes_max")
        if stream.session is None:
            self._fail(stream, INVALID_ARGUMENT, b"message too large")
            return
        limit = self._limits.message_bytes_max
        self._reply(stream, stream.session.reject(BodyTooLargeError(f"a message of {length} bytes; the limit is {limit}")))

    def _end_session(self, stream: _Stream) -> None:
        stream.over = True
        self._drop_parts(stream)
        if stream.session is not None:
            stream.session.closed()

    def _drop_parts(self, stream: _Stream) -> None:
        if stream.parts:
            self._shared.session_limits.buffered_bytes -= stream.parts_bytes
            stream.parts = []
            stream.parts_bytes = 0

    # out

    def _flush(self) -> None:
        """Everything one read caused, in one write."""
        connection = self._connection
        if self._dirty:
            dirty, self._dirty = self._dirty, []
            for stream in dirty:
                self._send(stream)
        if self._held and not self._paused and connection.queued_body_size() <= self._limits.queued_bytes_max:
            held, self._held = self._held, []
            for count, stream_id in held:
                connection.acknowledge_received_data(count, stream_id)
        transport = self._transport
        assert transport is not None
        data = connection.data_to_send()
        if data:
            transport.write(data)
        if not connection.want_read and not connection.want_write:
            transport.close()

    # lifecycle

    @property
    def open_streams(self) -> int:
        return len(self._streams)

    def check_alive(self, now_s: float) -> None:
        """Close a peer that never spoke, or that no longer answers; called every few seconds."""
        limits = self._limits
        silence_s = now_s - self.last_read_s
        if not self.heard:
            if silence_s > limits.handshake_s:
                self.abort()
        elif silence_s < limits.keepalive_s:
            self._pinged_s = 0.0
        elif not self._pinged_s:
            self._pinged_s = now_s
            self._connection.ping()
            self._flush()
        elif now_s - self._pinged_s > limits.keepalive_s:
            self.abort()

    def announce_shutdown(self) -> None:
        """GOAWAY with the highest stream id: open no more streams, those open go on."""
        try:
            self._connection.send_shutdown_notice()
            self._flush()
        except ngh2.NGH2Error:
            self.abort()

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()
