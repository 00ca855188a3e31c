"""The exact tokens of a prompt, and how they are put on its request."""

from __future__ import annotations

from array import array
from typing import NamedTuple

from epp.parsing.media import mark
from epp.types import TOKEN_IDS, TOKEN_MEDIA, LLMRequest


class Span(NamedTuple):
    """Token ids that stand for a picture, a video or a sound."""

    offset: int
    length: int
    content: bytes
    """The engine's hash of it."""


class Tokens(NamedTuple):
    """uint32 token ids; of several prompts in one request, one after the other."""

    ids: bytes
    media: tuple[Span, ...] = ()


def put(request: LLMRequest, tokens: Tokens) -> None:
    """The estimate gives way: what is counted and what is hashed is of the same tokens from now on."""
    request.attributes[TOKEN_IDS] = tokens.ids
    request.prompt_tokens = len(tokens.ids) // 4
    request.prompt = tokens.ids
    if tokens.media:
        request.attributes[TOKEN_MEDIA] = tokens.media
        marked = array("I", tokens.ids)
        mark(marked, tokens.media)  # every picture is the same ids to the engine: what is hashed must differ
        request.prompt = marked.tobytes()
