"""agent-identity: which agent session a request belongs to, by the headers that coding agents send anyway."""

from __future__ import annotations

from typing import ClassVar

from epp.plugins.base import Plugin
from epp.types import LLMRequest, Snapshot

SESSION_HEADERS = ("x-claude-code-session-id", "x-session-affinity", "session-id", "session_id")
IDENTITY_CHARS_MAX = 256
"""Longer ones are cut, as fairness ids are."""


class AgentIdentity(Plugin):
    """The first of these headers that is there is the request's fairness id, if the client gave none, and its `agent-identity`.

    additionalSessionHeaders, in order, then x-claude-code-session-id, x-session-affinity, session-id, session_id. So all turns of one
    session share one queue.
    """

    type: ClassVar[str] = "agent-identity"
    produces: ClassVar[tuple[str, ...]] = ("agent-identity",)

    additional_session_headers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        own = [header.strip().lower() for header in self.additional_session_headers]
        self.__dict__["_headers"] = tuple(dict.fromkeys(header for header in (*own, *SESSION_HEADERS) if header))

    def identify(self, request: LLMRequest) -> str:
        """For flow control, before the request waits."""
        headers = request.headers
        return next((headers[name][:IDENTITY_CHARS_MAX] for name in self.__dict__["_headers"] if headers.get(name)), "")

    def produce(self, request: LLMRequest, candidates: Snapshot) -> None:  # noqa: ARG002 - the protocol's
        found = self.identify(request)
        if found:
            request.attributes["agent-identity"] = found
            request.fairness_id = request.fairness_id or found
