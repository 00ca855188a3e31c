"""token-producer: how many tokens a prompt has, and which.

Parsers count while they read: token-id prompts exactly, text at four bytes a token. This plugin says which tokenizer a configuration wants
instead; it is run while the request waits, before any plugin sees it (epp.tokenize). Where that is not in time, the estimate stays.
"""

from __future__ import annotations

import logging
from typing import Annotated, Any, ClassVar, Literal
from urllib.parse import urlsplit

import msgspec

from epp.config.secrets import hidden_url
from epp.config.units import Duration, duration_s
from epp.plugins.base import Context, Plugin
from epp.types import LLMRequest, Snapshot

_log = logging.getLogger("epp.plugins")

MODELS_MAX = 1_000
"""Tokenizers, and names of one."""


class EstimateConfig(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, rename="camel", frozen=True):
    """How many tokens images, video and audio are taken for."""

    image: dict[str, Any] = {}
    video: dict[str, Any] = {}
    audio: dict[str, Any] = {}


class VllmConfig(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, rename="camel", frozen=True):
    """A vLLM server whose `/render` endpoints tokenize."""

    url: str = "http://localhost:8000"
    timeout: Duration = "5s"
    mm_timeout: Duration = "30s"
    messages_render_mode: Literal["", "auto", "native", "legacy"] = ""
    ca_cert_path: str = ""
    client_cert_path: str = ""
    client_key_path: str = ""
    insecure_skip_verify: bool = False
    in_flight_max: Annotated[int, msgspec.Meta(ge=1, le=10_000)] = 256
    cache_bytes_max: Annotated[int, msgspec.Meta(ge=0)] = 16 << 20


class EngineConfig(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, rename="camel", frozen=True):
    """The pool's own engines, asked in turn at `/tokenize`."""

    scheme: Literal["http", "https"] = "http"
    timeout: Duration = "400ms"
    ca_cert_path: str = ""
    insecure_skip_verify: bool = False
    bearer_token_file: str = ""
    in_flight_max: Annotated[int, msgspec.Meta(ge=1, le=10_000)] = 256
    cache_bytes_max: Annotated[int, msgspec.Meta(ge=0)] = 16 << 20


class LocalModel(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, rename="camel", frozen=True):
    """A tokenizer: a directory as the model's repository has it, or its tokenizer.json, and the names the model is served by."""

    name: Annotated[str, msgspec.Meta(min_length=1)]
    path: Annotated[str, msgspec.Meta(min_length=1)]
    aliases: Annotated[tuple[str, ...], msgspec.Meta(max_length=MODELS_MAX)] = ()
    chat_template: str = ""
    content_format: Literal["auto", "string", "openai"] = "auto"
    chat_template_kwargs: dict[str, Any] = {}
    exclude_tools_when_tool_choice_none: bool = False


class LocalConfig(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, rename="camel", frozen=True):
    """Tokenizers run by the picker itself."""

    models: Annotated[tuple[LocalModel, ...], msgspec.Meta(min_length=1, max_length=MODELS_MAX)]
    timeout: Duration = "400ms"
    workers: Annotated[int, msgspec.Meta(ge=1, le=64)] = 2
    queue_max: Annotated[int, msgspec.Meta(ge=0, le=100_000)] = 256
    text_bytes_max: Annotated[int, msgspec.Meta(ge=1)] = 8 << 20
    cache_bytes_max: Annotated[int, msgspec.Meta(ge=0)] = 64 << 20


class UdsTokenizerConfig(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, rename="camel", frozen=True):
    """Deprecated: a tokenizer process behind a Unix domain socket."""

    socket_file: str = ""
    use_tcp: bool = msgspec.field(name="useTCP", default=False)
    model_tokenizer_map: dict[str, str] = {}


Exact = LocalConfig | EngineConfig | VllmConfig


class TokenProducer(Plugin):
    """Tokens = bytes of text / 4, or the token ids the client sent; exact ones where one of these is written.

    local: tokenizers run in the picker. engine: the pool's engines are asked at /tokenize. vllm (with modelName): a vLLM server is asked
    at /render. udsTokenizerConfig is accepted, and estimated. estimate is the default. backend names one of them again. A request waits
    no longer than `timeout`; then the estimate stays.
    """

    type: ClassVar[str] = "token-producer"
    aliases: ClassVar[tuple[str, ...]] = ("tokenizer",)
    produces: ClassVar[tuple[str, ...]] = ("tokens",)

    backend: Literal["", "estimate", "vllm", "uds", "local", "engine"] = ""
    estimate: EstimateConfig | None = None
    vllm: VllmConfig | None = None
    local: LocalConfig | None = None
    engine: EngineConfig | None = None
    uds_tokenizer_config: UdsTokenizerConfig | None = None
    model_name: str = ""

    def __post_init__(self) -> None:
        uds = self.uds_tokenizer_config is not None and bool(self.uds_tokenizer_config.socket_file)
        vllm = self.vllm is not None or (bool(self.model_name) and not uds)
        local, engine = self.local is not None, self.engine is not None
        if [self.estimate is not None, vllm, uds, local, engine].count(True) > 1:
            raise ValueError("write one of estimate, local, engine, vllm (with modelName) and udsTokenizerConfig")
        if self.vllm is not None and not self.model_name:
            raise ValueError("vllm needs modelName")
        if self.backend == "local" and not local:
            raise ValueError("local needs models")
        self.__dict__["_uds"] = uds or self.backend == "uds"
        exact: Exact | None = self.local or self.engine
        if exact is None and (vllm or self.backend == "vllm") and not uds:
            exact = self.vllm or VllmConfig()
        elif exact is None and self.backend == "engine":
            exact = EngineConfig()
        _check(exact)
        self.__dict__["_exact"] = exact

    @property
    def exact(self) -> Exact | None:
        """How prompts are to be tokenized; None: they are estimated."""
        exact: Exact | None = self.__dict__["_exact"]
        return exact

    def bind(self, _context: Context) -> None:
        if self.__dict__["_uds"]:
            _log.warning("udsTokenizerConfig is deprecated and not used: tokens are estimated", extra={"fields": {"plugin": self.name}})
        elif self.estimate not in (None, EstimateConfig()):
            _log.warning("estimates of media are not adjustable yet", extra={"fields": {"plugin": self.name}})

    def produce(self, request: LLMRequest, candidates: Snapshot) -> None:
        """Nothing per request: the parser has counted, and whoever tokenizes has done so before."""


def _check(exact: Exact | None) -> None:
    """What types alone don't say."""
    if isinstance(exact, VllmConfig):
        parts = urlsplit(exact.url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise ValueError(f"vllm.url: {hidden_url(exact.url, alone=True)!r} is not the URL of a server")
        duration_s(exact.mm_timeout)
    elif isinstance(exact, LocalConfig):
        names = [name for model in exact.models for name in (model.name, *model.aliases)]
        if len(set(names)) < len(names):
            raise ValueError("local.models: a name is given twice")
    if exact is not None and not duration_s(exact.timeout):
        raise ValueError("timeout: must be more than 0")
