"""The product with its flow control: requests wait in its queues, in virtual time, before its director chooses.

Nothing of flow control is rebuilt here either: `epp.queueing` makes it of the configuration and tells it what it can't see, as in `epp serve`;
only its timers are the simulation's. A request is resumed in the next turn of the loop after it was woken, as by the transport.
Not here: the workloads (flow_scenarios), the figures (flow).
"""

from __future__ import annotations

import random
from collections.abc import Callable

from bench.replay.job import Job
from bench.replay.policy import WAITS, Ground, RejectedError, Timer
from bench.replay.product import START_S, ProductPolicy
from bench.replay.profiles import Profile
from epp.admission.control import FlowControl
from epp.arrival import Arrival
from epp.director import FAIRNESS_HEADER, OBJECTIVE_HEADER
from epp.errors import EppError
from epp.exchange import Exchange
from epp.queueing import Queueing
from epp.resources import Objective
from epp.types import LLMRequest

MARK = "flowControl"
"""A configuration that says anything of it is played with it."""
TURN_S = 1e-9
"""From one turn of the event loop to the next, if there is something to do."""
PRIORITIES_MAX = 100


class _Queueing(Queueing):
    """With the simulation's timers."""

    ground: Ground | None = None

    def _call_at(self, when_s: float, call: Callable[[], None]) -> Timer:  # type: ignore[override]
        assert self.ground is not None
        policy_clock = self._clock

        def fire(now_s: float) -> None:
            policy_clock.advance(max(0.0, now_s + START_S - policy_clock.now_s()))  # type: ignore[attr-defined]
            call()

        return self.ground.call_at(max(when_s, policy_clock.now_s()) - START_S + TURN_S, fire)


class FlowProduct(ProductPolicy):
    """See the module. The configuration's gate says which form of flow control it is; without the gate, the one on by default."""

    def __init__(
        self, config: str, source: str, profile: Profile, rng: random.Random, *, adapters_max: int = 0, usage: bool = True
    ) -> None:
        super().__init__(config, source, profile, rng, adapters_max=adapters_max, usage=usage)
        self._queueing = _Queueing(self._policy, self._datastore, self._director.candidates, self._clock, rng)
        self._director.stages = self._queueing.stages
        self._priorities: set[int] = set()
        self._waiting: dict[Job, Arrival] = {}
        self._queueing.follow(self._director, ())

    @property
    def flow(self) -> FlowControl | None:
        return self._queueing.flow

    def play_on(self, ground: Ground) -> None:
        self._ground = self._queueing.ground = ground

    def route(self, job: Job, now_s: float) -> int:
        self._at(now_s)
        self._tick()
        try:
            arrived = self._director.arrive(self.request_of(job), None, None, self._clock.now_s(), lambda: self._woken(job))
        except EppError as error:
            raise RejectedError from error
        if isinstance(arrived, Arrival):
            self._waiting[job] = arrived
            return WAITS
        return self._sent(job, arrived)

    def request_of(self, job: Job) -> LLMRequest:
        request = super().request_of(job)
        if job.tenant or job.priority:
            if job.priority not in self._priorities and len(self._priorities) < PRIORITIES_MAX:
                self._priorities.add(job.priority)
                self._resources.apply([Objective(_objective(priority), priority=priority) for priority in self._priorities], [])
            request.headers = {**self._headers, FAIRNESS_HEADER: job.tenant, OBJECTIVE_HEADER: _objective(job.priority)}
        return request

    def _woken(self, job: Job) -> None:
        self._ground.call_at(self._clock.now_s() - START_S + TURN_S, lambda now_s: self._resume(job, now_s))

    def _resume(self, job: Job, now_s: float) -> None:
        self._at(now_s)
        arrival = self._waiting.pop(job)
        try:
            arrived = self._director.resume(arrival)
        except EppError:
            self._ground.refused(job, now_s)
            return
        assert isinstance(arrived, Exchange)
        self._ground.placed(job, self._sent(job, arrived), now_s)

    def _sent(self, job: Job, exchange: Exchange) -> int:
        self._exchanges[job] = exchange
        return self._replica_of[exchange.decision.endpoint.spec.address]


def _objective(priority: int) -> str:
    return f"priority-{priority}"
