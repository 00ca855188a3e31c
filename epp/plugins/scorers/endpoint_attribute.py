"""endpoint-attribute-scorer: the higher, or the lower, some number an endpoint has, the better.

Computed when load changes, for all candidates: about 0.1 µs an endpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite
from typing import Annotated, ClassVar, Literal

import msgspec

from epp.plugins.attributes import reader
from epp.plugins.base import Plugin
from epp.types import Endpoint, LLMRequest


class FixedRange(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Values outside it count as its ends."""

    min: float
    max: float

    def __post_init__(self) -> None:
        if not self.min < self.max:
            raise ValueError("min must be below max")


class AdaptiveRange(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """From the lowest to the highest value of the candidates."""


class Normalization(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="camel"):
    """One of them; adaptiveRange if none is written."""

    fixed_range: FixedRange | None = None
    adaptive_range: AdaptiveRange | None = None

    def __post_init__(self) -> None:
        if self.fixed_range is not None and self.adaptive_range is not None:
            raise ValueError("write fixedRange or adaptiveRange, not both")


class Algorithm(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="camel"):
    """What is better, over which range."""

    type: Literal["linear_lower_is_better", "linear_higher_is_better"]
    normalization: Normalization = Normalization()


class EndpointAttributeScorer(Plugin):
    """(x - min) / (max - min), or 1 minus that for linear_lower_is_better; no attribute: 0; all equal in an adaptiveRange: 1.

    attributeKey: a key of a data source's extractor (`GPUUtilization`), or one of ours: WaitingQueueSize, RunningRequestsSize,
    KVCacheUsagePercent (0 to 1), InflightRequests, InflightTokens, PrefillTokensPerSecond, DecodeStepSeconds. producer is accepted: keys are unique here.
    """

    type: ClassVar[str] = "endpoint-attribute-scorer"
    per_request: ClassVar[bool] = False

    attribute_key: Annotated[str, msgspec.Meta(min_length=1)]
    algorithm: Algorithm
    producer: str = ""

    def __post_init__(self) -> None:
        self.__dict__["_read"] = reader(self.attribute_key)

    def score(self, _request: LLMRequest, endpoints: Sequence[Endpoint]) -> Sequence[float]:
        read = self.__dict__["_read"]
        values = [read(endpoint) for endpoint in endpoints]
        if isfinite(sum(values)):
            return self._scores(values)
        known = [position for position, value in enumerate(values) if isfinite(value)]
        scores = [0.0] * len(values)
        if known:
            for position, score in zip(known, self._scores([values[position] for position in known]), strict=True):
                scores[position] = score
        return scores

    def _scores(self, values: Sequence[float]) -> Sequence[float]:
        fixed = self.algorithm.normalization.fixed_range
        if fixed:
            low, high = fixed.min, fixed.max
            values = [min(max(value, low), high) if not low <= value <= high else value for value in values]
        else:
            low, high = min(values), max(values)
            if low == high:
                return [1.0] * len(values)
        span = high - low
        if self.algorithm.type == "linear_lower_is_better":
            return [(high - value) / span for value in values]
        return [(value - low) / span for value in values]
