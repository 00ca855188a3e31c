"""header-based-testing-filter: the endpoints a request header names. For conformance tests; never in production.

A request without the header passes through: the reference picker drops it with 429, which makes the filter useless in a pool that
serves anything besides the tests.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from epp.plugins.base import Plugin
from epp.types import Endpoint, LLMRequest

HEADER = "test-epp-endpoint-selection"


class HeaderBasedTestingFilter(Plugin):
    """Keeps the endpoints that the header test-epp-endpoint-selection lists (`IP` or `IP:port`, by commas); all without the header."""

    type: ClassVar[str] = "header-based-testing-filter"

    def keep(self, request: LLMRequest, endpoints: Sequence[Endpoint]) -> Sequence[Endpoint]:
        listed = request.headers.get(HEADER)
        if listed is None:
            return endpoints
        wanted = {each.strip() for each in listed.split(",")}
        return [e for e in endpoints if not wanted.isdisjoint(_names(e))]


def _names(endpoint: Endpoint) -> tuple[str, ...]:
    host, port = endpoint.spec.address
    return host, f"{host}:{port}", f"[{host}]", endpoint.destination
