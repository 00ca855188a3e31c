"""prefix-based-pd-decider: prefill elsewhere where enough of the prompt is new to the endpoint that decodes it."""

from __future__ import annotations

from typing import Annotated, ClassVar

import msgspec

from epp.plugins.base import Plugin, match_of
from epp.types import Endpoint, LLMRequest


class PrefixBasedPdDecider(Plugin):
    """True iff the prompt has at least promptTokens tokens and at least nonCachedTokens of them are not cached on the endpoint.

    nonCachedTokens 0: never. prefixMatchInfoProducerName: whose word on what is cached; the first prefix producer's by default.
    """

    type: ClassVar[str] = "prefix-based-pd-decider"
    requires: ClassVar[tuple[str, ...]] = ("prefix-match",)

    non_cached_tokens: Annotated[int, msgspec.Meta(ge=0)] = 0
    prompt_tokens: Annotated[int, msgspec.Meta(ge=0)] = 0
    prefix_match_info_producer_name: str = ""

    def disaggregate(self, request: LLMRequest, endpoint: Endpoint) -> bool:
        wanted = self.non_cached_tokens
        if not wanted or request.prompt_tokens < max(wanted, self.prompt_tokens):
            return False
        match = match_of(request, self.prefix_match_info_producer_name)
        if match is None:  # the producer failed: what is cached is not known
            return False
        return bool(request.prompt_tokens - match.matched_tokens.get(endpoint.slot, 0) >= wanted)
