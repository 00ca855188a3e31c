"""Numbers known of an endpoint, by key: what data sources read (`GPUUtilization`), and what is known of every endpoint here.

`GPUUtilization/dcgm-extractor`, the reference picker's spelling with the producer after a slash, is the same as `GPUUtilization`: keys are
unique here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import nan
from operator import attrgetter

from epp.types import Endpoint

OWN: Mapping[str, Callable[[Endpoint], float]] = {
    "WaitingQueueSize": attrgetter("waiting_estimate"),
    "RunningRequestsSize": attrgetter("running_estimate"),
    "KVCacheUsagePercent": attrgetter("kv_usage_estimate"),
    "InflightRequests": attrgetter("inflight_requests"),
    "InflightTokens": attrgetter("inflight_tokens"),
    "PrefillTokensPerSecond": attrgetter("capacity.prefill_tokens_per_s"),
    "DecodeStepSeconds": attrgetter("capacity.step_s"),
}


def reader(key: str) -> Callable[[Endpoint], float]:
    """Reads that number of an endpoint; NaN where it is not known."""
    name = key.partition("/")[0]
    return OWN.get(name) or (lambda endpoint: endpoint.attributes.get(name, nan))
