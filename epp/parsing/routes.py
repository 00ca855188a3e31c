"""Which API a path is, and so which parser reads its body. The longest path suffix wins, over all parsers.

A path no parser is for but that inference engines serve (tokenize, rerank, KServe, ...) is passed through: routed by load, body opaque.
A path no engine serves is a 404 here, unless `--unknown-paths route` says otherwise or a parser for any path is configured. Gateways
that send no path (NGINX Gateway Fabric) have the body tell.

Cost: one look-up for a path seen before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import msgspec

from epp.errors import NotFoundError
from epp.parsing.anthropic import AnthropicParser
from epp.parsing.base import ABSENT, NO_KINDS, understood
from epp.parsing.openai import OpenAIParser
from epp.parsing.sglang_http import SglangHttpParser
from epp.parsing.vertexai import VertexAIParser
from epp.parsing.vllm_grpc import VllmGrpcParser
from epp.parsing.vllm_http import VllmHttpParser
from epp.plugins.base import HTTP_PROTOCOLS, Parser
from epp.types import LLMRequest

ENGINE_SEGMENTS = frozenset({
    "v1", "v2", "v1beta", "api", "inference", "generate", "generate_stream", "tokenize", "detokenize", "classify", "score", "rerank",
    "pooling", "embed", "encode", "invocations", "models", "health", "ready", "live", "ping", "version", "load", "metrics", "info",
    "server_info", "get_model_info", "vllm.grpc.engine.VllmEngine", "sglang.grpc.scheduler.SglangScheduler", "inference.GRPCInferenceService",
    "google.cloud.aiplatform.v1.PredictionService", "google.cloud.aiplatform.v1beta1.PredictionService",
})  # fmt: skip
"""Segments of the paths vLLM, SGLang, Triton, TGI, NIM, llama.cpp and Ollama serve; a gateway may put a prefix before them."""
PATHS_MAX = 1_024
"""Different paths whose parser is remembered."""
PATH_CHARS_MAX = 256
"""A longer path is looked at anew each time."""

Match = tuple[Parser | None, str]


def path_of(headers: Mapping[str, str]) -> str:
    """The path without its query; empty when the gateway sends none (NGINX Gateway Fabric)."""
    path = headers.get(":path") or headers.get("x-original-path") or headers.get("x-forwarded-path") or ""
    return path.partition("?")[0]


class Routes:
    """Parsers by path. Immutable but for what it remembers."""

    def __init__(self, parsers: Sequence[Parser], *, unknown_paths_ok: bool) -> None:
        """Of parsers for the same suffix, or for any path, the first one counts."""
        self.protocols = frozenset[str]().union(*(getattr(parser, "protocols", HTTP_PROTOCOLS) for parser in parsers))
        """`appProtocol`s of pools whose requests can be read."""
        by_suffix: dict[str, Match] = {}
        for parser in parsers:
            for suffix, kind in parser.suffixes.items():
                by_suffix.setdefault(suffix, (parser, kind))
        self._by_suffix = sorted(by_suffix.items(), key=lambda item: -len(item[0]))
        self._any: Parser | None = next((parser for parser in parsers if not parser.suffixes), None)
        told_by: dict[str, Match] = {}
        for parser in parsers:
            for key, kind in getattr(parser, "told_by", NO_KINDS).items():
                told_by.setdefault(key, (parser, kind))
        self._told_by = tuple(told_by.values())
        self._decode_keys = _decoder_of(told_by)
        self._bodies_wanted = any(parser.body_wanted for parser in parsers)
        self._unknown_paths_ok = unknown_paths_ok
        self._seen: dict[str, Match] = {}

    @classmethod
    def default(cls, *, unknown_paths_ok: bool) -> Routes:
        """For a configuration that names no parsers: all of them but `passthrough-parser`, so that a mistyped path is found."""
        parsers = (OpenAIParser(), AnthropicParser(), VllmHttpParser(), SglangHttpParser(), VllmGrpcParser(), VertexAIParser())
        return cls(parsers, unknown_paths_ok=unknown_paths_ok)

    def needs_body(self, path: str, headers: Mapping[str, str]) -> bool:
        """The decision reads the body. If not, it is made on the headers and the body passes by, however long (uploads, websockets)."""
        if "upgrade" in headers or headers.get("content-encoding", "identity") != "identity":
            return False
        if not path:
            return self._bodies_wanted
        parser = self.match(path)[0]
        return parser is not None and parser.body_wanted

    def match(self, path: str) -> Match:
        """The parser for a path, and the kind of body there; (None, "") if there is none."""
        found = self._seen.get(path)
        if found is None:
            found = next((match for suffix, match in self._by_suffix if path.endswith(suffix)), (self._any, ""))
            if len(path) <= PATH_CHARS_MAX:
                if len(self._seen) >= PATHS_MAX:
                    self._seen.clear()
                self._seen[path] = found
        return found

    def parse(self, request: LLMRequest, body: bytes | None) -> Parser | None:
        """Fill in `request` from its path and `body` (None: there is none to see). Raises BadRequestError or NotFoundError.

        Returns the parser, for what it knows of the response; None where there is none for the path.
        """
        path = request.path
        parser, kind = self.match(path) if path else self._told(body)
        if parser is None:
            if path and not self._unknown_paths_ok and ENGINE_SEGMENTS.isdisjoint(path.split("/")):
                raise NotFoundError(
                    f"no inference API is served at {path[:200]!r}; start the picker with --unknown-paths=route to pass it on"
                )
        elif body is not None and parser.body_wanted:
            parser.parse(request, body, kind)
        return parser

    def _told(self, body: bytes | None) -> Match:
        """By the keys of a body that came without a path."""
        if body is not None and self._told_by and body.lstrip()[:1] == b"{":
            keys = understood(self._decode_keys, body)
            for match, value in zip(self._told_by, msgspec.structs.astuple(keys), strict=True):
                if value is not ABSENT:
                    return match
        return self._any, ""


def _decoder_of(keys: Iterable[str]) -> Callable[[bytes], msgspec.Struct]:
    """Finds which of `keys` an object has, and keeps nothing of the others."""
    names = {f"key_{number}": key for number, key in enumerate(keys)}
    fields = [(name, msgspec.Raw, ABSENT) for name in names]
    return msgspec.json.Decoder(msgspec.defstruct("Keys", fields, rename=names)).decode
