"""Any path no other parser reads: routed by load and headers, the body opaque and not waited for."""

from __future__ import annotations

from typing import ClassVar

from epp.parsing.base import JsonParser
from epp.types import LLMRequest


class PassthroughParser(JsonParser):
    """Accepts every path that no other parser is for, without looking at the body. It takes no parameters."""

    type: ClassVar[str] = "passthrough-parser"
    body_wanted: ClassVar[bool] = False
    model_required: ClassVar[bool] = False

    def parse(self, request: LLMRequest, body: bytes, kind: str) -> None:
        """There is nothing to read."""

    def with_model(self, body: bytes, model: str) -> bytes | None:  # noqa: ARG002 - it may not have one
        return None
