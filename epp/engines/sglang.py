"""SGLang's `/metrics`; the engine answers there only when started with --enable-metrics.

Each data-parallel rank has series of its own (`dp_rank`), which are summed. The tensor, pipeline and expert ranks of one of them see the
same queue, and with priority scheduling a queue is told as a whole and again by priority: of series that differ in anything but
`dp_rank` the largest counts.

The cache's size is two gauges since 0.5.12; before, they were the labels of `sglang:cache_config_info`. Adapters are not named anywhere.
"""

from __future__ import annotations

from collections.abc import Iterable

from epp.datastore import Reading
from epp.engines.exposition import VALUE_MAX, find_all, labels_of, values
from epp.engines.family import METRICS_PATHS, ReadingError, count, fullest, total

WAITING = b"sglang:num_queue_reqs"
RUNNING = b"sglang:num_running_reqs"
KV_USAGE = b"sglang:token_usage"
PAGE_TOKENS = b"sglang:page_size"
PAGES = b"sglang:num_pages"
CACHE_CONFIG = b"sglang:cache_config_info"
PREFIX_QUERIES = b"sglang:prompt_tokens_total"
PREFIX_HITS = b"sglang:cached_tokens_total"


class Sglang:
    """An `epp.engines.family.EngineFamily`."""

    name = "sglang"
    paths = METRICS_PATHS

    def read(self, text: bytes) -> Reading:
        waiting = by_rank(find_all(text, WAITING))
        running = by_rank(find_all(text, RUNNING))
        usage = values(text, KV_USAGE)
        if not (waiting or running or usage):
            raise ReadingError("no sglang: metrics in the answer")
        page_tokens, pages = _cache_size(text)
        return Reading(
            waiting=total(waiting),
            running=total(running),
            kv_usage=fullest(usage),
            kv_block_tokens=page_tokens,
            kv_blocks=pages,
            prefix_queries=total(values(text, PREFIX_QUERIES)),
            prefix_hits=total(values(text, PREFIX_HITS)),
        )


def by_rank(samples: Iterable[tuple[bytes, float]]) -> list[float]:
    """One value a data-parallel rank: the largest of its series."""
    found: dict[str, float] = {}
    for labels, value in samples:
        if 0 <= value <= VALUE_MAX:
            rank = labels_of(labels).get("dp_rank", "")
            found[rank] = max(value, found.get(rank, 0.0))
    return list(found.values())


def _cache_size(text: bytes) -> tuple[int | None, int | None]:
    """Tokens a page and pages of all ranks."""
    pages = by_rank(find_all(text, PAGES))
    if pages:
        return int(max(values(text, PAGE_TOKENS), default=0)) or None, int(sum(pages)) or None
    configs = [(labels, labels_of(labels)) for labels, _ in find_all(text, CACHE_CONFIG)]
    page_tokens = max((count(config.get("page_size")) for _, config in configs), default=0)
    old_pages = sum(by_rank((labels, count(config.get("num_pages"))) for labels, config in configs))
    return page_tokens or None, int(old_pages) or None
