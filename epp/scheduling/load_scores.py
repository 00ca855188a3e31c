"""The part of every endpoint's total that depends on load alone, kept up to date change by change.

A pick, a first token or a scrape changes one endpoint; its scores are computed anew and the others' stay, unless the range a scorer
normalises over moved with it. So a decision costs the endpoints that changed since the last one, not the size of the pool.
Cost: about 1 µs per changed endpoint and scorer; a whole recomputation (another set of candidates, a moved range) 0.4 µs each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import NamedTuple

from epp.plugins.base import PointwiseScorer, RangeScorer, Scorer, range_score
from epp.types import Endpoint, LLMRequest, Snapshot


@dataclass(frozen=True, slots=True)
class Weighted:
    """A scorer and what its opinion counts for."""

    scorer: Scorer
    weight: float

    @property
    def name(self) -> str:
        return str(getattr(self.scorer, "name", type(self.scorer).__name__))


class Column(NamedTuple):
    """One scorer's opinion of each endpoint that was scored."""

    plugin: str
    weight: float
    scores: Sequence[float] | Mapping[int, float]
    """In the endpoints' order; sparse ones by slot."""


def clamp(score: float) -> float:
    """Into [0, 1]; what is not a number counts for nothing."""
    if 0.0 <= score <= 1.0:
        return score
    return 1.0 if score > 1.0 else 0.0


def scores_of(scorer: Scorer, request: LLMRequest, endpoints: Sequence[Endpoint]) -> Sequence[float]:
    """One clamped score per endpoint. A scorer that says it is `in_range` is believed: looking costs 25 ns an endpoint."""
    scores = scorer.score(request, endpoints)
    if getattr(scorer, "in_range", False):
        return scores
    if min(scores) >= 0.0 and max(scores) <= 1.0 and isfinite(sum(scores)):
        return scores
    return [clamp(score) for score in scores]


class _Pointwise:
    """Scores of a PointwiseScorer."""

    def __init__(self, scorer: PointwiseScorer) -> None:
        self._scorer = scorer
        self.scores: list[float] = []

    def refresh(self, _request: LLMRequest, endpoints: Sequence[Endpoint]) -> None:
        self.scores = [clamp(self._scorer.score_one(endpoint)) for endpoint in endpoints]

    def changed(self, _request: LLMRequest, endpoints: Sequence[Endpoint], position: int) -> bool:
        self.scores[position] = clamp(self._scorer.score_one(endpoints[position]))
        return True


class _Range:
    """Scores of a RangeScorer, and the range they were normalised over."""

    def __init__(self, scorer: RangeScorer) -> None:
        self._scorer = scorer
        self.scores: list[float] = []
        self._measures: list[float] = []
        self._low = self._high = 0.0

    def refresh(self, _request: LLMRequest, endpoints: Sequence[Endpoint]) -> None:
        self._measures = [self._scorer.measure(endpoint) for endpoint in endpoints]
        self._normalise()

    def changed(self, _request: LLMRequest, endpoints: Sequence[Endpoint], position: int) -> bool:
        old, new = self._measures[position], self._scorer.measure(endpoints[position])
        if new == old:
            return True
        self._measures[position] = new
        if old in (self._low, self._high) or not self._low <= new <= self._high:
            self._normalise()
            return False
        self.scores[position] = range_score(new, self._low, self._high)
        return True

    def _normalise(self) -> None:
        self._low, self._high = min(self._measures), max(self._measures)
        self.scores = [clamp(range_score(measure, self._low, self._high)) for measure in self._measures]


class _Whole:
    """Scores of any other scorer of load: all anew whenever anything changed."""

    def __init__(self, scorer: Scorer) -> None:
        self._scorer = scorer
        self.scores: Sequence[float] = ()

    def refresh(self, request: LLMRequest, endpoints: Sequence[Endpoint]) -> None:
        self.scores = scores_of(self._scorer, request, endpoints)

    def changed(self, request: LLMRequest, endpoints: Sequence[Endpoint], _position: int) -> bool:
        self.refresh(request, endpoints)
        return False


def _kept(scorer: Scorer) -> _Pointwise | _Range | _Whole:
    if isinstance(scorer, PointwiseScorer):
        return _Pointwise(scorer)
    return _Range(scorer) if isinstance(scorer, RangeScorer) else _Whole(scorer)


class LoadScores:
    """See the module. One per profile."""

    def __init__(self, scorers: Sequence[Weighted]) -> None:
        self._scorers = [(_kept(weighted.scorer), weighted.weight) for weighted in scorers]
        self._names = [weighted.name for weighted in scorers]
        self._totals: list[float] = []
        self._candidates: Snapshot | None = None
        self._count = -1

    def totals(self, request: LLMRequest, candidates: Snapshot) -> list[float]:
        """One weighted sum per candidate, in order. The list is kept: copy it before changing it."""
        if not self._scorers:
            if candidates is not self._candidates:
                self._candidates, self._totals = candidates, [0.0] * len(candidates.endpoints)
            return self._totals
        changes = candidates.endpoints[0].changes
        if candidates is self._candidates:
            if changes.count == self._count:
                return self._totals
            slots = changes.since(self._count)
        else:
            self._candidates, slots = candidates, None
        self._count = changes.count
        if slots is None or len(slots) > len(candidates.endpoints):
            for kept, _ in self._scorers:
                kept.refresh(request, candidates.endpoints)
            self._sum()
        else:
            self._update(request, candidates, slots)
        return self._totals

    @property
    def kept(self) -> list[float]:
        """The list `totals` returned last."""
        return self._totals

    def columns(self) -> list[Column]:
        """The scores that make up the totals, as they are now."""
        return [Column(name, weight, list(kept.scores)) for name, (kept, weight) in zip(self._names, self._scorers, strict=True)]

    def _update(self, request: LLMRequest, candidates: Snapshot, slots: Sequence[int]) -> None:
        only_these = True
        positions = {candidates.by_slot[slot] for slot in slots if slot in candidates.by_slot}
        for position in positions:
            for kept, _ in self._scorers:
                only_these &= kept.changed(request, candidates.endpoints, position)
        if only_these:
            for position in positions:
                total = 0.0
                for kept, weight in self._scorers:
                    total += weight * kept.scores[position]
                self._totals[position] = total
        else:
            self._sum()

    def _sum(self) -> None:
        assert self._candidates is not None
        totals = [0.0] * len(self._candidates.endpoints)
        for kept, weight in self._scorers:
            totals = [total + weight * score for total, score in zip(totals, kept.scores, strict=True)]
        self._totals = totals
