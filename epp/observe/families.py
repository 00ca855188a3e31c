"""The names of every metric family, each with its older twin, and how cells become families.

Names, labels and HELP texts are the reference picker's, so that its dashboards, alerts and autoscalers go on working. A twin counts
the same cells over fewer labels. Not here: the cells (series), the text (text) and who asks (metrics).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

from epp.observe.series import Histogram, RequestSeries

NAMESPACE = "llm_d_epp_"
MODEL_LABELS = ("model_name", "target_model_name")
FLOW_LABELS = (*MODEL_LABELS, "fairness_id", "priority")

SeriesKey = tuple[str, str, str, str]
"""model, target model, fairness id, priority: the values of `FLOW_LABELS`."""
Labelled = tuple[Sequence[str], float]
Cell = tuple[Sequence[str], Histogram]


class Family(NamedTuple):
    """One family, ready to be written."""

    name: str
    help: str
    kind: Literal["counter", "gauge", "histogram"]
    labels: Sequence[str]
    values: Sequence[Labelled] = ()
    cells: Sequence[Cell] = ()
    """Of a histogram."""


class Name(NamedTuple):
    """A family under its name and, where it has one, its older name."""

    name: str
    text: str
    twin: str = ""
    twin_text: str = ""

    @property
    def full(self) -> str:
        return NAMESPACE + self.name

    @property
    def help(self) -> str:
        return f"[ALPHA] {self.text}"

    @property
    def twin_help(self) -> str:
        return f"[ALPHA] [Deprecated: Use {self.full}] {self.twin_text or self.text}"


def _objective(name: str, text: str, twin: str, twin_text: str) -> Name:
    return Name(name, text, f"inference_objective_{twin}", twin_text)


REQUESTS = _objective(
    "request_total",
    "Total number of processed requests.",
    "request_total",
    "Counter of inference objective requests broken out for each model and target model.",
)
ERRORS = _objective(
    "request_error_total",
    "Total number of request errors.",
    "request_error_total",
    "Counter of inference objective requests errors broken out for each model and target model.",
)
RUNNING = _objective(
    "request_running",
    "Current number of active running requests.",
    "running_requests",
    "Inference objective number of running requests in each model.",
)
TTFT = _objective(
    "request_ttft_seconds",
    "Time to first token in seconds, measured from request received to first response byte."
    " For non-streaming requests, this equals total request duration.",
    "request_ttft_seconds",
    "Inference model TTFT distribution in seconds for each model and target model.",
)
HISTOGRAMS = {
    "duration_s": _objective(
        "request_duration_seconds",
        "End-to-end request latency distribution in seconds.",
        "request_duration_seconds",
        "Inference objective response latency distribution in seconds for each model and target model.",
    ),
    "request_bytes": _objective(
        "request_size_bytes",
        "Incoming request body size distribution in bytes.",
        "request_sizes",
        "Inference objective requests size distribution in bytes for each model and target model.",
    ),
    "response_bytes": _objective(
        "response_size_bytes",
        "Outgoing response body size distribution in bytes.",
        "response_sizes",
        "Inference objective responses size distribution in bytes for each model and target model.",
    ),
    "input_tokens": _objective(
        "request_input_tokens",
        "Input token count distribution per request.",
        "input_tokens",
        "Inference objective input token count distribution for requests in each model.",
    ),
    "output_tokens": _objective(
        "request_output_tokens",
        "Output token count distribution per request.",
        "output_tokens",
        "Inference objective output token count distribution for requests in each model.",
    ),
    "cached_tokens": _objective(
        "request_cached_tokens",
        "Distribution of prompt tokens read from cache per request, as reported by the model server in the response.",
        "prompt_cached_tokens",
        "Inference objective prompt cached token count distribution for requests in each model.",
    ),
    "ntpot_s": _objective(
        "request_ntpot_seconds",
        "Normalized time per output token in seconds (end-to-end latency divided by output token count).",
        "normalized_time_per_output_token_seconds",
        "Inference objective latency divided by number of output tokens in seconds for each model and target model.",
    ),
    "streaming_tpot_s": _objective(
        "request_streaming_tpot_seconds",
        "Average time per output token in seconds for streaming requests, computed as (e2e - TTFT) / (output_tokens - 1).",
        "request_tpot_seconds",
        "Inference model TPOT distribution in seconds for each model and target model.",
    ),
    "streaming_itl_s": Name(
        "request_streaming_itl_seconds",
        "Inter-token latency in seconds for streaming requests, measured as the time between consecutive response body chunks.",
    ),
}
"""Attribute of `RequestSeries` -> family."""

SCHEDULER_SECONDS = Name(
    "scheduler_e2e_duration_seconds",
    "End-to-end scheduling latency distribution in seconds.",
    "inference_extension_scheduler_e2e_duration_seconds",
)
HIT_RATIOS = Name(
    "prefix_indexer_hit_ratio",
    "Ratio of prefix length matched to total prefix length in the cache lookup.",
    "inference_extension_prefix_indexer_hit_ratio",
)
HIT_LENGTHS = Name(
    "prefix_indexer_hit_bytes",
    "Length of the prefix match in number of bytes in the cache lookup.",
    "inference_extension_prefix_indexer_hit_bytes",
)
ATTEMPTS = Name("scheduler_attempts_total", "Total number of scheduling attempts.", "inference_extension_scheduler_attempts_total")
INDEX_SIZE = Name("prefix_indexer_size", "Size of the prefix indexer.", "inference_extension_prefix_indexer_size")
INFO = Name("info", "General information of the current build of Inference Extension.", "inference_extension_info")
POLL_ERRORS = Name(
    "datalayer_poll_errors_total",
    "Data-source poll errors per source type.",
    "llm_d_inference_scheduler_datalayer_poll_errors_total",
)


REWRITES = Name(
    "model_rewrite_decisions_total",
    "Total number of inference model rewrite decisions.",
    "inference_extension_model_rewrite_decisions_total",
)
STAGES = Name(
    "disagg_decision_total",
    "Total number of disaggregation routing decisions made, by which stages a request runs in.",
    "llm_d_inference_scheduler_disagg_decision_total",
)


def stage_families(decisions: Mapping[tuple[str, str], Mapping[tuple[str, str], int]]) -> Iterator[Family]:
    """(plugin name, plugin type) -> (model, stages) -> count, as families."""
    if not decisions:
        return
    rows = [((name, type_, model, stages), count) for (name, type_), its in decisions.items() for (model, stages), count in its.items()]
    labels = ("plugin_name", "plugin_type", "model_name", "decision_type")
    yield Family(STAGES.full, STAGES.help, "counter", labels, [(values, float(count)) for values, count in rows])
    yield Family(STAGES.twin, STAGES.twin_help, "counter", labels[2:], _summed((values[2:], float(count)) for values, count in rows))


def scraper_families(polls: int, restarts: int, without_metrics: int, interval_s: float) -> Iterator[Family]:
    yield Family("epp_scrapes_total", "Readings of engines' metrics asked for.", "counter", (), [((), float(polls))])
    yield Family("epp_engine_restarts_total", "Engines seen to have started anew.", "counter", (), [((), float(restarts))])
    yield Family("epp_endpoints_without_metrics", "Endpoints routed by our own count alone.", "gauge", (), [((), float(without_metrics))])
    yield Family("epp_scrape_interval_seconds", "Between two readings of a busy engine.", "gauge", (), [((), interval_s)])


def with_twin(
    name: Name, kind: Literal["counter", "gauge"], labels: Sequence[str], values: Sequence[Labelled], twin_labels: Sequence[str] = ()
) -> Iterator[Family]:
    """The family, and its twin with the same values under `twin_labels` (or the same labels)."""
    yield Family(name.full, name.help, kind, labels, values)
    if name.twin:
        yield Family(name.twin, name.twin_help, kind, twin_labels or labels, values)


def unlabelled(name: Name, cell: Histogram) -> Iterator[Family]:
    """A histogram without labels, and its twin."""
    yield Family(name.full, name.help, "histogram", (), cells=[((), cell)])
    if name.twin:
        yield Family(name.twin, name.twin_help, "histogram", (), cells=[((), cell)])


def request_families(series: Sequence[tuple[SeriesKey, RequestSeries]]) -> Iterator[Family]:
    """All families counted per request. A label set appears once something was counted in it."""
    requests = [(key, float(s.requests)) for key, s in series if s.requests]
    yield Family(REQUESTS.full, REQUESTS.help, "counter", FLOW_LABELS, requests)
    by_priority = _summed(((key[0], key[1], key[3]), count) for key, count in requests)
    yield Family(REQUESTS.twin, REQUESTS.twin_help, "counter", (*MODEL_LABELS, "priority"), by_priority)

    errors = [((*key, code), float(count)) for key, s in series for code, count in list(s.errors.items())]
    yield Family(ERRORS.full, ERRORS.help, "counter", (*FLOW_LABELS, "error_code"), errors)
    by_code = _summed(((key[0], key[1], key[4]), count) for key, count in errors)
    yield Family(ERRORS.twin, ERRORS.twin_help, "counter", (*MODEL_LABELS, "error_code"), by_code)

    running = [(key, float(s.running)) for key, s in series if s.requests or s.running]
    yield Family(RUNNING.full, RUNNING.help, "gauge", FLOW_LABELS, running)
    yield Family(RUNNING.twin, RUNNING.twin_help, "gauge", MODEL_LABELS[:1], _summed((key[:1], count) for key, count in running))

    for attribute, name in HISTOGRAMS.items():
        yield from _histograms(name, FLOW_LABELS, [(key, getattr(s, attribute)) for key, s in series])
    whole: list[Cell] = [((*key, "false"), s.ttft_s) for key, s in series]
    streaming: list[Cell] = [((*key, "true"), s.streaming_ttft_s) for key, s in series]
    yield from _histograms(TTFT, (*FLOW_LABELS, "streaming"), whole + streaming)


def _histograms(name: Name, labels: Sequence[str], cells: Sequence[Cell]) -> Iterator[Family]:
    """The family over all labels, then its twin over the model labels alone."""
    seen = [(values, cell) for values, cell in cells if any(cell.counts)]
    yield Family(name.full, name.help, "histogram", labels, cells=seen)
    if name.twin:
        sums: dict[tuple[str, ...], Histogram] = {}
        for values, cell in seen:
            sums.setdefault(tuple(values[:2]), Histogram(cell.bounds)).add(cell)
        yield Family(name.twin, name.twin_help, "histogram", MODEL_LABELS, cells=list(sums.items()))


def _summed(values: Iterable[tuple[tuple[str, ...], float]]) -> list[Labelled]:
    sums: dict[tuple[str, ...], float] = {}
    for labels, value in values:
        sums[labels] = sums.get(labels, 0.0) + value
    return list(sums.items())
