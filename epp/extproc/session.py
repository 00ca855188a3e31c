"""One ext_proc stream, one HTTP request: events in, replies out. Sans-IO: no await, no sockets, no protobuf.

The request phase: collect headers and body, route at the end of the body, then reply in the one legal order (headers, body, trailers).
A body that the decision does not read is not waited for: it passes by.
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

from epp.clock import Clock
from epp.director import Director
from epp.errors import (
    BadRequestError,
    BodyTooLargeError,
    BuffersFullError,
    DecisionTimeoutError,
    EppError,
    GatewayError,
    TooManyHeadersError,
)
from epp.exchange import Exchange
from epp.extproc.answers import immediate
from epp.extproc.limits import Limits
from epp.extproc.messages import (
    BodyMode,
    ContinueBody,
    ContinueHeaders,
    ContinueTrailers,
    Event,
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
_STREAMED_BACK = (BodyMode.FULL_DUPLEX_STREAMED, None)
"""Modes in which a body must be handed back piece by piece (rule 3)."""
_HELD_BY_GATEWAY = (BodyMode.BUFFERED, BodyMode.BUFFERED_PARTIAL)
"""Modes in which the gateway keeps the body until it has it."""


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
        "_buffered_bytes", "_chunks", "_clock", "_declined", "_director", "_end_unseen", "_exchange", "_headers", "_last_s", "_limits",
        "_passing", "_path", "_phase", "_pieces", "_request_mode", "_response_mode", "_started_s",
    )  # fmt: skip

    def __init__(self, director: Director, limits: Limits, clock: Clock) -> None:
        self._director = director
        self._limits = limits
        self._clock = clock
        self._phase = Phase.HEADERS
        self._request_mode = BodyMode.FULL_DUPLEX_STREAMED
        self._response_mode: BodyMode | None = BodyMode.FULL_DUPLEX_STREAMED
        self._headers: RequestHeaders | None = None
        self._path = ""
        self._chunks: list[bytes] = []
        self._pieces = 0
        """Body messages taken."""
        self._passing = False
        """The decision is made and the rest of the body passes by."""
        self._declined = False
        """The gateway was asked not to show us the response's body."""
        self._end_unseen = False
        """The gateway will not show us the response's end: the stream's is taken for it."""
        self._buffered_bytes = 0
        self._exchange: Exchange | None = None
        self._started_s = 0.0
        self._last_s = 0.0

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
        try:
            return handle(self, event)
        except Exception as error:  # noqa: BLE001 - whatever goes wrong becomes an answer to the client, never a gRPC error (rule 11)
            return self._failed(error)

    def half_closed(self) -> list[Reply]:
        """The peer sends no more. Not a cancel: NGINX Gateway Fabric does so after the body and waits for the answer (rule 9)."""
        if self._headers is not None and self._headers.request_mode is None:  # Envoy, which says its modes, does so when the client left
            self._end_unseen = True
        if self._phase is Phase.BODY:
            try:
                return self._route()
            except Exception as error:  # noqa: BLE001 - as in `receive`
                return self._failed(error)
        if self._phase is Phase.ROUTED and self._passing and self._pieces and self._request_mode is BodyMode.FULL_DUPLEX_STREAMED:
            self._passing = False
            return [StreamedBody(b"", end_of_stream=True, response=False)]
        return []

    def reject(self, error: EppError) -> list[Reply]:
        """The transport can't take what the peer sends (too large a message): answer the client, if that is still possible."""
        return [] if self._phase is Phase.ANSWERED else self._answer(self._refused(error))

    def expire(self, now_s: float) -> list[Reply]:
        """Called now and then: gives up on a request whose body stopped coming, for nothing but the gateway would."""
        if self._phase is not Phase.BODY or now_s - self._last_s < self._limits.decision_s:
            return []
        self._limits.hits("decision_s")
        error = DecisionTimeoutError(f"no further piece of the request body came for {self._limits.decision_s:g} s")
        return self._answer(self._refused(error))

    def closed(self) -> None:
        """The stream is over, for whatever reason: give back all that is held."""
        self._drop_body()
        self._phase = Phase.ANSWERED
        if self._exchange is not None:
            self._exchange.finish(complete=self._end_unseen, seen=False)
            self._exchange = None

    def _failed(self, error: Exception) -> list[Reply]:
        """The answer to a request that went wrong; for a bug of ours, a 500 with a body."""
        if isinstance(error, EppError):
            return self._answer(error)
        _log.error("unexpected error in the request phase", exc_info=error)
        return self._answer(self._refused(EppError("internal error in the endpoint picker")))

    def _refused(self, error: EppError) -> EppError:
        """Count what is answered before the director sees the request."""
        self._director.refused(error)
        return error

    def _on_request_headers(self, event: RequestHeaders) -> list[Reply]:
        if self._phase is not Phase.HEADERS:
            return []
        self._started_s = self._last_s = self._clock.now_s()
        self._headers = event
        self._phase = Phase.BODY
        if event.request_mode is not None:  # Envoy and agentgateway say so; a peer that does not is taken for full duplex
            self._request_mode = event.request_mode
            self._response_mode = event.response_mode
        headers = event.headers
        self._path = routes.path_of(headers)
        if event.bad_header:
            raise self._refused(BadRequestError(f"the value of header {event.bad_header!r} is not valid UTF-8"))
        if len(headers) > self._limits.header_count_max:
            self._limits.hits("header_count_max")
            raise self._refused(TooManyHeadersError(f"more than {self._limits.header_count_max} request headers"))
        mode = self._request_mode
        if event.end_of_stream or mode is BodyMode.NONE:
            return self._route()  # there is no body to see
        shown = event.body_unasked and "trailer" not in headers  # Envoy holds announced trailers, and so the body's end, until we answer
        if (mode is BodyMode.STREAMED and not shown) or not self._director.needs_body(self._path, headers):
            self._passing = True
            return self._route()
        if mode in _HELD_BY_GATEWAY:  # the body is not sent before an answer to the headers (rule 4)
            return [ContinueHeaders(response=False, keep_request_mode=self._decline_response_body())]
        return []

    def _decline_response_body(self) -> BodyMode | None:
        """A response held by the gateway until it is whole would hold back the first token: ask not to be shown it."""
        if self._response_mode not in _HELD_BY_GATEWAY or (self._headers and self._director.sees_response_bodies(self._headers.headers)):
            return None
        self._declined = True  # a configuration that comes later changes nothing of that
        return self._request_mode

    def _on_request_body(self, event: RequestBody) -> list[Reply]:
        if self._phase is Phase.ROUTED and self._passing:
            self._passing = not event.end_of_stream
            self._pieces += 1
            if self._request_mode is BodyMode.FULL_DUPLEX_STREAMED:
                return _streamed(event.body, ends=event.end_of_stream) or [StreamedBody(b"", end_of_stream=False, response=False)]
            return [ContinueBody(response=False)]
        if self._phase is Phase.HEADERS:
            raise self._refused(GatewayError("a request body came without its headers: set the gateway's request_header_mode to SEND"))
        if self._phase is not Phase.BODY:
            return []
        self._last_s = self._clock.now_s()
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
            raise self._refused(BodyTooLargeError(f"the request body is larger than {limits.body_bytes_max} bytes"))
        if limits.buffered_bytes + size > limits.buffered_bytes_max:
            limits.hits("buffered_bytes_max")
            raise self._refused(BuffersFullError("the endpoint picker holds too many request bodies at once; try again"))
        self._buffered_bytes += size
        limits.buffered_bytes += size
        self._chunks.append(body)

    def _on_request_trailers(self, _event: Event) -> list[Reply]:
        if self._phase is Phase.BODY:
            # Trailers end the body: no piece of it says so (section 2.1), and one that never came is not replied to (rule 14).
            routed = self._route(trailers=True)
            return routed if self._request_mode in _HELD_BY_GATEWAY else [*routed, ContinueTrailers(response=False)]
        self._passing = False
        return [ContinueTrailers(response=False)]

    def _on_response_headers(self, event: ResponseHeaders) -> list[Reply]:
        exchange = self._exchange
        remove: tuple[str, ...] = ()
        if exchange is not None:
            self._learn(
                exchange.response_headers,
                event.status,
                event_stream=event.event_stream,
                served=event.served,
                code_details=event.code_details,
                load=event.load,
            )
            if exchange.restorer is not None and self._response_mode is not BodyMode.NONE and not event.end_of_stream:
                remove = ("content-length",)  # the client's name for the model may be longer or shorter
            if event.end_of_stream:
                self._complete()
        if self._response_mode is BodyMode.NONE or self._declined:
            self._end_unseen = True
        return [ContinueHeaders(response=True, set=self._added_headers(event.served), remove=remove)]

    def _added_headers(self, served: str) -> dict[str, str] | None:
        try:
            return self._director.response_headers(self._exchange, served)
        except Exception:  # noqa: BLE001 - as in `_learn`
            _log.exception("unexpected error while adding response headers")
            return None

    def _on_response_body(self, event: ResponseBody) -> list[Reply]:
        exchange, body, ends = self._exchange, event.body, event.end_of_stream
        streamed = self._response_mode in _STREAMED_BACK
        if not (streamed or ends) and self._response_mode in _HELD_BY_GATEWAY:  # all that is sent of it: the rest passes by
            ends = self._response_mode is BodyMode.BUFFERED  # before trailers, it does not say that it ends
            self._end_unseen = True
        restored = metadata = None
        if exchange is not None:
            if body:
                self._learn(exchange.response_chunk, body)
            if exchange.restorer is not None:  # where pieces are answered one by one, nothing may be held over to the next
                restored = exchange.restorer.feed(body, last=ends or not streamed)
            if ends:
                self._complete()
                metadata = exchange.report()
        if streamed:
            return [StreamedBody(body if restored is None else restored, end_of_stream=ends, response=True, metadata=metadata)]
        return [ContinueBody(response=True, body=None if restored == body else restored, metadata=metadata)]

    def _on_response_trailers(self, _event: Event) -> list[Reply]:
        exchange = self._exchange
        replies: list[Reply] = []
        if exchange is not None and exchange.restorer is not None:
            held = exchange.restorer.feed(b"", last=True)
            if held and self._response_mode in _STREAMED_BACK:
                replies.append(StreamedBody(held, end_of_stream=False, response=True))
        self._complete()
        return [*replies, ContinueTrailers(response=True, metadata=exchange.report() if exchange is not None else None)]

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
        request = LLMRequest(id=request_id or new_id, path=self._path, headers=headers)
        seen = body if self._pieces and not cut else None
        if event.end_of_stream and headers.get(":method") == "POST" and self._director.needs_body(self._path, headers):
            seen = b""  # `content-length: 0`: as good as an empty body
        exchange = self._exchange = self._director.route(request, seen, event.subset, self._started_s)
        self._phase = Phase.ROUTED
        self._drop_body()
        remove = self._director.own_headers(headers)
        destination = exchange.decision.destination
        mode, pieces, renamed = self._request_mode, self._pieces, exchange.body
        told = exchange.decision.headers
        if told and remove:  # those of a client's headers that we set anew are not also removed
            remove = tuple(name for name in remove if name not in told)
        scores = exchange.scores() if self._director.emit_scores else None
        if trailers and mode in _HELD_BY_GATEWAY:  # the headers were answered before: only metadata can still say where to
            return [ContinueTrailers(response=False, destination=destination, scores=scores)]
        if mode is BodyMode.FULL_DUPLEX_STREAMED:
            body = body if renamed is None else renamed
            route = RouteReply(destination, len(body) if body else -1, new_id, remove=remove, set=told, scores=scores)
            return [route, *_streamed(body, ends=not trailers)] if pieces else [route]
        if mode is BodyMode.STREAMED or not pieces:
            if renamed is not None:
                remove = (*remove, "content-length")
            override = self._decline_response_body()
            route = RouteReply(destination, request_id=new_id, remove=remove, keep_request_mode=override, set=told, scores=scores)
            instead = [None] * pieces if renamed is None else [renamed, *[b""] * (pieces - 1)]
            return [route, *(ContinueBody(response=False, body=piece) for piece in instead)]
        length = -1 if renamed is None else len(renamed)
        return [RouteReply(destination, length, new_id, in_body=True, body=renamed, remove=remove, set=told, scores=scores)]

    def _answer(self, error: EppError) -> list[Reply]:
        self._drop_body()
        self._phase = Phase.ANSWERED
        if self._exchange is not None:
            self._exchange.finish(complete=False)
            self._exchange = None
        headers = self._headers.headers if self._headers is not None else {}
        return [immediate(error, grpc=headers.get("content-type", "").startswith("application/grpc"))]

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
