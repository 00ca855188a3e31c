"""What flow control counts, as metric families: the reference picker's names (inventory 6.1), and two of our own.

Cost: paid by whoever asks for the metrics, about 20 µs a label set.
"""

from __future__ import annotations

from collections.abc import Iterator

from epp.admission.control import FlowControl
from epp.admission.eviction import Evictor
from epp.admission.queues import LeastAttained
from epp.observe.families import MODEL_LABELS, Cell, Family, Labelled, Name, unlabelled, with_twin
from epp.observe.series import SCHEDULER_S, Histogram

JAIN_WINDOW_S = 60.0
"""Tenants seen within it are those the fairness index is about."""
TENANTS_SHOWN_MAX = 1_000
"""Those with the most tokens."""


def _name(name: str, text: str, twin_text: str = "") -> Name:
    return Name(name, text, f"inference_extension_{name}", twin_text)


QUEUE_SECONDS = _name(
    "flow_control_request_queue_duration_seconds",
    "Distribution of the total time requests spend in the EPP flow control layer, measured from the start of the EnqueueAndWait call"
    " until a final outcome is reached.",
)
ENQUEUE_SECONDS = _name(
    "flow_control_request_enqueue_duration_seconds",
    "Distribution of the time taken to enqueue a request into the EPP flow control layer.",
)
CYCLE_SECONDS = _name(
    "flow_control_dispatch_cycle_duration_seconds", "Distribution of the time taken for each internal dispatch cycle in flow control."
)
QUEUE_SIZE = _name(
    "flow_control_queue_size",
    "Current number of requests being actively managed by the EPP flow control layer, from the start of the EnqueueAndWait call until a"
    " final outcome is reached.",
)
QUEUE_BYTES = _name(
    "flow_control_queue_bytes", "Current total size in bytes of requests being actively managed by the EPP flow control layer."
)
POOL_SATURATION = _name(
    "flow_control_pool_saturation", "Current saturation level of the inference pool (0.0 = empty, 1.0 = fully saturated)."
)
REQUESTS = Name("flow_control_requests_total", "Total number of requests processed by the Flow Control layer.")
STALE = Name(
    "flow_control_stale_endpoints", "Number of candidate endpoints whose metrics are missing or older than the staleness threshold."
)
BAND_REQUESTS = Name(
    "flow_control_capacity_utilization_requests", "Fraction of a priority band's request-count capacity currently occupied (0.0-1.0)."
)
BAND_BYTES = Name(
    "flow_control_capacity_utilization_bytes", "Fraction of a priority band's byte-size capacity currently occupied (0.0-1.0)."
)
ALL_REQUESTS = Name(
    "flow_control_global_capacity_utilization_requests",
    "Fraction of the global request-count capacity currently occupied across all priority bands (0.0-1.0).",
)
ALL_BYTES = Name(
    "flow_control_global_capacity_utilization_bytes",
    "Fraction of the global byte-size capacity currently occupied across all priority bands (0.0-1.0).",
)
REVOKED = Name(
    "flow_control_revocations_issued_total",
    "Total number of in-flight eviction revocations issued, labeled by the demand band's priority.",
)
REVOCATIONS = Name(
    "flow_control_revocations_total",
    "Total number of in-flight eviction revocations by terminal outcome (confirmed, timed_out). Every issued revocation eventually"
    " increments exactly one outcome.",
)
RECLAIM = Name("flow_control_reclaim_target", "Last computed reclamation deficit, in saturation-gauge units.")
PENDING = Name("flow_control_pending_reclaim", "Sum of outstanding and cooling pending-reclaim debits, in saturation-gauge units.")
CONFIRMATION = Name("flow_control_revocation_confirmation_seconds", "Time from revocation issue to confirmed stream termination.")
PROGRAM_JAIN = Name("program_aware_jains_fairness_index", "Jain's fairness index across active programs.")
PROGRAM_WAIT = Name("program_aware_avg_wait_time_milliseconds", "Mean queue wait time per program in milliseconds.")
PROGRAM_SERVICE = Name("program_aware_attained_service_tokens", "Time-decayed attained service per program, in weighted tokens.")

FLOW_LABELS = ("fairness_id", "priority", "inference_pool", *MODEL_LABELS)
OUTCOME_LABELS = ("fairness_id", "priority", "outcome", "inference_pool", *MODEL_LABELS)


def flow_families(flow: FlowControl, now_s: float) -> Iterator[Family]:
    """All of them, as they are now."""
    counts, pool = flow.counts, (flow.counts.pool_name,)
    waits: list[Cell] = []
    entered: dict[tuple[str, ...], Histogram] = {}
    sizes: list[Labelled] = []
    size_bytes: list[Labelled] = []
    for (fairness_id, priority, pool_name, model, target_model), series in list(counts.series.items()):
        flow_of, where = (fairness_id, str(priority)), (pool_name, model, target_model)
        waits += [((*flow_of, outcome, *where), cell) for outcome, cell in series.queue_s.items()]
        for outcome, cell in series.enqueue_s.items():
            entered.setdefault((*flow_of, outcome), Histogram(SCHEDULER_S)).add(cell)
        sizes.append(((*flow_of, *where), float(series.queued)))
        size_bytes.append(((*flow_of, *where), float(series.size_bytes)))
    yield from _histograms(QUEUE_SECONDS, OUTCOME_LABELS, waits)
    yield from _histograms(ENQUEUE_SECONDS, ("fairness_id", "priority", "outcome"), list(entered.items()))
    yield from unlabelled(CYCLE_SECONDS, counts.cycle_s)
    yield from with_twin(QUEUE_SIZE, "gauge", FLOW_LABELS, sizes)
    yield from with_twin(QUEUE_BYTES, "gauge", FLOW_LABELS, size_bytes)
    yield from _saturations(flow)
    outcomes = [((outcome, str(priority), name), float(count)) for (outcome, priority, name), count in counts.outcomes.items()]
    yield Family(REQUESTS.full, REQUESTS.help, "counter", ("outcome", "priority", "inference_pool"), outcomes)
    yield from _capacities(flow)
    if flow.evictor is not None:
        yield from _revocations(flow.evictor, pool)
    yield from _tenants(flow, now_s)
    hits = [((limit,), float(count)) for limit, count in list(counts.limit_hits.items())]
    rates = flow.tenants.rates
    if rates is not None:
        hits += [(("token_rate",), float(rates.refused)), (("rate_tenants",), float(rates.shared))]
    hits += [(("groups",), float(flow.saturation.groups_overflowed)), (("uncharged",), float(flow.saturation.lapsed))]
    yield Family("epp_flow_limit_hits_total", "Times a named limit of flow control was hit.", "counter", ("limit",), hits)


def _histograms(name: Name, labels: tuple[str, ...], cells: list[Cell]) -> Iterator[Family]:
    yield Family(name.full, name.help, "histogram", labels, cells=cells)
    yield Family(name.twin, name.twin_help, "histogram", labels, cells=cells)


def _saturations(flow: FlowControl) -> Iterator[Family]:
    pool_name = flow.counts.pool_name
    flow.saturation.survey()
    by_stage = sorted(flow.saturation.by_stage.items())  # of what may go anywhere and of the pool that gives all its name: the latter
    levels = list({(pool or pool_name, stage): value for (pool, stage), value in by_stage}.items())
    yield Family(POOL_SATURATION.full, POOL_SATURATION.help, "gauge", ("inference_pool", "stage"), levels)
    effective = [((pool,), value) for (pool, stage), value in levels if stage == "effective"]
    yield Family(POOL_SATURATION.twin, POOL_SATURATION.twin_help, "gauge", ("inference_pool",), effective)
    stale = getattr(flow.saturation.detector, "stale", None)
    if stale is not None:
        endpoints = flow.saturation.endpoints()
        yield Family(STALE.full, STALE.help, "gauge", ("detector",), [((flow.saturation.detector_name,), float(stale(endpoints)))])


def _capacities(flow: FlowControl) -> Iterator[Family]:
    settings, pool = flow.settings, flow.counts.pool_name
    requests: list[Labelled] = []
    size_bytes: list[Labelled] = []
    for band in flow.bands.all:
        labels = (str(band.priority), pool)
        if band.settings.requests_max:
            requests.append((labels, band.requests / band.settings.requests_max))
        if band.settings.size_bytes_max:
            size_bytes.append((labels, band.size_bytes / band.settings.size_bytes_max))
    yield Family(BAND_REQUESTS.full, BAND_REQUESTS.help, "gauge", ("priority", "inference_pool"), requests)
    yield Family(BAND_BYTES.full, BAND_BYTES.help, "gauge", ("priority", "inference_pool"), size_bytes)
    for name, used, limit in ((ALL_REQUESTS, flow.requests, settings.requests_max), (ALL_BYTES, flow.size_bytes, settings.size_bytes_max)):
        if limit:
            yield Family(name.full, name.help, "gauge", ("inference_pool",), [((pool,), used / limit)])


def _revocations(evictor: Evictor, pool: tuple[str]) -> Iterator[Family]:
    issued = [((str(priority), name), float(count)) for (priority, name), count in list(evictor.issued.items())]
    yield Family(REVOKED.full, REVOKED.help, "counter", ("priority", "inference_pool"), issued)
    ended = [(("confirmed", *pool), float(evictor.confirmed)), (("timed_out", *pool), float(evictor.timed_out))]
    yield Family(REVOCATIONS.full, REVOCATIONS.help, "counter", ("outcome", "inference_pool"), ended)
    yield Family(RECLAIM.full, RECLAIM.help, "gauge", ("inference_pool",), [(pool, evictor.target)])
    yield Family(PENDING.full, PENDING.help, "gauge", ("inference_pool",), [(pool, evictor.pending)])
    yield Family(CONFIRMATION.full, CONFIRMATION.help, "histogram", ("inference_pool",), cells=[(pool, evictor.confirmation_s)])


def _tenants(flow: FlowControl, now_s: float) -> Iterator[Family]:
    service = flow.service
    in_use = [band.fairness.ledger for band in flow.bands.all if isinstance(band.fairness, LeastAttained)]
    for ledger in in_use[:1]:  # the reference picker has one set of these
        rows = sorted(ledger.tokens(now_s), key=lambda row: -row[1])[:TENANTS_SHOWN_MAX]
        yield Family(PROGRAM_JAIN.full, PROGRAM_JAIN.help, "gauge", (), [((), ledger.jain(now_s, JAIN_WINDOW_S))])
        means = [((name,), 1e3 * tenant.wait_s / tenant.requests) for name, _, tenant in rows if tenant.requests]
        yield Family(PROGRAM_WAIT.full, PROGRAM_WAIT.help, "gauge", ("program_id",), means)
        yield Family(PROGRAM_SERVICE.full, PROGRAM_SERVICE.help, "gauge", ("program_id",), [((name,), left) for name, left, _ in rows])
    rows = sorted(service.tokens.tokens(now_s), key=lambda row: -row[1])[:TENANTS_SHOWN_MAX]
    served: list[Labelled] = [((name,), left) for name, left, _ in rows]
    waits: list[Labelled] = [((name,), tenant.wait_s / tenant.requests) for name, _, tenant in rows if tenant.requests]
    yield Family("epp_flow_served_tokens", "Tokens served by fairness id, halved every minute.", "gauge", ("fairness_id",), served)
    yield Family("epp_flow_wait_seconds", "Mean wait before dispatch by fairness id.", "gauge", ("fairness_id",), waits)
    help_text = "Jain's index of tokens served to the fairness ids seen in the last minute: 1 alike, 1/n one has it all."
    yield Family("epp_flow_fairness_index", help_text, "gauge", (), [((), service.tokens.jain(now_s, JAIN_WINDOW_S))])
