"""Sends a workload to one front and measures each request from the time it was meant to leave.

Open loop: arrivals come at their times whatever the servers do; only the turns of an agent (`Arrival.turns`) wait for the answer before
them, and count from the end of their pause. Times of the workload and of the figures are those of life; on the wire everything runs
`speedup` times faster, and what gateway, picker and client cost counts `speedup` times as much.
"""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import aiohttp
import msgspec

from bench.replay.stats import Objective, latency_s, percentile
from bench.replay.workload import Arrival
from epp.demo.client import send
from epp.demo.workload import Request, trace_block
from epp.types import TOKEN_BYTES

AHEAD_S = 0.05
"""A request's text is made this long before it is sent, so that making it delays nothing."""
TIMEOUT_S = 120.0
"""Of real time, for one request."""
DIGITS = 6


class Sample(NamedTuple):
    """One request as the client saw it, in seconds of life."""

    at_s: float
    late_s: float
    """From the intended time to the real one; contained in the two below."""
    ttft_s: float
    e2e_s: float
    answer_tokens: int
    error: str = ""

    @property
    def tpot_s(self) -> float:
        return (self.e2e_s - self.ttft_s) / (self.answer_tokens - 1)


def request_of(arrival: Arrival, model: str) -> Request:
    """Text in which equal blocks are equal, of exactly as many tokens as the arrival has."""
    prompt = "".join(map(trace_block, arrival.blocks))[: arrival.prompt_tokens * TOKEN_BYTES]
    body = {"model": model, "prompt": prompt, "max_tokens": max(1, arrival.output_tokens)}
    return Request("/v1/completions", msgspec.json.encode({**body, "stream": True, "stream_options": {"include_usage": True}}))


async def play(base_url: str, arrivals: Sequence[Arrival], *, speedup: float, model: str) -> list[Sample]:
    """All of them, to the end of the last answer."""
    samples: list[Sample] = []
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
    loop = asyncio.get_running_loop()
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session, asyncio.TaskGroup() as group:
        start_s = loop.time() + 2 * AHEAD_S
        for arrival in arrivals:
            intended_s = start_s + arrival.at_s / speedup
            await asyncio.sleep(intended_s - AHEAD_S - loop.time())
            group.create_task(_one(session, base_url, arrival, intended_s, samples, speedup=speedup, model=model))
    return samples


async def _one(
    session: aiohttp.ClientSession,
    base_url: str,
    arrival: Arrival,
    intended_s: float,
    samples: list[Sample],
    *,
    speedup: float,
    model: str,
) -> None:
    loop = asyncio.get_running_loop()
    for number, turn in enumerate((arrival, *arrival.turns)):
        if number:
            intended_s = loop.time() + turn.at_s / speedup
        request = request_of(turn, model)
        await asyncio.sleep(intended_s - loop.time())
        late_s = loop.time() - intended_s
        outcome = await send(session, base_url, request)
        samples.append(
            Sample(
                arrival.at_s,
                late_s * speedup,
                (outcome.ttft_s + late_s) * speedup,
                (outcome.duration_s + late_s) * speedup,
                outcome.answer_tokens,
                outcome.error,
            )
        )
        if outcome.error:
            return


def figures(samples: Sequence[Sample], objective: Objective, *, planned: int, warmup_s: float = 0.0) -> dict[str, object]:
    """The part of a row that the client knows; None is the latency of answers where there are none.

    A turn that was never sent, because the one before it failed, is an error too.
    """
    counted = [sample for sample in samples if sample.at_s >= warmup_s]
    done = [sample for sample in counted if not sample.error]
    ttft_s = sorted(sample.ttft_s for sample in done)
    tpot_s = sorted(sample.tpot_s for sample in done if sample.answer_tokens > 1)
    not_sent = planned - len(samples)
    good = sum(
        sample.ttft_s <= objective.ttft_s and (sample.answer_tokens < 2 or sample.tpot_s <= objective.tpot_s) for sample in done
    )  # fmt: skip
    row = {
        "ttft_mean_s": _mean(ttft_s),
        "ttft_p50_s": latency_s(ttft_s, 0.50),
        "ttft_p90_s": latency_s(ttft_s, 0.90),
        "ttft_p99_s": latency_s(ttft_s, 0.99),
        "tpot_p90_s": latency_s(tpot_s, 0.90),
        "e2e_mean_s": _mean([sample.e2e_s for sample in done]),
        "goodput": good / (len(counted) + not_sent) if counted else 0.0,
        "errors": len(counted) - len(done) + not_sent,
        "requests": len(counted) + not_sent,
        "late_p99_s": percentile(sorted(sample.late_s for sample in counted), 0.99),
    }
    return {key: round(value, DIGITS) if isinstance(value, float) else value for key, value in row.items()}


def first_errors(samples: Sequence[Sample], most: int = 3) -> list[str]:
    counts = Counter(sample.error for sample in samples if sample.error)
    return [f"{count} x {text}" for text, count in counts.most_common(most)]


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None
