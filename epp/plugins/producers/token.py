"""token-producer: how many tokens a prompt has.

Parsers count while they read: token-id prompts exactly, text at four bytes a token. This plugin is how configurations say which
tokenizer they want; another than the estimate is accepted and not run yet, which the log says once.
"""

from __future__ import annotations

import logging
from typing import Any, ClassVar, Literal

import msgspec

from epp.config.units import Duration
from epp.plugins.base import Context, Plugin
from epp.types import LLMRequest, Snapshot

_log = logging.getLogger("epp.plugins")


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


class UdsTokenizerConfig(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, rename="camel", frozen=True):
    """Deprecated: a tokenizer process behind a Unix domain socket."""

    socket_file: str = ""
    use_tcp: bool = msgspec.field(name="useTCP", default=False)
    model_tokenizer_map: dict[str, str] = {}


class TokenProducer(Plugin):
    """Tokens = bytes of text / 4, or the token ids the client sent.

    `estimate` is that. `vllm` (with modelName) and udsTokenizerConfig are accepted, one of the three, and estimated too. backend names
    one of them again.
    """

    type: ClassVar[str] = "token-producer"
    aliases: ClassVar[tuple[str, ...]] = ("tokenizer",)
    produces: ClassVar[tuple[str, ...]] = ("tokens",)

    backend: Literal["", "estimate", "vllm", "uds"] = ""
    estimate: EstimateConfig | None = None
    vllm: VllmConfig | None = None
    uds_tokenizer_config: UdsTokenizerConfig | None = None
    model_name: str = ""

    def __post_init__(self) -> None:
        uds = self.uds_tokenizer_config is not None and bool(self.uds_tokenizer_config.socket_file)
        vllm = self.vllm is not None or (bool(self.model_name) and not uds)
        if [self.estimate is not None, vllm, uds].count(True) > 1:
            raise ValueError("write one of estimate, vllm (with modelName) and udsTokenizerConfig")
        if self.vllm is not None and not self.model_name:
            raise ValueError("vllm needs modelName")
        self.__dict__["_estimated"] = not (vllm or uds or self.backend in ("vllm", "uds"))

    def bind(self, _context: Context) -> None:
        if not self.__dict__["_estimated"]:
            _log.warning("prompts are not tokenized yet: their tokens are estimated", extra={"fields": {"plugin": self.name}})
        elif self.estimate not in (None, EstimateConfig()):
            _log.warning("estimates of media are not adjustable yet", extra={"fields": {"plugin": self.name}})

    def produce(self, request: LLMRequest, candidates: Snapshot) -> None:
        """Nothing per request: the parser has counted."""
