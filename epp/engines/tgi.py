"""Text Generation Inference's `/metrics`: queue and running batch. It does not tell how full its cache is."""

from __future__ import annotations

from epp.datastore import Reading
from epp.engines.family import METRICS_PATHS, Gauges

GAUGES = Gauges(waiting=b"tgi_queue_size", running=b"tgi_batch_current_size")


class Tgi:
    """An `epp.engines.family.EngineFamily`."""

    name = "tgi"
    paths = METRICS_PATHS

    def read(self, text: bytes) -> Reading:
        return GAUGES.read(text)
