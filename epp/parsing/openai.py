"""The OpenAI API: chat, completions, embeddings, responses, conversations, images; and vLLM's /render of the first two.

Only the fields routing needs are decoded; the prompt (`messages`, `tools`, `prompt`, `input`) stays the raw JSON the client sent, which
is what gets hashed: a client that continues a conversation sends the earlier messages in the same bytes again, so equal bytes stand
for equal prefixes, at the cost of a scan instead of a decode and for any language or escaping. The body itself is never rebuilt.

Cost: about 36 µs for 128 KB.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar

import msgspec

from epp.parsing.base import (
    ABSENT,
    Body,
    JsonParser,
    decode_items,
    decoded,
    given,
    lenient,
    set_common,
    set_named,
    set_output_tokens,
    set_prompt,
    set_text,
)
from epp.parsing.conversation import LARGE_BYTES, TalkBody, conversation, refuse_crowded, set_conversation
from epp.types import LLMRequest


class _Chat(TalkBody, gc=False):
    tools: msgspec.Raw = ABSENT
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    extra_key: msgspec.Raw = ABSENT


class _Completion(Body, gc=False):
    prompt: msgspec.Raw = ABSENT
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    extra_key: msgspec.Raw = ABSENT


class _Embedding(Body, gc=False):
    input: msgspec.Raw = ABSENT
    messages: msgspec.Raw = ABSENT


class _Response(Body, gc=False):
    input: msgspec.Raw = ABSENT
    instructions: msgspec.Raw = ABSENT
    tools: msgspec.Raw = ABSENT
    max_output_tokens: int | None = None


class _Conversation(Body, gc=False):
    items: msgspec.Raw = ABSENT


class _Shape(msgspec.Struct, gc=False):
    messages: msgspec.Raw = ABSENT
    prompt: msgspec.Raw = ABSENT
    input: msgspec.Raw = ABSENT


_decode_chat = msgspec.json.Decoder(_Chat).decode
_decode_completion = msgspec.json.Decoder(_Completion).decode
_decode_embedding = msgspec.json.Decoder(_Embedding).decode
_decode_response = msgspec.json.Decoder(_Response).decode
_decode_conversation = msgspec.json.Decoder(_Conversation).decode
_decode_shape = msgspec.json.Decoder(_Shape).decode
_decode_text = msgspec.json.Decoder(str).decode

_NO_MESSAGES = "invalid chat completions request: must have valid messages field"


def _chat(request: LLMRequest, body: bytes) -> None:
    parsed = conversation(request, body, _decode_chat, _NO_MESSAGES)
    if parsed is None:
        return
    _set_limits(request, parsed)
    tools = parsed.tools  # they come first, as chat templates put them
    set_conversation(request, given(tools) if len(tools) else b"", parsed.messages)


def _completion(request: LLMRequest, body: bytes) -> None:
    parsed = decoded(_decode_completion, body)
    set_common(request, parsed)
    _set_limits(request, parsed)
    set_prompt(request, bytes(parsed.prompt))


def _embedding(request: LLMRequest, body: bytes) -> None:
    parsed = decoded(_decode_embedding, body)
    set_common(request, parsed)
    if len(parsed.messages) and not len(parsed.input):  # as vLLM takes pictures to embed
        _set_items(request, b"", bytes(parsed.messages), body)
    else:
        set_prompt(request, bytes(parsed.input))


def _response(request: LLMRequest, body: bytes) -> None:
    """`previous_response_id` is not followed: what it stands for is known to the engine alone."""
    parsed = decoded(_decode_response, body)
    set_common(request, parsed)
    set_output_tokens(request, parsed.max_output_tokens)
    before = given(parsed.instructions) + given(parsed.tools)
    content = bytes(parsed.input)
    if content[:1] == b'"':  # as the first item of the list it will be part of in the next turn
        set_text(request, before + b'[{"role":"user","content":' + content + b"}")
    else:
        _set_items(request, before, content, body)


def _conversation(request: LLMRequest, body: bytes) -> None:
    parsed = decoded(_decode_conversation, body)
    set_common(request, parsed)
    _set_items(request, b"", bytes(parsed.items), body)


def _any(request: LLMRequest, body: bytes) -> None:
    """Which it is, the body tells."""
    shape = decoded(_decode_shape, body)
    if len(shape.messages):
        _chat(request, body)
    elif len(shape.input):
        _response(request, body)
    else:
        _completion(request, body)


def _set_items(request: LLMRequest, before: bytes, items: bytes, body: bytes) -> None:
    if len(body) > LARGE_BYTES:
        refuse_crowded(body)
    listed = lenient(decode_items, items)
    if listed:
        set_conversation(request, before, listed)
    elif before:
        set_text(request, before)


def _set_limits(request: LLMRequest, parsed: _Chat | _Completion) -> None:
    tokens = parsed.max_tokens if parsed.max_completion_tokens is None else parsed.max_completion_tokens
    if tokens is not None:
        set_output_tokens(request, tokens)
    if len(parsed.extra_key):  # SGLang's: it adds both to what separates tenants
        key = lenient(_decode_text, parsed.extra_key)
        if key:
            request.cache_salt = f"{request.cache_salt}\0{key}"


_READERS: Mapping[str, Callable[[LLMRequest, bytes], None]] = {
    "chat": _chat,
    "completion": _completion,
    "embedding": _embedding,
    "response": _response,
    "conversation": _conversation,
    "image": _completion,
    "": _any,
}


class OpenAIParser(JsonParser):
    """Bodies of the OpenAI API: chat and text completions, embeddings, responses, conversations, image generations.

    The prompt is tools (or instructions and tools), then the messages or the input, as raw JSON, a quarter of a token a byte; token
    ids count as they are; media as the tokens an engine makes of them. It takes no parameters.
    """

    type: ClassVar[str] = "openai-parser"
    suffixes: ClassVar[Mapping[str, str]] = {
        "/chat/completions": "chat",
        "/chat/completions/render": "chat",
        "/completions": "completion",
        "/completions/render": "completion",
        "/embeddings": "embedding",
        "/responses": "response",
        "/conversations": "conversation",
        "/images/generations": "image",
    }
    told_by: ClassVar[Mapping[str, str]] = {"messages": "chat", "prompt": "completion"}

    def parse(self, request: LLMRequest, body: bytes, kind: str) -> None:
        """A body whose fields have unexpected types is left with its model alone. Kind "" tells the API from the body's shape."""
        try:
            _READERS[kind](request, body)
        except msgspec.ValidationError:
            set_named(request, body)
