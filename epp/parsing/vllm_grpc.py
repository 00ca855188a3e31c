"""vLLM's gRPC API: Generate and Embed of `vllm.grpc.engine.VllmEngine`, as its routers in front call it.

    GenerateRequest   2 tokenized, 3 text, 4 sampling_params {8 max_tokens}, 5 stream, 7 mm_inputs {5 placeholders, 6 hashes}
    EmbedRequest      2 tokenized {2 input_ids}
    GenerateResponse  1 chunk {2 prompt, 3 completion, 4 cached tokens}, 2 complete {3, 4, 5: as many}
    EmbedResponse     2 prompt_tokens

These carry no model's name and no salt. The other methods of the service are routed by load.

Cost: about 0.15 µs a token of the prompt, for packed numbers have to be taken apart one by one.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Iterator, Mapping
from itertools import zip_longest
from typing import ClassVar

from epp.errors import BadRequestError
from epp.parsing.base import NO_KINDS, set_output_tokens, set_text, set_tokens
from epp.parsing.media import mark
from epp.parsing.wire import LENGTH, TOKENS_MAX, VARINT, Frames, fields, numbers, packed, unframed
from epp.plugins.base import GRPC_PROTOCOLS, Plugin, UsageReader
from epp.types import LLMRequest, Usage

_SPAN_BYTES_MAX = 64
_LAST_MESSAGES = 2
"""Messages of a response kept until its end; the last one has the counts."""


class VllmGrpcParser(Plugin):
    """Messages of vLLM's gRPC service: text or token ids, the longest answer, pictures, usage. It takes no parameters."""

    type: ClassVar[str] = "vllmgrpc-parser"
    protocols: ClassVar[frozenset[str]] = GRPC_PROTOCOLS
    suffixes: ClassVar[Mapping[str, str]] = {
        "/vllm.grpc.engine.VllmEngine/Generate": "generate",
        "/vllm.grpc.engine.VllmEngine/Embed": "embed",
    }
    told_by: ClassVar[Mapping[str, str]] = NO_KINDS
    body_wanted: ClassVar[bool] = True
    model_required: ClassVar[bool] = False

    def parse(self, request: LLMRequest, body: bytes, kind: str) -> None:
        found: dict[int, memoryview] = {}
        """Of fields given twice the last one, as protobuf has it."""
        for number, wire, value, data in fields(unframed(body)):
            if wire == LENGTH:
                if number in (2, 3):  # either of them, and the last one counts
                    found.pop(5 - number, None)
                found[number] = data
            elif number == 5 and wire == VARINT:
                request.stream = bool(value)
        if kind == "embed":
            found = {number: data for number, data in found.items() if number == 2}
            request.stream = False
        if 4 in found:
            set_output_tokens(request, numbers(found[4]).get(8))
        if 2 in found:
            tokens, count = _input_ids(found[2])
            if 7 in found:
                request.media = mark(tokens, _spans(found[7]))
            set_tokens(request, tokens)
            request.prompt_tokens = count
        elif 3 in found:
            set_text(request, bytes(found[3]))
        else:
            raise BadRequestError("the gRPC request has no input")

    def with_model(self, body: bytes, model: str) -> bytes | None:  # noqa: ARG002 - the request names none
        return None

    def usage(self, *, event_stream: bool) -> UsageReader | None:  # noqa: ARG002 - there are no event streams in gRPC
        return _Usage()


def _input_ids(tokenized: memoryview) -> tuple[array[int], int]:
    """In field 2, packed or one by one."""
    tokens, count = array("I"), 0
    for number, wire, value, data in fields(tokenized):
        if number != 2:
            continue
        left = TOKENS_MAX - len(tokens)
        more, found = packed(data, left) if wire == LENGTH else (array("I", [value & 0xFFFF_FFFF][:left]), 1)
        tokens.extend(more)
        count += found
    return tokens, count


def _spans(pictures: memoryview) -> Iterator[tuple[int, int, bytes]]:
    places: list[memoryview] = []
    hashes: list[bytes] = []
    for number, wire, _, data in fields(pictures):
        if number == 5 and wire == LENGTH and len(data) <= _SPAN_BYTES_MAX:
            places.append(data)
        elif number == 6 and wire == LENGTH:
            hashes.append(bytes(data))
    for place, hash_ in zip_longest(places, hashes[: len(places)], fillvalue=b""):
        found = numbers(place)
        yield found.get(1, 0), found.get(2, 0), bytes(hash_)


class _Usage:
    """Counts are in every message of a stream; those of the last one are read, when it is over."""

    __slots__ = ("_frames", "_last")

    def __init__(self) -> None:
        self._frames = Frames()
        self._last: deque[bytes] = deque(maxlen=_LAST_MESSAGES)

    def feed(self, chunk: bytes) -> None:
        self._last.extend(self._frames.feed(chunk))

    def finish(self) -> Usage | None:
        for message in reversed(self._last):
            try:
                usage = _counted(message)
            except BadRequestError:
                continue
            if usage is not None:
                return usage
        return None


def _counted(message: bytes) -> Usage | None:
    for number, wire, value, data in fields(message):
        if wire == LENGTH and number in (1, 2):
            counts = {at: count for at, count in numbers(data).items() if count <= 1 << 53}
            first = number + 1
            if counts.get(first) or counts.get(first + 1):
                return Usage(counts.get(first, 0), counts.get(first + 1, 0), counts.get(first + 2, 0))
        elif wire == VARINT and number == 2 and 0 < value <= 1 << 53:
            return Usage(value)
    return None
