"""What parsers share: JSON bodies of which few fields matter, prompts of any shape, a model that can be spliced.

A parser is a plugin (`requestHandler.parsers`), one file per API. Nothing here raises anything but BadRequestError for what a client
sends. Not here: which parser a request gets (routes), what a conversation with pictures in it is hashed as (conversation).
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping
from itertools import chain
from types import MappingProxyType
from typing import ClassVar, TypeVar

import msgspec

from epp.errors import BadRequestError
from epp.parsing.model_name import CHARS_MAX, checked, with_model
from epp.parsing.usage import JsonUsage, SseUsage
from epp.plugins.base import Plugin, UsageReader
from epp.types import TOKEN_BYTES, TOKEN_IDS, LLMRequest

NO_KINDS: Mapping[str, str] = MappingProxyType({})
ABSENT = msgspec.Raw(b"")
UNREADABLE = (msgspec.DecodeError, ValueError, RecursionError)
"""What decoding a part of a body raises that was valid JSON as a whole: another shape, bad UTF-8, nested too deeply to look into."""
OUTPUT_TOKENS_MAX = 1 << 31
"""A longer answer than this is nobody's wish; asking for one counts as this."""
TOKEN_LISTS_BYTES_MAX = 1 << 22
"""Of several prompts as token ids; longer ones count as text."""

_T = TypeVar("_T")


class JsonParser(Plugin):
    """Base of the parsers of JSON APIs; `epp.plugins.base.Parser` says what the methods mean."""

    suffixes: ClassVar[Mapping[str, str]] = NO_KINDS
    told_by: ClassVar[Mapping[str, str]] = NO_KINDS
    """Top-level key of a body -> its kind, for gateways that send no path."""
    body_wanted: ClassVar[bool] = True
    model_required: ClassVar[bool] = True

    def with_model(self, body: bytes, model: str) -> bytes | None:
        return with_model(body, model)

    def usage(self, *, event_stream: bool) -> UsageReader | None:
        return SseUsage() if event_stream else JsonUsage()


class Body(msgspec.Struct, gc=False):
    """The fields every API has. A model or salt of null is as good as none for the engine's own message about it."""

    model: str = ""
    stream: bool | None = None
    cache_salt: str | None = None


class _Named(msgspec.Struct):
    """What is left to read of a body whose other fields have types we don't know."""

    model: str = ""


class _Messages(msgspec.Struct, gc=False):
    messages: msgspec.Raw = ABSENT


_decode_messages = msgspec.json.Decoder(_Messages).decode
_decode_named = msgspec.json.Decoder(_Named).decode
_decode_tokens = msgspec.json.Decoder(list[int]).decode
_decode_token_lists = msgspec.json.Decoder(list[list[int]]).decode
_decode_one = msgspec.json.Decoder(tuple[msgspec.Raw]).decode
decode_items = msgspec.json.Decoder(list[msgspec.Raw]).decode


def decoded(decode: Callable[[bytes], _T], body: bytes) -> _T:
    """Raises BadRequestError for bad JSON, msgspec.ValidationError for JSON of another shape."""
    try:
        return decode(body)
    except msgspec.ValidationError:
        raise
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BadRequestError(f"the request body is not valid JSON: {error}") from None
    except RecursionError:
        raise BadRequestError("the request body is nested too deeply") from None


def understood(decode: Callable[[bytes], _T], body: bytes) -> _T:
    """Raises BadRequestError for anything but JSON of the right shape."""
    try:
        return decoded(decode, body)
    except msgspec.ValidationError as error:
        raise BadRequestError(f"the request body is not understood: {error}") from None


def set_named(request: LLMRequest, body: bytes) -> None:
    """The model alone, of a body that has a field of an unexpected type: it is routed by load, and the engine says what is wrong."""
    set_model(request, understood(_decode_named, body).model)


def has_messages(body: bytes) -> bool:
    """Whether `messages` is a list with something in it, whatever."""
    messages = bytes(understood(_decode_messages, body).messages)
    return messages[:1] == b"[" and bool(messages[1:-1].strip())


def set_model(request: LLMRequest, model: str) -> None:
    request.model = request.target_model = checked(model)


def set_common(request: LLMRequest, body: Body) -> None:
    model = body.model
    request.model = request.target_model = model if len(model) <= CHARS_MAX else checked(model)
    request.stream = body.stream is True
    if body.cache_salt:
        request.cache_salt = body.cache_salt


def set_output_tokens(request: LLMRequest, tokens: int | None) -> None:
    if tokens is not None and tokens >= 0:
        request.max_output_tokens = min(tokens, OUTPUT_TOKENS_MAX)


def set_text(request: LLMRequest, prompt: bytes) -> None:
    """`prompt` is what is hashed; its length stands for its tokens."""
    request.prompt = prompt
    request.prompt_tokens = -(-len(prompt) // TOKEN_BYTES)


def set_tokens(request: LLMRequest, tokens: array[int], *, one_prompt: bool = True) -> None:
    request.prompt = tokens.tobytes()
    if one_prompt:
        request.attributes[TOKEN_IDS] = request.prompt
    request.prompt_tokens = len(tokens)


def set_prompt(request: LLMRequest, prompt: bytes) -> None:
    """A string, token ids, or a list of either, as raw JSON; anything else is no prompt."""
    first = prompt[:1]
    if first == b'"':
        set_text(request, prompt[1:-1])
    elif first == b"[":
        try:
            set_tokens(request, array("I", _decode_tokens(prompt)))
        except (*UNREADABLE, OverflowError):
            _set_prompts(request, prompt)


def given(raw: msgspec.Raw) -> bytes:
    """A field as raw JSON; nothing if it is null."""
    text = bytes(raw)
    return b"" if text == b"null" else text


def token_ids(raw: bytes) -> array[int] | None:
    """A list of token ids as raw JSON, or None if it isn't one."""
    try:
        return array("I", _decode_tokens(raw))
    except (*UNREADABLE, OverflowError):
        return None


def _set_prompts(request: LLMRequest, prompts: bytes) -> None:
    """Of several prompts in one request, the first one's beginning is what others may share."""
    inner = prompts[1:-1].strip()
    if inner[:1] == b"[" and len(prompts) <= TOKEN_LISTS_BYTES_MAX:
        try:
            set_tokens(request, array("I", chain.from_iterable(_decode_token_lists(prompts))), one_prompt=False)
        except (*UNREADABLE, OverflowError):
            pass
        else:
            return
    alone = inner[:1] == b'"' and lenient(_decode_one, prompts) is not None
    set_text(request, inner[1:-1] if alone else prompts[1:-1])


def lenient(decode: Callable[[bytes], _T], raw: bytes) -> _T | None:
    """A part of a body, or None if it has another shape than we know."""
    try:
        return decode(raw) if raw else None
    except UNREADABLE:
        return None
