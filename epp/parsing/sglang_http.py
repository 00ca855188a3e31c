"""SGLang's own API: `/generate`, with text or token ids. TGI and Triton serve a path of that end too.

So a body with neither is not refused here: it is routed by load. Pictures, videos and sounds stand in fields of their own, and where in
the prompt the engine puts them is its template's business: for hashing they come before the prompt. Usage is in `meta_info`.
"""

from __future__ import annotations

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
    set_model,
    set_output_tokens,
    set_prompt,
    set_text,
    understood,
)
from epp.parsing.conversation import LARGE_BYTES, refuse_crowded
from epp.parsing.media import AUDIO, IMAGE, VIDEO, Estimator, Media
from epp.parsing.usage import Count, JsonUsage, SseUsage, counts
from epp.plugins.base import UsageReader
from epp.types import LLMRequest, Usage

MEDIA_MAX = 1_000
"""Pictures, videos or sounds of one request that are looked at."""


class _Generate(msgspec.Struct, gc=False):
    model: msgspec.Raw = ABSENT
    text: msgspec.Raw = ABSENT
    input_ids: msgspec.Raw = ABSENT
    image_data: msgspec.Raw = ABSENT
    video_data: msgspec.Raw = ABSENT
    audio_data: msgspec.Raw = ABSENT
    sampling_params: msgspec.Raw = ABSENT
    extra_key: msgspec.Raw = ABSENT
    stream: msgspec.Raw = ABSENT


class _Sampling(msgspec.Struct, gc=False):
    max_new_tokens: int | None = None


class _Url(msgspec.Struct, gc=False):
    url: msgspec.Raw = ABSENT


_decode_generate = msgspec.json.Decoder(_Generate).decode
_decode_sampling = msgspec.json.Decoder(_Sampling).decode
_decode_text = msgspec.json.Decoder(str).decode
_decode_url = msgspec.json.Decoder(_Url).decode


class SglangHttpParser(JsonParser):
    """Bodies of SGLang's /generate: text or token ids, sampling parameters; extra_key separates tenants. It takes no parameters."""

    type: ClassVar[str] = "sglanghttp-parser"
    suffixes: ClassVar[Mapping[str, str]] = {"/generate": "generate"}
    told_by: ClassVar[Mapping[str, str]] = {"input_ids": "generate"}
    model_required: ClassVar[bool] = False

    def parse(self, request: LLMRequest, body: bytes, kind: str) -> None:  # noqa: ARG002 - there is one kind
        parsed = understood(_decode_generate, body)
        set_model(request, lenient(_decode_text, parsed.model) or "")
        request.stream = bytes(parsed.stream) == b"true"
        request.cache_salt = lenient(_decode_text, parsed.extra_key) or ""
        sampling = lenient(_decode_sampling, parsed.sampling_params)
        if sampling is not None:
            set_output_tokens(request, sampling.max_new_tokens)
        set_prompt(request, given(parsed.input_ids) or given(parsed.text))
        media = [item for kind, raw in _fields(parsed) for item in _media(kind, bytes(raw))]
        if media:
            estimator = Estimator(request.headers)
            placeholders = b"".join(map(estimator.placeholder, media))
            set_text(request, placeholders + bytes(request.prompt))
            request.media = estimator.count

    def usage(self, *, event_stream: bool) -> UsageReader | None:
        return _SseUsage() if event_stream else _JsonUsage()


def _fields(parsed: _Generate) -> tuple[tuple[str, msgspec.Raw], ...]:
    fields = (IMAGE, parsed.image_data), (VIDEO, parsed.video_data), (AUDIO, parsed.audio_data)
    for _, raw in fields:
        if len(raw) > LARGE_BYTES:
            refuse_crowded(raw)
    return fields


def _media(kind: str, raw: bytes) -> list[Media]:
    """One, a list of them, or a list of such lists: URL or base64, as a string or as `{"url": ...}`."""
    if raw[:1] == b"[":
        items = [bytes(item) for item in (lenient(decode_items, raw) or ())[:MEDIA_MAX]]
        if items and items[0][:1] == b"[":  # a batch: the first request's stand for it
            items = [bytes(item) for item in (lenient(decode_items, items[0]) or ())[:MEDIA_MAX]]
        return [found for item in items if item[:1] != b"[" for found in _media(kind, item)]
    if raw[:1] == b"{":
        named = lenient(_decode_url, raw)
        raw = bytes(named.url) if named is not None and len(named.url) else raw
    if not raw or raw == b"null":
        return []
    return [Media(kind, raw[1:-1] if raw[:1] == b'"' else raw)]


class _MetaInfo(msgspec.Struct):
    prompt_tokens: Count | None = None
    completion_tokens: Count | None = None
    cached_tokens: Count | None = None


class _Answer(msgspec.Struct):
    meta_info: _MetaInfo | None = None


_decode_answer = msgspec.json.Decoder(_Answer).decode
_META_INFO = b'"meta_info"'


def _usage(text: bytes) -> Usage | None:
    try:
        info = _decode_answer(text).meta_info
    except UNREADABLE:
        return None
    if info is None or (info.prompt_tokens is None and info.completion_tokens is None):
        return None
    return counts(info.prompt_tokens, info.completion_tokens, info.cached_tokens)


class _JsonUsage(JsonUsage):
    __slots__ = ()
    key: ClassVar[bytes] = _META_INFO

    def decoded(self, text: bytes) -> Usage | None:
        return _usage(text)


class _SseUsage(SseUsage):
    __slots__ = ()
    key: ClassVar[bytes] = _META_INFO

    def event(self, text: bytes) -> None:
        self._found = _usage(text) or self._found
