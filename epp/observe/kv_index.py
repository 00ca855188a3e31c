"""The precise prefix index as metric families, under the reference picker's names where it has them.

Not here: what is counted (prefix.kv_view), the events on their way there (events.counts).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol

from epp.observe.families import Family, Name, unlabelled, with_twin
from epp.observe.series import Histogram


class PredictionsView(Protocol):
    exact: int
    over: int
    under: int
    over_tokens: int
    under_tokens: int


class PreciseView(Protocol):
    @property
    def counts(self) -> Mapping[str, int]: ...
    @property
    def budget_bytes(self) -> int: ...
    @property
    def blocks(self) -> int: ...
    @property
    def bytes_used(self) -> int: ...


class KvIndexView(Protocol):
    """What there is to read (prefix.kv_view.KvView)."""

    lookups: int
    blocks_found: int
    approximated: int
    mismatches: int
    lookup_s: Histogram

    @property
    def precise(self) -> PreciseView: ...
    @property
    def predictions(self) -> PredictionsView: ...


def _name(name: str, text: str) -> Name:
    return Name(f"kv_cache_index_{name}", text, f"kvcache_index_{name}")


ADMISSIONS = _name("admissions_total", "Total number of KV-block admissions.")
EVICTIONS = _name("evictions_total", "Total number of KV-block evictions.")
LOOKUPS = _name("lookup_requests_total", "Total number of lookup calls.")
HITS = _name("lookup_hits_total", "Number of keys found in the cache on lookup.")
POD_HITS = _name("max_pod_hit_count_total", "Maximum cache hit count on a single pod per lookup.")
LATENCY = _name("lookup_latency_seconds", "Latency of lookups in seconds, hashing included.")


def index_families(index: KvIndexView) -> Iterator[Family]:
    precise, predictions = index.precise, index.predictions
    counters = (
        (ADMISSIONS, precise.counts.get("stored", 0)),
        (EVICTIONS, precise.counts.get("removed", 0)),
        (LOOKUPS, index.lookups),
        (HITS, index.blocks_found),
        (POD_HITS, index.blocks_found),
    )
    for name, count in counters:
        yield from with_twin(name, "counter", (), [((), float(count))])
    yield from unlabelled(LATENCY, index.lookup_s)
    yield Family("epp_kv_index_blocks", "Cached blocks known from engines' events.", "gauge", (), [((), float(precise.blocks))])
    yield Family("epp_kv_index_bytes", "Memory they take, estimated.", "gauge", (), [((), float(precise.bytes_used))])
    yield Family("epp_kv_index_budget_bytes", "Memory they may take.", "gauge", (), [((), float(precise.budget_bytes))])
    text = "Requests matched by what was sent where: without tokens, or with others than the engines'."
    yield Family("epp_kv_index_approximated_total", text, "counter", (), [((), float(index.approximated))])
    text = "Times the tokens of a model turned out not to be the engines'."
    yield Family("epp_kv_index_token_mismatches_total", text, "counter", (), [((), float(index.mismatches))])
    outcomes = [((outcome,), float(getattr(predictions, outcome))) for outcome in ("exact", "over", "under")]
    text = "Cached tokens of answered prompts, predicted, against what the engine reported."
    yield Family("epp_kv_index_predictions_total", text, "counter", ("outcome",), outcomes)
    wrong = [(("over",), float(predictions.over_tokens)), (("under",), float(predictions.under_tokens))]
    text = "Cached tokens by which predictions were wrong."
    yield Family("epp_kv_index_mispredicted_tokens_total", text, "counter", ("outcome",), wrong)
