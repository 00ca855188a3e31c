"""The last decisions as they were made, and the table that tells why: endpoint by scorer, weights, totals, the winner.

Bounded (`--debug-decisions`), and without a word of any prompt. A record holds references and copied score lists, no text: the table is
made when somebody asks. A record costs 4 µs at 16 endpoints and 8 at 1 000, so no more than one in `EVERY_S` is made: under a load where
the last hundred decisions are those of a few milliseconds, not every one is kept.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from heapq import nlargest
from typing import Any, NamedTuple

from epp.clock import Clock
from epp.scheduling.pipeline import ProfileTrace
from epp.types import Decision, Endpoint, LLMRequest

ENDPOINTS_SHOWN_MAX = 32
"""Rows of a table: the best, and the picked."""
REMOVED_SHOWN_MAX = 32
EVERY_S = 0.002


class Record(NamedTuple):
    """One decision, or the refusal of one."""

    at_s: float
    request_id: str
    path: str
    model: str
    target_model: str
    prompt_tokens: int
    priority: int
    matched_tokens: Mapping[int, int]
    """slot -> tokens of the prompt found cached."""
    traces: Sequence[ProfileTrace]
    decision: Decision | None
    error: str


class Decisions:
    """The last `records_max` of them."""

    def __init__(self, clock: Clock, records_max: int) -> None:
        self._clock = clock
        self._records: deque[Record] = deque(maxlen=records_max)
        self._next_s = 0.0

    def __len__(self) -> int:
        return len(self._records)

    def due(self) -> bool:
        """Whether the next decision is to be kept."""
        return self._clock.now_s() >= self._next_s

    def add(self, request: LLMRequest, traces: Sequence[ProfileTrace], decision: Decision | None, error: str = "") -> None:
        now_s = self._clock.now_s()
        self._next_s = now_s + EVERY_S
        self._records.append(record(now_s, request, traces, decision, error))

    def tables(self, count: int) -> list[dict[str, Any]]:
        """The newest first."""
        now_s = self._clock.now_s()
        newest = [self._records[-1 - i] for i in range(min(count, len(self._records)))]
        return [{"age_s": round(now_s - each.at_s, 3), **table(each)} for each in newest]


def record(at_s: float, request: LLMRequest, traces: Sequence[ProfileTrace], decision: Decision | None, error: str = "") -> Record:
    matched = request.prefix.matched_tokens if request.prefix is not None else {}
    return Record(
        at_s,
        request.id,
        request.path,
        request.model,
        request.target_model,
        request.prompt_tokens,
        request.priority,
        matched,
        traces,
        decision,
        error,
    )


def table(of: Record) -> dict[str, Any]:
    """As JSON: see `epp explain --help`."""
    decision = of.decision
    answer: dict[str, Any] = {
        "request_id": of.request_id,
        "path": of.path,
        "model": of.model,
        "target_model": of.target_model,
        "prompt_tokens": of.prompt_tokens,
        "priority": of.priority,
        "endpoint": decision.endpoint.name if decision else None,
        "destination": decision.destination if decision else None,
        "profile": decision.profile if decision else None,
        "targets": {name: endpoint.name for name, endpoint in decision.targets.items()} if decision else {},
        "profiles": [_profile(trace, of.matched_tokens) for trace in of.traces],
    }
    if of.error:
        answer["error"] = of.error
    return answer


def _profile(trace: ProfileTrace, matched_tokens: Mapping[int, int]) -> dict[str, Any]:
    count = len(trace.endpoints)
    picked = {endpoint.slot for endpoint in trace.chosen[:1]}
    shown = nlargest(ENDPOINTS_SHOWN_MAX, range(count), key=trace.totals.__getitem__)
    shown += [i for i in range(count) if trace.endpoints[i].slot in picked and i not in shown]
    rows = []
    for i in shown:
        endpoint = trace.endpoints[i]
        rows.append(
            {
                "name": endpoint.name,
                "address": endpoint.destination,
                "scores": {column.plugin: round(_score(column.scores, i, endpoint), 6) for column in trace.columns},
                "total": round(trace.totals[i], 6),
                "cached_tokens": matched_tokens.get(endpoint.slot, 0),
                "picked": endpoint.slot in picked,
            }
        )
    return {
        "profile": trace.profile,
        "filters": [
            {"filter": name, "removed": [e.name for e in removed[:REMOVED_SHOWN_MAX]], "removed_count": len(removed)}
            for name, removed in trace.filtered
        ],
        "scorers": [{"name": column.plugin, "weight": column.weight} for column in trace.columns],
        "endpoints": rows,
        "endpoints_count": count,
    }


def _score(scores: Sequence[float] | Mapping[int, float], position: int, endpoint: Endpoint) -> float:
    return scores.get(endpoint.slot, 0.0) if isinstance(scores, Mapping) else scores[position]
