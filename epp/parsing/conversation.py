"""A list of messages becomes the bytes that are hashed: the raw JSON of each, joined, with media replaced by what stands for them.

A client that continues a conversation sends the earlier messages in the same bytes again, so the earlier prompt is a prefix of the
later one. Base64 is neither text nor worth hashing as text: a message with a picture, a video, a sound or a file in it is decoded, and
each such part becomes a placeholder of as many bytes as it has tokens (media). Every other message stays as it was sent.

Cost: nothing is decoded where there is no part that could be media. A search through 128 KB costs more than decoding it, so none is made:
a message whose content is a string is known by its first bytes, one without `mark` (a single byte: found at memory speed) can have no
media, and only what is left is looked into. Besides the join of the messages that is 1 µs for prose, 0.3 µs a message for code.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import TypeVar

import msgspec

from epp.errors import BadRequestError
from epp.parsing.base import ABSENT, Body, decode_items, decoded, has_messages, lenient, set_common, set_named
from epp.parsing.media import AUDIO, EMBEDDING, FILE, IMAGE, VIDEO, Estimator, Media
from epp.types import TOKEN_BYTES, LLMRequest

LARGE_BYTES = 1 << 20
ELEMENTS_MAX = 1 << 20
"""Commas in a large body: a list of so many elements is no conversation, but would take a lot of memory."""
MESSAGES_MAX = 10_000
"""Messages looked into for media; what comes after them is hashed as it is."""
PARTS_MAX = 10_000
"""Messages, lists and parts decoded one by one; what comes after them is hashed as it is."""
DEPTH_MAX = 6
"""How deep in a message a part may be: message, content, tool result, its content, part."""


class TalkBody(Body, gc=False):
    """A body whose prompt is a list of messages."""

    messages: list[msgspec.Raw] = msgspec.field(default_factory=list)


Talk = TypeVar("Talk", bound=TalkBody)

_ROLES = (b"user", b"assistant", b"system", b"tool", b"developer")
_PLAIN = tuple(text % role for text in (b'{"role":"%s","content":"', b'{"role": "%s", "content": "') for role in _ROLES)
_is_plain = re.compile(
    rb'\{(?:\s*"(?:role|name|type|id|status|call_id|tool_call_id)"\s*:\s*"[^"\\]*"\s*,)*+\s*"(?:content|output)"\s*:\s*(?:"|null)'
).match
"""A message whose content is a string, however it is spaced and whatever short fields come before."""

_PARTS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "image_url": (IMAGE, ("image_url",)),
    "input_image": (IMAGE, ("image_url", "file_id")),
    "computer_screenshot": (IMAGE, ("image_url", "file_id")),
    "image_generation_call": (IMAGE, ("result",)),
    "image": (IMAGE, ("source", "image")),
    "video_url": (VIDEO, ("video_url",)),
    "video": (VIDEO, ("video",)),
    "audio_url": (AUDIO, ("audio_url",)),
    "input_audio": (AUDIO, ("input_audio",)),
    "file": (FILE, ("file",)),
    "input_file": (FILE, ("file_data", "file_url", "file_id")),
    "document": (FILE, ("source",)),
    "image_embeds": (EMBEDDING, ("image_embeds",)),
    "audio_embeds": (EMBEDDING, ("audio_embeds",)),
}
"""`type` of a part -> what it is, and the fields its content may be in (OpenAI, its Responses API, Anthropic, vLLM)."""
_UNTYPED = tuple(name for name in _PARTS if name.endswith("_url") or name == "input_audio")
"""Parts vLLM knows without a `type`, by their one field."""
_OBJECT, _QUOTE, _NULL = memoryview(b"{"), memoryview(b'"'), memoryview(b"null")
_CONTENTS = ("url", "data", "file_data", "file_url", "file_id", "id")
_NESTED = ("content", "output")
"""Fields of a message or part that hold parts."""
_TEXT = frozenset(
    {b"text", b"input_text", b"output_text", b"refusal", b"thinking", b"redacted_thinking", b"reasoning", b"tool_use", b"function_call"}
)
"""Parts that are known by their first bytes to be no media and to hold none."""
_PART_TYPES = frozenset(name.encode() for name in _PARTS)
_start_of = re.compile(rb'[\[{](?:(?<=\{)\s*"type"\s*:\s*"(\w*)")?').match
"""Of a list or an object; of the latter its type, if that comes first."""


class _Parts(msgspec.Struct, gc=False):
    """A message or part that holds parts, with what else in it is of the prompt."""

    content: list[msgspec.Raw]
    type: msgspec.Raw = ABSENT
    role: msgspec.Raw = ABSENT
    name: msgspec.Raw = ABSENT
    id: msgspec.Raw = ABSENT
    tool_call_id: msgspec.Raw = ABSENT
    tool_use_id: msgspec.Raw = ABSENT
    tool_calls: msgspec.Raw = ABSENT


_BESIDE = tuple((name, f'"{name}":'.encode()) for name in _Parts.__struct_fields__[1:])
_decode_parts = msgspec.json.Decoder(_Parts).decode
_decode_fields = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_decode_text = msgspec.json.Decoder(str).decode


def conversation(request: LLMRequest, body: bytes, decode: Callable[[bytes], Talk], refusal: str) -> Talk | None:
    """A body with messages, its common fields set; None for one left with its model alone, its fields being of unexpected types.

    Raises BadRequestError, with `refusal` where there are no messages.
    """
    if len(body) > LARGE_BYTES:
        refuse_crowded(body)
    try:
        parsed = decoded(decode, body)
    except msgspec.ValidationError:
        set_named(request, body)
        if not has_messages(body):
            raise BadRequestError(refusal) from None
        return None
    set_common(request, parsed)
    if not parsed.messages:
        raise BadRequestError(refusal)
    return parsed


def refuse_crowded(text: bytes) -> None:
    """Raises BadRequestError for JSON of more than `LARGE_BYTES` that would take far more memory decoded as a list than it does now."""
    if bytes(text).count(b",") > ELEMENTS_MAX:
        raise BadRequestError(f"the request body has more than {ELEMENTS_MAX} elements")


def set_conversation(request: LLMRequest, before: bytes, messages: list[msgspec.Raw], mark: bytes = b"_") -> None:
    """Make `before` and `messages` the prompt, and count the media in them. Every message with media has `mark` in it."""
    pieces: list[bytes] = [b","] * (2 * len(messages) or 1)
    pieces[0] = before + b"["
    pieces[1::2] = messages
    # Without its closing bracket the list is a prefix of the next turn's.
    prompt = b"".join(pieces)
    if len(mark) > 1 or prompt.find(mark, len(before)) >= 0:
        suspects = _suspects(prompt, len(before) + 1, messages, mark)
        if suspects:
            reader = _Reader(request.headers)
            for at in suspects:
                pieces[2 * at + 1] = reader.read(messages[at], 0)
            if reader.found:
                prompt = b"".join(pieces)
                request.media = reader.estimator.count
    request.prompt = prompt
    request.prompt_tokens = -(-len(prompt) // TOKEN_BYTES)


def _suspects(prompt: bytes, start: int, messages: list[msgspec.Raw], mark: bytes) -> list[int]:
    """Which of `messages`, as they stand in `prompt`, may have media in them."""
    found: list[int] = []
    for at, message in enumerate(messages if len(messages) <= MESSAGES_MAX else messages[:MESSAGES_MAX]):
        end = start + len(message)
        if not (prompt.startswith(_PLAIN, start) or prompt.find(mark, start, end) < 0 or _is_plain(prompt, start, end)):
            found.append(at)
        start = end + 1
    return found


class _Reader:
    """Puts placeholders into one conversation."""

    __slots__ = ("_left", "estimator", "found")

    def __init__(self, headers: Mapping[str, str]) -> None:
        self.estimator = Estimator(headers)
        self.found = False
        self._left = PARTS_MAX

    def read(self, raw: msgspec.Raw, depth: int) -> bytes:
        """A JSON value with its media replaced; `raw` itself where there are none, or it can't be read."""
        start = _start_of(raw)
        if start is None or start[1] in _TEXT or depth >= DEPTH_MAX or not self._left:
            return raw
        self._left -= 1
        if start[0] == b"[":
            return self._list(lenient(decode_items, raw) or [], depth) or raw
        if start[1] is None or start[1] not in _PART_TYPES:
            parts = lenient(_decode_parts, raw)
            if parts is not None:
                return self._parts(parts, depth) or raw
        return self._object(raw, depth)

    def _list(self, items: list[msgspec.Raw], depth: int) -> bytes | None:
        """None: as it was."""
        read = [self.read(item, depth + 1) for item in items]
        for new, old in zip(read, items, strict=True):
            if new is not old:
                return b"[" + b",".join(read) + b"]"
        return None

    def _parts(self, parts: _Parts, depth: int) -> bytes | None:
        content = self._list(parts.content, depth + 1)
        if content is None:
            return None
        beside = b"".join(key + value + b"," for name, key in _BESIDE if len(value := getattr(parts, name)))
        return b"{" + beside + b'"content":' + content + b"}"

    def _object(self, raw: msgspec.Raw, depth: int) -> bytes:
        fields = lenient(_decode_fields, raw)
        if not fields:
            return raw
        media = _media_of(fields)
        if media is not None:
            self.found = True
            return self.estimator.placeholder(media)
        read = {name: self.read(fields[name], depth + 1) for name in _NESTED if name in fields}
        if all(value is fields[name] for name, value in read.items()):
            return raw
        return b"{" + b",".join(b'"%b":%b' % (name.encode(), read.get(name, value)) for name, value in fields.items()) + b"}"


def _media_of(fields: Mapping[str, msgspec.Raw]) -> Media | None:
    """What the part is, if it is media."""
    type_ = lenient(_decode_text, fields["type"]) if "type" in fields else None
    if type_ is None:
        type_ = next((name for name in _UNTYPED if name in fields), None)
    if type_ is None or type_ not in _PARTS:
        return None
    kind, names = _PARTS[type_]
    for name in names:
        value = memoryview(fields.get(name, ABSENT))
        if value[:1] == _OBJECT:
            inner = lenient(_decode_fields, fields[name]) or {}
            if kind == FILE and lenient(_decode_text, inner.get("type", ABSENT)) in ("text", "content"):
                return None  # a document that is text: it counts as such
            contents = (memoryview(inner.get(key, ABSENT)) for key in _CONTENTS)
            value = next((content for content in contents if content[:1] == _QUOTE), value)
        if len(value) and value != _NULL:
            return Media(kind, value[1:-1] if value[:1] == _QUOTE else value)
    return Media(kind, b"")
