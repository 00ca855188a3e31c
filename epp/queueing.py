"""Flow control put to work: made of a configuration, told of what it can't see, in the director's way.

Three modes (`featureGates`): `flowControl=true`, as the `flowControl` block says; `flowControl=false`, none; not written, the safe form:
queues of fixed limits, turns for all who are told apart, and a pool counts as full only by what we ourselves sent and how fast it turned out to be
(`predicted-wait-detector`), so that no engine whose metrics are late, odd or missing holds anybody up.

Not here: the rules (admission). What mode it is changes with a restart, everything else with the configuration.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal

from epp.admission.control import FlowControl
from epp.admission.families import flow_families
from epp.admission.refusals import EvictedError
from epp.admission.settings import BandSettings, Settings, settings_of, tenancy_of
from epp.arrival import Stage
from epp.candidates import Candidates
from epp.clock import Clock
from epp.datastore import Datastore
from epp.director import Director
from epp.exchange import Exchange
from epp.observe.families import Family
from epp.plugins.base import Context, Detector
from epp.plugins.detectors.predicted_wait import PredictedWaitDetector
from epp.plugins.flow_control.policies import RoundRobinFairnessPolicy
from epp.policy import Policy
from epp.scheduling.build import Built

SAFE_TTL_S = 120.0
"""Longest wait in the safe form."""
SAFE_REQUESTS_MAX = 20_000
"""Queued at once in the safe form; their bodies count in --max-buffered-bytes too."""
SAFE_WAIT = "2s"
"""A pool whose best endpoint will take so long to begin with a prompt is full, in the safe form."""

_log = logging.getLogger("epp.flow_control")


class Queueing:
    """See the module."""

    def __init__(self, policy: Policy, datastore: Datastore, candidates: Candidates, clock: Clock, rng: random.Random) -> None:
        self._policy = policy
        self._datastore = datastore
        self._clock = clock
        self._rng = rng
        self._mode = policy.built.config.flow_control_mode
        self._told = False
        self._safe: PredictedWaitDetector | None = None
        self.flow: FlowControl | None = None
        if self._mode == "off":
            return
        if self._mode == "safe":
            self._safe = PredictedWaitDetector(max_wait=SAFE_WAIT)
            datastore.subscribe(removed=self._safe.removed)
        settings, detector = self._of(policy.built)
        self.flow = FlowControl(settings, candidates, clock, self._call_at, detector=detector, pool_name=datastore.name, evict=self._evict)
        datastore.noticed = self.flow.changed

    @property
    def stages(self) -> Sequence[Stage]:
        """What a request passes; the last there is."""
        return (self.flow,) if self.flow is not None else ()

    @property
    def sheds(self) -> bool:
        """Whether sheddable requests are refused at once, and not queued."""
        return self._mode != "on"

    def follow(self, director: Director, priorities: Iterable[int]) -> None:
        """By the configuration that is in service now."""
        built = self._policy.built
        if built.config.flow_control_mode != self._mode and not self._told:
            self._told = True
            _log.warning("the gate flowControl changes with the next start only")
        flow = self.flow
        director.flow, director.sheds = flow, self.sheds
        if flow is None:
            return
        flow.use(*self._of(built))
        self.provision(priorities)
        director.evicts = flow.evictor is not None
        scheduler = built.scheduler
        if flow.finished in scheduler.finished:
            return
        if self._safe is not None:  # no plugin of the configuration's, so it is told here
            scheduler.picked = (*scheduler.picked, self._safe.picked)
            scheduler.served = (*scheduler.served, self._safe.served)
            scheduler.finished = (*scheduler.finished, self._safe.finished)
        scheduler.first_token = (*scheduler.first_token, flow.first_token)
        scheduler.finished = (*scheduler.finished, flow.finished)

    def provision(self, priorities: Iterable[int]) -> None:
        """There are objectives of these priorities now."""
        if self.flow is not None:
            self.flow.provision(priorities)

    def close(self, policy: Literal["drain", "reject"]) -> None:
        """Nobody begins to wait any more; who waits does so to the end (drain), or is refused now."""
        if self.flow is not None:
            self.flow.close(policy)

    def families(self) -> Iterator[Family]:
        if self.flow is not None:
            yield from flow_families(self.flow, self._clock.now_s())

    def _of(self, built: Built) -> tuple[Settings, Detector]:
        if self._safe is not None:
            self._safe.bind(Context(self._clock, self._rng, built.plugins))
            band = BandSettings(requests_max=SAFE_REQUESTS_MAX, fairness=RoundRobinFairnessPolicy())
            settings = Settings(
                requests_max=SAFE_REQUESTS_MAX,
                ttl_s=SAFE_TTL_S,
                request_ttl_max_s=SAFE_TTL_S,
                default_band=band,
                waits_for_endpoints=False,
                sheds=True,
                **tenancy_of(built.plugins),
            )
            return settings, self._safe
        assert built.scheduler.detector is not None
        return settings_of(built.config.flow_control, built.plugins), built.scheduler.detector

    def _evict(self, exchange: Exchange) -> bool:
        if exchange.evict is None or self.flow is None:
            return False
        now_s = self._clock.now_s()
        return exchange.evict(EvictedError(self.flow.bands.of(exchange.request.priority, now_s).retry_after_s(now_s)))

    def _call_at(self, when_s: float, call: Callable[[], None]) -> asyncio.TimerHandle:
        return asyncio.get_running_loop().call_later(max(0.0, when_s - self._clock.now_s()), call)
