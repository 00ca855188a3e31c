"""destination-endpoint-served-verifier: tells the conformance suite who served a request."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from epp.plugins.base import Plugin
from epp.types import Endpoint, LLMRequest

HEADER = "x-conformance-test-served-endpoint"


class DestinationEndpointServedVerifier(Plugin):
    """For tests: puts the address of the endpoint that served a request into the response header x-conformance-test-served-endpoint."""

    type: ClassVar[str] = "destination-endpoint-served-verifier"
    roles: ClassVar[tuple[str, ...]] = ("reporter",)

    def response_headers(self, request: LLMRequest, endpoint: Endpoint) -> Mapping[str, str] | None:  # noqa: ARG002 - the protocol's
        return {HEADER: endpoint.destination}
