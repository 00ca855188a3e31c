"""Whose a request is, what it costs its tenant, and whether that tenant may have any more.

The fairness id is, in this order: what a plugin with `override` finds, the client's header, what the next identity plugin finds. It is set
here, before the request waits. Not here: how tokens fade (ledger), how they are limited (rates).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from copy import copy

from epp.admission.ledger import DEFAULT_FLOW, Service
from epp.admission.rates import Rates
from epp.admission.settings import Identity
from epp.plugins.base import Finished
from epp.plugins.flow_control.tenants import TokenRateLimit
from epp.types import Endpoint, LLMRequest, Usage

FAIRNESS_CHARS_MAX = 256
"""Of a fairness id; longer ones are cut."""

_log = logging.getLogger("epp.flow_control")


class Tenants:
    """See the module."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.rates: Rates | None = None
        self._identities: Sequence[Identity] = ()

    def use(self, identities: Sequence[Identity], limit: TokenRateLimit | None) -> None:
        """By these from now on; what was counted in a window of the same length stays counted."""
        self._identities = sorted(identities, key=lambda each: not getattr(each, "override", False))
        if limit is None:
            self.rates = None
        elif self.rates is not None and self.rates.window_s == limit.window_s:
            self.rates.limit = limit
        else:
            self.rates = Rates(limit)

    def twin(self, service: Service, tenant: str) -> Tenants:
        """Another that counts one request of that tenant's for itself, and what is served in `service`."""
        made = copy(self)
        made.service, made.rates = service, self.rates.twin(tenant) if self.rates is not None else None
        return made

    def named(self, request: LLMRequest) -> str:
        """The request's fairness id, which it has from now on."""
        for each in self._identities:
            if request.fairness_id and not getattr(each, "override", False):
                continue
            try:
                found = each.identify(request)
            except Exception:  # noqa: BLE001 - a plugin that fails to see whose it is must not refuse it
                _log.exception("a plugin's hook failed")
                continue
            if found:
                request.fairness_id = found[:FAIRNESS_CHARS_MAX]
                break
        return request.fairness_id or DEFAULT_FLOW

    def returned(self, request: LLMRequest, now_s: float, *, sent: bool = False) -> None:
        """It is not served after all. `sent`: it had been let through."""
        if sent:
            self.service.returned(request, now_s)
        if self.rates is not None:
            self.rates.returned(request, now_s)

    def finished(self, request: LLMRequest, endpoint: Endpoint, outcome: Finished, now_s: float) -> None:
        if outcome.status >= 400:  # nothing was served
            self.returned(request, now_s, sent=True)
            return
        usage = outcome.usage or _estimated(request, endpoint, outcome)
        if usage is not None:
            self.service.finished(request, usage, now_s)
        if self.rates is not None:
            self.rates.finished(request, usage, now_s)


def _estimated(request: LLMRequest, endpoint: Endpoint, outcome: Finished) -> Usage | None:
    """By time, where the answer does not say what it cost (most streams, and those that break off): nobody is served for nothing so."""
    step_s = endpoint.capacity.step_s
    if not request.stream or outcome.ttft_s < 0 or not step_s:
        return None
    tokens = 1 + int((outcome.duration_s - outcome.ttft_s) / step_s)
    return Usage(completion_tokens=min(tokens, request.max_output_tokens or tokens))
