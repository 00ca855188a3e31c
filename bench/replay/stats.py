"""From jobs to one row of figures, and from the rows of several seeds to a mean with its interval.

Latencies are of requests answered in full, errors stand beside them and count against goodput: a policy cannot look fast by failing.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bench.replay.simulation import Result, Stay

REJECTED = ("rejected", "status 400")
DIGITS = 9
"""Of a figure in a row: more than anything means, few enough that rows of the same run are equal byte for byte."""

WINDOW_S = 60.0
"""What `imbalance` looks at in one piece: longer than an answer takes, shorter than load takes to move."""

T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
"""Student's t, 97.5 %, by degrees of freedom from 1."""


@dataclass(frozen=True, slots=True)
class Objective:
    """What a request must meet to count as good."""

    ttft_s: float = 2.0
    tpot_s: float = 0.1


def figures(result: Result, objective: Objective, warmup_s: float = 0.0) -> dict[str, float | int | None]:
    """One run's row, without what names it; None is what cannot be said, as the latency of answers where there are none.

    Requests that came in the first `warmup_s` are left out.
    """
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
        "ttft_p50_s": latency_s(ttft_s, 0.50),
        "ttft_p90_s": latency_s(ttft_s, 0.90),
        "ttft_p99_s": latency_s(ttft_s, 0.99),
        "tpot_mean_s": _mean(tpot_s),
        "tpot_p90_s": latency_s(tpot_s, 0.90),
        "e2e_mean_s": _mean([job.e2e_s for job in done]),
        "e2e_p90_s": latency_s(sorted(job.e2e_s for job in done), 0.90),
        "hit_rate": cached_tokens / prompt_tokens if prompt_tokens else 0.0,
        "goodput": good / len(jobs) if jobs else 0.0,
        "errors": len(jobs) - len(done),
        "rejected": rejected,
        "requests": len(jobs),
        "imbalance": imbalance(result, warmup_s),
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


def latency_s(ascending: Sequence[float], share: float) -> float | None:
    """That percentile; None of nothing, for no time at all would be the best there is."""
    return percentile(ascending, share) if ascending else None


def imbalance(result: Result, from_s: float = 0.0) -> float | None:
    """Standard deviation over replicas of their request-seconds in a minute, over their mean; both averaged over the minutes.

    A request-second: a second of a request between its sending and its end. A replica counts as far as it is in the pool and up, and so do
    its request-seconds. 0: all alike; square root of n - 1: one of n has all. None: there was nothing to share. Minutes begin at the first
    arrival from `from_s` on; the last one may be short, and counts less.
    """
    arrivals_s = [job.arrival_s for job in result.jobs if job.arrival_s >= from_s]
    if not arrivals_s:
        return None
    from_s = arrivals_s[0]
    until_s = max([arrivals_s[-1], *(stay.to_s for stay in result.held if stay.to_s < math.inf)])
    present: dict[int, list[Stay]] = {}
    for stay in result.present:
        present.setdefault(stay.replica, []).append(stay)
    windows: dict[int, dict[int, float]] = {}
    for stay in result.held:
        for there in present.get(stay.replica, ()):
            first_s, last_s = max(stay.from_s, there.from_s, from_s), min(stay.to_s, there.to_s, until_s)
            window = int((first_s - from_s) // WINDOW_S)
            while first_s < last_s:
                edge_s = min(last_s, from_s + (window + 1) * WINDOW_S)
                held_s = windows.setdefault(window, {})
                held_s[stay.replica] = held_s.get(stay.replica, 0.0) + edge_s - first_s
                first_s, window = edge_s, window + 1
    deviation = total = 0.0
    for window, held_s in windows.items():
        opens_s = from_s + window * WINDOW_S
        closes_s = min(until_s, opens_s + WINDOW_S)
        there_s = {
            replica: sum(max(0.0, min(stay.to_s, closes_s) - max(stay.from_s, opens_s)) for stay in stays)
            for replica, stays in present.items()
        }
        replicas_s = sum(there_s.values())
        if not replicas_s:
            continue
        mean = sum(held_s.values()) / replicas_s
        squares = sum(each_s * (held_s.get(replica, 0.0) / each_s - mean) ** 2 for replica, each_s in there_s.items() if each_s > 0)
        deviation += math.sqrt(squares / replicas_s) * (closes_s - opens_s)
        total += mean * (closes_s - opens_s)
    return deviation / total if total else None


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


def mean_of(rows: Sequence[Mapping[str, object]], key: str) -> Interval | None:
    """Over the rows that can say it; None where none can."""
    values = [float(str(row[key])) for row in rows if row.get(key) is not None]
    return interval(values) if values else None


def text_of_mean(rows: Sequence[Mapping[str, object]], key: str, spec: str) -> str | None:
    mean = mean_of(rows, key)
    return None if mean is None else mean.text(spec)


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None
