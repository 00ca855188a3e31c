"""label-selector-filter: endpoints whose labels match a Kubernetes label selector.

Runs when the set of candidates changes, not per request.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar, Literal

import msgspec

from epp.plugins.base import Plugin
from epp.types import Endpoint, LLMRequest


class Requirement(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One of matchExpressions."""

    key: Annotated[str, msgspec.Meta(min_length=1)]
    operator: Literal["In", "NotIn", "Exists", "DoesNotExist"]
    values: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.operator in ("In", "NotIn") and not self.values:
            raise ValueError(f"operator {self.operator} needs values")
        if self.operator in ("Exists", "DoesNotExist") and self.values:
            raise ValueError(f"operator {self.operator} takes no values")

    def holds(self, labels: Mapping[str, str]) -> bool:
        value = labels.get(self.key)
        if self.operator == "In":
            return value in self.values
        if self.operator == "NotIn":
            return value not in self.values
        return (value is not None) is (self.operator == "Exists")


class LabelSelectorFilter(Plugin):
    """Keeps endpoints that have every label of matchLabels and for which every one of matchExpressions holds; all when both are empty.

    operator: In, NotIn (of values; an endpoint without the label is in none), Exists, DoesNotExist.
    """

    type: ClassVar[str] = "label-selector-filter"
    aliases: ClassVar[tuple[str, ...]] = ("by-label-selector",)
    per_request: ClassVar[bool] = False

    match_labels: dict[str, str] = msgspec.field(default_factory=dict)
    match_expressions: tuple[Requirement, ...] = ()

    def keep(self, _request: LLMRequest, endpoints: Sequence[Endpoint]) -> Sequence[Endpoint]:
        return [e for e in endpoints if self._matches(e.labels)]

    def _matches(self, labels: Mapping[str, str]) -> bool:
        return self.match_labels.items() <= labels.items() and all(each.holds(labels) for each in self.match_expressions)
