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

from epp.arrival import Arrival
from epp.clock import Clock
from epp.director import Director
from epp.errors import (
    BadRequestError,
    BodyTooLargeError,
    BuffersFullError,
    DecisionTimeoutError,
    EppError,
    GatewayError,
    ShuttingDownError,
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
    ResponseHeaders,
    RouteReply,
    StreamedBody,
)
from epp.extproc.request_replies import request_replies, streamed
from epp.extproc.response_phase import HELD_BY_GATEWAY, ResponsePhase
from epp.parsing import routes
from epp.types import LLMRequest

_log = logging.getLogger("epp.session")


class Phase(Enum):
    HEADERS = auto()
    """Nothing seen yet."""
    BODY = auto()
    """Collecting the request body."""
    WAITING = auto()
    """The request is whole and waits for its turn: admission, tokens."""
    ROUTED = auto()
    """The request phase is answered; the response is what comes next."""
    ANSWERED = auto()
    """The client was answered by us: nothing more to say on this stream."""


class Session(ResponsePhase):
    """See the module. `receive` takes one message, `half_closed` the end of the peer's messages, `closed` the end of the stream."""

    __slots__ = (
        "_arrival", "_buffered_bytes", "_chunks", "_clock", "_ended", "_headers", "_last_s", "_late", "_limits",
        "_passing", "_path", "_phase", "_pieces", "_pool", "_request_mode", "_started_s", "_trailers",
    )  # fmt: skip

    def __init__(self, director: Director, limits: Limits, clock: Clock, pool: str = "") -> None:
        """`pool`: the one the stream is for, where there are several and it is known."""
        super().__init__(director)
        self._limits = limits
        self._clock = clock
        self._phase = Phase.HEADERS
        self._request_mode = BodyMode.FULL_DUPLEX_STREAMED
        self._headers: RequestHeaders | None = None
        self._path = ""
        self._chunks: list[bytes] = []
        self._pool = pool
        self._pieces = 0
        """Body messages taken."""
        self._passing = False
        """The decision is made and the rest of the body passes by."""
        self._trailers = False
        """Trailers ended the request's body."""
        self._buffered_bytes = 0
        self._ended = False
        """The peer sends no more, and waits for the answer."""
        self._arrival: Arrival | None = None
        self._late: list[Event] = []
        """What came of a body that passes by while the request waits."""
        self._started_s = 0.0
        self._last_s = 0.0

    def __repr__(self) -> str:
        return f"<Session {self._phase.name} buffered={self._buffered_bytes} exchange={self._exchange is not None}>"

    @property
    def answered(self) -> bool:
        """We answered the client ourselves: the transport may end the stream."""
        return self._phase is Phase.ANSWERED

    @property
    def waiting(self) -> bool:
        """The request waits: what it is answered comes from `resumed`."""
        return self._phase is Phase.WAITING

    def receive(self, event: Event) -> list[Reply]:
        """What to send back for one message, in order; often nothing."""
        handle = self._ON.get(type(event))
        if handle is None or self._phase is Phase.ANSWERED:
            return []
        if self._phase is Phase.WAITING and type(event) is ResponseHeaders:
            self._answered_elsewhere()
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
        if self._phase is Phase.WAITING:
            if self._end_unseen:
                self._ended = True
            else:  # of Envoy: the client left
                self.closed()
            return []
        return self._last_piece() if self._phase is Phase.ROUTED else []

    def _last_piece(self) -> list[Reply]:
        """Of a body that passes by and did not say that it ends."""
        if not (self._passing and self._pieces and self._request_mode is BodyMode.FULL_DUPLEX_STREAMED):
            return []
        self._passing = False
        return [StreamedBody(b"", end_of_stream=True, response=False)]

    def resumed(self) -> list[Reply]:
        """The wait is over, or the next one begins, or a running request gives way: what to send."""
        arrival = self._arrival
        if arrival is None:
            error, exchange = self._evicted, self._exchange
            if error is None or exchange is None:
                return []
            exchange.finish(complete=False, evicted=error)
            return self._answer(error)
        try:
            outcome = self._director.resume(arrival)
            if outcome is arrival:
                return []
            self._arrival = None
            assert isinstance(outcome, Exchange)
            replies = self._routed(outcome)
            late, self._late = self._late, []
            for event in late:
                replies += self.receive(event)
            if self._ended:
                replies += self._last_piece()
        except Exception as error:  # noqa: BLE001 - as in `receive`
            self._arrival = None
            return self._failed(error)
        return replies

    def reject(self, error: EppError) -> list[Reply]:
        """The transport can't take what the peer sends (too large a message): answer the client, if that is still possible."""
        return [] if self._phase is Phase.ANSWERED else self._answer(self._refused(error))

    def expire(self, now_s: float) -> list[Reply]:
        """Called now and then: gives up on a request whose body stopped coming, for nothing but the gateway would, or that waits for a
        picker that stops."""
        if self._phase is Phase.WAITING and self._limits.closing:
            return self._answer(self._refused(ShuttingDownError("the endpoint picker is shutting down")))
        if self._phase is not Phase.BODY or now_s - self._last_s < self._limits.decision_s:
            return []
        self._limits.hits("decision_s")
        error = DecisionTimeoutError(f"no further piece of the request body came for {self._limits.decision_s:g} s")
        return self._answer(self._refused(error))

    def closed(self) -> None:
        """The stream is over, for whatever reason: give back all that is held."""
        self._leave()
        self._drop_body()
        self._phase = Phase.ANSWERED
        self.notify = None
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
        if mode in HELD_BY_GATEWAY:  # the body is not sent before an answer to the headers (rule 4)
            return [ContinueHeaders(response=False, keep_request_mode=self._decline_response_body())]
        return []

    def _decline_response_body(self) -> BodyMode | None:
        """A response held by the gateway until it is whole would hold back the first token: ask not to be shown it."""
        if self._response_mode not in HELD_BY_GATEWAY or (self._headers and self._director.sees_response_bodies(self._headers.headers)):
            return None
        self._declined = True  # a configuration that comes later changes nothing of that
        return self._request_mode

    def _on_request_body(self, event: RequestBody) -> list[Reply]:
        if self._phase is Phase.ROUTED and self._passing:
            self._passing = not event.end_of_stream
            self._pieces += 1
            if self._request_mode is BodyMode.FULL_DUPLEX_STREAMED:
                return streamed(event.body, ends=event.end_of_stream) or [StreamedBody(b"", end_of_stream=False, response=False)]
            return [ContinueBody(response=False)]
        if self._phase is Phase.HEADERS:
            raise self._refused(GatewayError("a request body came without its headers: set the gateway's request_header_mode to SEND"))
        if self._phase is Phase.WAITING and self._passing:
            if event.body or event.end_of_stream:
                self._hold(event.body)
                self._late.append(event)
            return []
        if self._phase is not Phase.BODY:
            return []
        self._last_s = self._clock.now_s()
        if event.body:
            self._hold(event.body)
            self._chunks.append(event.body)
        self._pieces += 1
        mode = self._request_mode
        if event.end_of_stream or mode is BodyMode.BUFFERED:  # buffered before trailers, it does not say that it ends
            return self._route()
        if mode is BodyMode.BUFFERED_PARTIAL:
            return self._route(cut=True)
        return []

    def _hold(self, body: bytes) -> None:
        """Count a piece of the body that is kept for a while."""
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

    def _on_request_trailers(self, event: Event) -> list[Reply]:
        if self._phase is Phase.BODY:
            # Trailers end the body: no piece of it says so (section 2.1), and one that never came is not replied to (rule 14).
            self._trailers = True
            return self._route()
        if self._phase is Phase.WAITING:
            if self._passing:
                self._late.append(event)
            return []
        self._passing = False
        return [ContinueTrailers(response=False)]

    def _route(self, *, cut: bool = False) -> list[Reply]:
        """Decide, or have it wait. `cut`: the body taken is not the whole one."""
        event = self._headers
        assert event is not None
        chunks = self._chunks
        if len(chunks) > 1:
            chunks[:] = [b"".join(chunks)]
        headers = event.headers
        request = LLMRequest(id=headers.get("x-request-id") or str(uuid.uuid4()), path=self._path, headers=headers)
        request.pool = self._pool
        seen = (chunks[0] if chunks else b"") if self._pieces and not cut else None
        if event.end_of_stream and headers.get(":method") == "POST" and self._director.needs_body(self._path, headers):
            seen = b""  # `content-length: 0`: as good as an empty body
        arrived = self._director.arrive(request, seen, event.subset, self._started_s, self._wake)
        if type(arrived) is Arrival:
            self._arrival = arrived
            self._phase = Phase.WAITING
            self.unprompted = True
            return []
        assert isinstance(arrived, Exchange)
        return self._routed(arrived)

    def _wake(self) -> None:
        if self.notify is not None:
            self.notify()

    def _routed(self, exchange: Exchange) -> list[Reply]:
        """The request-phase replies in their order."""
        assert self._headers is not None
        self._exchange = exchange
        self._phase = Phase.ROUTED
        self.unprompted = self._director.evicts
        if self.unprompted:
            exchange.evict = self.evict
        headers, decision, mode, pieces = self._headers.headers, exchange.decision, self._request_mode, self._pieces
        body = self._chunks[0] if self._chunks else b""
        self._drop_body()
        remove = self._director.own_headers(headers)
        if decision.headers and remove:  # those of a client's headers that we set anew are not also removed
            remove = tuple(name for name in remove if name not in decision.headers)
        scores = exchange.scores() if self._director.emit_scores else None
        if self._trailers and mode in HELD_BY_GATEWAY:  # the headers were answered before: only metadata can still say where to
            return [ContinueTrailers(response=False, destination=decision.destination, scores=scores)]
        late = mode is BodyMode.STREAMED or (not pieces and mode is not BodyMode.FULL_DUPLEX_STREAMED)
        return request_replies(
            RouteReply(
                decision.destination,
                request_id="" if headers.get("x-request-id") else exchange.request.id,
                remove=remove,
                set=decision.headers,
                scores=scores,
                keep_request_mode=self._decline_response_body() if late else None,
            ),
            mode,
            body,
            exchange.body,
            pieces,
            trailers=self._trailers,
        )

    def _answered_elsewhere(self) -> None:
        """The gateway answered in our place (a time-out of its own): there is nothing to wait for any more."""
        self._leave()
        self._drop_body()
        self._phase, self._passing = Phase.ROUTED, False

    def _leave(self) -> None:
        """Wait no more."""
        arrival, self._arrival = self._arrival, None
        if arrival is not None:
            self._late = []
            arrival.cancel()

    def _answer(self, error: EppError) -> list[Reply]:
        self._leave()
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
        **ResponsePhase.ON_RESPONSE,
    }
