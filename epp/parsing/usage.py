"""Token counts out of a response, chunk by chunk, without holding it.

Server-sent events may be split anywhere over chunks: only an unfinished line is kept, up to `LINE_BYTES_MAX`; of a longer one (the whole
answer again, at the end of a stream of the Responses API) its last `TAIL_BYTES_MAX` bytes, where engines put `usage`. As much is kept of
a plain JSON answer. What is found does not depend on where the chunks are cut. Cost of a chunk that has no usage in it: one byte search,
about 0.3 µs.
"""

from __future__ import annotations

import json
from typing import Annotated, ClassVar

import msgspec

from epp.types import Usage

LINE_BYTES_MAX = 1 << 16
TAIL_BYTES_MAX = 1 << 14

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
    response: msgspec.Raw = msgspec.Raw(b"")
    """Where an event of the Responses API (`response.completed`) has it."""


_decode = msgspec.json.Decoder(_Answer).decode


class SseUsage:
    """Reads `usage` from the events of a text/event-stream response; the last one wins."""

    __slots__ = ("_cut", "_data", "_found", "_pending")
    key: ClassVar[bytes] = b'"usage"'
    """What the line of an event that matters has in it."""

    def __init__(self) -> None:
        self._pending = b""
        """An unfinished line; only its end, if it is too long to keep (`_cut`)."""
        self._cut = False
        self._data = False
        """The line that was cut is data."""
        self._found: Usage | None = None

    def feed(self, chunk: bytes) -> None:
        if self._pending:
            chunk = self._pending + chunk
            self._pending = b""
        if chunk[-1:] != b"\n":
            end = chunk.rfind(b"\n") + 1
            rest, chunk = chunk[end:], chunk[:end]
            if chunk:
                self._lines(chunk)
            self._keep(rest)
        elif self.key in chunk:
            self._lines(chunk)
        else:
            self._cut = False

    def finish(self) -> Usage | None:
        if self._pending:
            self._lines(self._pending)
            self._pending = b""
        return self._found

    def event(self, text: bytes) -> None:
        """Take what is of use from an event's data that has `key` in it."""
        self._found = decoded(text) or self._found

    def _keep(self, rest: bytes) -> None:
        if len(rest) > LINE_BYTES_MAX and not self._cut:
            self._cut, self._data = True, rest.startswith(b"data:")
        if self._cut:
            rest = rest[-TAIL_BYTES_MAX:]
        self._pending = rest

    def _lines(self, text: bytes) -> None:
        cut, self._cut = self._cut, False
        if self.key not in text:
            return
        for number, line in enumerate(text.split(b"\n")):
            if number == 0 and cut:
                if self._data:
                    self._end(line)
            elif line.startswith(b"data:"):
                if len(line) > LINE_BYTES_MAX:
                    self._end(line)
                elif self.key in line:
                    self.event(line[5:])

    def _end(self, line: bytes) -> None:
        found = last_object(line[-TAIL_BYTES_MAX:], self.key)
        if found:
            self.event(found)


class JsonUsage:
    """Reads `usage` from the end of a JSON response."""

    __slots__ = ("_cut", "_tail")
    key: ClassVar[bytes] = b'"usage"'

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
        text = last_object(self._tail, self.key) if self._cut else self._tail
        return self.decoded(text) if text else None

    def decoded(self, text: bytes) -> Usage | None:
        return decoded(text)


def last_object(tail: bytes, key: bytes) -> bytes:
    """`{key: its value}` for the last such object in the end of a JSON text; empty if there is none."""
    at = tail.rfind(key)
    start = tail.find(b"{", at) if at >= 0 else -1
    if start < 0:
        return b""
    text = tail[start:].decode("utf-8", "replace")
    try:
        _, end = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError):
        return b""
    return b"{" + key + b":" + text[:end].encode() + b"}"


def decoded(text: bytes) -> Usage | None:
    """The usage of an OpenAI-style answer or event."""
    try:
        answer = _decode(text)
        usage = answer.usage
        if usage is None and len(answer.response):
            usage = _decode(answer.response).usage
    except (msgspec.DecodeError, ValueError, RecursionError):  # ValueError: bad UTF-8, a number beyond any float
        return None
    if usage is None:
        return None
    prompt = usage.prompt_tokens if usage.prompt_tokens is not None else usage.input_tokens
    completion = usage.completion_tokens if usage.completion_tokens is not None else usage.output_tokens
    details = usage.prompt_tokens_details or usage.input_tokens_details
    return counts(prompt, completion, details.cached_tokens if details else None)


def counts(prompt: int | None, completion: int | None, cached: int | None) -> Usage:
    return Usage(-1 if prompt is None else prompt, -1 if completion is None else completion, -1 if cached is None else cached)
