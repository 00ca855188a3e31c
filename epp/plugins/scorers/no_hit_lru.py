"""no-hit-lru-scorer: spreads requests that nobody has cached, so that every cache grows.

A cold request goes to the endpoint that has waited longest for one. Per cold request: about 0.2 µs an endpoint; a request with a hit
costs next to nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar

import msgspec

from epp.plugins.base import Context, Plugin, Producer, match_of
from epp.types import Decision, Endpoint, LLMRequest

PREFILL = "prefill"


class NoHitLruScorer(Plugin):
    """A request some candidate has a part of: 0.5 for all. A cold one, over n candidates: 1 - rank / (n - 1), never below 0.

    Candidates that never had a cold request rank first (by age in the pool), then the others, least recently used first, by their
    position among the lruSize endpoints remembered. One candidate alone scores 1. The pick of a cold request, its prefill endpoint too,
    becomes the most recently used.
    prefixPluginType and prefixPluginName are old, never did anything, and are accepted.
    """

    type: ClassVar[str] = "no-hit-lru-scorer"
    requires: ClassVar[tuple[str, ...]] = ("prefix-match",)
    per_request: ClassVar[bool] = True

    lru_size: Annotated[int, msgspec.Meta(gt=0)] = 1024
    prefix_match_info_producer_name: str = ""
    prefix_plugin_type: str = ""
    prefix_plugin_name: str = ""

    def __post_init__(self) -> None:
        used: dict[int, None] = {}
        self.__dict__["_used"] = used
        """Slots by their last cold request, the oldest first."""

    def bind(self, context: Context) -> None:
        if self.prefix_match_info_producer_name:
            context.plugin(self.prefix_match_info_producer_name, Producer, parameter="prefixMatchInfoProducerName")

    def score(self, request: LLMRequest, endpoints: Sequence[Endpoint]) -> Sequence[float]:
        slots = [e.slot for e in endpoints]
        match = match_of(request, self.prefix_match_info_producer_name)
        if match is not None and match.matched_tokens and not match.matched_tokens.keys().isdisjoint(slots):
            return [0.5] * len(slots)
        request.attributes[self.name] = True  # it is `picked` that must know, and the candidates are known here
        if len(slots) == 1:
            return [1.0]
        used: dict[int, None] = self.__dict__["_used"]
        never = sorted(slot for slot in slots if slot not in used)
        ranks = {slot: rank for rank, slot in enumerate((*never, *used))}
        last = len(slots) - 1
        return [max(0.0, 1.0 - ranks[slot] / last) for slot in slots]

    def picked(self, request: LLMRequest, decision: Decision) -> None:
        if not request.attributes.get(self.name):
            return
        self._touch(decision.endpoint)
        prefill = decision.targets.get(PREFILL)
        if prefill is not None:
            self._touch(prefill)

    def served(self, request: LLMRequest, endpoint: Endpoint) -> None:
        if request.attributes.get(self.name):
            self._touch(endpoint)

    def removed(self, endpoint: Endpoint) -> None:
        self.__dict__["_used"].pop(endpoint.slot, None)

    def _touch(self, endpoint: Endpoint) -> None:
        used: dict[int, None] = self.__dict__["_used"]
        used.pop(endpoint.slot, None)
        used[endpoint.slot] = None
        if len(used) > self.lru_size:
            del used[next(iter(used))]
