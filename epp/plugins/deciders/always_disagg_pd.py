"""always-disagg-pd-decider: every request is prefilled elsewhere."""

from __future__ import annotations

from typing import ClassVar

from epp.plugins.base import Plugin
from epp.types import Endpoint, LLMRequest


class AlwaysDisaggPdDecider(Plugin):
    """True for every request."""

    type: ClassVar[str] = "always-disagg-pd-decider"

    def disaggregate(self, request: LLMRequest, endpoint: Endpoint) -> bool:  # noqa: ARG002 - the protocol's
        return True
