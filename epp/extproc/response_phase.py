"""The response phase of an ext_proc stream: every message is answered at once with the same bytes and the same end of stream.

What is learned from a response is learned on the side, and never at its cost: a bug there is logged. Not here: the request phase
(session), what is learned (exchange). Cost of a streamed chunk: about 1 µs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, ClassVar

from epp.director import Director
from epp.errors import EppError
from epp.exchange import Exchange
from epp.extproc.messages import (
    BodyMode,
    ContinueBody,
    ContinueHeaders,
    ContinueTrailers,
    Event,
    Reply,
    ResponseBody,
    ResponseHeaders,
    ResponseTrailers,
    StreamedBody,
)

_log = logging.getLogger("epp.session")

STREAMED_BACK = (BodyMode.FULL_DUPLEX_STREAMED, None)
"""Modes in which a body must be handed back piece by piece (rule 3)."""
HELD_BY_GATEWAY = (BodyMode.BUFFERED, BodyMode.BUFFERED_PARTIAL)
"""Modes in which the gateway keeps the body until it has it."""


class ResponsePhase:
    """The part of a session that a response is about."""

    __slots__ = ("_declined", "_director", "_end_unseen", "_evicted", "_exchange", "_response_mode", "notify", "unprompted")

    def __init__(self, director: Director) -> None:
        self._director = director
        self.notify: Callable[[], None] | None = None
        """Set by the transport where the session is `unprompted`: called when `resumed` has something to say."""
        self.unprompted = False
        """It may have something to say that no message asks for."""
        self._response_mode: BodyMode | None = BodyMode.FULL_DUPLEX_STREAMED
        self._declined = False
        """The gateway was asked not to show us the response's body."""
        self._end_unseen = False
        """The gateway will not show us the response's end: the stream's is taken for it."""
        self._exchange: Exchange | None = None
        self._evicted: EppError | None = None
        """What the client is to be answered instead of the rest of the response."""

    def evict(self, error: EppError) -> bool:
        """End the running request soon: the gateway answers the client with `error`, or cuts a response it has begun with, and lets the
        engine go. Whether that is possible."""
        if self._exchange is None or self.notify is None:
            return False
        self._evicted = error
        self.notify()
        return True

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
        streamed = self._response_mode in STREAMED_BACK
        if not (streamed or ends) and self._response_mode in HELD_BY_GATEWAY:  # all that is sent of it: the rest passes by
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
            if held and self._response_mode in STREAMED_BACK:
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

    ON_RESPONSE: ClassVar[dict[type[Event], Callable[[Any, Event], list[Reply]]]] = {
        ResponseHeaders: _on_response_headers,  # type: ignore[dict-item]  # each takes its own kind of event; the key says which
        ResponseBody: _on_response_body,  # type: ignore[dict-item]
        ResponseTrailers: _on_response_trailers,
    }
