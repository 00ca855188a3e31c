"""What the demo measured, and how it is summed up. Pure.

Times of an `Outcome` are as measured on the wire; a `Summary` has them multiplied by the time scale, in seconds of the simulated
world. Everything between client and engine is so counted as many times slower than it is: the comparison is not kind to the picker.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

ERRORS_KEPT = 5


@dataclass(frozen=True, slots=True)
class Outcome:
    """One request, as the client saw it."""

    ttft_s: float = 0.0
    """Until the first piece of the answer."""
    duration_s: float = 0.0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    answer_tokens: int = 0
    answer: str = ""
    error: str = ""
    """Why it failed; then nothing above means anything. Empty if it did not."""


@dataclass(slots=True)
class Tally:
    """Outcomes of one phase, counted as they come."""

    requests_planned: int
    sent: int = 0
    finished: int = 0
    """Well or badly."""
    errors_total: int = 0
    not_sent: int = 0
    """Because the request before them in their conversation failed."""
    first_errors: list[str] = field(default_factory=list)
    ttft_s: list[float] = field(default_factory=list)
    duration_s: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    answer_tokens: int = 0

    @property
    def in_flight(self) -> int:
        return self.sent - self.finished

    def add(self, outcome: Outcome) -> None:
        self.finished += 1
        if outcome.error:
            self.errors_total += 1
            if len(self.first_errors) < ERRORS_KEPT:
                self.first_errors.append(outcome.error)
            return
        self.ttft_s.append(outcome.ttft_s)
        self.duration_s.append(outcome.duration_s)
        self.prompt_tokens += outcome.prompt_tokens
        self.cached_tokens += outcome.cached_tokens
        self.answer_tokens += outcome.answer_tokens


class Distribution(dict[str, float]):
    """mean, p50, p90, p99: NaN where nothing was measured."""

    @classmethod
    def of(cls, values: Sequence[float], scale: float = 1.0) -> Distribution:
        ordered = sorted(values)
        made = cls(mean=math.fsum(ordered) / len(ordered) * scale if ordered else math.nan)
        for percent in (50, 90, 99):
            made[f"p{percent}"] = percentile(ordered, percent) * scale
        return made


def percentile(ordered: Sequence[float], percent: float) -> float:
    """Nearest rank: a value that was measured, never one in between."""
    if not ordered:
        return math.nan
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]


@dataclass(frozen=True, slots=True)
class Summary:
    """One phase in numbers."""

    name: str
    requests: int
    errors: int
    not_sent: int
    wall_s: float
    ttft_s: Distribution
    duration_s: Distribution
    prompt_tokens: int
    cached_tokens: int
    answer_tokens: int
    hit_rate: float
    """Of prompt tokens, found in the engines' prefix caches, by the engines' own counters; NaN if they counted nothing."""
    per_engine: dict[str, int]
    """Requests each engine finished."""
    picks: dict[str, int]
    """By the picker's counter; empty where the picker was not asked."""
    first_errors: list[str]

    @property
    def computed_tokens(self) -> int:
        return self.prompt_tokens - self.cached_tokens


def summarise(name: str, tally: Tally, *, time_scale: float, wall_s: float, hit_rate: float, per_engine: dict[str, int], picks: dict[str, int]) -> Summary:  # fmt: skip
    return Summary(
        name=name,
        requests=tally.finished,
        errors=tally.errors_total,
        not_sent=tally.not_sent,
        wall_s=wall_s,
        ttft_s=Distribution.of(tally.ttft_s, time_scale),
        duration_s=Distribution.of(tally.duration_s, time_scale),
        prompt_tokens=tally.prompt_tokens,
        cached_tokens=tally.cached_tokens,
        answer_tokens=tally.answer_tokens,
        hit_rate=hit_rate,
        per_engine=per_engine,
        picks=picks,
        first_errors=tally.first_errors,
    )


def ratio(baseline: float, picker: float) -> float:
    """How many times less the picker took; NaN where that means nothing."""
    return baseline / picker if picker > 0 else math.nan


def report(baseline: Summary, picker: Summary, settings: dict[str, object]) -> dict[str, object]:
    """For `--json`: plain data, null for what was not measured."""
    ratios = {
        f"{measure}_{key}": ratio(getattr(baseline, measure)[key], getattr(picker, measure)[key])
        for measure in ("ttft_s", "duration_s")
        for key in ("mean", "p50", "p90", "p99")
    }
    phases = {summary.name: asdict(summary) for summary in (baseline, picker)}
    plain = _without_nan({"settings": settings, "phases": phases, "round_robin_over_picker": ratios})
    assert isinstance(plain, dict)
    return plain


def _without_nan(value: object) -> object:
    if isinstance(value, float) and math.isnan(value):
        return None
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    return value
