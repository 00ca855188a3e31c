"""The Anthropic API: `/v1/messages`, as vLLM, SGLang and gateways serve it, and its `count_tokens`.

What is hashed: tools, system, messages, as raw JSON. Two things that clients change from turn to turn without changing the prompt are
left out of it: the system's billing line, and the `cache_control` marks, which move to the newest message each time.

Cost: as of a chat, and a search through what has parts (0.4 µs a KB).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import ClassVar

import msgspec

from epp.parsing.base import (
    ABSENT,
    UNREADABLE,
    JsonParser,
    decode_items,
    given,
    lenient,
    set_named,
    set_output_tokens,
)
from epp.parsing.conversation import TalkBody, conversation, set_conversation
from epp.parsing.usage import Count, JsonUsage, SseUsage
from epp.plugins.base import UsageReader
from epp.types import LLMRequest, Usage

_BILLING = b"x-anthropic-billing-header"
_CACHE_CONTROL = b'"cache_control"'
_MARKS_MAX = 64
"""`cache_control` marks taken out of one message; the API allows four in all."""
_mark_after = re.compile(rb'\s*"cache_control"\s*:\s*(?:\{[^{}]{0,200}\}|null)').match
_MEDIA_MARK = b'"source"'
_NO_MESSAGES = "invalid messages request: must have at least one message"


class _Messages(TalkBody, gc=False):
    system: msgspec.Raw = ABSENT
    tools: msgspec.Raw = ABSENT
    max_tokens: int | None = None


class _Block(msgspec.Struct, gc=False):
    text: str = ""


_decode_messages = msgspec.json.Decoder(_Messages).decode
_decode_block = msgspec.json.Decoder(_Block).decode


class AnthropicParser(JsonParser):
    """Bodies of the Anthropic API: messages, count_tokens.

    The prompt is tools, system and messages, as raw JSON, a quarter of a token a byte; pictures and documents as the tokens an
    engine makes of them. Counting tokens fills no cache: such a request is routed by load. It takes no parameters.
    """

    type: ClassVar[str] = "anthropic-parser"
    suffixes: ClassVar[Mapping[str, str]] = {"/messages": "messages", "/messages/count_tokens": "count"}

    def parse(self, request: LLMRequest, body: bytes, kind: str) -> None:
        if kind == "count":
            set_named(request, body)
            return
        parsed = conversation(request, body, _decode_messages, _NO_MESSAGES)
        if parsed is None:
            return
        set_output_tokens(request, parsed.max_tokens)
        before = _without_marks(given(parsed.tools)) + _without_marks(_system(given(parsed.system)))
        messages = parsed.messages
        if _CACHE_CONTROL in body:
            messages = [msgspec.Raw(_without_marks(bytes(message))) for message in messages]
        set_conversation(request, before, messages, mark=_MEDIA_MARK)

    def usage(self, *, event_stream: bool) -> UsageReader | None:
        return _SseUsage() if event_stream else _JsonUsage()


def _system(system: bytes) -> bytes:
    """Without the line that is another one in every request."""
    if system[:1] != b"[" or _BILLING not in system:
        return system
    parts = [part for part in lenient(decode_items, system) or () if not _is_billing(part)]
    return b"[" + b",".join(parts) + b"]"


def _is_billing(part: msgspec.Raw) -> bool:
    block = lenient(_decode_block, part)
    return block is not None and block.text.startswith(_BILLING.decode())


def _without_marks(text: bytes) -> bytes:
    """A JSON text without the `cache_control` fields in it."""
    at = text.find(_CACHE_CONTROL)
    if at < 0:
        return text
    parts: list[bytes] = []
    done = 0
    while at >= 0 and len(parts) < _MARKS_MAX:
        found = _mark_after(text, at)
        if found:
            kept = text[done:at].rstrip(b", \t\r\n")
            parts.append(kept)
            done = found.end()
            if kept.endswith(b"{"):
                done = len(text) - len(text[done:].lstrip(b", \t\r\n"))
        at = text.find(_CACHE_CONTROL, at + 1)
    return b"".join((*parts, text[done:]))


class _Counts(msgspec.Struct, omit_defaults=True):
    input_tokens: Count | None = None
    output_tokens: Count | None = None
    cache_read_input_tokens: Count | None = None
    cache_creation_input_tokens: Count | None = None


class _Start(msgspec.Struct):
    usage: _Counts | None = None


class _Event(msgspec.Struct):
    usage: _Counts | None = None
    message: _Start | None = None


_decode_event = msgspec.json.Decoder(_Event).decode


def _counted(text: bytes) -> _Counts | None:
    try:
        event = _decode_event(text)
    except UNREADABLE:
        return None
    return event.usage or (event.message.usage if event.message else None)


def _usage(counts: _Counts | None) -> Usage | None:
    """What was read from a cache or written to one is not in `input_tokens`, but is of the prompt."""
    if counts is None:
        return None
    read, output = counts.cache_read_input_tokens, counts.output_tokens
    prompt = -1 if counts.input_tokens is None else counts.input_tokens + (read or 0) + (counts.cache_creation_input_tokens or 0)
    return Usage(prompt, -1 if output is None else output, -1 if read is None else read)


class _JsonUsage(JsonUsage):
    __slots__ = ()

    def decoded(self, text: bytes) -> Usage | None:
        return _usage(_counted(text))


class _SseUsage(SseUsage):
    """`message_start` has the prompt's counts, each `message_delta` the answer's so far: the last one of each field counts."""

    __slots__ = ("_counts",)

    def __init__(self) -> None:
        super().__init__()
        self._counts = _Counts()

    def event(self, text: bytes) -> None:
        new = _counted(text)
        if new is not None:
            for name in _Counts.__struct_fields__:
                value = getattr(new, name)
                if value is not None:
                    setattr(self._counts, name, value)
            self._found = _usage(self._counts)
