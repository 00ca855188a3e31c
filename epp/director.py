"""One request's way from its body to a decision: parse, rename, find candidates, decide, charge.

The order is the reference picker's (inventory 3.3): model rewrite, objective, fairness id, candidates, shedding by how full those are,
then the scheduler with its producers and admitters, and last the charge. Between taking the snapshot and the decision there is no
await. Not here: what becomes of the request afterwards (exchange), the protocol (extproc), scores (scheduling).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from epp.admission.outlook import Outlook
from epp.arrival import Arrival, Stage, Understood
from epp.candidates import Candidates, Models
from epp.clock import Clock
from epp.datastore import Datastore
from epp.decisions import Decisions, record, table
from epp.errors import BadRequestError, EppError, ModelNotFoundError, NoEndpointsError, PreconditionFailedError, SaturatedError, shed
from epp.exchange import Exchange, can_be_sent, sendable
from epp.observe.metrics import Metrics
from epp.outliers import Outliers
from epp.parsing.model_name import ModelRestorer, checked
from epp.parsing.routes import Routes
from epp.pools import Pools
from epp.resources import Resources
from epp.scheduling.pipeline import ProfileTrace, Scheduler
from epp.types import ASKED_ABOUT, Decision, LLMRequest

_log = logging.getLogger("epp.decision")

REWRITE_HEADER, REWRITE_HEADER_OLD = "x-llm-d-model-name-rewrite", "x-gateway-model-name-rewrite"
OBJECTIVE_HEADER, OBJECTIVE_HEADER_OLD = "x-llm-d-inference-objective", "x-gateway-inference-objective"
FAIRNESS_HEADER, FAIRNESS_HEADER_OLD = "x-llm-d-inference-fairness-id", "x-gateway-inference-fairness-id"
TTL_HEADER, TTL_HEADER_OLD = "x-llm-d-request-ttl", "x-gateway-request-ttl"
OWN_HEADERS = frozenset({
    REWRITE_HEADER, REWRITE_HEADER_OLD, OBJECTIVE_HEADER, OBJECTIVE_HEADER_OLD, FAIRNESS_HEADER, FAIRNESS_HEADER_OLD,
    TTL_HEADER, TTL_HEADER_OLD,
})  # fmt: skip
"""Headers meant for us: the engine does not see them."""
TEST_SELECTION = "test-epp-endpoint-selection"
TEST_SERVED = "x-conformance-test-served-endpoint"
FAIRNESS_CHARS_MAX = 256
"""Of a fairness id; longer ones are cut."""
LEFT_OUT_SHOWN_MAX = 32
"""Endpoints that are no candidates, in an explanation."""
_QUOTED = re.compile(r'"(?:[^"\\]|\\.)*"?')
_IF_AVAILABLE = re.compile(r"(?:^|,)[ \t]*if-available[ \t]*(?:[=;,]|$)", re.ASCII | re.IGNORECASE)
"""The preference of that name, whatever its value and parameters (RFC 7240)."""


class Flow(Protocol):
    """What is needed of flow control; `epp.admission.control.FlowControl` is one."""

    def routed(self, request: LLMRequest, exchange: Exchange | None) -> None: ...

    def retry_after_s(self) -> int: ...


class Inquiry(Arrival):
    """A request that nobody sent: only asked about."""

    __slots__ = ("error",)

    error: EppError | None
    """It is refused before its endpoint is chosen."""


class Director:
    """Routes requests. One per pool; what it routes by is exchanged whole with `use`."""

    def __init__(
        self,
        datastore: Datastore,
        scheduler: Scheduler,
        routes: Routes,
        metrics: Metrics,
        clock: Clock,
        *,
        resources: Resources,
        outliers: Outliers,
        pools: Pools | None = None,
        subset_filter: bool = True,
        test_headers: bool = False,
        decisions: Decisions | None = None,
        emit_scores: bool = False,
        models: Models | None = None,
        model_missed: Callable[[], None] = lambda: None,
    ) -> None:
        """`pools`: where there are several, `resources` being those of the first. `test_headers`: honour the conformance suite's headers
        (protocol reference, section 9); never in production.
        """
        self._datastore = datastore
        self._metrics = metrics
        self._clock = clock
        self._resources = resources
        self._outliers = outliers
        self.candidates = Candidates(datastore, models, subset_filter=subset_filter)
        self._test_headers = test_headers
        self._decisions = decisions
        self.emit_scores = emit_scores
        self._pools = pools if pools is not None and pools.several else None
        self._model_missed = model_missed
        """Called when a model nobody serves was asked for."""
        self.stages: Sequence[Stage] = ()
        """What a request passes before its endpoint is chosen."""
        self.flow: Flow | None = None
        """The last of the stages, where there is flow control."""
        self.outlook: Callable[[Arrival], Outlook] | None = None
        """What flow control would do with a request, where there is any."""
        self.sheds = True
        """Sheddable requests are refused while the pool is full; with flow control configured they queue like others."""
        self.evicts = False
        """Running requests may have to give way to queued ones."""
        self.use(scheduler, routes)

    def use(self, scheduler: Scheduler, routes: Routes) -> None:
        """Decide like this from the next request on; requests under way keep what they were decided by."""
        self._scheduler = scheduler
        self._routes = routes
        self._own_headers = OWN_HEADERS | set(scheduler.own_headers)
        self.needs_body = routes.needs_body

    def arrive(
        self, request: LLMRequest, body: bytes | None, subset: Sequence[str] | None, started_s: float, wake: Callable[[], None]
    ) -> Exchange | Arrival:
        """As `route`, but where a stage has the request wait, that: `wake` is called when `resume` may be, never before this returns."""
        if not self.stages:
            return self.route(request, body, subset, started_s)
        understood = self._understood(request, body)
        return self.resume(Arrival(request, body, subset, started_s, understood=understood, wake=wake, stages=self.stages))

    def resume(self, arrival: Arrival) -> Exchange | Arrival:
        """On with a request whose wait is over: the next wait, or the decision. Raises EppError."""
        try:
            waits = arrival.advance()
        except EppError as error:
            self._refuse(arrival.request, error, keep=self._due())
            raise
        if waits:
            return arrival
        exchange: Exchange | None = None
        try:
            exchange = self._routed(arrival.request, arrival.body, arrival.subset, arrival.started_s, arrival.understood)
        finally:
            if self.flow is not None:
                self.flow.routed(arrival.request, exchange)
        return exchange

    def route(self, request: LLMRequest, body: bytes | None, subset: Sequence[str] | None, started_s: float) -> Exchange:
        """Decide where `request` goes and charge that endpoint. Raises EppError.

        `body`: None when it can't be seen whole before the decision (a GET, a gateway that keeps it): routed by load.
        `started_s`: when its headers came.
        """
        return self._routed(request, body, subset, started_s, self._understood(request, body))

    def _understood(self, request: LLMRequest, body: bytes | None) -> Understood:
        request.body_bytes = len(body) if body is not None else 0
        try:
            return self._understand(request, body)
        except EppError as error:
            self._refuse(request, error, understood=0, keep=self._due())
            raise

    def _routed(
        self, request: LLMRequest, body: bytes | None, subset: Sequence[str] | None, started_s: float, understood: Understood
    ) -> Exchange:
        metrics, scheduler = self._metrics, self._scheduler
        parser, renamed = understood
        keep = self._due()
        traces: list[ProfileTrace] | None = [] if keep or self.emit_scores else None
        scheduling_s = self._clock.now_s()
        try:
            decision = self._decide(request, subset, traces)
        except EppError as error:
            self._refuse(request, error, keep=keep, traces=traces or ())
            raise
        series = metrics.series(request.model, request.target_model, request.fairness_id, request.priority)
        series.requests += 1
        uncached = self._uncached(request, decision)
        rewritten = parser.with_model(body, renamed) if renamed and body is not None and parser is not None else None
        for picked in scheduler.picked:
            try:
                picked(request, decision)
            except Exception:  # noqa: BLE001 - what a plugin wants to remember is no reason to refuse a request
                _log.exception("a plugin's hook failed")
        exchange = Exchange(
            request,
            decision,
            tokens=scheduler.inflight.charge(request, uncached),
            uncached_tokens=uncached,
            parser=parser,
            scheduler=scheduler,
            series=series,
            datastore=self._datastore,
            outliers=self._outliers,
            clock=self._clock,
            started_s=started_s,
        )
        if decision.endpoint.half_open:
            self._outliers.probing(decision.endpoint)
        metrics.picked(request.target_model, decision.endpoint)
        metrics.scheduler_duration_s.observe(self._clock.now_s() - scheduling_s)
        series.request_bytes.observe(request.body_bytes)
        if traces is not None:
            exchange.traces = traces
            self._keep(keep, request, traces, decision)
        if _log.isEnabledFor(logging.DEBUG):
            self._log_decision(request, decision, uncached)
        if rewritten is not None:
            exchange.body = rewritten
            if request.model:
                exchange.restorer = ModelRestorer(renamed, request.model)
        return exchange

    def inquire(
        self,
        request: LLMRequest,
        body: bytes | None,
        subset: Sequence[str] | None,
        *,
        stages: Sequence[Stage] = (),
        wake: Callable[[], None] = lambda: None,
    ) -> Inquiry:
        """As `arrive`, for a request that is only asked about, and to be passed through these stages by whoever asks. Then `explained`."""
        understood: Understood = None, ""
        error: EppError | None = None
        request.attributes[ASKED_ABOUT] = True
        request.body_bytes = len(body) if body is not None else 0
        try:
            understood = self._understand(request, body, count=False)
        except EppError as refused:
            error, stages = refused, ()
        inquiry = Inquiry(request, body, subset, self._clock.now_s(), understood=understood, wake=wake, stages=stages)
        inquiry.error = error
        return inquiry

    def explain(self, request: LLMRequest, body: bytes | None, subset: Sequence[str] | None) -> dict[str, Any]:
        """What would become of it now, and why, by the estimate of its tokens."""
        return self.explained(self.inquire(request, body, subset))

    def explained(self, inquiry: Inquiry) -> dict[str, Any]:
        """What flow control and the decision would make of it now, and why; nothing is charged, counted or remembered."""
        request, error = inquiry.request, inquiry.error
        traces: list[ProfileTrace] = []
        decision = seen = None
        if error is None:
            seen = self.outlook(inquiry) if self.outlook is not None else None
            try:
                decision = self._decide(request, inquiry.subset, traces)
            except EppError as refused:
                if seen is None or not (seen.waits and isinstance(refused, NoEndpointsError)):  # those who wait do so for an endpoint too
                    error = refused
            if seen is not None and seen.error is not None:  # it would have come first
                decision, error = None, seen.error
        reason = f"{error.http_status} {error.message}" if error is not None else ""
        answer = table(record(self._clock.now_s(), request, traces, decision, reason))
        if seen is not None:
            answer["flow_control"] = seen.about
        ready = self._datastore.ready.by_slot
        out = [e for e in self._datastore.endpoints.values() if e.slot not in ready]
        answer["left_out"] = [{"name": e.name, "address": e.destination, "state": e.state} for e in out[:LEFT_OUT_SHOWN_MAX]]
        return answer

    def refused(self, error: EppError) -> None:
        """Count a request that was answered before it could be parsed."""
        self._metrics.series("", "").errors[error.code_name] += 1

    def sees_response_bodies(self, headers: Mapping[str, str]) -> bool:
        """Whether the response's body matters so much that a gateway that holds it back must still show it to us."""
        if (self._pools or self._resources).rewrites_any or self._scheduler.report:
            return True
        return bool(headers.get(REWRITE_HEADER) or headers.get(REWRITE_HEADER_OLD))

    def own_headers(self, headers: Mapping[str, str]) -> tuple[str, ...]:
        """Headers meant for us, or that only we may set: the engine must not see the client's."""
        own = self._own_headers
        return () if own.isdisjoint(headers) else tuple(name for name in headers if name in own)

    def response_headers(self, exchange: Exchange | None, served: str) -> dict[str, str] | None:
        """What to add to a response's headers."""
        added = exchange.added_headers() if exchange is not None else None
        if self._test_headers:
            added = {**(added or {}), TEST_SERVED: served or "fail: missing destination endpoint served metadata"}
        return added or None

    def _understand(self, request: LLMRequest, body: bytes | None, *, count: bool = True) -> Understood:
        parser = self._routes.parse(request, body)
        if self._pools is not None and not request.pool:
            request.pool = self._pools.of_model(request.model)
        headers = request.headers
        renamed = ""
        if not OWN_HEADERS.isdisjoint(headers):
            renamed = headers.get(REWRITE_HEADER) or headers.get(REWRITE_HEADER_OLD) or ""
            objective = headers.get(OBJECTIVE_HEADER) or headers.get(OBJECTIVE_HEADER_OLD) or ""
            pools = self._pools
            request.priority = self._resources.priority(objective) if pools is None else pools.priority(request.pool, objective)
            request.fairness_id = (headers.get(FAIRNESS_HEADER) or headers.get(FAIRNESS_HEADER_OLD) or "")[:FAIRNESS_CHARS_MAX]
        if parser is None or body is None or not parser.body_wanted:
            return parser, ""
        target = self._resources.target(request.model) if self._pools is None else self._pools.target(request.pool, request.model)
        if target is not None:
            renamed = target.model
            if count:
                self._metrics.rewritten(target.rewrite, request.model, target.model)
        if renamed:
            request.target_model = checked(renamed)
            renamed = "" if renamed == request.model else renamed
        elif not request.model and parser.model_required:
            raise BadRequestError("model not found in request body")
        return parser, renamed

    def _decide(self, request: LLMRequest, subset: Sequence[str] | None, traces: list[ProfileTrace] | None) -> Decision:
        scheduler = self._scheduler
        if self._test_headers and TEST_SELECTION in request.headers:
            subset = tuple(request.headers[TEST_SELECTION].replace(" ", "").split(","))
        detector = scheduler.detector if request.priority < 0 and self.sheds else None
        try:
            candidates = self.candidates.of(subset, request.pool, request.target_model)
        except NoEndpointsError:
            if detector is None:
                raise
            raise self._shed() from None  # to the reference picker's detectors nobody at all is a full pool
        if detector is not None and detector.saturation(candidates.endpoints) >= 1:
            raise self._shed()
        decision = scheduler.schedule(request, candidates, traces)
        if "prefer" in request.headers and _prefers_available(request.headers["prefer"]):
            match = request.prefix
            if match is None or not match.matched_tokens.get(decision.endpoint.slot):
                raise PreconditionFailedError("the endpoint chosen for this request is not known to have a prefix of its prompt cached")
        return _checked(decision) if decision.headers or decision.instead else decision

    def _shed(self) -> SaturatedError:
        return shed(self.flow.retry_after_s() if self.flow is not None else 0)

    def _uncached(self, request: LLMRequest, decision: Decision) -> int:
        """Prompt tokens the endpoint has to compute."""
        match = request.prefix
        if match is not None:
            cached = match.matched_tokens.get(decision.endpoint.slot, 0)
            self._metrics.prefix_hit_ratio.observe(cached / match.prompt_tokens)
            self._metrics.prefix_hit_bytes.observe(cached * 4)
        return request.uncached_on(decision.endpoint)

    def _due(self) -> bool:
        """Whether this decision is one to remember."""
        return self._decisions is not None and self._decisions.due()

    def _keep(self, keep: bool, request: LLMRequest, traces: Sequence[ProfileTrace], decision: Decision | None, error: str = "") -> None:
        if keep and self._decisions is not None:
            self._decisions.add(request, traces, decision, error)

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

    def _refuse(
        self, request: LLMRequest, error: EppError, *, understood: int = 1, keep: bool = False, traces: Sequence[ProfileTrace] = ()
    ) -> None:
        """Count a request that gets no endpoint."""
        series = self._metrics.series(request.model, request.target_model, request.fairness_id, request.priority)
        series.requests += understood
        series.errors[error.code_name] += 1
        self._metrics.not_picked(request.target_model)
        self._keep(keep, request, traces, None, error.message)
        if isinstance(error, ModelNotFoundError):
            self._model_missed()
        if _log.isEnabledFor(logging.DEBUG):
            fields = {"request_id": request.id, "model": request.model, "status": error.http_status, "reason": error.message}
            _log.debug("rejected", extra={"fields": fields})


def _prefers_available(prefer: str) -> bool:
    """Whether the header `Prefer` asks for it."""
    return _IF_AVAILABLE.search(_QUOTED.sub("", prefer) if '"' in prefer else prefer) is not None


def _checked(decision: Decision) -> Decision:
    """Without headers of its profile handler's that can't be sent. Raises EppError for such a destination: there is no other."""
    if decision.instead and not can_be_sent("destination", decision.instead):
        _log.error("a profile handler's destination can't be sent", extra={"fields": {"destination": ascii(decision.instead)}})
        raise EppError("internal error in the endpoint picker")
    headers = decision.headers
    return decision if all(map(can_be_sent, headers, headers.values())) else decision._replace(headers=sendable(headers))
