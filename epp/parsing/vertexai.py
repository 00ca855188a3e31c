"""Vertex AI's gRPC API: ChatCompletions, RawPredict and StreamRawPredict of `PredictionService`.

Each request and each response message has a google.api.HttpBody in it (1 content_type, 2 data), the request in its field 2. The data is
an OpenAI body or answer, the latter JSON or server-sent events over any number of messages.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from epp.errors import BadRequestError
from epp.parsing.base import NO_KINDS
from epp.parsing.openai import OpenAIParser
from epp.parsing.usage import JsonUsage, SseUsage
from epp.parsing.wire import LENGTH, Frames, fields, unframed
from epp.plugins.base import Plugin, UsageReader
from epp.types import LLMRequest, Usage

_BLANKS = b" \t\r\n"
_openai = OpenAIParser()


class VertexAIParser(Plugin):
    """Messages of Vertex AI's PredictionService with OpenAI bodies in them. The model in a body is not rewritten. No parameters."""

    type: ClassVar[str] = "vertexai-parser"
    suffixes: ClassVar[Mapping[str, str]] = {
        "PredictionService/ChatCompletions": "chat",
        "PredictionService/RawPredict": "raw",
        "PredictionService/StreamRawPredict": "raw",
    }
    told_by: ClassVar[Mapping[str, str]] = NO_KINDS
    body_wanted: ClassVar[bool] = True
    model_required: ClassVar[bool] = False

    def parse(self, request: LLMRequest, body: bytes, kind: str) -> None:
        """A raw prediction may be anything: what is no JSON object is routed by load."""
        http_body = _field(unframed(body), 2)
        if http_body is None:
            raise BadRequestError("the gRPC request has no HttpBody")
        data = bytes(_field(http_body, 2) or b"")
        if kind == "chat":
            _openai.parse(request, data, "chat")
        elif data.lstrip(_BLANKS)[:1] == b"{":
            _openai.parse(request, data, "")

    def with_model(self, body: bytes, model: str) -> bytes | None:  # noqa: ARG002 - the answer's name could not be put back
        return None

    def usage(self, *, event_stream: bool) -> UsageReader | None:  # noqa: ARG002 - what it is, the data tells
        return _Usage()


def _field(message: bytes | memoryview, number: int) -> memoryview | None:
    """The last one of that number, as protobuf has it."""
    found = None
    for at, wire, _, data in fields(message):
        if at == number and wire == LENGTH:
            found = data
    return found


class _Usage:
    __slots__ = ("_frames", "_inner")

    def __init__(self) -> None:
        self._frames = Frames()
        self._inner: JsonUsage | SseUsage | None = None

    def feed(self, chunk: bytes) -> None:
        for message in self._frames.feed(chunk):
            try:
                data = bytes(_field(message, 2) or b"")
            except BadRequestError:
                continue
            if self._inner is None:
                data = data.lstrip(_BLANKS)
                if not data:
                    continue
                self._inner = JsonUsage() if data[:1] == b"{" else SseUsage()
            self._inner.feed(data)

    def finish(self) -> Usage | None:
        return self._inner.finish() if self._inner is not None else None
