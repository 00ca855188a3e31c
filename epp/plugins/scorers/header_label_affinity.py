"""header-label-affinity-scorer: endpoints that carry in a label what the request carries in a header.

Which endpoint has which value is looked up once per set of candidates, not per request: a request costs as many steps as endpoints
have its value.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar

import msgspec

from epp.plugins.base import Plugin
from epp.types import Endpoint, LLMRequest


class HeaderLabelAffinityScorer(Plugin):
    """1 where the label labelKey has the value of the request's header headerName, else 0; 0 for all without the header."""

    type: ClassVar[str] = "header-label-affinity-scorer"
    per_request: ClassVar[bool] = True

    header_name: Annotated[str, msgspec.Meta(min_length=1)]
    label_key: Annotated[str, msgspec.Meta(min_length=1)]

    def __post_init__(self) -> None:
        nobody: tuple[Sequence[Endpoint], Mapping[str, Sequence[int]]] = ((), {})
        self.__dict__.update(_header=self.header_name.lower(), _positions=nobody)

    def score(self, request: LLMRequest, endpoints: Sequence[Endpoint]) -> Sequence[float]:
        scores = [0.0] * len(endpoints)
        wanted = request.headers.get(self.__dict__["_header"])
        if wanted:
            for position in self._by_value(endpoints).get(wanted, ()):
                scores[position] = 1.0
        return scores

    def _by_value(self, endpoints: Sequence[Endpoint]) -> Mapping[str, Sequence[int]]:
        of: Sequence[Endpoint]
        kept: Mapping[str, Sequence[int]]
        of, kept = self.__dict__["_positions"]
        if of is endpoints and isinstance(endpoints, tuple):  # a snapshot's tuple is made anew when a label changes
            return kept
        positions: dict[str, list[int]] = {}
        for position, endpoint in enumerate(endpoints):
            positions.setdefault(endpoint.labels.get(self.label_key, ""), []).append(position)
        self.__dict__["_positions"] = endpoints, positions
        return positions
