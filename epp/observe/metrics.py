"""Every metric of the picker: cells for the request path, families for Prometheus.

The request path touches cells only (`series`): a dict look-up on a tuple, then attributes. Names, twins and texts come into play
when Prometheus asks (`exposition`). A family and its older twin are read from the same cells, so nothing is counted twice on the
request path. Not here: the HTTP server (app).

Labels that clients choose are bounded: `LABEL_VALUES_MAX` distinct values each and `SERIES_MAX` combinations, then `other`;
`limit_hits` counts what was folded.

Cost per request: `series` 0.15 µs, each `observe` 0.15 µs, `picked` 0.2 µs.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Container, Iterator, Mapping
from typing import Protocol

from prometheus_client import CollectorRegistry, Metric, PlatformCollector, ProcessCollector
from prometheus_client.exposition import choose_encoder, generate_latest

from epp.clock import Clock
from epp.observe import families, text
from epp.observe.pool import STALENESS_S, ClusterView, PoolView, cluster_families, leader_family, pool_families
from epp.observe.series import HIT_BYTES, HIT_RATIO, SCHEDULER_S, Histogram, RequestSeries
from epp.types import Endpoint

LABEL_VALUES_MAX = 1000
"""Distinct model names, and distinct fairness ids, that get a label of their own."""
SERIES_MAX = 10_000
"""Distinct combinations of them: 4 KB each."""
ATTEMPTS_MAX = 10_000
"""Distinct (target model, endpoint) pairs counted; pods come and go, their counts stay."""
OTHER = "other"


class IndexView(Protocol):
    """What is needed of a prefix index; `epp.prefix.index.PrefixIndex` is one."""

    @property
    def blocks(self) -> int: ...


class PollView(Protocol):
    """What is needed of a source of data that polls; the scraper and the file source are such."""

    @property
    def poll_errors_total(self) -> int: ...


class ScraperView(Protocol):
    """What is needed of the scraper, besides its errors."""

    @property
    def polls_total(self) -> int: ...

    @property
    def restarts_total(self) -> int: ...

    @property
    def without_metrics(self) -> int: ...

    @property
    def interval_s(self) -> float: ...


class OutlierView(Protocol):
    """What is needed of the passive health checks; `epp.outliers.Outliers` is such."""

    @property
    def ejections_total(self) -> int: ...

    def __len__(self) -> int: ...


class BoundedLabel:
    """Lets the first `values_max` distinct values through; the rest become `other`. Names in `always` are let through whenever they come."""

    def __init__(self, values_max: int) -> None:
        self._values_max = values_max
        self.always: Callable[[], Container[str]] = tuple
        self._seen: set[str] = set()

    def fold(self, value: str) -> str:
        if value in self._seen:
            return value
        if len(self._seen) < self._values_max or value in self.always():
            self._seen.add(value)
            return value
        return OTHER


class Metrics:
    """See the module. One per process, built by the composition root and handed to who counts."""

    def __init__(
        self,
        *,
        clock: Clock,
        pool: PoolView | None = None,
        indexes: Mapping[tuple[str, str], IndexView] | None = None,
        polls: Mapping[str, PollView] | None = None,
        staleness_s: float = STALENESS_S,
        commit: str = "",
        build_ref: str = "",
        process: bool = False,
        label_values_max: int = LABEL_VALUES_MAX,
        series_max: int = SERIES_MAX,
        attempts_max: int = ATTEMPTS_MAX,
    ) -> None:
        """`indexes` by (plugin name, plugin type); `polls` by source type; `process` adds CPU, memory and Python version."""
        self.scheduler_duration_s = Histogram(SCHEDULER_S)
        self.prefix_hit_ratio = Histogram(HIT_RATIO)
        self.prefix_hit_bytes = Histogram(HIT_BYTES)
        self.limit_hits: defaultdict[str, int] = defaultdict(int)
        """name of a limit -> times it was hit; any part of the program may count its own here."""
        self.registry = CollectorRegistry()
        """For collectors of third-party plugins; exposed after our own families."""
        if process:
            self.registry.register(ProcessCollector(registry=None))
            self.registry.register(PlatformCollector(registry=None))
        self._clock = clock
        self._pool = pool
        self.indexes = indexes or {}
        self.stage_decisions: Mapping[tuple[str, str], Mapping[tuple[str, str], int]] = {}
        """(plugin name, plugin type) -> (model, which stages ran) -> decisions."""
        self.config_reloads: defaultdict[str, int] = defaultdict(int)
        """Outcome (`applied`, `rejected`) -> times the configuration file changed."""
        self.parts: list[Callable[[], Iterator[families.Family]]] = []
        """Families of parts that are not always there."""
        self.outliers: OutlierView | None = None
        self.scraper: ScraperView | None = None
        self.cluster: ClusterView | None = None
        self.leading: bool | None = None
        """None: there is no election."""
        self._rewrites: defaultdict[tuple[str, str, str], int] = defaultdict(int)
        self.polls: dict[str, PollView] = dict(polls or {})
        self._staleness_s = staleness_s
        self._build = (commit, build_ref)
        self.models = BoundedLabel(label_values_max)
        """Model names as labels; `always` is for those the operator writes in rewrite rules."""
        self._fairness_ids = BoundedLabel(label_values_max)
        self._series_max = series_max
        self._attempts_max = attempts_max
        self._series: dict[tuple[str, str, str, int], RequestSeries] = {}
        self._attempts: dict[tuple[str, str], int] = {}
        self._targets: dict[str, tuple[str, str, str]] = {}
        """destination -> endpoint name, namespace, port."""
        self._failures: defaultdict[str, int] = defaultdict(int)

    def series(self, model: str, target_model: str, fairness_id: str = "", priority: int = 0) -> RequestSeries:
        """The cells of this label set; made on first sight, folded into `other` past the limits."""
        found = self._series.get((model, target_model, fairness_id, priority))
        return found if found is not None else self._admit(model, target_model, fairness_id, priority)

    def picked(self, target_model: str, endpoint: Endpoint) -> None:
        """Scheduling succeeded: one attempt for that endpoint."""
        try:
            self._attempts[target_model, endpoint.destination] += 1
        except KeyError:
            self._first_attempt(target_model, endpoint)

    def not_picked(self, target_model: str) -> None:
        """Scheduling failed: one attempt without an endpoint."""
        self._failures[self.models.fold(target_model)] += 1

    def rewritten(self, rewrite: str, model: str, target_model: str) -> None:
        """An InferenceModelRewrite gave a request another model."""
        self._rewrites[rewrite, self.models.fold(model), target_model] += 1

    def exposition(self, accept: str = "") -> tuple[bytes, str]:
        """Body and content type for an `Accept` header: the plain text format 0.0.4, or OpenMetrics if asked for."""
        encode, content_type = choose_encoder(accept)
        if "openmetrics" in content_type:
            return encode(self), content_type
        return b"".join(self.plain_parts()), text.PLAIN_CONTENT_TYPE

    def plain_parts(self) -> Iterator[bytes]:
        """The plain text family by family, so that a server can let requests through between two."""
        for family in self.gather():
            yield text.plain(family).encode()
        yield generate_latest(self.registry)

    def collect(self) -> Iterator[Metric]:
        """As a prometheus-client collector."""
        for family in self.gather():
            yield text.metric(family)
        yield from self.registry.collect()

    def gather(self) -> Iterator[families.Family]:
        """Every family of our own, as it is now."""
        yield from families.request_families([(_labels(key), s) for key, s in list(self._series.items())])
        yield from families.unlabelled(families.SCHEDULER_SECONDS, self.scheduler_duration_s)
        yield from families.with_twin(
            families.ATTEMPTS,
            "counter",
            ("status", "target_model_name", "endpoint_name", "namespace", "port"),
            self._attempt_values(),
            twin_labels=("status", "target_model_name", "pod_name", "namespace", "port"),
        )
        yield from families.unlabelled(families.HIT_RATIOS, self.prefix_hit_ratio)
        yield from families.unlabelled(families.HIT_LENGTHS, self.prefix_hit_bytes)
        sizes = [(names, float(index.blocks)) for names, index in self.indexes.items()]
        yield from families.with_twin(families.INDEX_SIZE, "gauge", ("plugin_name", "plugin_type"), sizes)
        errors = [((source_type,), float(poll.poll_errors_total)) for source_type, poll in self.polls.items()]
        yield from families.with_twin(families.POLL_ERRORS, "counter", ("source_type",), errors)
        yield from families.with_twin(families.INFO, "gauge", ("commit", "build_ref"), [(self._build, 1.0)])
        rewrites = [(key, float(count)) for key, count in list(self._rewrites.items())]
        yield from families.with_twin(families.REWRITES, "counter", ("model_rewrite_name", "model_name", "target_model"), rewrites)
        yield from families.stage_families(self.stage_decisions)
        reloads = [((outcome,), float(count)) for outcome, count in list(self.config_reloads.items())]
        yield families.Family("epp_config_reloads_total", "Changes of the configuration file.", "counter", ("outcome",), reloads)
        hits = [((limit,), float(count)) for limit, count in list(self.limit_hits.items())]
        yield families.Family("epp_limit_hits_total", "Times a named limit of the picker was hit.", "counter", ("limit",), hits)
        if self.outliers is not None:
            help_text = "Endpoints left out because requests sent to them failed."
            yield families.Family("epp_ejected_endpoints", help_text, "gauge", (), [((), float(len(self.outliers)))])
            yield families.Family(
                "epp_ejections_total", "Times an endpoint was left out.", "counter", (), [((), float(self.outliers.ejections_total))]
            )
        if self.scraper is not None:
            yield from families.scraper_families(
                self.scraper.polls_total, self.scraper.restarts_total, self.scraper.without_metrics, self.scraper.interval_s
            )
        for part in self.parts:
            yield from part()
        if self.cluster is not None:
            yield from cluster_families(self.cluster, self._clock.now_s())
        if self.leading is not None:
            yield leader_family(self.leading)
        if self._pool is not None:
            yield from pool_families(self._pool, self._clock.now_s(), self._staleness_s)

    def _attempt_values(self) -> list[families.Labelled]:
        values: list[families.Labelled] = [
            (("success", target_model, *self._targets[destination]), float(count))
            for (target_model, destination), count in list(self._attempts.items())
        ]
        values += [(("failure", target_model, "", "", ""), float(count)) for target_model, count in list(self._failures.items())]
        return values

    def _admit(self, model: str, target_model: str, fairness_id: str, priority: int) -> RequestSeries:
        wanted = (model, target_model, fairness_id, priority)
        key = (self.models.fold(model), self.models.fold(target_model), self._fairness_ids.fold(fairness_id), priority)
        if key not in self._series and len(self._series) >= self._series_max:
            key = (OTHER, OTHER, OTHER, priority)  # priorities are the operator's, few
        if key != wanted:
            self.limit_hits["metric_labels"] += 1
        if key not in self._series:
            self._series[key] = RequestSeries()
        return self._series[key]

    def _first_attempt(self, target_model: str, endpoint: Endpoint) -> None:
        target_model, destination = self.models.fold(target_model), endpoint.destination
        if (target_model, destination) not in self._attempts and len(self._attempts) >= self._attempts_max:
            self.limit_hits["metric_labels"] += 1
            destination = OTHER
        self._targets.setdefault(
            destination, (OTHER, "", "") if destination is OTHER else (endpoint.name, endpoint.namespace, str(endpoint.spec.address.port))
        )
        self._attempts[target_model, destination] = self._attempts.get((target_model, destination), 0) + 1


def _labels(key: tuple[str, str, str, int]) -> families.SeriesKey:
    model, target_model, fairness_id, priority = key
    return model, target_model, fairness_id, str(priority)
