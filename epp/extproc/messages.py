"""What passes between a transport's codec and a session: events in, replies out. Plain data, no protobuf, no bytes of the wire."""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum

from epp.types import NO_HEADERS


class BodyMode(IntEnum):
    """`BodySendMode` of Envoy's ProcessingMode; the numbers are the wire's."""

    NONE = 0
    STREAMED = 1
    BUFFERED = 2
    BUFFERED_PARTIAL = 3
    FULL_DUPLEX_STREAMED = 4
    GRPC = 5


class Event:
    """One ProcessingRequest."""

    __slots__ = ()


class RequestHeaders(Event):
    __slots__ = ("bad_header", "body_unasked", "end_of_stream", "headers", "request_mode", "response_mode", "subset")

    def __init__(self, headers: dict[str, str], *, end_of_stream: bool) -> None:
        self.headers = headers
        """Lower-case keys; a repeated header's values joined with a comma."""
        self.end_of_stream = end_of_stream
        self.request_mode: BodyMode | None = None
        """None: the peer sent no protocol_config (not Envoy)."""
        self.response_mode: BodyMode | None = None
        self.body_unasked = False
        """`send_body_without_waiting_for_header_response`: in STREAMED mode the body comes before an answer to the headers."""
        self.subset: tuple[str, ...] | None = None
        """Endpoints the gateway allows (`ip:port` or `ip`); None: all."""
        self.bad_header = ""
        """Name of a header whose value is not UTF-8."""


class RequestBody(Event):
    __slots__ = ("body", "end_of_stream")

    def __init__(self, body: bytes, end_of_stream: bool) -> None:
        self.body = body
        self.end_of_stream = end_of_stream


class RequestTrailers(Event):
    __slots__ = ()


class ResponseHeaders(Event):
    __slots__ = ("code_details", "end_of_stream", "event_stream", "load", "served", "status")

    def __init__(self, status: int, *, event_stream: bool, served: str, code_details: str, end_of_stream: bool, load: str = "") -> None:
        self.status = status
        self.load = load
        """What the engine says of its load (`endpoint-load-metrics`)."""
        self.event_stream = event_stream
        self.served = served
        """`ip:port` that answered, from the gateway; empty when it does not say or no upstream answered."""
        self.code_details = code_details
        """Envoy's `response.code_details`, where the gateway sends it: tells a local reply from an engine's answer."""
        self.end_of_stream = end_of_stream


class ResponseBody(Event):
    __slots__ = ("body", "end_of_stream")

    def __init__(self, body: bytes, end_of_stream: bool) -> None:
        self.body = body
        self.end_of_stream = end_of_stream


class ResponseTrailers(Event):
    __slots__ = ()


class UnknownMessage(Event):
    """A kind this version does not know: ignored (protocol rule 14)."""

    __slots__ = ()


class Reply:
    """One ProcessingResponse."""

    __slots__ = ()


class RouteReply(Reply):
    """The reply that carries the destination, in the header and in `envoy.lb` metadata (rule 5)."""

    __slots__ = ("body", "content_length", "destination", "in_body", "keep_request_mode", "remove", "request_id", "scores", "set")

    def __init__(
        self,
        destination: str,
        content_length: int = -1,
        request_id: str = "",
        *,
        in_body: bool = False,
        body: bytes | None = None,
        remove: tuple[str, ...] = (),
        keep_request_mode: BodyMode | None = None,
        set: Mapping[str, str] = NO_HEADERS,  # noqa: A002 - as the protocol calls it
        scores: Mapping[str, float] | None = None,
    ) -> None:
        self.destination = destination
        self.set = set
        """Request headers for the engine."""
        self.scores = scores
        """`--emit-endpoint-scores`: destination -> total score."""
        self.keep_request_mode = keep_request_mode
        """As in ContinueHeaders."""
        self.body = body
        """With `in_body`: the body to send on instead of the one received."""
        self.remove = remove
        """Request headers the engine must not see."""
        self.in_body = in_body
        """In the reply to the request body (BUFFERED: the headers had to be answered first, rule 4)."""
        self.content_length = content_length
        """-1: leave the header alone."""
        self.request_id = request_id
        """Set as x-request-id when the client's request had none."""


class ContinueHeaders(Reply):
    """A headers reply without a decision."""

    __slots__ = ("keep_request_mode", "remove", "response", "set")

    def __init__(
        self,
        *,
        response: bool,
        set: dict[str, str] | None = None,  # noqa: A002 - as the protocol calls it
        remove: tuple[str, ...] = (),
        keep_request_mode: BodyMode | None = None,
    ) -> None:
        self.response = response
        self.set = set
        self.remove = remove
        self.keep_request_mode = keep_request_mode
        """Ask (mode_override) not to be sent the response's body, the request's coming as it does."""


class StreamedBody(Reply):
    """A piece of body handed back (FULL_DUPLEX_STREAMED): what is not sent back is lost (rule 3)."""

    __slots__ = ("body", "end_of_stream", "metadata", "response")

    def __init__(
        self, body: bytes | memoryview, *, end_of_stream: bool, response: bool, metadata: Mapping[str, Mapping[str, float]] | None = None
    ) -> None:
        self.body = body
        self.metadata = metadata
        """Namespace -> name -> number, for the gateway's dynamic metadata."""
        self.end_of_stream = end_of_stream
        self.response = response


class ContinueBody(Reply):
    """The answer to a piece of body that is not handed back (STREAMED, BUFFERED, BUFFERED_PARTIAL)."""

    __slots__ = ("body", "metadata", "response")

    def __init__(self, *, response: bool, body: bytes | None = None, metadata: Mapping[str, Mapping[str, float]] | None = None) -> None:
        self.response = response
        self.metadata = metadata
        """As in StreamedBody."""
        self.body = body
        """What goes on in its place; None: the piece stays as it is."""


class ContinueTrailers(Reply):
    """Trailers stay as they are; `destination`: the decision, where only metadata can still carry it."""

    __slots__ = ("destination", "metadata", "response", "scores")

    def __init__(
        self,
        *,
        response: bool,
        destination: str = "",
        scores: Mapping[str, float] | None = None,
        metadata: Mapping[str, Mapping[str, float]] | None = None,
    ) -> None:
        self.response = response
        self.destination = destination
        self.scores = scores
        """As in RouteReply, beside `destination`."""
        self.metadata = metadata
        """As in StreamedBody, in the place of `destination`."""


class Immediate(Reply):
    """Answer the client now, instead of routing (rule 11)."""

    __slots__ = ("body", "details", "grpc_status", "headers", "status")

    def __init__(self, status: int, body: bytes, headers: dict[str, str], *, grpc_status: int | None, details: str) -> None:
        self.status = status
        self.body = body
        self.headers = headers
        self.grpc_status = grpc_status
        self.details = details
