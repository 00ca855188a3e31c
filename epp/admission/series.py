"""The cells flow control counts in. Names and texts: families. Clients choose fairness ids and models, so label sets are bounded."""

from __future__ import annotations

from collections import defaultdict

from epp.admission.refusals import Outcome
from epp.observe.series import SCHEDULER_S, Histogram
from epp.types import LLMRequest

SERIES_MAX = 2_000
OTHER = "other"
QUEUE_S = (0.0001, 0.0005, 0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
REVOCATION_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)

Key = tuple[str, int, str, str, str]


class FlowSeries:
    """Of one (fairness id, priority, pool, model, target model). About 1 KB."""

    __slots__ = ("_at_once", "_passing_s", "enqueue_s", "queue_s", "queued", "size_bytes")

    def __init__(self) -> None:
        self.queued = 0
        self.size_bytes = 0
        self.queue_s: dict[Outcome, Histogram] = {}
        self.enqueue_s: dict[Outcome, Histogram] = {}
        self._at_once: Histogram | None = None
        """Of those that were let through, as is the next one: found once."""
        self._passing_s: Histogram

    def passed(self, took_s: float) -> None:
        """It was let through without a wait: `ended` and `entered` in one."""
        if self._at_once is None:
            self._at_once = self.queue_s.setdefault(Outcome.DISPATCHED, Histogram(QUEUE_S))
            self._passing_s = self.enqueue_s.setdefault(Outcome.DISPATCHED, Histogram(SCHEDULER_S))
        self._at_once.counts[0] += 1
        self._passing_s.observe(took_s)

    def ended(self, outcome: Outcome, wait_s: float) -> None:
        """The one outcome of a request."""
        cell = self.queue_s.get(outcome)
        if cell is None:
            cell = self.queue_s[outcome] = Histogram(QUEUE_S)
        cell.observe(wait_s)

    def entered(self, outcome: Outcome, took_s: float) -> None:
        cell = self.enqueue_s.get(outcome)
        if cell is None:
            cell = self.enqueue_s[outcome] = Histogram(SCHEDULER_S)
        cell.observe(took_s)


class Counts:
    """All cells of one FlowControl."""

    def __init__(self, pool_name: str, series_max: int = SERIES_MAX) -> None:
        self.pool_name = pool_name
        self._series_max = series_max
        self.series: dict[Key, FlowSeries] = {}
        self.cycle_s = Histogram(SCHEDULER_S)
        self.limit_hits: defaultdict[str, int] = defaultdict(int)
        """Named limits of flow control that were hit."""

    def of(self, request: LLMRequest, fairness_id: str, priority: int) -> FlowSeries:
        """The label set's cells; folded into `other` past the limit."""
        key = (fairness_id, priority, request.pool or self.pool_name, request.model, request.target_model)
        found = self.series.get(key)
        if found is None:
            if len(self.series) >= self._series_max:
                self.limit_hits["metric_labels"] += 1
                key = (OTHER, priority, request.pool or self.pool_name, OTHER, OTHER)
                found = self.series.get(key)
            if found is None:
                found = self.series[key] = FlowSeries()
        return found

    @property
    def outcomes(self) -> dict[tuple[Outcome, int, str], int]:
        """(outcome, priority, pool) -> requests. Priorities are of bands, hence few."""
        found: defaultdict[tuple[Outcome, int, str], int] = defaultdict(int)
        for (_, priority, pool, _, _), series in list(self.series.items()):
            for outcome, waits in list(series.queue_s.items()):
                found[outcome, priority, pool] += waits.count
        return dict(found)
