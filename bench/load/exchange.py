"""One exchange with a picker of any make: what it must do to count, and when it decided. No I/O.

`bench overhead` checks every byte of our own picker; here only what every picker must keep is asked for: a destination, in the header or
in the metadata and the same where it is in both; the body back to its end, in pieces or in one, rewritten or not; then each part of the
response. Parts of a stream go one at a time, the next when the last came back; a whole JSON answer goes at once, because some pickers
hold it until its end. Replies may come in any order the protocol allows.
"""

from __future__ import annotations

import time

from google.protobuf.message import DecodeError

from bench import BenchError
from bench.exchange import DESTINATION_HEADER, GrpcMessages, Wait
from bench.workload import Workload
from epp._pb.epp_ext_proc_pb2 import CommonResponse, ProcessingResponse

LB_NAMESPACE = "envoy.lb"


class LoadError(BenchError):
    """An exchange that failed: `kind` is what it is counted under."""

    def __init__(self, kind: str, text: str = "") -> None:
        super().__init__(text or kind)
        self.kind = kind


class PickExchange:
    """Latencies count from `intended_s`, whenever the request really left."""

    __slots__ = (
        "_answered", "_body_back", "_chunk", "_with_response", "_workload", "counted", "decided_s", "destination", "intended_s", "messages", "wait",
    )  # fmt: skip

    def __init__(self, workload: Workload, intended_s: float, *, with_response: bool = True, counted: bool = True) -> None:
        self._workload = workload
        self._with_response = with_response
        self._body_back = False
        self._chunk = 0
        self._answered = 0
        self.counted = counted
        """False during the warm-up."""
        self.intended_s = intended_s
        self.decided_s = 0.0
        self.destination = ""
        self.messages = GrpcMessages()
        self.wait = Wait.DESTINATION

    def open(self) -> bytes:
        return self._workload.next_conversation().request

    def advance(self, reply: bytes) -> bytes:
        """What to send because of a reply, if anything. Raises LoadError."""
        if self.wait is Wait.CHUNK and reply == self._workload.response[self._chunk].plain_reply:
            return self._on_echo(ended=self._workload.response[self._chunk].last)
        message = _parsed(reply)
        kind = message.WhichOneof("response")
        if kind in ("request_headers", "request_body"):
            return self._on_request_reply(message, kind)
        if kind == "response_headers" and self.wait is Wait.RESPONSE_HEADERS:
            self.wait = Wait.CHUNK
            return self._first_chunks()
        if kind == "response_body" and self.wait is Wait.CHUNK:
            mutation = message.response_body.response.body_mutation
            self._answered += 1
            streamed = mutation.WhichOneof("mutation") == "streamed_response"
            every = self._answered >= len(self._workload.response)
            return self._on_echo(ended=mutation.streamed_response.end_of_stream if streamed else every)
        raise LoadError("wrong reply", f"{kind} while waiting for {self.wait.value}")

    def _on_request_reply(self, message: ProcessingResponse, kind: str) -> bytes:
        if self.wait not in (Wait.DESTINATION, Wait.BODY):
            return b""  # the rest of a body that came back without an end
        response: CommonResponse = getattr(message, kind).response
        if not self.destination and (destination := _destination(message, response)):
            self.destination = destination
            self.decided_s = time.monotonic()
            self.wait = Wait.BODY
        if kind == "request_body":
            mutation = response.body_mutation
            streamed = mutation.WhichOneof("mutation") == "streamed_response"
            self._body_back = mutation.streamed_response.end_of_stream or not streamed
        if not self._body_back:
            return b""
        if not self.destination:
            raise LoadError("no destination", "the body came back, and no destination with it or before it")
        if not self._with_response:
            self.wait = Wait.END
            return b""
        self.wait = Wait.RESPONSE_HEADERS
        return self._workload.response_headers

    def _first_chunks(self) -> bytes:
        chunks = self._workload.response
        if self._workload.chunks > 1:
            return chunks[0].request
        self._chunk = len(chunks) - 1
        return b"".join(chunk.request for chunk in chunks)

    def _on_echo(self, *, ended: bool) -> bytes:
        if ended:
            self.wait = Wait.END
            return b""
        if self._workload.chunks == 1 or self._chunk == len(self._workload.response) - 1:
            return b""
        self._chunk += 1
        return self._workload.response[self._chunk].request


def _parsed(reply: bytes) -> ProcessingResponse:
    try:
        message = ProcessingResponse.FromString(reply)
    except DecodeError as error:
        raise LoadError("wrong reply", f"no ProcessingResponse: {error}") from None
    if message.WhichOneof("response") == "immediate_response":
        refusal = message.immediate_response
        text = f"{refusal.details} {refusal.body[:200].decode(errors='replace')}".strip()
        raise LoadError(f"immediate {refusal.status.code}", text)
    return message


def _destination(message: ProcessingResponse, response: CommonResponse) -> str:
    """The first one named; empty if none is."""
    options = response.header_mutation.set_headers
    named = [option.header for option in options if option.header.key == DESTINATION_HEADER]
    metadata = ""
    if LB_NAMESPACE in message.dynamic_metadata.fields:
        lb = message.dynamic_metadata.fields[LB_NAMESPACE].struct_value
        metadata = lb.fields[DESTINATION_HEADER].string_value if DESTINATION_HEADER in lb.fields else ""
    header = (named[0].raw_value or str(named[0].value).encode()).decode(errors="replace") if named else ""
    if header and metadata and header != metadata:
        raise LoadError("wrong reply", f"the destination is {header!r} in the headers and {metadata!r} in the metadata")
    return (metadata or header).partition(",")[0].strip()
