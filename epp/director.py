"""One request's way from its body to a decision, and its accounting until the response ends.

Parse, find candidates, decide, charge the endpoint; the Exchange that comes back is told how the response goes and releases the
charge exactly once. Between taking the snapshot and the decision there is no await. Not here: the protocol (extproc), scores
(scheduling).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from epp.clock import Clock
from epp.datastore import Datastore, Ticket
from epp.errors import EppError, NoEndpointsError
from epp.observe.metrics import Metrics
from epp.observe.series import RequestSeries
from epp.parsing import routes
from epp.parsing.model_name import ModelRestorer, checked, with_model
from epp.parsing.usage import JsonUsage, SseUsage, UsageReader
from epp.plugins.base import PickedHook
from epp.scheduling.pipeline import Scheduler
from epp.types import Decision, LLMRequest, Snapshot

_log = logging.getLogger("epp.decision")

REWRITE_HEADER, REWRITE_HEADER_OLD = "x-llm-d-model-name-rewrite", "x-gateway-model-name-rewrite"
OWN_HEADERS = frozenset({
    REWRITE_HEADER, REWRITE_HEADER_OLD, "x-llm-d-inference-objective", "x-gateway-inference-objective", "x-llm-d-inference-fairness-id",
    "x-gateway-inference-fairness-id",
})  # fmt: skip
TEST_SELECTION = "test-epp-endpoint-selection"
TEST_SERVED = "x-conformance-test-served-endpoint"

# What Envoy says when it could not get a request to an endpoint at all (response.code_details, core/http response code details).
_CONNECTION_FAILURES = ("upstream_reset_before_response_started{connection", "upstream_reset_before_response_started{remote_connection")


class Exchange:
    """A routed request, until its response ends: in-flight accounting and metrics. Every method is safe after `finish`."""

    __slots__ = (
        "_clock", "_datastore", "_first_s", "_last_s", "_response_bytes", "_series", "_served_hooks", "_started_s", "_status", "_ticket", "_usage",
        "body", "decision", "request", "restorer",
    )  # fmt: skip

    def __init__(
        self,
        request: LLMRequest,
        decision: Decision,
        ticket: Ticket,
        *,
        series: RequestSeries,
        datastore: Datastore,
        clock: Clock,
        started_s: float,
        served_hooks: Sequence[PickedHook] = (),
    ) -> None:
        self.request = request
        self.decision = decision
        self.body: bytes | None = None
        """The request's body for the engine, where it is not the client's: another model name."""
        self.restorer: ModelRestorer | None = None
        """Then: gives the response the client's name back."""
        self._ticket: Ticket | None = ticket
        self._series = series
        self._served_hooks = served_hooks
        self._datastore = datastore
        self._clock = clock
        self._started_s = started_s
        self._first_s = 0.0
        self._last_s = 0.0
        self._response_bytes = 0
        self._status = 0
        self._usage: UsageReader | None = None
        series.running += 1

    def response_headers(self, status: int, *, event_stream: bool, served: str, code_details: str) -> None:
        """The engine (or the gateway in its place) answered. `served`: who did, if the gateway says."""
        if self._ticket is None:
            return
        self._status = status
        if served and served != self.decision.endpoint.destination:
            self._served_elsewhere(served)
        if status >= 500 and code_details.startswith(_CONNECTION_FAILURES):
            self._datastore.set_healthy(self.decision.endpoint, healthy=False)
        if status == 200:
            self._usage = SseUsage() if event_stream else JsonUsage()

    def response_chunk(self, body: bytes) -> None:
        """A piece of the response body passed, not empty; the first one is the first token."""
        ticket = self._ticket
        if ticket is None:
            return
        now_s = self._clock.now_s()
        if not self._first_s:
            self._first_s = now_s
            ticket.first_token()
        elif self.request.stream:
            self._series.streaming_itl_s.observe(now_s - self._last_s)
        self._last_s = now_s
        self._response_bytes += len(body)
        if self._usage is not None:
            self._usage.feed(body)

    def finish(self, *, complete: bool) -> None:
        """The response ended, or (`complete=False`) the stream did before it. Only the first call counts."""
        ticket = self._ticket
        if ticket is None:
            return
        self._ticket = None
        ticket.release()
        series = self._series
        series.running -= 1
        if not complete:
            series.errors["ClientDisconnected"] += 1
        elif self._status == 200:
            self._observe(series)
        elif self._status:
            series.errors["ModelServerError"] += 1

    def _served_elsewhere(self, served: str) -> None:
        endpoint = self._datastore.by_destination.get(served)
        if endpoint is None or self._ticket is None:
            return
        if endpoint in self.decision.fallbacks:
            # The gateway goes along our list: it could not use the one before. (Elsewhere, it may just not follow us.)
            self._datastore.set_healthy(self.decision.endpoint, healthy=False)
        self._ticket.move(endpoint)
        for served_by in self._served_hooks:  # the prompt is in that endpoint's cache now
            served_by(self.request, endpoint)

    def _observe(self, series: RequestSeries) -> None:
        if not self._first_s:  # no body, or we are not shown it: then its end is not known either
            return
        duration_s = self._clock.now_s() - self._started_s
        series.duration_s.observe(duration_s)
        series.response_bytes.observe(self._response_bytes)
        ttft_s = self._first_s - self._started_s
        (series.streaming_ttft_s if self.request.stream else series.ttft_s).observe(ttft_s)
        usage = self._usage.finish() if self._usage is not None else None
        if usage is None:
            return
        if usage.prompt_tokens >= 0:
            series.input_tokens.observe(usage.prompt_tokens)
        if usage.cached_tokens >= 0:
            series.cached_tokens.observe(usage.cached_tokens)
        if usage.completion_tokens > 0:
            series.output_tokens.observe(usage.completion_tokens)
            series.ntpot_s.observe(duration_s / usage.completion_tokens)
            if self.request.stream and usage.completion_tokens > 1:
                series.streaming_tpot_s.observe((duration_s - ttft_s) / (usage.completion_tokens - 1))


class Director:
    """Routes requests. One per pool."""

    def __init__(
        self,
        datastore: Datastore,
        scheduler: Scheduler,
        metrics: Metrics,
        clock: Clock,
        *,
        unknown_paths_ok: bool,
        subset_filter: bool,
        test_headers: bool = False,
    ) -> None:
        """`test_headers`: honour the conformance suite's headers (protocol reference, section 9); never in production."""
        self._test_headers = test_headers
        self._datastore = datastore
        self._scheduler = scheduler
        self._metrics = metrics
        self._clock = clock
        self._unknown_paths_ok = unknown_paths_ok
        self._subset_filter = subset_filter

    def route(self, request: LLMRequest, body: bytes | None, subset: Sequence[str] | None, started_s: float) -> Exchange:
        """Decide where `request` goes and charge that endpoint. Raises EppError.

        `body`: None when it can't be seen whole before the decision (a GET, a gateway that keeps it): routed by load.
        `started_s`: when its headers came.
        """
        metrics = self._metrics
        try:
            request.body_bytes = len(body) if body is not None else 0
            routes.parse(request, body, unknown_paths_ok=self._unknown_paths_ok)
            renamed = self.renames(request.headers) if request.model and body is not None else ""
            if renamed:
                request.target_model = checked(renamed)
            if self._test_headers and TEST_SELECTION in request.headers:
                subset = request.headers[TEST_SELECTION].replace(" ", "").split(",")
            series = metrics.series(request.model, request.target_model, "", request.priority)
            series.requests += 1
            scheduling_s = self._clock.now_s()
            decision = self._scheduler.schedule(request, self._candidates(subset))
        except EppError as error:
            metrics.series(request.model, request.target_model, "", request.priority).errors[error.code_name] += 1
            metrics.not_picked(request.target_model)
            self._log_rejection(request, error)
            raise
        endpoint = decision.endpoint
        match = request.prefix
        uncached = request.prompt_tokens
        if match is not None:
            cached = match.matched_tokens.get(endpoint.slot, 0)
            uncached -= cached
            metrics.prefix_hit_ratio.observe(cached / match.prompt_tokens)
            metrics.prefix_hit_bytes.observe(cached * 4)
        rewritten = with_model(body, renamed) if renamed and body is not None and renamed != request.model else None
        for picked in self._scheduler.picked:
            picked(request, endpoint)
        ticket = Ticket(endpoint, max(0, uncached))  # after what plugins do: nothing that may fail comes between this and its Exchange
        metrics.picked(request.target_model, endpoint)
        metrics.scheduler_duration_s.observe(self._clock.now_s() - scheduling_s)
        series.request_bytes.observe(request.body_bytes)
        if _log.isEnabledFor(logging.DEBUG):
            self._log_decision(request, decision, uncached)
        exchange = Exchange(
            request,
            decision,
            ticket,
            series=series,
            datastore=self._datastore,
            clock=self._clock,
            started_s=started_s,
            served_hooks=self._scheduler.picked,
        )
        if rewritten is not None:
            exchange.body = rewritten
            exchange.restorer = ModelRestorer(renamed, request.model)
        return exchange

    def refused(self, error: EppError) -> None:
        """Count a request that was answered before it could be parsed."""
        self._metrics.series("", "").errors[error.code_name] += 1

    @staticmethod
    def renames(headers: Mapping[str, str]) -> str:
        """The model the gateway wants the engine to be asked for, if another than the body's."""
        return headers.get(REWRITE_HEADER) or headers.get(REWRITE_HEADER_OLD) or ""

    @staticmethod
    def own_headers(headers: Mapping[str, str]) -> tuple[str, ...]:
        """Headers meant for us: the engine must not see them."""
        return () if OWN_HEADERS.isdisjoint(headers) else tuple(name for name in headers if name in OWN_HEADERS)

    def response_headers(self, served: str) -> dict[str, str] | None:
        """What to add to a response; only the conformance suite wants anything."""
        if not self._test_headers:
            return None
        return {TEST_SERVED: served or "fail: missing destination endpoint served metadata"}

    def _candidates(self, subset: Sequence[str] | None) -> Snapshot:
        ready = self._datastore.ready
        if subset is not None and self._subset_filter:
            allowed = frozenset(subset)
            found = [e for e in ready.endpoints if _in_subset(e.spec.address.host, e.destination, allowed)]
            if not found:  # one that fails its scrapes is better than none
                found = [e for e in self._datastore.endpoints.values() if _in_subset(e.spec.address.host, e.destination, allowed)]
            if not found:
                raise NoEndpointsError("failed to find endpoint candidates for serving the request: none is in the gateway's subset")
            return Snapshot.of(found)
        if not ready.endpoints:
            raise NoEndpointsError("failed to find endpoint candidates for serving the request: no endpoint is ready")
        return ready

    def _log_decision(self, request: LLMRequest, decision: Decision, uncached: int) -> None:
        fields = {
            "request_id": request.id,
            "model": request.model,
            "endpoint": decision.destination,
            "endpoint_name": decision.endpoint.name,
            "profile": decision.profile,
            "prompt_tokens": request.prompt_tokens,
            "uncached_tokens": uncached,
            "body_bytes": request.body_bytes,
        }
        _log.debug("routed", extra={"fields": fields})

    def _log_rejection(self, request: LLMRequest, error: EppError) -> None:
        if _log.isEnabledFor(logging.DEBUG):
            fields = {"request_id": request.id, "model": request.model, "status": error.http_status, "reason": error.message}
            _log.debug("rejected", extra={"fields": fields})


def _in_subset(host: str, destination: str, allowed: frozenset[str]) -> bool:
    """A bare address allows all its ports, `ip:port` only that one (protocol rule 10)."""
    return destination in allowed or host in allowed or f"[{host}]" in allowed
