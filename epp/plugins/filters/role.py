"""decode-filter, prefill-filter, encode-filter: endpoints that do one stage of a request, by their role label.

One file, for it is one table. They run when the set of candidates changes, not per request.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from epp.plugins.base import Plugin
from epp.types import Endpoint, LLMRequest

ROLE_LABEL = "llm-d.ai/role"


class DecodeFilter(Plugin):
    """Keeps endpoints whose label llm-d.ai/role is decode, prefill-decode, encode-prefill-decode or both, and those without the label."""

    type: ClassVar[str] = "decode-filter"
    per_request: ClassVar[bool] = False
    kept: ClassVar[frozenset[str | None]] = frozenset(("decode", "prefill-decode", "encode-prefill-decode", "both", None))

    def keep(self, _request: LLMRequest, endpoints: Sequence[Endpoint]) -> Sequence[Endpoint]:
        return [e for e in endpoints if e.labels.get(ROLE_LABEL) in self.kept]


class PrefillFilter(Plugin):
    """Keeps endpoints whose label llm-d.ai/role is prefill, encode-prefill, prefill-decode, encode-prefill-decode or both."""

    type: ClassVar[str] = "prefill-filter"
    per_request: ClassVar[bool] = False
    kept: ClassVar[frozenset[str]] = frozenset(("prefill", "encode-prefill", "prefill-decode", "encode-prefill-decode", "both"))

    def keep(self, _request: LLMRequest, endpoints: Sequence[Endpoint]) -> Sequence[Endpoint]:
        return [e for e in endpoints if e.labels.get(ROLE_LABEL) in self.kept]


class EncodeFilter(Plugin):
    """Keeps endpoints whose label llm-d.ai/role is encode, encode-prefill or encode-prefill-decode."""

    type: ClassVar[str] = "encode-filter"
    per_request: ClassVar[bool] = False
    kept: ClassVar[frozenset[str]] = frozenset(("encode", "encode-prefill", "encode-prefill-decode"))

    def keep(self, _request: LLMRequest, endpoints: Sequence[Endpoint]) -> Sequence[Endpoint]:
        return [e for e in endpoints if e.labels.get(ROLE_LABEL) in self.kept]
