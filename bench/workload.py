"""What the load consists of: chat conversations as the ext_proc messages in which Envoy hands them to the picker.

Everything that can be built before the measurement is: the messages are serialised once, with a mark where the conversation's own
text starts, and a new conversation only writes its serial number there. So every prompt is new from its middle on, its first half
belongs to one of `prefixes` system prompts, and making one costs a copy of its bytes. Not here: sockets, HTTP/2 (extproc_client.py).
"""

import itertools
import json
import random
from collections.abc import Mapping
from dataclasses import dataclass, field

from epp._pb.epp_ext_proc_pb2 import (
    FULL_DUPLEX_STREAMED,
    BodyMutation,
    BodyResponse,
    CommonResponse,
    HeaderMap,
    HeaderValue,
    HttpBody,
    HttpHeaders,
    Metadata,
    ProcessingRequest,
    ProcessingResponse,
    ProtocolConfiguration,
    StreamedBodyResponse,
)

MODEL = "meta-llama/Llama-3.1-8B-Instruct"
MESSAGE_BODY_BYTES_MAX = 64 * 1024
MARK = b"@conversation-00"  # as long as the serial number that replaces it
VOCABULARY = (
    "the of and to in is that it was for on are as with his they at be this from have or by one had not but what all were when we there "
    "can an your which their said if do will each about how up out them then she many some so these would other into has more her two "
    "like him see time could no make than first been its who now people my made over did down only way find use may water long little "
    "very after words called just where most know request server model prompt cache token latency answer question system user context "
    "document section table figure result method function return value error message client stream header body metric policy"
)
WORDS = VOCABULARY.split()
TOKEN_BYTES = 4
"""Of text, about: what every picker without a tokenizer assumes."""
SUBSET_NAMESPACE = "envoy.lb.subset_hint"
SUBSET_KEY = "x-gateway-destination-endpoint-subset"
USAGE: Mapping[str, object] = {
    "prompt_tokens": 241, "total_tokens": 340, "completion_tokens": 99, "prompt_tokens_details": {"cached_tokens": 128},
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Asked:
    """What requests say beside their text, and what the gateway says of them."""

    model: str = MODEL
    max_tokens: int = 256
    usage: Mapping[str, object] = field(default_factory=lambda: USAGE)
    """Told at the end of every answer."""
    subset: tuple[str, ...] = ()
    """The gateway's hint: only these endpoints; none: no hint."""

    @classmethod
    def tokens(cls, prompt: int, output: int, *, model: str = MODEL, subset: tuple[str, ...] = ()) -> "Asked":
        """With the usage that fits them."""
        usage = {"prompt_tokens": prompt, "total_tokens": prompt + output, "completion_tokens": output}
        return cls(model, max(1, output), {**usage, "prompt_tokens_details": {"cached_tokens": prompt // 2}}, subset)

    def metadata(self) -> Metadata | None:
        """With every message of the request phase, as Envoy sends it; pickers differ in which one they read."""
        if not self.subset:
            return None
        metadata = Metadata()
        metadata.filter_metadata[SUBSET_NAMESPACE].update({SUBSET_KEY: list(self.subset)})
        return metadata


PLAIN = Asked()


def framed(message: bytes) -> bytes:
    """A message in gRPC's framing: not compressed, length, bytes."""
    return b"\0" + len(message).to_bytes(4, "big") + message


def _text(rng: random.Random, size: int) -> str:
    """Words in lines of about a hundred characters."""
    lines: list[str] = []
    length = 0
    while length < size:
        line = " ".join(rng.choices(WORDS, k=18))
        lines.append(line)
        length += len(line) + 1
    return "\n".join(lines)[:size]


def _chat_frame(shared: str, *, stream: bool, asked: Asked) -> tuple[str, str, str]:
    """A chat completion before, at and after MARK."""
    request: dict[str, object] = {
        "model": asked.model,
        "messages": [{"role": "system", "content": shared}, {"role": "user", "content": MARK.decode()}],
        "max_tokens": asked.max_tokens,
        "temperature": 0.7,
        "stream": stream,
    }
    if stream:
        request["stream_options"] = {"include_usage": True}
    return json.dumps(request, separators=(",", ":")).partition(MARK.decode())


def _chat_body(size: int, shared: str, own: str, *, stream: bool, asked: Asked) -> bytes:
    """A chat completion of exactly `size` bytes: `shared` as the system prompt, then MARK and as much of `own` as fits."""
    head, mark, tail = _chat_frame(shared, stream=stream, asked=asked)
    room = size - len(head) - len(mark) - len(tail)
    if room < 0:
        raise ValueError(f"a chat body of {size} bytes does not hold its own frame")
    escaped = json.dumps(own)[1:-1][:room]
    escaped = escaped.removesuffix("\\")  # an escape cut in two
    return (head + mark + escaped.ljust(room, ".") + tail).encode()


def _header_map(headers: dict[str, str]) -> HeaderMap:
    return HeaderMap(headers=[HeaderValue(key=key, raw_value=value.encode()) for key, value in headers.items()])


def _request_headers(body_bytes: int, asked: Asked) -> bytes:
    headers = {
        ":authority": "inference.example.com",
        ":path": "/v1/chat/completions",
        ":method": "POST",
        ":scheme": "https",
        "content-type": "application/json",
        "content-length": str(body_bytes),
        "accept": "application/json",
        "accept-encoding": "gzip, deflate, br",
        "user-agent": "OpenAI/Python 1.99.1",
        "authorization": "Bearer sk-0123456789abcdef0123456789abcdef0123456789abcdef",
        "x-stainless-lang": "python",
        "x-stainless-package-version": "1.99.1",
        "x-forwarded-for": "10.244.1.17",
        "x-forwarded-proto": "https",
        "x-request-id": "5b0f5a3c-8f5c-4f6e-9d43-0d5a6b1f7c11",
    }
    config = ProtocolConfiguration(request_body_mode=FULL_DUPLEX_STREAMED, response_body_mode=FULL_DUPLEX_STREAMED)
    message = HttpHeaders(headers=_header_map(headers))
    return ProcessingRequest(request_headers=message, protocol_config=config, metadata_context=asked.metadata()).SerializeToString()


def _body_pieces(body: bytes) -> list[bytes]:
    """The body in messages as large as allowed, the mark whole in one of them, then the empty one that ends an HTTP/1.1 body."""
    mark = body.index(MARK)
    pieces: list[bytes] = []
    start = 0
    while start < len(body):
        end = min(start + MESSAGE_BODY_BYTES_MAX, len(body))
        if start < mark < end < mark + len(MARK):
            end = mark
        pieces.append(body[start:end])
        start = end
    return [*pieces, b""]


@dataclass(frozen=True, slots=True)
class Conversation:
    """One request, ready to send, and the body that has to come back."""

    request: bytes  # all messages of the request phase, framed
    body: bytes


@dataclass(frozen=True, slots=True)
class Chunk:
    """One response body message, framed, and the echo that has to come back (as bytes if serialised the plain way)."""

    request: bytes
    body: bytes
    last: bool
    plain_reply: bytes


@dataclass(frozen=True, slots=True)
class _Template:
    request: tuple[bytes, bytes]  # what is before and after the mark
    body: tuple[bytes, bytes]


def _template(size: int, shared: str, own: str, *, stream: bool, asked: Asked) -> _Template:
    body = _chat_body(size, shared, own, stream=stream, asked=asked)
    messages = [_request_headers(size, asked)]
    pieces = _body_pieces(body)
    for i, piece in enumerate(pieces):
        part = HttpBody(body=piece, end_of_stream=i == len(pieces) - 1)
        messages.append(ProcessingRequest(request_body=part, metadata_context=asked.metadata()).SerializeToString())
    before, _, after = b"".join(map(framed, messages)).partition(MARK)
    body_before, _, body_after = body.partition(MARK)
    return _Template((before, after), (body_before, body_after))


def _chunk(body: bytes, *, last: bool) -> Chunk:
    request = ProcessingRequest(response_body=HttpBody(body=body, end_of_stream=last)).SerializeToString()
    echo = StreamedBodyResponse(body=body, end_of_stream=last)
    reply = ProcessingResponse(response_body=BodyResponse(response=CommonResponse(body_mutation=BodyMutation(streamed_response=echo))))
    return Chunk(framed(request), body, last, reply.SerializeToString())


def _response_bodies(chunks: int, asked: Asked) -> list[bytes]:
    """A JSON answer in one piece, or `chunks` server-sent events as vLLM writes them: a token each, the last with usage and [DONE]."""
    frame: dict[str, object] = {"id": "chatcmpl-bf75a0ccc4e9dc98", "created": 1795227461, "model": asked.model}
    if chunks == 1:
        text = "A short answer to the question that was asked."
        if asked.usage is not USAGE:
            text = " ".join(WORDS[i % len(WORDS)] for i in range(asked.max_tokens))
        message = {"role": "assistant", "content": text}
        choice: dict[str, object] = {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop", "stop_reason": None}
        whole = {**frame, "object": "chat.completion", "choices": [choice], "usage": asked.usage}
        return [json.dumps(whole, separators=(",", ":")).encode()]

    def event(content: dict[str, object]) -> bytes:
        return b"data: " + json.dumps({**frame, "object": "chat.completion.chunk", **content}, separators=(",", ":")).encode() + b"\n\n"

    events = [
        event({"choices": [{"index": 0, "delta": {"content": f" {WORDS[i % len(WORDS)]}"}, "logprobs": None, "finish_reason": None}]})
        for i in range(chunks - 1)
    ]
    return [*events, event({"choices": [], "usage": asked.usage}) + b"data: [DONE]\n\n"]


class Workload:
    """An endless supply of new conversations of one size, and the one answer they all get."""

    def __init__(self, prompt_kb: float, chunks: int, *, prefixes: int = 32, seed: int = 1, asked: Asked = PLAIN) -> None:
        rng = random.Random(f"{seed}/{prompt_kb}/{chunks}")  # another text for each case: none meets a prompt of another
        size, stream = round(prompt_kb * 1024), chunks > 1
        own = _text(rng, size)
        shared_bytes = max(0, size // 2 - 160)
        self.prompt_kb = prompt_kb
        self.chunks = chunks
        self._templates = [_template(size, _text(rng, shared_bytes), own, stream=stream, asked=asked) for _ in range(prefixes)]
        self._serials = itertools.count()
        headers = {":status": "200", "content-type": "text/event-stream; charset=utf-8" if stream else "application/json"}
        headers |= {"date": "Sat, 21 Nov 2026 02:17:40 GMT", "server": "uvicorn"}
        self.response_headers = framed(ProcessingRequest(response_headers=HttpHeaders(headers=_header_map(headers))).SerializeToString())
        self.response = [*(_chunk(body, last=False) for body in _response_bodies(chunks, asked)), _chunk(b"", last=True)]

    @classmethod
    def of_tokens(
        cls, prompt: int, output: int, *, stream: bool = True, prefixes: int = 32, seed: int = 1, asked: Asked = PLAIN
    ) -> "Workload":
        """Prompts of about so many tokens, text alone counted; the answer an event a token, and one with usage, or a JSON document."""
        frame = sum(map(len, _chat_frame("", stream=stream, asked=asked)))
        chunks = max(1, output) + 1 if stream else 1
        return cls((frame + prompt * TOKEN_BYTES) / 1024, chunks, prefixes=prefixes, seed=seed, asked=asked)

    def next_conversation(self) -> Conversation:
        serial = next(self._serials)
        template = self._templates[serial % len(self._templates)]
        mark = b"%016d" % serial
        return Conversation(mark.join(template.request), mark.join(template.body))
