"""The gRPC server of the request path: an asyncio protocol around libnghttp2 (ngh2), one object per connection.

One read from a socket may hold messages of many streams; their replies go out in one write, which is most of why this is cheap (also
for Envoy). Streams only collect what they have to say; `_flush` says it all. Not here: what is allowed (h2_policy), listening (server),
what a message means (codec, session).

Cost: `bench overhead` measures it with all above it (bench/README.md); a further streamed chunk about 8 µs, all told.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import ngh2
from ngh2 import events as h2_events
from ngh2.config import Configuration, Role
from ngh2.enums import Setting

from epp.errors import BodyTooLargeError
from epp.extproc import codec
from epp.extproc.grpc_frames import (
    INTERNAL,
    INVALID_ARGUMENT,
    OK,
    UNAVAILABLE,
    UNIMPLEMENTED,
    Call,
    Deframer,
    Trailers,
    framed,
    path_and_authority,
)
from epp.extproc.h2_intake import Intake
from epp.extproc.h2_policy import Shared
from epp.extproc.h2_vigil import Verdict, Vigil
from epp.extproc.messages import Reply
from epp.extproc.session import Session

_log = logging.getLogger("epp.h2")

PROCESS = b"/envoy.service.ext_proc.v3.ExternalProcessor/Process"

READ_BYTES = 1 << 18
"""A connection's read buffer."""
RESPONSE_HEADERS = ((b":status", b"200"), (b"content-type", b"application/grpc"))

_OK: Trailers = ((b"grpc-status", b"0"),)


class H2Connection(asyncio.BufferedProtocol):
    """One peer: bytes in, sessions fed, bytes out."""

    def __init__(self, shared: Shared) -> None:
        self._shared = shared
        self._limits = shared.limits
        self._buffer = bytearray(READ_BYTES)
        self._view = memoryview(self._buffer)
        self._streams: dict[int, Call] = {}
        self._dirty: list[Call] = []
        self._intake = Intake(shared.limits)
        self._leaving: set[int] = set()
        """Streams reset in the read being handled."""
        self._transport: asyncio.Transport | None = None
        self._connection = ngh2.Connection(
            Role.SERVER,
            Configuration(
                auto_window_update=False,
                stream_reset_rate_limit=(self._limits.reset_burst, self._limits.resets_per_s),
                max_inbound_header_list_size=self._limits.header_bytes_max,
            ),
        )
        self._paused = False
        self._vigil = Vigil(shared.limits, shared.clock.now_s())
        self._on: dict[type, Callable[[Any], None]] = {
            h2_events.RequestReceived: self._on_request,
            h2_events.DataReceived: self._on_data,
            h2_events.StreamReset: self._on_over,
            h2_events.StreamClosed: self._on_over,
            h2_events.TrailersReceived: self._on_trailers,
        }

    # asyncio's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is one in all but its class
        shared, limits = self._shared, self._limits
        if len(shared.connections) >= limits.connections_max:
            shared.session_limits.hits("connections_max")
            self.abort()
            return
        shared.connections.add(self)
        self._connection.initiate_connection(
            {
                Setting.MAX_CONCURRENT_STREAMS: limits.streams_max,
                Setting.INITIAL_WINDOW_SIZE: limits.stream_window_bytes,
                Setting.MAX_FRAME_SIZE: limits.frame_bytes_max,
            }
        )
        self._connection.set_local_window_size(limits.connection_window_bytes)
        self._flush()

    def get_buffer(self, _sizehint: int) -> memoryview:
        return self._view  # not the bytearray: asyncio's TLS slices it, and a slice of that is a copy

    def buffer_updated(self, count: int) -> None:
        self._vigil.heard(self._shared.clock.now_s())
        connection = self._connection
        try:
            connection.receive_data(self._view[:count])
            events = connection.events()
        except ngh2.NGH2Error as error:
            _log.info("closing a connection: %s", error)
            with contextlib.suppress(ngh2.NGH2Error):  # the GOAWAY that says why, if there is one
                self._write(connection.data_to_send())
            self.close()
            return
        handlers = self._on
        self._leaving = {event.stream_id for event in events if type(event) is h2_events.StreamReset}
        for event in events:
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
            self._release(stream)
        self._shared.stream_ended()

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False
        if not self._closing:
            self._flush()

    # HTTP/2's side

    def _on_request(self, event: h2_events.RequestReceived) -> None:
        path, authority = path_and_authority(event.headers)
        shared = self._shared
        new_session = shared.new_session if path == PROCESS else None
        session = new_session(authority) if new_session is not None and not shared.closing else None
        unary = shared.unary.get(path)
        deframer = Deframer(shared.session_limits, self._limits.message_bytes_max)
        stream = self._streams[event.stream_id] = Call(event.stream_id, deframer, session, unary)
        if session is None and unary is None:
            if new_session is not None:
                self._end(stream, UNAVAILABLE, b"shutting down")
            else:
                self._end(stream, UNIMPLEMENTED, b"unknown method")
        elif event.end_stream:
            self._half_closed(stream)

    def _on_data(self, event: h2_events.DataReceived) -> None:
        data = event.data
        self._intake.held.append((len(data), event.stream_id))
        stream = self._streams.get(event.stream_id)
        if stream is None or stream.ending is not None:
            return
        if data:
            deframer = stream.deframer
            for message in deframer.feed(data):
                self._message(stream, message)
            if deframer.compressed:
                self._end(stream, UNIMPLEMENTED, b"compressed messages are not supported")
            elif deframer.too_large_bytes:
                self._too_large(stream)
        if event.end_stream:
            self._half_closed(stream)

    def _on_over(self, event: h2_events.StreamReset | h2_events.StreamClosed) -> None:
        self._over(event.stream_id)

    def _on_trailers(self, event: h2_events.TrailersReceived) -> None:
        stream = self._streams.get(event.stream_id)
        if stream is not None:
            self._half_closed(stream)

    # gRPC's side

    def _message(self, stream: Call, message: bytes) -> None:
        if stream.ending is not None:
            return
        session = stream.session
        if session is None:
            self._call(stream, message)
            return
        try:
            event = codec.decode(message)
        except codec.MalformedMessageError:
            self._end(stream, INTERNAL, b"not a ProcessingRequest")
            return
        self._say(stream, session.receive(event))
        if session.answered:
            self._end(stream, OK)
        elif session.unprompted and session.notify is None:
            self._park(stream, session)

    def _call(self, stream: Call, message: bytes) -> None:
        assert stream.unary is not None
        try:
            stream.answer = framed(stream.unary(message))
        except ValueError:
            self._end(stream, INVALID_ARGUMENT, b"malformed request")
        else:
            self._end(stream, OK)

    def _half_closed(self, stream: Call) -> None:
        if stream.ending is not None:
            return
        if stream.session is None:
            self._end(stream, INVALID_ARGUMENT, b"no request message")
            return
        if stream.id in self._leaving:
            return  # the client left: what came of its body is no request
        self._say(stream, stream.session.half_closed())
        if stream.session.waiting:  # the answer is still to come (rule 9)
            stream.half_closed = True
            self._park(stream, stream.session)
        else:
            self._end(stream, OK)

    def _park(self, stream: Call, session: Session) -> None:
        """The session goes on when it says so, and not from within whatever made it."""
        session.notify = partial(_soon, self._resume, stream, session)

    def _resume(self, stream: Call, session: Session) -> None:
        if self._closing or stream.ending is not None or self._streams.get(stream.id) is not stream:
            return
        self._say(stream, session.resumed())
        if session.answered or (stream.half_closed and not session.waiting):
            self._end(stream, OK)
        if not session.unprompted:
            session.notify = None
        self._flush()

    def _too_large(self, stream: Call) -> None:
        self._shared.session_limits.hits("message_bytes_max")
        if stream.session is None:
            self._end(stream, INVALID_ARGUMENT, b"message too large")
            return
        error = BodyTooLargeError(f"a message of {stream.deframer.too_large_bytes} bytes; the limit is {self._limits.message_bytes_max}")
        self._say(stream, stream.session.reject(error))
        self._end(stream, OK)

    def _say(self, stream: Call, replies: list[Reply]) -> None:
        if replies:
            stream.replies += replies
            self._mark(stream)

    def _end(self, stream: Call, status: int, message: bytes = b"") -> None:
        """Our side is done after what is waiting. Any status but OK only for what is not a valid call at all."""
        if stream.ending is None:
            stream.ending = ((b"grpc-status", b"%d" % status), (b"grpc-message", message)) if message else _OK
            stream.deframer.drop()
            self._mark(stream)

    def _mark(self, stream: Call) -> None:
        if not stream.waiting:
            stream.waiting = True
            self._dirty.append(stream)

    def _over(self, stream_id: int) -> None:
        stream = self._streams.pop(stream_id, None)
        if stream is not None:
            self._release(stream)
            self._shared.stream_ended()

    def _release(self, stream: Call) -> None:
        """The call is over, for whatever reason."""
        stream.ending = stream.ending or _OK
        stream.deframer.drop()
        if stream.session is not None:
            stream.session.closed()

    # out

    def _flush(self) -> None:
        """Everything one read caused, in one write."""
        connection = self._connection
        if self._intake.held and not self._paused:
            self._intake.give_back(connection, self._streams)  # before new replies wait: what waits now, the peer left unread
        if self._dirty:
            dirty, self._dirty = self._dirty, []
            for stream in dirty:
                self._send(stream)
        data = connection.data_to_send()
        if self._intake.held and not self._paused:  # what a stream was held back for may be on its way now
            self._intake.give_back(connection, self._streams)
            data += connection.data_to_send()
        self._write(data)
        if self._shared.closing:
            self._shared.stream_ended()
        if not connection.want_read and not connection.want_write:
            self.close()

    def _send(self, stream: Call) -> None:
        stream.waiting = False
        if stream.id not in self._streams:  # reset by the peer in the same read
            return
        connection = self._connection
        replies, stream.replies = stream.replies, []
        try:
            data = codec.frame(replies) if replies else stream.answer
        except Exception:  # noqa: BLE001 - a reply that can't be written costs its own call, not the connection's others
            _log.exception("a reply can't be written")
            data, stream.ending = b"", ((b"grpc-status", b"%d" % INTERNAL),)
        ending = stream.ending
        if ending is not None and not data and not stream.headers_sent:
            connection.send_response(stream.id, (*RESPONSE_HEADERS, *ending), end_stream=True)
        else:
            if not stream.headers_sent:
                stream.headers_sent = True
                connection.send_response(stream.id, RESPONSE_HEADERS)
            if data:
                connection.send_data(stream.id, data)
            if ending is not None:
                connection.send_trailers(stream.id, ending)
        if ending is not None:  # nothing the peer may still say matters
            self._over(stream.id)

    def _write(self, data: bytes) -> None:
        if data and self._transport is not None:
            self._transport.write(data)

    # lifecycle

    @property
    def open_streams(self) -> int:
        """Calls that are not over; while replies of the last ones wait for the peer's window, still one."""
        return len(self._streams) or int(self._queued_bytes() > 0)

    def check_alive(self, now_s: float) -> None:
        """Close a peer that never spoke, no longer answers, or takes no reply; give up calls that stopped. Called every few seconds."""
        if not self._closing:
            self._expire_calls(now_s)
        verdict = self._vigil.look(now_s, reading=self._reading(), closing=self._closing)
        if verdict is Verdict.PING:
            self._connection.ping()
            self._flush()
        elif verdict is not Verdict.ALIVE:
            if verdict is Verdict.STALLED:
                self._shared.session_limits.hits("stall_s")
            self.abort()

    def _expire_calls(self, now_s: float) -> None:
        for stream in list(self._streams.values()):
            if stream.session is not None and stream.ending is None:
                self._say(stream, stream.session.expire(now_s))
                if stream.session.answered:
                    self._end(stream, OK)
        if self._dirty:
            self._flush()

    def _reading(self) -> bool:
        """The peer takes our replies: none waits, or it leaves us window and its socket takes bytes."""
        return not self._paused and (not self._queued_bytes() or self._connection.remote_window_size > 0)

    def _queued_bytes(self) -> int:
        try:
            return self._connection.queued_body_size()
        except ngh2.NGH2Error:  # the connection is ending
            return 0

    def announce_shutdown(self) -> None:
        """GOAWAY with the highest stream id: open no more streams, those open go on."""
        try:
            self._connection.send_shutdown_notice()
            self._flush()
        except ngh2.NGH2Error:
            self.abort()

    @property
    def _closing(self) -> bool:
        """It only waits for the peer to take the last bytes: the HTTP/2 engine may be done with it."""
        return self._transport is None or self._transport.is_closing()

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()


def _soon(resume: Callable[[Call, Session], None], stream: Call, session: Session) -> None:
    asyncio.get_running_loop().call_soon(resume, stream, session)
