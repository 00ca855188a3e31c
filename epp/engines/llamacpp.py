"""llama.cpp's `/metrics`: samples without labels, one server a model. The engine answers there only when started with --metrics.

`prompt_tokens_total` leaves out the tokens found in the cache: looked up were both. `kv_cache_usage_ratio` is gone from newer servers.
"""

from __future__ import annotations

from epp.datastore import Reading
from epp.engines.exposition import values
from epp.engines.family import METRICS_PATHS, Gauges, total

GAUGES = Gauges(waiting=b"llamacpp:requests_deferred", running=b"llamacpp:requests_processing", kv_usage=b"llamacpp:kv_cache_usage_ratio")
COMPUTED = b"llamacpp:prompt_tokens_total"
CACHED = b"llamacpp:prompt_tokens_cached_total"


class LlamaCpp:
    """An `epp.engines.family.EngineFamily`."""

    name = "llamacpp"
    paths = METRICS_PATHS

    def read(self, text: bytes) -> Reading:
        reading = GAUGES.read(text)
        computed, cached = values(text, COMPUTED), values(text, CACHED)
        if not (computed and cached):
            return reading
        return reading._replace(prefix_queries=sum(computed) + sum(cached), prefix_hits=total(cached))
