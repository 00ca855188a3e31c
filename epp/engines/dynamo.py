"""NVIDIA Dynamo's `/metrics`: of a worker, on its system port, and of a frontend.

A worker adds the names of the engine inside it to its own: those tell most. Before its first request there are none: its requests in
flight are what is running. A frontend tells of all its workers: queued is what none of them has begun (recorded: as many as its two
workers said were waiting), and is among those in flight.
"""

from __future__ import annotations

from epp.datastore import Reading
from epp.engines.exposition import VALUE_MAX, find_all, labels_of, values
from epp.engines.family import METRICS_PATHS, Gauges, ReadingError, read_first, total
from epp.engines.sglang import Sglang
from epp.engines.trtllm_serve import TrtLlmServe
from epp.engines.vllm import Vllm

INFLIGHT = b"dynamo_component_inflight_requests"
FRONTEND_QUEUED = b"dynamo_frontend_queued_requests"
FRONTEND_INFLIGHT = b"dynamo_frontend_inflight_requests"
TRTLLM = Gauges(waiting=b"trtllm:num_requests_waiting", running=b"trtllm:num_requests_running", kv_usage=b"trtllm:kv_cache_usage_perc")


class _Worker:
    def read(self, text: bytes) -> Reading:
        """Requests at the endpoint `generate`, where there is one: the others are questions of Dynamo's own parts."""
        told = [(labels_of(labels).get("dynamo_endpoint"), value) for labels, value in find_all(text, INFLIGHT) if 0 <= value <= VALUE_MAX]
        inflight = [value for name, value in told if name == "generate"] or [value for _, value in told]
        if not inflight:
            raise ReadingError("no dynamo_component_ metrics in the answer")
        # no queue and no cache use are told, but those of the process that was here before must not stay
        return Reading(waiting=0.0, running=sum(inflight), kv_usage=None if any(inflight) else 0.0)


class _Frontend:
    def read(self, text: bytes) -> Reading:
        queued, inflight = values(text, FRONTEND_QUEUED), values(text, FRONTEND_INFLIGHT)
        if not (queued and inflight):
            raise ReadingError("no dynamo_frontend_ metrics in the answer")
        return Reading(waiting=total(queued), running=max(0.0, sum(inflight) - sum(queued)))


_READERS = (Vllm(), Sglang(), TRTLLM, TrtLlmServe(), _Worker(), _Frontend())


class Dynamo:
    """An `epp.engines.family.EngineFamily`."""

    name = "dynamo"
    paths = METRICS_PATHS

    def read(self, text: bytes) -> Reading:
        return read_first(_READERS, text)
