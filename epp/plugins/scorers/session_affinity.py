"""session-affinity-scorer: prefers the endpoint that served a session before, and may be outweighed.

Sparse: a request costs a header and a dict look-up or two, whatever the size of the pool. session-affinity-filter insists.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from epp.plugins.session_binding import SessionAffinity
from epp.types import Endpoint, LLMRequest


class SessionAffinityScorer(SessionAffinity):
    """1 for the endpoint of the request's session, 0 for all others and where there is none; parameters as session-affinity-filter's.

    strategy encoded_endpoint_header: responses carry a signed token (encodedEndpointHeaderConfig.header) that the client sends back.
    session_id: the first of sessionIdConfig.sources tells the session, and the picker remembers its endpoint. profileName: the stage
    whose endpoint is meant; empty: the destination.
    """

    type: ClassVar[str] = "session-affinity-scorer"
    per_request: ClassVar[bool] = True

    def score(self, request: LLMRequest, endpoints: Sequence[Endpoint]) -> Sequence[float]:
        pinned = self.pinned(request)
        return [1.0 if e is pinned else 0.0 for e in endpoints]

    def score_sparse(self, request: LLMRequest) -> Mapping[int, float]:
        pinned = self.pinned(request)
        return {} if pinned is None else {pinned.slot: 1.0}
