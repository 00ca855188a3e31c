"""session-affinity-filter: the endpoint that served a session before, and no other, while it is a candidate.

A request costs a header and a few dict look-ups, and a scan of the candidates for the endpoint. session-affinity-scorer only prefers it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from epp.plugins.session_binding import SessionAffinity
from epp.types import Endpoint, LLMRequest


class SessionAffinityFilter(SessionAffinity):
    """Keeps the endpoint of the request's session; all when there is no session, or its endpoint is no candidate.

    strategy encoded_endpoint_header: responses carry a signed token (encodedEndpointHeaderConfig.header) that the client sends back.
    session_id: the first of sessionIdConfig.sources tells the session, and the picker remembers its endpoint. profileName: the stage
    whose endpoint is meant; empty: the destination. Set EPP_SESSION_KEY (16 bytes or more) in the environment, the same for every
    replica, or tokens end with the process.
    """

    type: ClassVar[str] = "session-affinity-filter"

    def keep(self, request: LLMRequest, endpoints: Sequence[Endpoint]) -> Sequence[Endpoint]:
        pinned = self.pinned(request)
        return (pinned,) if pinned is not None and pinned in endpoints else endpoints
