"""vLLM's token-in, token-out API: `/inference/v1/generate`.

The prompt is token ids, so its length is exact. Pictures are runs of one and the same id in it; their hashes come beside it
(`features`), and are put in place of the ids for hashing, or any two pictures would look alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar

import msgspec

from epp.errors import BadRequestError
from epp.parsing.base import ABSENT, Body, JsonParser, lenient, set_common, set_output_tokens, set_tokens, token_ids, understood
from epp.parsing.conversation import LARGE_BYTES, refuse_crowded
from epp.parsing.media import mark
from epp.types import LLMRequest

_NO_TOKENS = "invalid generate request: must have non-empty token_ids field"


class _Generate(Body, gc=False):
    token_ids: msgspec.Raw = ABSENT
    sampling_params: msgspec.Raw = ABSENT
    features: msgspec.Raw = ABSENT


class _Sampling(msgspec.Struct, gc=False):
    max_tokens: int | None = None


class _Span(msgspec.Struct, gc=False):
    offset: int = 0
    length: int = 0


class _Features(msgspec.Struct, gc=False):
    mm_hashes: dict[str, list[str]] = msgspec.field(default_factory=dict)
    mm_placeholders: dict[str, list[_Span]] = msgspec.field(default_factory=dict)


_decode_generate = msgspec.json.Decoder(_Generate).decode
_decode_sampling = msgspec.json.Decoder(_Sampling).decode
_decode_features = msgspec.json.Decoder(_Features).decode


class VllmHttpParser(JsonParser):
    """Bodies of vLLM's /inference/v1/generate: token ids, sampling parameters, multimodal features. It takes no parameters."""

    type: ClassVar[str] = "vllmhttp-parser"
    suffixes: ClassVar[Mapping[str, str]] = {"/inference/v1/generate": "generate"}
    told_by: ClassVar[Mapping[str, str]] = {"token_ids": "generate"}
    model_required: ClassVar[bool] = False

    def parse(self, request: LLMRequest, body: bytes, kind: str) -> None:  # noqa: ARG002 - there is one kind
        parsed = understood(_decode_generate, body)
        set_common(request, parsed)
        tokens = token_ids(parsed.token_ids)
        if not tokens:
            raise BadRequestError(_NO_TOKENS)
        sampling = lenient(_decode_sampling, parsed.sampling_params)
        if sampling is not None:
            set_output_tokens(request, sampling.max_tokens)
        if len(parsed.features) > LARGE_BYTES:
            refuse_crowded(parsed.features)
        features = lenient(_decode_features, parsed.features)
        if features is not None:
            request.media = mark(tokens, _spans(features))
        set_tokens(request, tokens, one_prompt=not request.media)


def _spans(features: _Features) -> Iterator[tuple[int, int, bytes]]:
    for modality, spans in features.mm_placeholders.items():
        hashes = features.mm_hashes.get(modality, ())
        for number, span in enumerate(spans):
            yield span.offset, span.length, hashes[number].encode() if number < len(hashes) else b""
