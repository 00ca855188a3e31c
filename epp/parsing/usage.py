"""Token counts out of a response, chunk by chunk, without holding it.

Server-sent events may be split anywhere over chunks: only an unfinished line that could still become a usage event is kept, up to
`LINE_BYTES_MAX`. A plain JSON answer keeps its last `TAIL_BYTES_MAX` bytes, where engines put `usage`. Cost of a chunk that has no
usage in it: one byte search, about 0.3 µs.
"""

from __future__ import annotations

import json
from typing import Annotated, Protocol

import msgspec

from epp.types import Usage

LINE_BYTES_MAX = 1 << 16
TAIL_BYTES_MAX = 1 << 14

_KEY = b'"usage"'


Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 53)]
"""Anything else is no number of tokens: the whole of `usage` is then left aside."""


class _PromptDetails(msgspec.Struct):
    cached_tokens: Count | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: Count | None = None
    completion_tokens: Count | None = None
    input_tokens: Count | None = None
    output_tokens: Count | None = None
    prompt_tokens_details: _PromptDetails | None = None
    input_tokens_details: _PromptDetails | None = None


class _Answer(msgspec.Struct):
    usage: _Usage | None = None


_decode = msgspec.json.Decoder(_Answer).decode


class UsageReader(Protocol):
    def feed(self, chunk: bytes) -> None: ...

    def finish(self) -> Usage | None:
        """What was found by the end of the response; None if nothing was."""
        ...


class SseUsage:
    """Reads `usage` from the events of a text/event-stream response; the last one wins."""

    __slots__ = ("_found", "_pending")

    def __init__(self) -> None:
        self._pending = b""
        self._found: Usage | None = None

    def feed(self, chunk: bytes) -> None:
        if self._pending:
            chunk = self._pending + chunk
            self._pending = b""
        if chunk[-1:] != b"\n":
            cut = chunk.rfind(b"\n") + 1
            if len(chunk) - cut <= LINE_BYTES_MAX:
                self._pending = chunk[cut:]
            chunk = chunk[:cut]
        if _KEY in chunk:
            self._read(chunk)

    def finish(self) -> Usage | None:
        if _KEY in self._pending:
            self._read(self._pending)
        return self._found

    def _read(self, text: bytes) -> None:
        for line in text.split(b"\n"):
            if line.startswith(b"data:") and _KEY in line:
                usage = _decoded(line[5:])
                if usage is not None:
                    self._found = usage


class JsonUsage:
    """Reads `usage` from the end of a JSON response."""

    __slots__ = ("_cut", "_tail")

    def __init__(self) -> None:
        self._tail = b""
        self._cut = False

    def feed(self, chunk: bytes) -> None:
        tail = self._tail + chunk if self._tail else chunk
        if len(tail) > TAIL_BYTES_MAX:
            tail = tail[-TAIL_BYTES_MAX:]
            self._cut = True
        self._tail = tail

    def finish(self) -> Usage | None:
        if not self._cut:
            return _decoded(self._tail)
        at = self._tail.rfind(_KEY)
        start = self._tail.find(b"{", at) if at >= 0 else -1
        if start < 0:
            return None
        try:
            _, end = json.JSONDecoder().raw_decode(self._tail[start:].decode("utf-8", "replace"))
        except (ValueError, RecursionError):
            return None
        return _decoded(b'{"usage":' + self._tail[start:].decode("utf-8", "replace")[:end].encode() + b"}")


def _decoded(text: bytes) -> Usage | None:
    try:
        usage = _decode(text).usage
    except (msgspec.DecodeError, ValueError, RecursionError):  # ValueError: bad UTF-8, a number beyond any float
        return None
    if usage is None:
        return None
    prompt = usage.prompt_tokens if usage.prompt_tokens is not None else usage.input_tokens
    completion = usage.completion_tokens if usage.completion_tokens is not None else usage.output_tokens
    details = usage.prompt_tokens_details or usage.input_tokens_details
    cached = details.cached_tokens if details else None
    return Usage(-1 if prompt is None else prompt, -1 if completion is None else completion, -1 if cached is None else cached)
