"""tenant-tier-scorer: tenants prefer model servers of their own tier, and fall back to the others when those are busy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from epp.plugins.base import Plugin
from epp.types import Endpoint, LLMRequest


class TenantTierScorer(Plugin):
    """1 if the value of the request header `header` is the endpoint's label `label`, else `otherTier`."""

    type: ClassVar[str] = "tenant-tier-scorer"
    per_request: ClassVar[bool] = True  # the score depends on the request, not on load alone

    # Fields are the plugin's parameters; in YAML they are camelCase, and an unknown one is an error.
    header: str = "x-tenant-tier"
    label: str = "tier"
    other_tier: float = 0.0

    def score(self, request: LLMRequest, endpoints: Sequence[Endpoint]) -> Sequence[float]:
        tier = request.headers.get(self.header)
        if tier is None:
            return [1.0] * len(endpoints)  # nobody is preferred
        return [1.0 if endpoint.labels.get(self.label) == tier else self.other_tier for endpoint in endpoints]
