"""Which requests have a prompt to tokenize, and what their bodies say of it.

Told by parser and path, as the parsers do: chat and text completions of the OpenAI API, SGLang's `/generate`, and, for engines that are
asked, Anthropic's messages and OpenAI's responses. Token ids need no tokenizer. Cost before a worker has it: a look at the path; a text
completion's body is scanned once more for whether its prompt is text.
"""

from __future__ import annotations

from typing import Any

import msgspec

from epp.arrival import Arrival
from epp.tokenize.conversation import ChatBody, UnsupportedError

CHAT, TEXT, GENERATE, MESSAGES, RESPONSE = "chat", "text", "generate", "messages", "response"
PROMPTS_MAX = 1_000
"""Texts of one request."""
_KINDS: tuple[tuple[str, str, str], ...] = (
    ("openai-parser", "/chat/completions", CHAT),
    ("openai-parser", "/completions", TEXT),
    ("openai-parser", "/responses", RESPONSE),
    ("anthropic-parser", "/messages", MESSAGES),
    ("sglanghttp-parser", "/generate", GENERATE),
)


class TextBody(msgspec.Struct, gc=False):
    """What of a text completion, or of SGLang's `/generate` (`text`), its prompt is made of."""

    prompt: Any = None
    text: Any = None
    add_special_tokens: bool = True
    truncate_prompt_tokens: int | None = None
    truncation_side: str | None = None

    @property
    def texts(self) -> list[str]:
        """Raises UnsupportedError."""
        given = self.text if self.prompt is None else self.prompt
        texts = given if isinstance(given, list) else [given]
        if not texts or len(texts) > PROMPTS_MAX or not all(isinstance(text, str) for text in texts):
            raise UnsupportedError("a prompt that is no text")
        return texts


class _Shape(msgspec.Struct, gc=False):
    messages: msgspec.Raw = msgspec.Raw(b"")
    prompt: msgspec.Raw = msgspec.Raw(b"")
    text: msgspec.Raw = msgspec.Raw(b"")


decode_chat = msgspec.json.Decoder(ChatBody).decode
decode_text = msgspec.json.Decoder(TextBody).decode
_decode_shape = msgspec.json.Decoder(_Shape).decode
UNREADABLE = (msgspec.DecodeError, ValueError, RecursionError)


def kind_of(arrival: Arrival) -> str:
    """Empty: there is nothing to tokenize."""
    parser, body = arrival.understood[0], arrival.body
    if parser is None or body is None or not arrival.request.prompt:
        return ""
    type_, path = getattr(parser, "type", ""), arrival.request.path
    kind = next((kind for name, suffix, kind in _KINDS if name == type_ and path.endswith(suffix)), "")
    if kind in (TEXT, GENERATE) or (not path and type_ in ("openai-parser", "sglanghttp-parser")):
        return _told(body, kind)
    return kind


def _told(body: bytes, kind: str) -> str:
    """By the body: text, token ids, or messages of a request that came without a path."""
    try:
        shape = _decode_shape(body)
    except UNREADABLE:
        return ""
    if not kind and len(shape.messages):
        return CHAT
    prompt = bytes(shape.text if kind == GENERATE or not len(shape.prompt) else shape.prompt)
    is_text = prompt[:1] == b'"' or (prompt[:1] == b"[" and prompt[1:].lstrip()[:1] == b'"')
    return (kind or TEXT) if is_text else ""
