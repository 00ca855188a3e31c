"""Passive health: an endpoint that fails the requests it is sent is left out for a while, then tried with one request.

A request that could not be brought to the endpoint ejects it at once; answers with a 5xx and requests nobody answered in `HANG_S` do when
`FAILURES_MAX` come in a row. The first time out is `EJECT_S`, each further one twice as long up to `EJECT_MAX_S`; after it the endpoint is
half open: the next request that picks it is the probe, and until that one is answered no other goes there. One success forgets
everything. When all are ejected none is (datastore.ready).

Not here: scrapes (their failures make an endpoint unhealthy, which is another flag), retries (the gateway's). Cost per response: a dict
look-up, and for a success of an endpoint without failures nothing more.
"""

from __future__ import annotations

import logging

from epp.clock import Clock
from epp.datastore import Datastore
from epp.types import Endpoint

FAILURES_MAX = 5
"""Failed answers in a row that eject (Envoy's consecutive_5xx)."""
EJECT_S = 1.0
EJECT_MAX_S = 60.0
HANG_S = 10.0
"""A request given up by its client after so long without a single byte from the engine counts as failed."""
PROBE_S = 30.0
"""For a probe to be answered; then another may try."""

_log = logging.getLogger("epp.outliers")


class _Trouble:
    """What is held against one endpoint."""

    __slots__ = ("failures", "interval_s", "probing", "until_s")

    def __init__(self) -> None:
        self.failures = 0
        self.probing = False
        """The one request that tries it is under way."""
        self.interval_s = 0.0
        self.until_s = 0.0
        """While ejected: when it is next half open."""


class Outliers:
    """See the module. `tick` it a few times a second."""

    def __init__(self, datastore: Datastore, clock: Clock) -> None:
        self.ejections_total = 0
        self._datastore = datastore
        self._clock = clock
        self._troubles: dict[Endpoint, _Trouble] = {}
        datastore.subscribe(removed=self._removed)

    def __len__(self) -> int:
        """Endpoints ejected now."""
        return sum(endpoint.ejected or endpoint.half_open for endpoint in self._troubles)

    def failed(self, endpoint: Endpoint, reason: str, *, certain: bool = False) -> None:
        """A request to it failed. `certain`: it was not even taken, one is enough."""
        trouble = self._troubles.get(endpoint)
        if trouble is None:
            if endpoint.spec.address not in self._datastore.endpoints:
                return
            trouble = self._troubles[endpoint] = _Trouble()
        trouble.failures += 1
        if not trouble.probing:
            if endpoint.ejected or endpoint.half_open:
                return  # of a request sent before
            if not certain and trouble.failures < FAILURES_MAX:
                return
        trouble.probing = False
        trouble.interval_s = min(2 * trouble.interval_s or EJECT_S, EJECT_MAX_S)
        trouble.until_s = self._clock.now_s() + trouble.interval_s
        self.ejections_total += 1
        self._datastore.set_ejected(endpoint, ejected=True)
        fields = {"endpoint": endpoint.name, "address": endpoint.destination, "reason": reason, "seconds": trouble.interval_s}
        _log.warning("endpoint is ejected", extra={"fields": fields})

    def succeeded(self, endpoint: Endpoint) -> None:
        """It answered a request as it should."""
        if self._troubles and self._troubles.pop(endpoint, None) is not None and (endpoint.ejected or endpoint.half_open):
            self._datastore.set_ejected(endpoint, ejected=False)
            _log.info("endpoint is back", extra={"fields": {"endpoint": endpoint.name, "address": endpoint.destination}})

    def restarted(self, endpoint: Endpoint) -> None:
        """Another process answers there now: what the one before did is not held against it."""
        if self._troubles.pop(endpoint, None) is not None:
            self._datastore.set_ejected(endpoint, ejected=False)

    def probing(self, endpoint: Endpoint) -> None:
        """A half-open endpoint was picked: nobody else until that request is answered."""
        trouble = self._troubles.get(endpoint)
        if trouble is None:
            return
        trouble.probing = True
        trouble.until_s = self._clock.now_s() + PROBE_S
        self._datastore.set_ejected(endpoint, ejected=True)

    def tick(self) -> None:
        """Open the door a little for those whose time is over."""
        if not self._troubles:
            return
        now_s = self._clock.now_s()
        for endpoint, trouble in self._troubles.items():
            if endpoint.ejected and trouble.until_s <= now_s:
                trouble.probing = False
                self._datastore.set_ejected(endpoint, ejected=False, half_open=True)

    def state(self) -> dict[str, dict[str, float | int | bool]]:
        """By endpoint name, of those with failures held against them."""
        now_s = self._clock.now_s()
        return {
            endpoint.name: {
                "failures": trouble.failures,
                "ejected": endpoint.ejected,
                "half_open": endpoint.half_open,
                "seconds_left": round(max(0.0, trouble.until_s - now_s), 3) if endpoint.ejected else 0.0,
            }
            for endpoint, trouble in self._troubles.items()
        }

    def _removed(self, endpoint: Endpoint) -> None:
        self._troubles.pop(endpoint, None)
