"""What tenants got of a flow scenario: one row's further figures.

Not here: latency over all requests (stats), the scenarios, the command (flow).
"""

from __future__ import annotations

from bench.replay.flow_scenarios import BATCH, DURATION_S, HEAVY, IMPORTANT, LIGHT
from bench.replay.simulation import Result
from bench.replay.stats import DIGITS, latency_s

WARMUP_S = 30.0
"""Until queues are as long as they get."""
TENANTS = (LIGHT, HEAVY, IMPORTANT, BATCH)


def flow_figures(result: Result) -> dict[str, float | int | None]:
    """Jain's index is of tokens of requests answered in full between `WARMUP_S` and the end of the load, over the tenants there are."""
    row: dict[str, float | int | None] = {}
    served: list[int] = []
    for tenant in TENANTS:
        jobs = [job for job in result.jobs if job.tenant == tenant]
        if not jobs:
            continue
        done = [job for job in jobs if not job.error]
        tokens = sum(job.prompt_tokens + job.output_tokens for job in done if WARMUP_S <= job.finished_s <= DURATION_S)
        served.append(tokens)
        ttft_s = sorted(job.ttft_s for job in done if job.arrival_s >= WARMUP_S)
        row[f"{tenant}_requests"] = len(jobs)
        row[f"{tenant}_answered"] = len(done)
        row[f"{tenant}_tokens"] = tokens
        for share in (50, 90):
            found_s = latency_s(ttft_s, share / 100)
            row[f"{tenant}_ttft_p{share}_s"] = None if found_s is None else round(found_s, DIGITS)
    row["served_tokens_per_s"] = round(sum(served) / (DURATION_S - WARMUP_S), DIGITS)
    row["jain"] = round(jain(served), DIGITS)
    return row


def jain(values: list[int]) -> float:
    """1: all alike, 1/n: one has it all."""
    squares = sum(value * value for value in values)
    return sum(values) ** 2 / (len(values) * squares) if squares else 1.0
