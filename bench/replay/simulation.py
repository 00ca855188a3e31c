"""Plays a workload against a pool of engines, with a policy in between, in virtual time.

One pass over what happens, in order of time: ends of engine steps, scrapes, incidents, arrivals, a policy's own timers. At the same instant
they go in that order. Nothing sleeps, nothing is random here.

Scrapes: replica r is asked every `interval_s`, from a phase of its own, and the reading is known `delay_s` later. Only readings that a
decision will see are taken: the newest before each arrival; what a policy knows when it decides is the same as if all were. (Where
replicas fail, arrivals depend on answers, or a policy has requests wait, all of them are taken.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import count, cycle
from typing import NamedTuple

from bench.replay.engine import NEVER, Engine
from bench.replay.job import Job
from bench.replay.policy import WAITS, Patient, RejectedError, RoutingPolicy, Timer
from bench.replay.profiles import Profile
from bench.replay.workload import Arrival, Incident, Workload

READ, ASK, INCIDENT, ARRIVE, CALL = range(5)
GOLDEN = 0.6180339887498949
"""Its multiples are spread evenly: which answers are streamed is no matter of chance."""
MOMENT_S = 1e-9
"""An answer is known so much before the next scrape may go out."""
DRAIN_S = 7_200.0
"""After the last arrival; what is not answered by then never finished."""


@dataclass(frozen=True, slots=True)
class Scrapes:
    interval_s: float = 0.05
    delay_s: float = 0.0

    @property
    def period_s(self) -> float:
        """The next scrape goes out when the one before is answered, at the soonest."""
        return max(self.interval_s, self.delay_s)


class Stay(NamedTuple):
    """A replica, and from when to when something was so there; without an end: infinite."""

    replica: int
    from_s: float
    to_s: float


@dataclass(frozen=True, slots=True)
class Result:
    """How it went."""

    jobs: Sequence[Job]
    engines: Sequence[Engine]
    elapsed_s: float
    """From the first arrival to the last answer."""
    events: int
    held: Sequence[Stay]
    """One for each request an engine took: from its sending to its end there."""
    present: Sequence[Stay]
    """Times in which a replica was part of the pool and up."""


def engines_of(
    profile: Profile | Sequence[Profile], replicas: int, workload: Workload, *, offload_tokens: int = 0, promises: bool = False
) -> list[Engine]:
    """Several profiles are dealt out to the replicas in turn."""
    profiles = [profile] if isinstance(profile, Profile) else profile
    speeds = [*workload.speeds, *[1.0] * replicas][:replicas]
    return [
        Engine(each, speed=speed, offload_tokens=offload_tokens, adapters=workload.adapters, promises=promises)
        for each, speed in zip(cycle(profiles), speeds, strict=False)
    ]


class Simulation:
    """See the module. One use: `run`."""

    def __init__(
        self,
        workload: Workload,
        engines: Sequence[Engine],
        policy: RoutingPolicy,
        scrapes: Scrapes,
        phases: Sequence[float],
        *,
        whole: float = 0.0,
    ) -> None:
        """`phases`: in [0, 1), a replica's place in the scrape interval. `whole`: the share of answers that are not streamed."""
        self._workload = workload
        self._engines = engines
        self._policy = policy
        self._scrapes = scrapes
        self._phases = phases
        self._whole = whole
        self._due = [engine.next_s for engine in engines]
        self._members = set(range(len(engines))) - workload.absent
        self._jobs: list[Job] = []
        self._turns: dict[Job, tuple[Arrival, ...]] = {}
        self._later: list[tuple[float, int, int, object]] = []
        """Heap of what was not known from the start: (time, kind, order, what)."""
        self._coming = 0
        """Turns among `_later`, and requests that wait."""
        self._order = count()
        self._now_s = 0.0
        self._events = 0
        self._sent_s: dict[Job, float] = {}
        """When an engine took it."""
        self._lost_s: dict[Job, float] = {}
        self._since_s = {replica: 0.0 for replica in sorted(self._members) if engines[replica].up}
        self._present: list[Stay] = []
        if isinstance(policy, Patient):
            policy.play_on(self)

    def call_at(self, when_s: float, call: Callable[[float], None]) -> Timer:
        """Call it at that time, or now if that is past; never from within."""
        timer = Timer(call)
        heappush(self._later, (when_s, CALL, next(self._order), timer))
        return timer

    def placed(self, job: Job, replica: int, now_s: float) -> None:
        """A request that waited goes there."""
        self._coming -= 1
        self._place(job, replica, now_s)

    def refused(self, job: Job, now_s: float) -> None:
        """A request that waited goes nowhere."""
        self._coming -= 1
        self._fails(job, "rejected", now_s)

    def run(self) -> Result:
        for replica in sorted(self._members):
            self._policy.joined(replica, 0.0)
        planned = iter(self._planned())
        following = next(planned, None)
        last_s = 0.0
        while True:
            from_later = bool(self._later) and (following is None or self._later[0] < following)
            event = self._later[0] if from_later else following
            self._advance(event[0] if event is not None else last_s + DRAIN_S)
            if self._later and (event is None or self._later[0] < event):
                continue  # an answer brought something that comes first
            if event is None:
                break
            if from_later:
                heappop(self._later)
                self._coming -= event[1] == ARRIVE
            self._happens(event[0], event[1], event[3])
            if event[1] == ARRIVE:
                last_s = event[0]
            if not from_later:
                following = next(planned, None)
        for job in self._jobs:
            if job.finished_s < 0 and not job.error:
                job.error = "unfinished"
        ended_s = max((job.finished_s for job in self._jobs), default=0.0)
        first_s = self._workload.arrivals[0].at_s if self._workload.arrivals else 0.0
        held = [Stay(job.replica, sent_s, self._ended_s(job)) for job, sent_s in self._sent_s.items()]
        present = [*self._present, *(Stay(replica, since_s, math.inf) for replica, since_s in self._since_s.items())]
        return Result(self._jobs, self._engines, max(0.0, ended_s - first_s), self._events, held, present)

    def _ended_s(self, job: Job) -> float:
        return job.finished_s if job.finished_s >= 0 else self._lost_s.get(job, math.inf)

    def _planned(self) -> Iterable[tuple[float, int, int, object]]:
        events: list[tuple[float, int, int, object]] = [
            (arrival.at_s, ARRIVE, next(self._order), arrival) for arrival in self._workload.arrivals
        ]
        events += [(incident.at_s, INCIDENT, next(self._order), incident) for incident in self._workload.incidents]
        events.sort(key=lambda event: event[:3])
        if not self._policy.scrapes:
            return events
        dense = (
            bool(self._workload.incidents) or any(arrival.turns for arrival in self._workload.arrivals) or isinstance(self._policy, Patient)
        )
        if dense:
            return self._with_all_scrapes(events)
        events += self._seen_scrapes()
        events.sort(key=lambda event: event[:3])
        return events

    def _seen_scrapes(self) -> Iterator[tuple[float, int, int, object]]:
        """Of each replica, those that are the newest at some arrival."""
        period_s, delay_s = self._scrapes.period_s, self._scrapes.delay_s
        for replica in range(len(self._engines)):
            phase_s = self._phases[replica] * period_s
            before = -1
            for arrival in self._workload.arrivals:
                tick = math.floor((arrival.at_s - delay_s - phase_s) / period_s)
                if tick > before:
                    before = tick
                    yield tick * period_s + phase_s, ASK, next(self._order), replica

    def _with_all_scrapes(self, events: Sequence[tuple[float, int, int, object]]) -> Iterator[tuple[float, int, int, object]]:
        """Each in its time; as long as anything is left to happen."""
        period_s = self._scrapes.period_s
        ticks = [(phase * period_s, replica) for replica, phase in enumerate(self._phases[: len(self._engines)])]
        ticks.sort()
        tick = 0
        position = 0
        while position < len(events) or self._coming or any(due != NEVER for due in self._due):
            for phase_s, replica in ticks:
                at_s = tick * period_s + phase_s
                while position < len(events) and events[position][0] < at_s:
                    yield events[position]
                    position += 1
                yield at_s, ASK, next(self._order), replica
            tick += 1

    def _advance(self, until_s: float) -> None:
        """Let the engines work up to and including that instant."""
        due, engines, policy = self._due, self._engines, self._policy
        while True:
            now_s = min(due)
            if now_s > until_s:
                break
            replica = due.index(now_s)
            engine = engines[replica]
            events = engine.advance()
            due[replica] = engine.next_s
            self._events += 1
            for job in events.first_tokens:
                if job.streamed:
                    policy.first_token(job, now_s)
            for job in events.finished:
                policy.finished(job, now_s)
                if job in self._turns:
                    self._next_turn(job, now_s)
            if self._later:
                until_s = min(until_s, self._later[0][0])

    def _happens(self, at_s: float, kind: int, what: object) -> None:
        self._events += 1
        if kind == ARRIVE:
            assert isinstance(what, Arrival)
            self._arrives(what, at_s)
        elif kind == ASK:
            assert isinstance(what, int)
            if what not in self._members:
                return
            engine = self._engines[what]
            gauges = engine.gauges(at_s) if engine.up else None
            asked = self._policy.asked(what, at_s)
            if self._scrapes.delay_s:
                heappush(self._later, (at_s + self._scrapes.delay_s - MOMENT_S, READ, next(self._order), (what, gauges, asked)))
            else:
                self._policy.read(what, gauges, asked, at_s)
        elif kind == CALL:
            assert isinstance(what, Timer)
            what.fire(at_s)
        elif kind == READ:
            assert isinstance(what, tuple)
            replica, gauges, asked = what
            if replica in self._members:
                self._policy.read(replica, gauges, asked, at_s)
        else:
            assert isinstance(what, Incident)
            self._incident(what, at_s)

    def _arrives(self, arrival: Arrival, now_s: float) -> None:
        job = Job(len(self._jobs), now_s, arrival.prompt_tokens, arrival.output_tokens, arrival.blocks, adapter=arrival.adapter)
        job.tenant, job.priority = arrival.tenant, arrival.priority
        job.streamed = job.index * GOLDEN % 1.0 >= self._whole
        self._jobs.append(job)
        if arrival.turns:
            self._turns[job] = arrival.turns
        try:
            replica = self._policy.route(job, now_s)
        except RejectedError:
            self._fails(job, "rejected", now_s)
            return
        if replica == WAITS:
            self._coming += 1
        else:
            self._place(job, replica, now_s)

    def _place(self, job: Job, replica: int, now_s: float) -> None:
        job.replica = replica
        engine = self._engines[replica]
        if not engine.up:
            self._fails(job, "refused", now_s)
        elif engine.failing:
            self._fails(job, "status 500", now_s)
        elif job.prompt_tokens + job.output_tokens > engine.cache.capacity:
            self._fails(job, "status 400", now_s)
        else:
            self._sent_s[job] = now_s
            engine.submit(job, now_s)
            self._due[replica] = engine.next_s

    def _fails(self, job: Job, why: str, now_s: float) -> None:
        job.error = why
        if why != "rejected":
            self._policy.finished(job, now_s)
        if job in self._turns:
            self._next_turn(job, now_s)

    def _next_turn(self, job: Job, now_s: float) -> None:
        turn, *rest = self._turns.pop(job)
        self._coming += 1
        heappush(self._later, (now_s + turn.at_s, ARRIVE, next(self._order), turn._replace(at_s=now_s + turn.at_s, turns=tuple(rest))))

    def _incident(self, incident: Incident, now_s: float) -> None:
        replica, kind = incident.replica, incident.kind
        engine = self._engines[replica]
        if kind == "join":
            self._members.add(replica)
            self._policy.joined(replica, now_s)
        elif kind == "leave":
            self._members.discard(replica)
            self._policy.left(replica, now_s)
        elif kind == "down":
            for job in engine.stop():
                self._lost_s[job] = now_s
                self._fails(job, "lost", now_s)
            self._due[replica] = NEVER
        elif kind == "up":
            engine.up = True
        elif kind == "speed":
            engine.speed = incident.value
        else:
            engine.failing = bool(incident.value)
        if replica not in self._members or not engine.up:
            if replica in self._since_s:
                self._present.append(Stay(replica, self._since_s.pop(replica), now_s))
        else:
            self._since_s.setdefault(replica, now_s)
