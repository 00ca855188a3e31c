"""by-label: endpoints whose label has one of some values. Older than label-selector-filter, which can say more.

Runs when the set of candidates changes, not per request.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar

import msgspec

from epp.plugins.base import Plugin
from epp.types import Endpoint, LLMRequest


class ByLabelFilter(Plugin):
    """Keeps endpoints whose label has one of validValues, and those without it if allowsNoLabel."""

    type: ClassVar[str] = "by-label"
    deprecated: ClassVar[str] = "label-selector-filter"
    per_request: ClassVar[bool] = False

    label: Annotated[str, msgspec.Meta(min_length=1)]
    valid_values: tuple[str, ...] = ()
    allows_no_label: bool = False

    def __post_init__(self) -> None:
        if not self.valid_values and not self.allows_no_label:
            raise ValueError("without validValues and allowsNoLabel it would keep no endpoint")

    def keep(self, _request: LLMRequest, endpoints: Sequence[Endpoint]) -> Sequence[Endpoint]:
        label, valid, allows_none = self.label, self.valid_values, self.allows_no_label
        return [e for e in endpoints if (e.labels[label] in valid if label in e.labels else allows_none)]
