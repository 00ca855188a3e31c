"""From candidates to a decision: producers, admitters, then the profile handler with one or more profiles of filters, scorers and a picker.

Total score of an endpoint = sum over scorers of weight x clamp(score, 0, 1); not normalised by the sum of weights, as in the reference
picker. What depends on endpoint load alone is summed when load changes and kept (`load_scores`); per request only sparse scores are
added. Filters that look at labels alone are run when the set of candidates changes. No await anywhere: the decision is atomic.

Cost of the three default scorers of the reference picker: 2-3 µs at 16 endpoints, about 10 µs at 1 000, producer not counted.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from epp.errors import SaturatedError
from epp.plugins.base import Admitter, Detector, Filter, Picker, Plugin, Producer, ProfileHandler, SparseScorer, hook
from epp.plugins.producers.inflight_load import InflightLoadProducer
from epp.scheduling.load_scores import Column, LoadScores, Weighted, clamp, scores_of
from epp.types import Decision, Endpoint, LLMRequest, Snapshot

_log = logging.getLogger("epp.scheduling")


class ProfileTrace(NamedTuple):
    """How one run of a profile came to its choice."""

    profile: str
    filtered: Sequence[tuple[str, Sequence[Endpoint]]]
    """Filter and what it took out, for those that took out any."""
    endpoints: Sequence[Endpoint]
    columns: Sequence[Column]
    totals: Sequence[float]
    chosen: Sequence[Endpoint]


class Profile:
    """Filters, weighted scorers and one picker, sorted once into what runs per change of load and what runs per request."""

    def __init__(self, name: str, filters: Sequence[Filter], scorers: Sequence[Weighted], picker: Picker) -> None:
        self.name = name
        leading = next((i for i, each in enumerate(filters) if getattr(each, "per_request", True)), len(filters))
        self._label_filters = tuple(filters[:leading])
        self._filters = tuple(filters[leading:])
        self._load_scores = LoadScores([w for w in scorers if not w.scorer.per_request])
        per_request = [w for w in scorers if w.scorer.per_request]
        self._sparse = [(w.scorer.score_sparse, w) for w in per_request if isinstance(w.scorer, SparseScorer)]
        self._per_request = [w for w in per_request if not isinstance(w.scorer, SparseScorer)]
        self._alone = len(scorers) == len(self._per_request) == 1 and self._per_request[0].weight == 1.0
        """One scorer decides, whose scores are the totals."""
        self._picker = picker
        self._labelled: tuple[Snapshot, Snapshot] | None = None
        """Candidates and what the label filters left of them, the last time."""

    def run(
        self, request: LLMRequest, candidates: Snapshot, rng: random.Random, trace: list[ProfileTrace] | None = None
    ) -> Sequence[Endpoint]:
        """The picker's choice, best first. Raises SaturatedError when the filters leave nobody."""
        filtered: list[tuple[str, Sequence[Endpoint]]] = []
        if self._label_filters or self._filters:
            candidates = self._filtered(request, candidates, filtered, anew=trace is not None)
        if not candidates.endpoints:
            if trace is not None:
                trace.append(ProfileTrace(self.name, filtered, (), (), (), ()))
            raise SaturatedError("no endpoints available for the given request")
        totals: Sequence[float] = self._load_scores.totals(request, candidates)
        columns = self._load_scores.columns() if trace is not None else None
        if self._sparse:
            totals = self._with_sparse(request, totals, candidates.by_slot, columns)
        for weighted in self._per_request:
            scores = scores_of(weighted.scorer, request, candidates.endpoints)
            alone = self._alone and type(scores) is list and len(scores) == len(candidates.endpoints)
            totals = scores if alone else [total + weighted.weight * score for total, score in zip(totals, scores, strict=True)]
            if columns is not None:
                columns.append(Column(weighted.name, weighted.weight, scores))
        chosen = self._picker.pick(totals, candidates.endpoints, rng)
        if trace is not None and columns is not None:
            kept = list(totals) if totals is self._load_scores.kept else totals
            trace.append(ProfileTrace(self.name, filtered, candidates.endpoints, columns, kept, chosen))
        return chosen

    def _with_sparse(
        self, request: LLMRequest, kept: Sequence[float], by_slot: Mapping[int, int], columns: list[Column] | None
    ) -> list[float]:
        """A copy of the totals with the sparse scores added."""
        totals = list(kept)
        for score_sparse, weighted in self._sparse:
            found, weight = score_sparse(request), weighted.weight
            for slot, score in found.items():
                position = by_slot.get(slot)
                if position is not None:
                    totals[position] += weight * clamp(score)
            if columns is not None:
                columns.append(Column(weighted.name, weight, found))
        return totals

    def _filtered(
        self, request: LLMRequest, candidates: Snapshot, filtered: list[tuple[str, Sequence[Endpoint]]], *, anew: bool
    ) -> Snapshot:
        """What the filters leave; label filters are asked again only about other candidates, or `anew` to tell what they took out."""
        if self._label_filters:
            if self._labelled is None or self._labelled[0] is not candidates:
                self._labelled = candidates, self._kept(self._label_filters, request, candidates, filtered)
            elif anew:
                self._kept(self._label_filters, request, candidates, filtered)
            candidates = self._labelled[1]
        return self._kept(self._filters, request, candidates, filtered) if self._filters else candidates

    @staticmethod
    def _kept(
        filters: Iterable[Filter], request: LLMRequest, candidates: Snapshot, filtered: list[tuple[str, Sequence[Endpoint]]]
    ) -> Snapshot:
        for each in filters:
            if not candidates.endpoints:
                break
            kept = each.keep(request, candidates.endpoints)
            if len(kept) != len(candidates.endpoints):
                left = {endpoint.slot for endpoint in kept}
                filtered.append((getattr(each, "name", ""), [e for e in candidates.endpoints if e.slot not in left]))
                candidates = Snapshot.of(kept)
        return candidates


class Scheduler:
    """See the module. One per configuration; replaced whole when that changes."""

    def __init__(
        self,
        profiles: Sequence[Profile],
        handler: ProfileHandler | None,
        plugins: Iterable[Plugin],
        rng: random.Random,
        *,
        producers: Sequence[Producer] = (),
        detector: Detector | None = None,
        inflight: InflightLoadProducer | None = None,
    ) -> None:
        """`handler` None: the one profile there is. `producers` in the order they run. `inflight`: how requests are charged."""
        self._profiles = {profile.name: profile for profile in profiles}
        self._only = profiles[0] if handler is None else None
        self._handler = handler
        self._rng = rng
        self.producers = tuple(producers)
        everyone = tuple(plugins)
        self._admitters = [each for each in everyone if isinstance(each, Admitter)]
        self.detector = detector
        self.inflight = inflight or InflightLoadProducer()
        self.own_headers: tuple[str, ...] = handler.own_headers if handler else ()
        # plugins' hooks
        self.picked = _hooks(everyone, "picked")
        self.served = _hooks(everyone, "served")
        self.response_headers = _hooks(everyone, "response_headers")
        self.first_token = _hooks(everyone, "first_token")
        self.finished = _hooks(everyone, "finished")
        self.report = _hooks(everyone, "report")

    def schedule(self, request: LLMRequest, candidates: Snapshot, trace: list[ProfileTrace] | None = None) -> Decision:
        """Where `request` goes. `candidates` is not empty. Raises EppError: SaturatedError, or what an admitter says."""
        for producer in self.producers:
            try:
                producer.produce(request, candidates)
            except Exception:  # noqa: BLE001 - a producer's failure costs its data, never the request (inventory section 2.7)
                _log.exception("a data producer failed", extra={"fields": {"plugin": getattr(producer, "name", "")}})
        if self._admitters:
            for admitter in self._admitters:
                admitter.admit(request, candidates.endpoints)
        if self._only is not None:
            chosen = self._only.run(request, candidates, self._rng, trace)
            return Decision(chosen[0], tuple(chosen[1:]), self._only.name)
        assert self._handler is not None

        def run(name: str) -> Sequence[Endpoint]:
            return self._profiles[name].run(request, candidates, self._rng, trace)

        outcome = self._handler.schedule(request, run, tuple(self._profiles))
        chosen = outcome.chosen
        return Decision(chosen[0], tuple(chosen[1:]), outcome.profile, outcome.targets, outcome.headers, outcome.instead)


def _hooks(plugins: Iterable[Plugin], name: str) -> tuple[Any, ...]:
    return tuple(found for plugin in plugins if (found := hook(plugin, name)))
