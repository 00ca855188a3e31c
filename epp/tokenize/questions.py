"""What is asked of a server that tokenizes, and how its answer is read.

`/render` of a vLLM server takes the request as it is, with the configured model (a sidecar knows no LoRA adapters) and without the tensors
of media; `/tokenize` of vLLM and SGLang takes what of a request its prompt is made of. Prompts stay the raw JSON the client sent.
"""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol

import msgspec

from epp.config.units import duration_s
from epp.plugins.producers.token import EngineConfig, VllmConfig
from epp.tokenize.backend import FAILED, RESTING, UNSUPPORTED, Ask
from epp.tokenize.prompts import CHAT, GENERATE, MESSAGES, RESPONSE, TEXT
from epp.tokenize.tokens import Span, Tokens
from epp.types import TOKEN_BYTES, Endpoint

ENGINES_TRIED_MAX = 16
"""Engines looked at for one that does not rest."""
SPANS_MAX = 10_000
"""Pictures and the like of one prompt."""
MODALITIES = 3
"""Pictures, videos and sounds: those of one do not overlap."""
_RENDER = {
    CHAT: "/v1/chat/completions/render",
    TEXT: "/v1/completions/render",
    MESSAGES: "/v1/messages/render",
    RESPONSE: "/v1/responses/render",
}
_TOKENIZE = "/tokenize"
_TOKENIZED_FIELDS = (
    "messages", "tools", "tool_choice", "add_generation_prompt", "continue_final_message", "add_special_tokens", "reasoning_effort",
)  # fmt: skip
_GENERATED_ONLY = ("chat_template", "truncate_prompt_tokens", "mm_processor_kwargs")
"""Fields that change a prompt, and that `/tokenize` does not take."""

Fields = dict[str, msgspec.Raw]


class Question(NamedTuple):
    """One POST."""

    url: str
    path: str
    body: bytes
    read: Callable[[bytes], Tokens]
    """Raises what decoding raises, ValueError and OverflowError."""


class Questions(Protocol):
    """What to ask about a prompt."""

    def timeout_s(self, ask: Ask) -> float: ...

    def about(self, ask: Ask, rested: Callable[[str], bool]) -> Question | str:
        """Or why there is nothing to ask. Raises what decoding raises. `rested`: whether this URL may be asked now."""
        ...


class _Place(msgspec.Struct, gc=False):
    offset: int
    length: int


class _Features(msgspec.Struct):
    mm_hashes: dict[str, list[str]] = {}
    mm_placeholders: dict[str, list[_Place]] = {}


class _Rendered(msgspec.Struct):
    token_ids: list[int]
    features: _Features | None = None


class _Tokenized(msgspec.Struct):
    tokens: list[int]


_decode_fields = msgspec.json.Decoder(Fields).decode
_decode_rendered = msgspec.json.Decoder(_Rendered | list[_Rendered]).decode
_decode_tokenized = msgspec.json.Decoder(_Tokenized).decode
_decode_template_fields = msgspec.json.Decoder(Fields | None).decode
_decode_prompt = msgspec.json.Decoder(list[msgspec.Raw]).decode


class Render:
    """Of a vLLM server's `/render` paths."""

    def __init__(self, config: VllmConfig, model_name: str) -> None:
        self._url = config.url.rstrip("/")
        self._timeout_s, self._media_timeout_s = duration_s(config.timeout), duration_s(config.mm_timeout)
        self._model = _raw(model_name) if model_name else None
        self._kinds = _RENDER if config.messages_render_mode != "legacy" else {k: v for k, v in _RENDER.items() if k != MESSAGES}

    def timeout_s(self, ask: Ask) -> float:
        return self._media_timeout_s if ask.media else self._timeout_s

    def about(self, ask: Ask, rested: Callable[[str], bool]) -> Question | str:  # noqa: ARG002 - there is one server
        path = self._kinds.get(ask.kind)
        if path is None:
            return UNSUPPORTED
        fields = _decode_fields(ask.body)
        fields.pop("stream_options", None)
        fields["stream"] = _raw(False)
        fields["model"] = self._model or _raw(ask.model)
        if ask.media:
            fields["mm_payload"] = _raw("none")
        return Question(self._url + path, path, msgspec.json.encode(fields), read_rendered)


class Tokenize:
    """Of the engines of the pool a request is for, in turn."""

    def __init__(self, config: EngineConfig, endpoints: Callable[[str], Sequence[Endpoint]]) -> None:
        """`endpoints`: those that are ready in the pool of that name."""
        self._scheme = config.scheme
        self._timeout_s = duration_s(config.timeout)
        self._endpoints = endpoints
        self._turn = itertools.count()

    def timeout_s(self, ask: Ask) -> float:  # noqa: ARG002 - every prompt has the same time
        return self._timeout_s

    def about(self, ask: Ask, rested: Callable[[str], bool]) -> Question | str:
        if ask.media or ask.kind not in (CHAT, TEXT, GENERATE):
            return UNSUPPORTED
        fields = _tokenize_fields(ask)
        if fields is None:
            return UNSUPPORTED
        endpoints = self._endpoints(ask.pool)
        if not endpoints:
            return FAILED
        turn = next(self._turn)
        for step in range(min(len(endpoints), ENGINES_TRIED_MAX)):
            url = f"{self._scheme}://{endpoints[(turn + step) % len(endpoints)].spec.address}{_TOKENIZE}"
            if rested(url):
                return Question(url, _TOKENIZE, msgspec.json.encode(fields), read_tokenized)
        return RESTING


def read_rendered(answer: bytes) -> Tokens:
    """Of a text completion with several prompts there is a list."""
    found = _decode_rendered(answer)
    parts = found if isinstance(found, list) else [found]
    ids = array("I", itertools.chain.from_iterable(part.token_ids for part in parts)).tobytes()
    features = parts[0].features if len(parts) == 1 else None
    spans = tuple(sorted(itertools.islice(_spans(features), SPANS_MAX))) if features is not None else ()
    count = len(ids) // TOKEN_BYTES
    if any(span.offset < 0 or span.length < 0 or span.offset + span.length > count for span in spans):
        raise ValueError("media outside the prompt")
    if sum(span.length for span in spans) > MODALITIES * count:
        raise ValueError("media that overlap")
    return _some(Tokens(ids, spans))


def read_tokenized(answer: bytes) -> Tokens:
    return _some(Tokens(array("I", _decode_tokenized(answer).tokens).tobytes()))


def _some(tokens: Tokens) -> Tokens:
    if not tokens.ids:
        raise ValueError("no tokens")
    return tokens


def _spans(features: _Features) -> Iterator[Span]:
    for modality, places in features.mm_placeholders.items():
        hashes = features.mm_hashes.get(modality, ())
        for number, place in enumerate(places):
            yield Span(place.offset, place.length, hashes[number].encode() if number < len(hashes) else b"")


def _tokenize_fields(ask: Ask) -> Fields | None:
    """None: it can't be asked this way."""
    given = {name: value for name, value in _decode_fields(ask.body).items() if bytes(value) != b"null"}
    if any(name in given for name in _GENERATED_ONLY):
        return None
    if ask.kind != CHAT:
        prompt = bytes(given.get("text" if ask.kind == GENERATE else "prompt", b""))
        if prompt[:1] == b"[":  # vLLM takes one
            alone = _decode_prompt(prompt)
            prompt = bytes(alone[0]) if len(alone) == 1 else b""
        if prompt[:1] != b'"':
            return None
        fields = {"prompt": msgspec.Raw(prompt)} | {k: given[k] for k in ("add_special_tokens",) if k in given}
    else:
        fields = {name: given[name] for name in _TOKENIZED_FIELDS if name in given}
        variables = _template_fields(given)
        if variables:
            fields["chat_template_kwargs"] = _raw(variables)
    if ask.model:
        fields["model"] = _raw(ask.model)
    return fields


def _template_fields(given: Fields) -> Fields:
    """With what a generating request says elsewhere; vLLM's `/tokenize` takes it only here."""
    variables = dict(_decode_template_fields(given.get("chat_template_kwargs", msgspec.Raw(b"null"))) or {})
    if "documents" in given:
        variables["documents"] = given["documents"]
    if "reasoning_effort" in given:
        variables["reasoning_effort"] = given["reasoning_effort"]
        variables.setdefault("enable_thinking", _raw(bytes(given["reasoning_effort"]) != b'"none"'))
    return variables


def _raw(value: object) -> msgspec.Raw:
    return msgspec.Raw(msgspec.json.encode(value))
