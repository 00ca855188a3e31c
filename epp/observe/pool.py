"""Gauges of the pool, computed from its endpoints when Prometheus asks and never kept.

Averages and deviations are over endpoints whose metrics were read within `STALENESS_S`; with none such they are absent, for a value
from long ago would mislead an autoscaler. Not here: how load gets onto endpoints (datastore, engines).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean, pstdev
from typing import Protocol

from epp.observe.families import Family, Name, with_twin
from epp.types import Address, Endpoint

STALENESS_S = 2.0
"""`--metrics-staleness-threshold`: readings older than this don't count in averages."""
PRODUCER = "inflight-load-producer"
"""The reference picker's name for what counts requests in flight; part of its label set."""


_IN_SERVICE = frozenset({"healthy", "half-open"})


class PoolView(Protocol):
    """What is needed of the pool; `epp.datastore.Datastore` is one."""

    @property
    def name(self) -> str: ...

    @property
    def pools(self) -> Sequence[str]: ...

    @property
    def endpoints(self) -> Mapping[Address, Endpoint]: ...


class KnownPool(Protocol):
    """What is needed of a pool in a cluster; `epp.pools.Pool` is one."""

    @property
    def name(self) -> str: ...

    @property
    def exists(self) -> bool: ...

    @property
    def synced(self) -> bool: ...

    @property
    def view_as_of_s(self) -> float: ...


class ClusterView(Protocol):
    """What is needed of the watch of a cluster; `epp.sources.kubernetes.source.KubernetesSource` is one."""

    @property
    def pools(self) -> Sequence[KnownPool]: ...

    @property
    def events_total(self) -> int: ...

    @property
    def relists_total(self) -> int: ...

    @property
    def poll_errors_total(self) -> int: ...


_STATISTICS = (
    ("kv_cache_utilization", "kv_usage", "kv cache utilization for an inference server pool."),
    ("queue_size", "waiting", "number of requests pending in the model server queue."),
    ("running_requests", "running", "number of running requests across model servers in the pool."),
)
"""family, attribute of Endpoint, text."""
_READY = Name(
    "ready_endpoints",
    "The number of ready endpoints in the inference server pool.",
    "inference_pool_ready_pods",
    "The number of ready pods in the inference server pool.",
)
_QUEUES = Name(
    "per_endpoint_queue_size",
    "The total number of requests pending in the model server queue for each underlying endpoint.",
    "inference_pool_per_pod_queue_size",
    "The total number of requests pending in the model server queue for each underlying pod.",
)
_INFLIGHT_REQUESTS = Name(
    "inflight_requests", "Current number of in-flight requests per endpoint, as tracked by the in-flight load producer."
)
_INFLIGHT_TOKENS = Name(
    "inflight_tokens",
    "Current number of in-flight tokens per endpoint (uncached prompt tokens, optionally plus estimated output),"
    " as tracked by the in-flight load producer.",
)
_INFLIGHT_LABELS = ("endpoint_name", "namespace", "producer_name", "fairness_id", "priority")


def pool_families(pool: PoolView, now_s: float, staleness_s: float = STALENESS_S) -> Iterator[Family]:
    everywhere = list(pool.endpoints.values())
    members = {name: [e for e in everywhere if name in e.spec.pools] for name in pool.pools} if pool.pools else {pool.name: everywhere}
    fresh = {name: [e for e in there if now_s - e.scraped_at_s <= staleness_s] for name, there in members.items()}
    for family, attribute, text in _STATISTICS:
        values = [((name,), [float(getattr(endpoint, attribute)) for endpoint in there]) for name, there in fresh.items() if there]
        average = Name(f"average_{family}", f"The average {text}", f"inference_pool_average_{family}")
        deviation = Name(f"std_dev_{family}", f"The standard deviation {text}")
        yield from with_twin(average, "gauge", ("name",), [(label, round(fmean(its), 2)) for label, its in values])
        yield from with_twin(deviation, "gauge", ("name",), [(label, round(pstdev(its), 2)) for label, its in values])
    ready = [((name,), float(sum(endpoint.state in _IN_SERVICE for endpoint in there))) for name, there in members.items()]
    yield from with_twin(_READY, "gauge", ("name",), ready)
    yield from with_twin(
        _QUEUES,
        "gauge",
        ("name", "model_server_endpoint"),
        [((name, endpoint.name), endpoint.waiting) for name, there in members.items() for endpoint in there],
        twin_labels=("name", "model_server_pod"),
    )
    # one count per endpoint, not per flow: the flow labels stay empty, which Prometheus treats as absent
    holders = [((endpoint.name, endpoint.namespace, PRODUCER, "", ""), endpoint) for endpoint in everywhere]
    yield from with_twin(_INFLIGHT_REQUESTS, "gauge", _INFLIGHT_LABELS, [(labels, float(e.inflight_requests)) for labels, e in holders])
    yield from with_twin(_INFLIGHT_TOKENS, "gauge", _INFLIGHT_LABELS, [(labels, float(e.inflight_tokens)) for labels, e in holders])


def cluster_families(cluster: ClusterView, now_s: float) -> Iterator[Family]:
    """What is known of the view of a Kubernetes cluster."""
    ages = [((pool.name,), max(0.0, now_s - pool.view_as_of_s)) for pool in cluster.pools if pool.synced]
    help_text = "Since the view of the pool was last known to be the API server's."
    yield Family("epp_kubernetes_view_age_seconds", help_text, "gauge", ("name",), ages)
    exists = [((pool.name,), float(pool.exists)) for pool in cluster.pools]
    yield Family("epp_kubernetes_pool_exists", "Whether the InferencePool is there.", "gauge", ("name",), exists)
    yield Family("epp_kubernetes_events_total", "Changes the API server told of.", "counter", (), [((), float(cluster.events_total))])
    relists = [((), float(cluster.relists_total))]
    yield Family("epp_kubernetes_relists_total", "Times a kind of object was listed whole.", "counter", (), relists)


def leader_family(leading: bool) -> Family:
    return Family("epp_leader", "Whether this replica holds the Lease.", "gauge", (), [((), float(leading))])
