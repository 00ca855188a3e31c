"""From jobs to one row of figures, and from the rows of several seeds to a mean with its interval.

Latencies are of requests answered in full, errors stand beside them and count against goodput: a policy cannot look fast by failing.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bench.replay.simulation import Result

REJECTED = ("rejected", "status 400")
DIGITS = 9
"""Of a figure in a row: more than anything means, few enough that rows of the same run are equal byte for byte."""

T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
"""Student's t, 97.5 %, by degrees of freedom from 1."""


@dataclass(frozen=True, slots=True)
class Objective:
    """What a request must meet to count as good."""

    ttft_s: float = 2.0
    tpot_s: float = 0.1


def figures(result: Result, objective: Objective, warmup_s: float = 0.0) -> dict[str, float | int]:
    """One run's row, without what names it. Requests that came in the first `warmup_s` are left out."""
    jobs = [job for job in result.jobs if job.arrival_s >= warmup_s]
    done = [job for job in jobs if not job.error]
    errors = Counter(job.error for job in jobs if job.error)
    ttft_s = sorted(job.ttft_s for job in done)
    tpot_s = sorted(job.tpot_s for job in done if job.output_tokens > 1)
    good = sum(job.ttft_s <= objective.ttft_s and job.tpot_s <= objective.tpot_s for job in done)
    rejected = sum(errors[why] for why in REJECTED)
    prompt_tokens = sum(job.prompt_tokens for job in jobs if job.cached_tokens >= 0)
    cached_tokens = sum(job.cached_tokens for job in jobs if job.cached_tokens >= 0)
    busy_s = [engine.busy_s for engine in result.engines]
    mean_busy_s = statistics.fmean(busy_s)
    elapsed_s = result.elapsed_s or 1.0
    row = {
        "ttft_mean_s": _mean(ttft_s),
        "ttft_p50_s": percentile(ttft_s, 0.50),
        "ttft_p90_s": percentile(ttft_s, 0.90),
        "ttft_p99_s": percentile(ttft_s, 0.99),
        "tpot_mean_s": _mean(tpot_s),
        "tpot_p90_s": percentile(tpot_s, 0.90),
        "e2e_mean_s": _mean([job.e2e_s for job in done]),
        "e2e_p90_s": percentile(sorted(job.e2e_s for job in done), 0.90),
        "hit_rate": cached_tokens / prompt_tokens if prompt_tokens else 0.0,
        "goodput": good / len(jobs) if jobs else 0.0,
        "errors": len(jobs) - len(done),
        "rejected": rejected,
        "requests": len(jobs),
        "imbalance": result.imbalance,
        "busy_cv": statistics.pstdev(busy_s) / mean_busy_s if mean_busy_s else 0.0,
        "busy": mean_busy_s / elapsed_s,
        "preemptions": sum(engine.preemptions for engine in result.engines),
        "output_tokens_per_s": sum(job.output_tokens for job in done) / elapsed_s,
        "elapsed_s": elapsed_s,
    }
    return {key: round(value, DIGITS) if isinstance(value, float) else value for key, value in row.items()}


def percentile(ascending: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of them do not exceed; 0 of nothing."""
    return ascending[max(0, math.ceil(share * len(ascending)) - 1)] if ascending else 0.0


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean over seeds and half the width of its 95 % interval; 0 for a single seed, which says nothing."""

    mean: float
    half: float

    def text(self, spec: str) -> str:
        return f"{self.mean:{spec}}±{self.half:{spec}}" if self.half else f"{self.mean:{spec}}"


def interval(values: Sequence[float]) -> Interval:
    mean = statistics.fmean(values)
    if len(values) < 2:
        return Interval(mean, 0.0)
    t = T_95[len(values) - 2] if len(values) - 2 < len(T_95) else 1.96
    return Interval(mean, t * statistics.stdev(values) / math.sqrt(len(values)))


Key = tuple[str, str, float]


def by_cell(rows: Sequence[Mapping[str, object]]) -> dict[Key, list[Mapping[str, object]]]:
    """(workload, policy, rate) -> the rows of its seeds, in order of first appearance."""
    cells: dict[Key, list[Mapping[str, object]]] = {}
    for row in rows:
        key = (str(row.get("workload", "")), str(row["policy"]), float(str(row["rate"])))
        cells.setdefault(key, []).append(row)
    return cells


def mean_of(rows: Sequence[Mapping[str, object]], key: str) -> Interval:
    return interval([float(str(row[key])) for row in rows])


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values) if values else 0.0
