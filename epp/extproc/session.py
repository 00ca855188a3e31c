"""One ext_proc stream, one HTTP request: events in, replies out. Sans-IO: no await, no sockets, no protobuf.

The request phase: collect headers and body, route at the end of the body, then reply in the one legal order (headers, body, trailers).
The response phase: answer each message at once with the same bytes and the same end of stream; learn from it on the side.
The table `_ON` is the protocol: what to do with each kind of message; a kind that makes no sense in the current phase is ignored
(protocol rule 14), for the peer may be ahead of us.

Invariants (property-tested): every body byte taken is handed back, once, in order, or the client gets an ImmediateResponse; at most
one decision; whatever was charged is released when `closed` is called, which the transport promises to do exactly once.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable
from enum import Enum, auto
from typing import ClassVar

import msgspec

from epp.clock import Clock
from epp.director import Director, Exchange
from epp.errors import BadRequestError, BodyTooLargeError, EppError, SaturatedError
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
)
from epp.parsing import routes
from epp.types import LLMRequest

_log = logging.getLogger("epp.session")

CHUNK_BYTES_MAX = 62_000
"""Body handed back in pieces of at most this: GKE and others limit a message to 64 KiB (rule 12)."""

GRPC_STATUS = {400: 3, 401: 16, 403: 7, 404: 5, 412: 9, 413: 8, 429: 8, 500: 13, 503: 14}
"""HTTP status -> gRPC status, for clients that speak gRPC to the gateway."""


_STREAMED_BACK = (BodyMode.FULL_DUPLEX_STREAMED, None)
"""Modes in which a body must be handed back piece by piece (rule 3)."""


class Limits:
    """What all sessions together may hold. `body_bytes_max` per request, `buffered_bytes_max` over all of them."""

    __slots__ = ("body_bytes_max", "buffered_bytes", "buffered_bytes_max", "hits")

    def __init__(self, body_bytes_max: int, buffered_bytes_max: int, hits: Callable[[str], None]) -> None:
        self.body_bytes_max = body_bytes_max
        self.buffered_bytes_max = buffered_bytes_max
        self.buffered_bytes = 0
        self.hits = hits
        """Told the name of a limit when it is hit."""


class Phase(Enum):
    HEADERS = auto()
    """Nothing seen yet."""
    BODY = auto()
    """Collecting the request body."""
    ROUTED = auto()
    """The request phase is answered; the response is what comes next."""
    ANSWERED = auto()
    """The client was answered by us: nothing more to say on this stream."""


class Session:
    """See the module. `receive` takes one message, `half_closed` the end of the peer's messages, `closed` the end of the stream."""

    __slots__ = (
        "_buffered_bytes",
        "_chunks",
        "_clock",
        "_director",
        "_exchange",
        "_headers",
        "_limits",
        "_passing",
        "_phase",
        "_pieces",
        "_request_mode",
        "_response_streamed",
        "_started_s",
    )

    def __init__(self, director: Director, limits: Limits, clock: Clock) -> None:
        self._director = director
        self._limits = limits
        self._clock = clock
        self._phase = Phase.HEADERS
        self._request_mode = BodyMode.FULL_DUPLEX_STREAMED
        self._response_streamed = True
        self._headers: RequestHeaders | None = None
        self._chunks: list[bytes] = []
        self._pieces = 0
        """Body messages taken."""
        self._passing = False
        """The decision is made and the rest of the body passes by (STREAMED)."""
        self._buffered_bytes = 0
        self._exchange: Exchange | None = None
        self._started_s = 0.0

    def __repr__(self) -> str:
        return f"<Session {self._phase.name} buffered={self._buffered_bytes} exchange={self._exchange is not None}>"

    @property
    def answered(self) -> bool:
        """We answered the client ourselves: the transport may end the stream."""
        return self._phase is Phase.ANSWERED

    def receive(self, event: Event) -> list[Reply]:
        """What to send back for one message, in order; often nothing."""
        handle = self._ON.get(type(event))
        if handle is None or self._phase is Phase.ANSWERED:
            return []
        return self._guarded(handle, self, event)

    def half_closed(self) -> list[Reply]:
        """The peer sends no more. Not a cancel: NGINX Gateway Fabric does so after the body and waits for the answer (rule 9)."""
        return self._guarded(self._route) if self._phase is Phase.BODY else []

    def reject(self, error: EppError) -> list[Reply]:
        """The transport can't take what the peer sends (too large a message): answer the client, if that is still possible."""
        return [] if self._phase is Phase.ANSWERED else self._answer(error)

    def closed(self) -> None:
        """The stream is over, for whatever reason: give back all that is held."""
        self._drop_body()
        self._phase = Phase.ANSWERED
        if self._exchange is not None:
            self._exchange.finish(complete=False)
            self._exchange = None

    def _guarded(self, handle: Callable[..., list[Reply]], *args: object) -> list[Reply]:
        """Whatever goes wrong becomes an answer to the client, never a gRPC error (rule 11)."""
        try:
            return handle(*args)
        except EppError as error:
            return self._answer(error)
        except Exception:  # noqa: BLE001 - a bug of ours must reach the client as a 500 with a body
            _log.exception("unexpected error in the request phase")
            return self._answer(EppError("internal error in the endpoint picker"))

    def _on_request_headers(self, event: RequestHeaders) -> list[Reply]:
        if self._phase is not Phase.HEADERS:
            return []
        self._started_s = self._clock.now_s()
        self._headers = event
        self._phase = Phase.BODY
        if event.request_mode is not None:  # Envoy and agentgateway say so; a peer that does not is taken for full duplex
            self._request_mode = event.request_mode
            self._response_streamed = event.response_mode in _STREAMED_BACK
        if event.bad_header:
            raise BadRequestError(f"the value of header {event.bad_header!r} is not valid UTF-8")
        mode = self._request_mode
        if event.end_of_stream or mode is BodyMode.NONE or (mode is BodyMode.STREAMED and not event.body_unasked):
            self._passing = mode is BodyMode.STREAMED and not event.end_of_stream
            return self._route()  # there is no body, or none before the decision: route by load
        if mode in (BodyMode.BUFFERED, BodyMode.BUFFERED_PARTIAL):
            return [ContinueHeaders(response=False)]  # the body is not sent before (rule 4)
        return []

    def _on_request_body(self, event: RequestBody) -> list[Reply]:
        if self._phase is Phase.ROUTED and self._passing:
            self._passing = not event.end_of_stream
            return [ContinueBody(response=False)]
        if self._phase is not Phase.BODY:
            return []
        if event.body:
            self._take(event.body)
        self._pieces += 1
        mode = self._request_mode
        if event.end_of_stream or mode is BodyMode.BUFFERED:  # buffered before trailers, it does not say that it ends
            return self._route()
        if mode is BodyMode.BUFFERED_PARTIAL:
            return self._route(cut=True)
        return []

    def _take(self, body: bytes) -> None:
        limits = self._limits
        size = len(body)
        if self._buffered_bytes + size > limits.body_bytes_max:
            limits.hits("body_bytes_max")
            raise BodyTooLargeError(f"the request body is larger than {limits.body_bytes_max} bytes")
        if limits.buffered_bytes + size > limits.buffered_bytes_max:
            limits.hits("buffered_bytes_max")
            raise SaturatedError("the endpoint picker holds too many request bodies at once; try again")
        self._buffered_bytes += size
        limits.buffered_bytes += size
        self._chunks.append(body)

    def _on_request_trailers(self, _event: Event) -> list[Reply]:
        if self._phase is Phase.BODY:
            # Trailers end the body: no piece of it says so (section 2.1), and one that never came is not replied to (rule 14).
            return [*self._route(trailers=True), ContinueTrailers(response=False)]
        return [ContinueTrailers(response=False)]

    def _on_response_headers(self, event: ResponseHeaders) -> list[Reply]:
        exchange = self._exchange
        if exchange is not None:
            self._learn(
                exchange.response_headers,
                event.status,
                event_stream=event.event_stream,
                served=event.served,
                code_details=event.code_details,
            )
            if event.end_of_stream:
                self._complete()
        return [ContinueHeaders(response=True)]

    def _on_response_body(self, event: ResponseBody) -> list[Reply]:
        exchange = self._exchange
        if exchange is not None:
            if event.body:
                self._learn(exchange.response_chunk, event.body)
            if event.end_of_stream:
                self._complete()
        if self._response_streamed:
            return [StreamedBody(event.body, end_of_stream=event.end_of_stream, response=True)]
        return [ContinueBody(response=True)]

    def _on_response_trailers(self, _event: Event) -> list[Reply]:
        self._complete()
        return [ContinueTrailers(response=True)]

    @staticmethod
    def _learn(see: Callable[..., None], *args: object, **named: object) -> None:
        """What we fail to learn of a response must not keep it from the client."""
        try:
            see(*args, **named)
        except Exception:  # noqa: BLE001 - see above
            _log.exception("unexpected error while reading a response")

    def _complete(self) -> None:
        exchange, self._exchange = self._exchange, None
        if exchange is not None:
            self._learn(exchange.finish, complete=True)

    def _route(self, *, trailers: bool = False, cut: bool = False) -> list[Reply]:
        """Decide, then the request-phase replies in their order. `cut`: the body taken is not the whole one."""
        event = self._headers
        assert event is not None
        chunks = self._chunks
        body = chunks[0] if len(chunks) == 1 else b"".join(chunks)
        headers = event.headers
        request_id = headers.get("x-request-id", "")
        new_id = "" if request_id else str(uuid.uuid4())
        request = LLMRequest(id=request_id or new_id, path=routes.path_of(headers), headers=headers)
        whole = body if self._pieces and not cut else None
        self._exchange = self._director.route(request, whole, event.subset, self._started_s)
        self._phase = Phase.ROUTED
        self._drop_body()
        destination = self._exchange.decision.destination
        mode, pieces = self._request_mode, self._pieces
        if mode is BodyMode.FULL_DUPLEX_STREAMED:
            route = RouteReply(destination, len(body) if body else -1, new_id)
            return [route, *_streamed(body, ends=not trailers)] if pieces else [route]
        if mode is BodyMode.STREAMED or not pieces:
            return [RouteReply(destination, request_id=new_id), *(ContinueBody(response=False) for _ in range(pieces))]
        return [RouteReply(destination, request_id=new_id, in_body=True)]

    def _answer(self, error: EppError) -> list[Reply]:
        """The one place where an error becomes an answer to the client (section 5 of the protocol reference)."""
        self._drop_body()
        self._phase = Phase.ANSWERED
        if self._exchange is not None:
            self._exchange.finish(complete=False)
            self._exchange = None
        body = msgspec.json.encode({"error": {"message": error.message, "type": error.type, "code": error.code}})
        headers = {"content-type": "application/json"}
        if error.dropped_reason:
            headers["x-llm-d-request-dropped-reason"] = error.dropped_reason
        grpc_status = None
        if self._headers is not None and self._headers.headers.get("content-type", "").startswith("application/grpc"):
            grpc_status = GRPC_STATUS.get(error.http_status, 2)
        return [Immediate(error.http_status, body, headers, grpc_status=grpc_status, details=f"epp_{error.code}")]

    def _drop_body(self) -> None:
        if self._buffered_bytes:
            self._limits.buffered_bytes -= self._buffered_bytes
            self._buffered_bytes = 0
            self._chunks = []

    _ON: ClassVar[dict[type[Event], Callable[[Session, Event], list[Reply]]]] = {
        RequestHeaders: _on_request_headers,  # type: ignore[dict-item]  # each takes its own kind of event; the key says which
        RequestBody: _on_request_body,  # type: ignore[dict-item]
        RequestTrailers: _on_request_trailers,
        ResponseHeaders: _on_response_headers,  # type: ignore[dict-item]
        ResponseBody: _on_response_body,  # type: ignore[dict-item]
        ResponseTrailers: _on_response_trailers,
    }


def _streamed(body: bytes, *, ends: bool) -> list[Reply]:
    """`body` in pieces of at most CHUNK_BYTES_MAX; an empty body is one empty piece, for it was received."""
    size = len(body)
    if size <= CHUNK_BYTES_MAX:
        return [StreamedBody(body, end_of_stream=ends, response=False)] if size or ends else []
    view = memoryview(body)
    last = (size - 1) // CHUNK_BYTES_MAX * CHUNK_BYTES_MAX
    return [
        StreamedBody(view[at : at + CHUNK_BYTES_MAX], end_of_stream=ends and at == last, response=False)
        for at in range(0, size, CHUNK_BYTES_MAX)
    ]
