"""Gauges of the pool, computed from its endpoints when Prometheus asks and never kept.

Averages and deviations are over endpoints whose metrics were read within `STALENESS_S`; with none such they are absent, for a value
from long ago would mislead an autoscaler. Not here: how load gets onto endpoints (datastore, engines).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
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
    def endpoints(self) -> Mapping[Address, Endpoint]: ...


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
    endpoints = list(pool.endpoints.values())
    fresh = [endpoint for endpoint in endpoints if now_s - endpoint.scraped_at_s <= staleness_s]
    pool_label = (pool.name,)
    for family, attribute, text in _STATISTICS:
        values = [float(getattr(endpoint, attribute)) for endpoint in fresh]
        average = Name(f"average_{family}", f"The average {text}", f"inference_pool_average_{family}")
        deviation = Name(f"std_dev_{family}", f"The standard deviation {text}")
        yield from with_twin(average, "gauge", ("name",), [(pool_label, round(fmean(values), 2))] if values else [])
        yield from with_twin(deviation, "gauge", ("name",), [(pool_label, round(pstdev(values), 2))] if values else [])
    yield from with_twin(_READY, "gauge", ("name",), [(pool_label, float(sum(endpoint.state in _IN_SERVICE for endpoint in endpoints)))])
    yield from with_twin(
        _QUEUES,
        "gauge",
        ("name", "model_server_endpoint"),
        [((pool.name, endpoint.name), endpoint.waiting) for endpoint in endpoints],
        twin_labels=("name", "model_server_pod"),
    )
    # one count per endpoint, not per flow: the flow labels stay empty, which Prometheus treats as absent
    holders = [((endpoint.name, endpoint.namespace, PRODUCER, "", ""), endpoint) for endpoint in endpoints]
    yield from with_twin(_INFLIGHT_REQUESTS, "gauge", _INFLIGHT_LABELS, [(labels, float(e.inflight_requests)) for labels, e in holders])
    yield from with_twin(_INFLIGHT_TOKENS, "gauge", _INFLIGHT_LABELS, [(labels, float(e.inflight_tokens)) for labels, e in holders])
