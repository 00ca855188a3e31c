"""context-length-aware: endpoints labelled with the range of prompt lengths they are meant for.

A scorer, and a filter where enableFiltering says so. A label is parsed once per value; per request each value is scored once, and each
endpoint costs two look-ups (about 0.06 µs).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar

import msgspec

from epp.plugins.base import Plugin
from epp.types import Endpoint, LLMRequest

LABELS_MAX = 1_024
"""Label values remembered; far more than a pool has. They are forgotten all at once."""
OUTSIDE_MAX = 0.3
"""What an endpoint whose range the prompt is outside of scores at most: less than any it is inside of."""

Range = tuple[int, int]


class ContextLengthAware(Plugin):
    """No label: 0.5. Inside the range: 0.3 + 0.7 * (0.7 / (1 + width / 10000) + 0.3 * (max - length) / width), 1 where width is 0.

    Outside: 0.3 / (1 + distance / 1000). A label that is no range (`min-max`, in tokens): 0. length is the prompt's tokens. With
    enableFiltering, endpoints whose range the prompt is outside of, or whose label is no range, are taken out as well.
    """

    type: ClassVar[str] = "context-length-aware"
    uses: ClassVar[tuple[str, ...]] = ("tokens",)
    per_request: ClassVar[bool] = True

    label: Annotated[str, msgspec.Meta(min_length=1)] = "llm-d.ai/context-length-range"
    enable_filtering: bool = False

    def __post_init__(self) -> None:
        ranges: dict[str, Range | None] = {}
        self.__dict__["_ranges"] = ranges

    def keep(self, request: LLMRequest, endpoints: Sequence[Endpoint]) -> Sequence[Endpoint]:
        if not self.enable_filtering:
            return endpoints
        key, length = self.label, request.prompt_tokens
        labels = [e.labels.get(key) for e in endpoints]
        fits = {label: label is None or self._fits(label, length) for label in set(labels)}
        return [e for e, label in zip(endpoints, labels, strict=True) if fits[label]]

    def score(self, request: LLMRequest, endpoints: Sequence[Endpoint]) -> Sequence[float]:
        key, length = self.label, request.prompt_tokens
        labels = [e.labels.get(key) for e in endpoints]
        scores = {label: 0.5 if label is None else _score(length, self._range(label)) for label in set(labels)}
        return [scores[label] for label in labels]

    def _fits(self, label: str, length: int) -> bool:
        found = self._range(label)
        return found is not None and found[0] <= length <= found[1]

    def _range(self, label: str) -> Range | None:
        ranges: dict[str, Range | None] = self.__dict__["_ranges"]
        if label not in ranges:
            if len(ranges) == LABELS_MAX:
                ranges.clear()
            ranges[label] = _parsed(label)
        return ranges[label]


def _parsed(label: str) -> Range | None:
    low, _, high = label.partition("-")
    low, high = low.strip(), high.strip()
    if not (low.isdecimal() and low.isascii() and high.isdecimal() and high.isascii()):
        return None
    return (int(low), int(high)) if int(low) <= int(high) else None


def _score(length: int, of: Range | None) -> float:
    if of is None:
        return 0.0
    low, high = of
    if length < low:
        return OUTSIDE_MAX / (1.0 + (low - length) / 1000)
    if length > high:
        return OUTSIDE_MAX / (1.0 + (length - high) / 1000)
    width = high - low
    if not width:
        return 1.0
    return OUTSIDE_MAX + (1.0 - OUTSIDE_MAX) * (0.7 / (1.0 + width / 10_000) + 0.3 * (high - length) / width)
