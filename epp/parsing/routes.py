"""Which API a path is, and so how its body is read. The longest path suffix wins.

A path we have no parser for but that inference engines serve (embeddings, responses, tokenize, KServe, ...) is passed through:
routed by load, body opaque. A path no engine serves is a 404 here, unless `--unknown-paths route` says otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping

from epp.errors import NotFoundError
from epp.parsing import openai
from epp.types import LLMRequest

_CHAT = "/chat/completions"
_COMPLETIONS = "/completions"

ENGINE_SEGMENTS = frozenset({
    "v1", "v2", "v1beta", "api", "inference", "generate", "generate_stream", "tokenize", "detokenize", "classify", "score", "rerank",
    "pooling", "embed", "encode", "invocations", "models", "health", "ready", "live", "ping", "version", "load", "metrics", "info",
    "server_info", "get_model_info",
})  # fmt: skip
"""First segments of the paths vLLM, SGLang, Triton, TGI, NIM, llama.cpp and Ollama serve; a gateway may put a prefix before them."""


def path_of(headers: Mapping[str, str]) -> str:
    """The path without its query; empty when the gateway sends none (NGINX Gateway Fabric)."""
    path = headers.get(":path") or headers.get("x-original-path") or headers.get("x-forwarded-path") or ""
    return path.partition("?")[0]


def needs_body(path: str, headers: Mapping[str, str]) -> bool:
    """The decision reads the body. If not, it is made on the headers and the body passes by, however long (uploads, websockets)."""
    if "upgrade" in headers or headers.get("content-encoding", "identity") != "identity":
        return False
    return path.endswith(_COMPLETIONS) or not path


def parse(request: LLMRequest, body: bytes | None, *, unknown_paths_ok: bool) -> None:
    """Fill in `request` from its path and `body` (None: there is none to see). Raises BadRequestError or NotFoundError."""
    path = request.path
    kind: openai.Kind = ""
    if path.endswith(_CHAT):
        kind = "chat"
    elif path.endswith(_COMPLETIONS):
        kind = "completion"
    elif path:
        if not unknown_paths_ok and ENGINE_SEGMENTS.isdisjoint(path.split("/")):
            raise NotFoundError(f"no inference API is served at {path[:200]!r}; start the picker with --unknown-paths=route to pass it on")
        return
    elif body is None or not body.lstrip().startswith(b"{"):
        return
    if body is not None:
        openai.parse(request, body, kind)
