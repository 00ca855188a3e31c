"""lora-affinity-scorer: endpoints that have the request's LoRA adapter loaded, or room for it.

Per request, for it depends on the model asked for: about 0.04 µs an endpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from epp.plugins.base import Plugin
from epp.types import Endpoint, LLMRequest


class LoraAffinityScorer(Plugin):
    """1 where the target model is a running adapter; 0.8 where one more adapter fits; 0.6 where it waits to be loaded; else 0.

    It fits while running + waiting adapters are fewer than the engine's limit (`max_lora`).
    """

    type: ClassVar[str] = "lora-affinity-scorer"
    per_request: ClassVar[bool] = True

    def score(self, request: LLMRequest, endpoints: Sequence[Endpoint]) -> Sequence[float]:
        model = request.target_model
        return [
            1.0
            if model in e.adapters_active
            else 0.8
            if len(e.adapters_active) + len(e.adapters_waiting) < e.adapters_max
            else 0.6
            if model in e.adapters_waiting
            else 0.0
            for e in endpoints
        ]
