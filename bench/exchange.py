"""One ext_proc stream as the load generator drives it: replies in, checked, and what to send next out. No I/O, no HTTP/2.

Checked in every exchange: the destination is in the header and the same in the metadata; the body comes back byte for byte, as streamed
responses of at most 64 KB, and ends; each chunk is echoed once, in order, with its own end; nothing else arrives.
"""

from collections import Counter
from enum import Enum

from google.protobuf.message import DecodeError

from bench import BenchError
from bench.workload import MESSAGE_BODY_BYTES_MAX, Workload
from epp._pb.epp_ext_proc_pb2 import ProcessingResponse

DESTINATION_HEADER = "x-gateway-destination-endpoint"


class Wait(Enum):
    """What a stream waits for."""

    DESTINATION = "the reply to the request headers"
    BODY = "the request body"
    RESPONSE_HEADERS = "the reply to the response headers"
    CHUNK = "the echo of a response chunk"
    END = "the end of the stream"


class GrpcMessages:
    """Messages out of the bytes of one direction of one stream."""

    __slots__ = ("_pending",)

    def __init__(self) -> None:
        self._pending = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """The messages which `data` completes."""
        pending = self._pending
        if not pending and len(data) >= 5 and int.from_bytes(data[1:5], "big") == len(data) - 5:
            if data[0]:
                raise BenchError("a compressed message, although no encoding was negotiated")
            return [data[5:]]
        pending += data
        messages: list[bytes] = []
        start = 0
        with memoryview(pending) as view:
            while len(view) - start >= 5:
                if view[start]:
                    raise BenchError("a compressed message, although no encoding was negotiated")
                end = start + 5 + int.from_bytes(view[start + 1 : start + 5], "big")
                if end > len(view):
                    break
                messages.append(bytes(view[start + 5 : end]))
                start = end
        del pending[:start]
        return messages

    @property
    def empty(self) -> bool:
        return not self._pending


def _expect(reply: bytes, kind: str) -> ProcessingResponse:
    try:
        message = ProcessingResponse.FromString(reply)
    except DecodeError as error:
        raise BenchError(f"a reply that is no ProcessingResponse: {error}") from None
    found = message.WhichOneof("response")
    if found == "immediate_response":
        refusal = message.immediate_response
        raise BenchError(f"ImmediateResponse {refusal.status.code} {refusal.details} {refusal.body[:200]!r}")
    if found != kind:
        raise BenchError(f"{found} instead of {kind}")
    return message


class Exchange:
    """One stream's state."""

    __slots__ = ("_body", "_body_checked", "_chunk", "_destinations", "_workload", "messages", "wait")

    def __init__(self, workload: Workload, destinations: Counter[str]) -> None:
        self._workload = workload
        self._destinations = destinations
        self._body = b""
        self._body_checked = 0
        self._chunk = 0
        self.messages = GrpcMessages()
        self.wait = Wait.DESTINATION

    def open(self) -> bytes:
        conversation = self._workload.next_conversation()
        self._body = conversation.body
        return conversation.request

    def advance(self, reply: bytes) -> bytes:
        """Check a reply; what to send because of it, if anything."""
        match self.wait:
            case Wait.CHUNK:
                return self._on_chunk(reply)
            case Wait.BODY:
                return self._on_body(reply)
            case Wait.DESTINATION:
                self._on_destination(reply)
                return b""
            case Wait.RESPONSE_HEADERS:
                _expect(reply, "response_headers")
                self.wait = Wait.CHUNK
                return self._workload.response[0].request
            case Wait.END:
                raise BenchError("a reply after the last one")

    def _on_destination(self, reply: bytes) -> None:
        message = _expect(reply, "request_headers")
        options = message.request_headers.response.header_mutation.set_headers
        in_header = [option.header.raw_value.decode() for option in options if option.header.key == DESTINATION_HEADER]
        lb = message.dynamic_metadata.fields["envoy.lb"].struct_value
        in_metadata = lb.fields[DESTINATION_HEADER].string_value
        if len(in_header) != 1 or not in_header[0] or in_header[0] != in_metadata:
            raise BenchError(f"the destination is {in_header} in the headers and {in_metadata!r} in the metadata")
        self._destinations[in_metadata] += 1
        self.wait = Wait.BODY

    def _on_body(self, reply: bytes) -> bytes:
        message = _expect(reply, "request_body")
        mutation = message.request_body.response.body_mutation
        if mutation.WhichOneof("mutation") != "streamed_response":
            raise BenchError("a body reply that is not a streamed response")
        piece, start = mutation.streamed_response.body, self._body_checked
        self._body_checked += len(piece)
        if len(piece) > MESSAGE_BODY_BYTES_MAX:
            raise BenchError(f"a streamed response of {len(piece)} bytes")
        if not self._body.startswith(piece, start):
            raise BenchError(f"the body came back changed, somewhere in bytes {start} to {self._body_checked} of {len(self._body)}")
        if not mutation.streamed_response.end_of_stream:
            return b""
        if self._body_checked != len(self._body):
            raise BenchError(f"{self._body_checked} bytes of the body came back, of {len(self._body)}")
        self._body = b""
        self.wait = Wait.RESPONSE_HEADERS
        return self._workload.response_headers

    def _on_chunk(self, reply: bytes) -> bytes:
        chunks = self._workload.response
        chunk = chunks[self._chunk]
        if reply != chunk.plain_reply:  # may still say the same, serialised another way
            echo = _expect(reply, "response_body").response_body.response.body_mutation.streamed_response
            if echo.body != chunk.body or echo.end_of_stream != chunk.last:
                raise BenchError(f"the echo of response chunk {self._chunk} is {echo.body[:80]!r}, end {echo.end_of_stream}")
        self._chunk += 1
        if chunk.last:
            self.wait = Wait.END
            return b""
        return chunks[self._chunk].request
