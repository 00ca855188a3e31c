"""A routed request, until its response ends: in-flight accounting, metrics, and what plugins want to hear of it.

Made by the director once the decision is final; told by the session how the response goes. Releases what was charged exactly once.
Not here: the protocol (extproc), the decision (director). Cost of a streamed chunk: about 1 µs.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from math import isfinite
from typing import Any

from epp.clock import Clock
from epp.datastore import Datastore, Ticket
from epp.errors import EppError
from epp.observe.series import RequestSeries
from epp.outliers import HANG_S, Outliers
from epp.parsing import orca
from epp.parsing.model_name import ModelRestorer
from epp.parsing.usage import JsonUsage, SseUsage
from epp.plugins.base import Finished, Parser, UsageReader
from epp.scheduling.pipeline import ProfileTrace, Scheduler
from epp.types import Decision, Endpoint, LLMRequest, Usage

_log = logging.getLogger("epp.exchange")
_FAILED = "a plugin's hook failed"

Report = Mapping[str, Mapping[str, float]]
"""Namespace -> name -> number, for the gateway's dynamic metadata."""

# What Envoy says when it could not get a request to an endpoint at all (response.code_details, core/http response code details).
_CONNECTION_FAILURES = ("upstream_reset_before_response_started{connection", "upstream_reset_before_response_started{remote_connection")

_NAME = re.compile(r"[!#$%&'*+\-.^_`|~0-9a-z]+")
_VALUE = re.compile(r"[\t -~\x80-\ud7ff\ue000-\U0010ffff]*")
"""Whatever is no control character and has a form in UTF-8."""
_FRAMING = frozenset({"content-length", "transfer-encoding"})
"""How a body ends is not for plugins to say."""


class Exchange:
    """See the module. Every method is safe after `finish`."""

    __slots__ = (
        "_clock", "_datastore", "_first_s", "_last_s", "_outliers", "_parser", "_response_bytes", "_scheduler", "_sent_s", "_series", "_started_s",
        "_status", "_ticket", "_uncached_tokens", "_usage", "_usage_reader", "_work", "_work_tokens", "body", "decision", "evict", "request", "restorer", "traces",
    )  # fmt: skip

    def __init__(
        self,
        request: LLMRequest,
        decision: Decision,
        *,
        tokens: int,
        uncached_tokens: int,
        parser: Parser | None,
        scheduler: Scheduler,
        series: RequestSeries,
        datastore: Datastore,
        outliers: Outliers,
        clock: Clock,
        started_s: float,
    ) -> None:
        """Charges the decision's endpoints: nothing that may fail must come between that and the caller's taking the Exchange."""
        self.request = request
        self.decision = decision
        self.body: bytes | None = None
        """The request's body for the engine, where it is not the client's: another model name."""
        self.restorer: ModelRestorer | None = None
        """Then: gives the response the client's name back."""
        self.traces: Sequence[ProfileTrace] = ()
        """How the decision came about, where somebody wants to know."""
        self.evict: Callable[[EppError], bool] | None = None
        """Where running requests may have to give way: has the client answered with that soon, if its stream is still there."""
        self._parser = parser
        self._scheduler = scheduler
        self._series = series
        self._datastore = datastore
        self._outliers = outliers
        self._clock = clock
        self._started_s = started_s
        self._uncached_tokens = uncached_tokens
        self._first_s = 0.0
        self._last_s = 0.0
        self._response_bytes = 0
        self._status = 0
        self._usage_reader: UsageReader | None = None
        self._usage: Usage | None = None
        endpoint = decision.endpoint
        self._ticket: Ticket | None = Ticket(
            endpoint, tokens, to_the_end=scheduler.inflight.add_estimated_output_tokens, told=request.stream
        )
        self._work: Sequence[Ticket] = ()
        """Stages of the request on other endpoints: over with the first token."""
        if decision.targets:
            self._work = [Ticket(endpoint, request.uncached_on(endpoint)) for endpoint in decision.targets.values()]
        self._work_tokens = endpoint.inflight_tokens - endpoint.untold_tokens
        """To be worked through before its first token, as far as that is known: prompts of whole answers are long since, most of the time."""
        self._sent_s = clock.now_s()
        series.running += 1

    def scores(self) -> dict[str, float]:
        """Destination -> total score, of every endpoint the deciding profile compared."""
        trace = next((trace for trace in self.traces if trace.profile == self.decision.profile), None)
        return {e.destination: total for e, total in zip(trace.endpoints, trace.totals, strict=True)} if trace else {}

    def response_headers(self, status: int, *, event_stream: bool, served: str, code_details: str, load: str = "") -> None:
        """The engine (or the gateway in its place) answered. `served`: who did, if the gateway says; `load`: how busy it says it is."""
        if self._ticket is None:
            return
        self._status = status
        if served and served != self.decision.endpoint.destination:
            self._served_elsewhere(served)
        if load:
            pushed = orca.parse(load)
            if pushed is not None:
                self._datastore.record_push(self._ticket.endpoint, waiting=pushed.waiting, kv_usage=pushed.kv_usage)
        engines = not code_details or code_details == "via_upstream"  # else Envoy's own answer
        if status < 500:
            if engines:
                self._outliers.succeeded(self._ticket.endpoint)
        elif engines or code_details.startswith("upstream_reset") or "timeout" in code_details:
            # Envoy's in the engine's place too; not what Envoy says of itself (no route, no host)
            certain = code_details.startswith(_CONNECTION_FAILURES)
            self._outliers.failed(self._ticket.endpoint, "connection failed" if certain else f"status {status}", certain=certain)
        if status == 200:
            if self._parser is not None:
                self._usage_reader = self._parser.usage(event_stream=event_stream)
            else:
                self._usage_reader = SseUsage() if event_stream else JsonUsage()

    def added_headers(self) -> dict[str, str] | None:
        """What plugins add to the response's headers."""
        if not self._scheduler.response_headers:
            return None
        added: dict[str, str] = {}
        ticket = self._ticket
        if ticket is not None:
            for response_headers in self._scheduler.response_headers:
                try:
                    added.update(sendable(response_headers(self.request, ticket.endpoint) or {}))
                except Exception:  # noqa: BLE001 - see _tell
                    _log.exception(_FAILED)
        return added

    def response_chunk(self, body: bytes) -> None:
        """A piece of the response body passed, not empty; the first one is the first token."""
        ticket = self._ticket
        if ticket is None:
            return
        now_s = self._clock.now_s()
        if not self._first_s:
            self._first_s = now_s
            answered = self._status < 400  # a refusal is no first token
            if answered and self.request.stream:  # a whole answer comes when all of it is decoded
                ticket.endpoint.capacity.first_token(self._work_tokens, now_s - self._sent_s)
            ticket.first_token()
            if self._work:
                self._work_done()
            if answered and self._scheduler.first_token:
                _tell(self._scheduler.first_token, self.request, ticket.endpoint, now_s - self._started_s)
        elif self.request.stream:
            self._series.streaming_itl_s.observe(now_s - self._last_s)
        self._last_s = now_s
        self._response_bytes += len(body)
        if self._usage_reader is not None:
            self._usage_reader.feed(body)

    def finish(self, *, complete: bool, seen: bool = True, evicted: EppError | None = None) -> None:
        """The response ended, or (`complete=False`) the stream did before it. Only the first call counts.

        `seen` False: the gateway does not show us the end; when it was, and what of the response was before it, is not known.
        `evicted`: we ended it.
        """
        ticket = self._ticket
        if ticket is None:
            return
        self._ticket = None
        ticket.release()
        if self._work:
            self._work_done()
        series = self._series
        series.running -= 1
        if evicted is not None:
            series.errors[evicted.code_name] += 1
        elif not complete:
            series.errors["ClientDisconnected"] += 1
            if not self._status and self._clock.now_s() - self._sent_s >= HANG_S:
                self._outliers.failed(ticket.endpoint, "no answer")
        elif self._status == 200:
            if seen:
                self._observe(series, ticket.endpoint)
        elif self._status:
            series.errors["ModelServerError"] += 1
        if self._scheduler.finished:
            ttft_s = self._first_s - self._started_s if self._first_s else -1.0
            duration_s = self._clock.now_s() - self._started_s
            outcome = Finished(self._status if complete else 0, ttft_s, duration_s, self._usage, self._uncached_tokens)
            _tell(self._scheduler.finished, self.request, ticket.endpoint, outcome)

    def report(self) -> Report | None:
        """What reporters make of the response's cost, once it is over."""
        usage = self._usage
        if usage is None or not self._scheduler.report:
            return None
        found: dict[str, dict[str, float]] = {}
        for report in self._scheduler.report:
            try:
                reported = report(usage)
                if reported is not None:
                    namespace, name, value = reported
                    f"{namespace}{name}".encode()  # raises for what has no form in UTF-8
                    found.setdefault(str(namespace), {})[str(name)] = _finite(float(value))
            except Exception:  # noqa: BLE001 - see _tell
                _log.exception(_FAILED)
        return found or None

    def _work_done(self) -> None:
        for ticket in self._work:
            ticket.release()
        self._work = ()

    def _served_elsewhere(self, served: str) -> None:
        endpoint = self._datastore.by_destination.get(served)
        if endpoint is None or self._ticket is None or self.decision.instead:
            return
        if endpoint in self.decision.fallbacks:
            # The gateway goes along our list: it could not use the one before. (Elsewhere, it may just not follow us.)
            self._outliers.failed(self.decision.endpoint, "the gateway went on to another", certain=True)
        self._ticket.move(endpoint)
        _tell(self._scheduler.served, self.request, endpoint)  # the prompt is in that endpoint's cache now

    def _observe(self, series: RequestSeries, endpoint: Endpoint) -> None:
        if not self._first_s:  # no body, or we are not shown it: then its end is not known either
            return
        duration_s = self._clock.now_s() - self._started_s
        series.duration_s.observe(duration_s)
        series.response_bytes.observe(self._response_bytes)
        ttft_s = self._first_s - self._started_s
        (series.streaming_ttft_s if self.request.stream else series.ttft_s).observe(ttft_s)
        usage = self._usage = self._usage_reader.finish() if self._usage_reader is not None else None
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
                endpoint.capacity.finished(usage.completion_tokens - 1, duration_s - ttft_s)


def _tell(hooks: tuple[Callable[..., Any], ...], request: LLMRequest, endpoint: Endpoint, *more: object) -> None:
    """A plugin that fails to listen must not harm the response."""
    for each in hooks:
        try:
            each(request, endpoint, *more)
        except Exception:  # noqa: BLE001 - see above
            _log.exception(_FAILED)


def sendable(headers: Mapping[str, str]) -> dict[str, str]:
    """Those of a plugin's headers that can be sent. Envoy would answer any other with a 500 (protocol rule 15)."""
    found = {}
    for key, value in headers.items():
        name, text = str(key).lower(), str(value)
        if can_be_sent(name, text):
            found[name] = text
        else:
            _log.warning("a plugin's header can't be sent: it is left out", extra={"fields": {"header": ascii(name)}})
    return found


def can_be_sent(name: str, value: str) -> bool:
    """As a header; a plugin may give what is no text at all."""
    if not (isinstance(name, str) and isinstance(value, str)):
        return False
    return _is_name(name) and (value.isprintable() or _VALUE.fullmatch(value) is not None)


@lru_cache(maxsize=1_000)
def _is_name(name: str) -> bool:
    return _NAME.fullmatch(name) is not None and name not in _FRAMING


def _finite(number: float) -> float:
    """`number` itself. Raises ValueError for what JSON can't say: gateways write such numbers into their access logs."""
    if not isfinite(number):
        raise ValueError(f"{number} is no number to report")
    return number
