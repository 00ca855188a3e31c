"""Flow control against a naive model, in virtual time, through any history of requests, ends, leavings, and pools that come and go.

The model keeps everything in one list and sorts it: who may go next is worked out from scratch each time.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from itertools import pairwise

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from epp.admission.queues import OVER, QUEUED, SENT
from epp.admission.rates import SLOTS, Rates
from epp.admission.refusals import DisplacedError, RateLimitedError
from epp.admission.settings import BandSettings
from epp.errors import EppError
from epp.plugins.flow_control.policies import (
    EdfOrderingPolicy,
    FcfsOrderingPolicy,
    GlobalStrictFairnessPolicy,
    ProgramAwareFairness,
    RoundRobinFairnessPolicy,
)
from epp.plugins.flow_control.tenants import TokenRateLimit
from epp.types import LLMRequest, Usage
from tests.flow_world import World

FLOWS = ("a", "b", "c", "d")
PRIORITIES = (5, 0, -1)
SUBSETS = (None, ("pod-1",), ("pod-2",))
TTLS_S = ("", "3s", "20s")
REQUESTS_MAX, BAND_MAX, FLOW_MAX, BYTES_MAX = 12, 8, 4, 900


@dataclass
class Model:
    """One request, as the naive model knows it."""

    name: str
    number: int
    priority: int
    flow: str
    subset: tuple[str, ...] | None
    queued_s: float
    ttl_s: float
    size_bytes: int
    given: bool = False
    """Its time was, by its header: it counts from when it came, whatever becomes of the pool."""
    outcome: str = ""


class FlowMachine(RuleBasedStateMachine):
    """Two endpoints, three priorities, four flows, three sets of candidates."""

    @initialize(
        fairness=st.sampled_from(["strict", "turns", "least"]),
        deadlines=st.booleans(),
        each=st.integers(1, 3),
        ttl_s=st.sampled_from([10.0, 0.0]),
    )
    def start(self, fairness: str, deadlines: bool, each: int, ttl_s: float) -> None:
        made = {"strict": GlobalStrictFairnessPolicy, "turns": RoundRobinFairnessPolicy, "least": ProgramAwareFairness}[fairness]
        ordering = EdfOrderingPolicy if deadlines else FcfsOrderingPolicy
        self.fairness, self.deadlines, self.each, self.ttl_s = fairness, deadlines, each, ttl_s
        bands = tuple(
            BandSettings(priority=p, requests_max=BAND_MAX, flow_requests_max=FLOW_MAX, fairness=made(), ordering=ordering())
            for p in PRIORITIES
        )
        self.world = World(
            2, each=each, bands=bands, requests_max=REQUESTS_MAX, size_bytes_max=BYTES_MAX, ttl_s=ttl_s, no_endpoints_ttl_s=ttl_s
        )
        self.asked: dict[str, Model] = {}
        self.running: list[str] = []
        self.served: dict[int, list[str]] = {priority: [] for priority in PRIORITIES}
        self.gone = False
        self.changed, self.changed_s = False, 0.0

    @rule(
        priority=st.sampled_from(PRIORITIES), flow=st.sampled_from(FLOWS), subset=st.sampled_from(SUBSETS), ttl=st.sampled_from(TTLS_S),
        size_bytes=st.integers(0, 200),
    )  # fmt: skip
    def ask(self, priority: int, flow: str, subset: tuple[str, ...] | None, ttl: str, size_bytes: int) -> None:
        number = len(self.asked)
        ttl_s = float(ttl[:-1]) if ttl else self.ttl_s
        made = Model(f"r{number}", number, priority, flow, subset, self.world.clock.now_s(), ttl_s, size_bytes, given=bool(ttl))
        if self.gone and subset is not None:
            subset = made.subset = None  # a subset of nobody is a matter of the pool, not of this model
        queued = self.queued()
        fits = (
            len(queued) < REQUESTS_MAX
            and sum(each.size_bytes for each in queued) + size_bytes <= BYTES_MAX
            and sum(each.priority == priority for each in queued) < BAND_MAX
            and sum((each.priority, each.flow) == (priority, flow) for each in queued) < FLOW_MAX
        )
        displaced = [] if fits else self.expected_displaced(made, queued)
        self.asked[made.name] = made
        room = self.has_room(made)
        ahead = any(each.subset == subset and each.priority >= priority for each in queued)
        headers = {"x-llm-d-request-ttl": ttl} if ttl else {}
        try:
            wait = self.world.ask(made.name, priority=priority, fairness_id=flow, subset=subset, headers=headers, body_bytes=size_bytes)
        except EppError:
            assert not fits
            assert not displaced, "others should have given way"
            assert not (room and not ahead), "refused though it might have passed"
            made.outcome = "Rejected"
            return
        if wait is None:
            assert room
            assert not ahead, "it passed those that wait"
            made.outcome = "Dispatched"
            self.running.append(made.name)
            self.correct_place(made)
        else:
            assert not room or ahead
            assert fits or displaced, "capacity exceeded"
            for each in displaced:
                assert isinstance(self.world.waits[each.name].error, DisplacedError)
                each.outcome = "Displaced"

    def expected_displaced(self, made: Model, queued: list[Model]) -> list[Model]:
        """Who gives way to a request that does not fit: of lower bands first where it is their common limit, else of the flow with most."""
        band = [each for each in queued if each.priority == made.priority]
        own = [each for each in band if each.flow == made.flow] + [made]
        if len(own) > FLOW_MAX:
            return []
        requests = len(queued) + 1 - REQUESTS_MAX
        size_bytes = sum(each.size_bytes for each in queued) + made.size_bytes - BYTES_MAX
        lowest = min(each.priority for each in queued)
        equals = len(band) >= BAND_MAX or lowest >= made.priority
        if equals and self.fairness == "strict":
            return []
        if equals:
            requests = max(requests, len(band) + 1 - BAND_MAX)
        among = band if equals else [each for each in queued if each.priority == lowest]

        def measure(of: list[Model]) -> int:
            return len(of) if requests > 0 else sum(each.size_bytes for each in of)

        flows = {flow: [each for each in among if each.flow == flow] for flow in FLOWS if any(each.flow == flow for each in among)}
        if not flows:
            return []
        most = max(flows.values(), key=measure)
        if equals and measure(most) - max(0, requests if requests > 0 else size_bytes) < measure(own):
            return []
        found: list[Model] = []
        for each in reversed(most):
            found.append(each)
            if len(found) >= requests and sum(one.size_bytes for one in found) >= size_bytes:
                return found
        return []

    @rule(which=st.integers(0, 30))
    def end(self, which: int) -> None:
        if self.running:
            self.world.end(self.running.pop(which % len(self.running)))

    @rule(which=st.integers(0, 30))
    def leave(self, which: int) -> None:
        queued = self.queued()
        if queued:
            left = queued[which % len(queued)]
            self.world.waits[left.name].cancel()
            left.outcome = "Cancelled"

    @rule()
    def pool_goes_or_comes(self) -> None:
        self.gone = not self.gone
        self.changed = True
        self.world.pool.endpoints = [] if self.gone else list(self.world.all)
        self.world.flow.changed()

    @rule()
    def reload(self) -> None:
        """The same configuration again: nobody's place, time or turn among equals is lost."""
        self.world.flow.use(self.world.flow.settings, self.world.detector)

    @rule(after_s=st.sampled_from([0.0, 0.0, 0.1, 1.0, 4.0]))
    def time_passes(self, after_s: float) -> None:
        world = self.world
        expected = {priority: self.expected_first(priority) for priority in PRIORITIES}
        world.clock.advance(after_s)
        before = len(world.woken)
        world.timers.run()
        order: list[Model] = []
        for name in world.woken[before:]:
            made, wait = self.asked[name], world.waits[name]
            assert made.outcome == "", "woken once, and not after it left"
            if wait.error is None:
                assert wait.state == SENT
                made.outcome = "Dispatched"
                order.append(made)
                world.route(name, None)
                self.running.append(name)
                self.correct_place(made)
            else:
                assert wait.state == OVER
                assert made.ttl_s
                assert world.clock.now_s() - made.queued_s >= min(made.ttl_s, self.ttl_s or made.ttl_s) - 1e-9
                made.outcome = "Expired"
        if self.changed:  # known with this pump at the latest
            self.changed, self.changed_s = False, world.clock.now_s()
        for made in self.queued():
            since_s = made.queued_s if made.given else max(made.queued_s, self.changed_s)
            assert not made.ttl_s or world.clock.now_s() - since_s < made.ttl_s + 1e-9, "it waits too long"
        for subset in SUBSETS:
            same = [made for made in order if made.subset == subset]
            assert [m.priority for m in same] == sorted((m.priority for m in same), reverse=True), (
                "strict priority among the same candidates"
            )
            for priority in PRIORITIES:
                self.in_order([made for made in same if made.priority == priority])
        for made in order:
            assert not any(each.subset == made.subset and each.priority > made.priority for each in self.queued()), (
                "nobody above it stayed behind for the same candidates"
            )
        if self.fairness == "strict" and order and not after_s:
            first = expected[order[0].priority]
            assert first is None or order[0].number in first

    def expected_first(self, priority: int) -> set[int] | None:
        """Who may be the first of that priority: for each set of candidates, the first of the list sorted by the policy."""
        found = set()
        for subset in SUBSETS:
            same = [made for made in self.queued() if (made.priority, made.subset) == (priority, subset)]
            if same:
                found.add(min(same, key=self.key).number)
        return found or None

    def in_order(self, same: list[Model]) -> None:
        """Of one priority and set of candidates, let through in one pump: in the policy's order, within each flow at least."""
        flows = [same] if self.fairness == "strict" else [[made for made in same if made.flow == flow] for flow in FLOWS]
        for served in flows:
            keys = [self.key(made) for made in served]
            assert keys == sorted(keys)
        if self.fairness == "turns":
            for first, second in pairwise(same):
                waiting = {made.flow for made in self.queued() if (made.priority, made.subset) == (first.priority, first.subset)}
                if first.flow == second.flow:
                    others = {made.flow for made in same[same.index(second) :]} | waiting
                    assert others == {first.flow}, "a flow was served twice while another waited"

    def key(self, made: Model) -> tuple[float, int]:
        if not self.deadlines:
            return made.queued_s, made.number
        return (made.queued_s + made.ttl_s if made.ttl_s else float("inf")), made.number

    def queued(self) -> list[Model]:
        return [made for made in self.asked.values() if not made.outcome]

    def has_room(self, made: Model) -> bool:
        """By what is charged: the detector's mean over the candidates is below 1."""
        if self.gone:
            return False
        members = [e for e in self.world.all if made.subset is None or e.name in made.subset]
        return sum(e.inflight_requests for e in members) < self.each * len(members)

    def correct_place(self, made: Model) -> None:
        """`World.route` knows no subsets: charge an endpoint of the request's."""
        if made.subset is not None:
            wrong, right = self.world.where[made.name], next(e for e in self.world.all if e.name in made.subset)
            wrong.inflight_requests -= 1
            right.inflight_requests += 1
            self.world.where[made.name] = right

    @invariant()
    def counts_are_those_of_what_waits(self) -> None:
        if not hasattr(self, "world"):
            return
        flow, queued = self.world.flow, self.queued()
        assert flow.requests == len(queued) <= REQUESTS_MAX
        assert flow.size_bytes == sum(made.size_bytes for made in queued) <= BYTES_MAX
        assert sum(series.queued for series in flow.counts.series.values()) == len(queued)
        assert sum(group.queued for group in flow.saturation.queued()) == len(queued)
        for band in flow.bands.all:
            mine = [made for made in queued if made.priority == band.priority]
            assert band.requests == len(mine) <= BAND_MAX
            assert {each.id: each.requests for each in band.flows.values()} == {
                name: sum(made.flow == name for made in mine) for name in {made.flow for made in mine}
            }
            assert sum(1 for backlog in band.backlogs.values() for _ in backlog) == len(mine)
        for made in queued:
            assert self.world.waits[made.name].state == QUEUED

    @invariant()
    def every_request_has_one_outcome_or_waits(self) -> None:
        if hasattr(self, "world"):
            assert sum(self.world.flow.counts.outcomes.values()) + self.world.flow.requests == len(self.asked)

    @precondition(lambda self: hasattr(self, "world") and not self.gone)
    @rule()
    def whoever_has_room_goes(self) -> None:
        """Nothing is forgotten: when the pool is idle and events have been dealt with, nobody waits."""
        while self.running:
            self.world.end(self.running.pop())
        for _ in range(REQUESTS_MAX + 1):
            self.time_passes(0.0)
            while self.running:
                self.world.end(self.running.pop())
        assert self.queued() == []


FlowMachine.TestCase.settings = settings(
    max_examples=100, stateful_step_count=50, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much]
)
TestFlow = FlowMachine.TestCase


@pytest.mark.parametrize("flows", [2, 7])
def test_nobody_starves_while_flows_take_turns(flows: int) -> None:
    """One flow floods, the others ask now and then: each of theirs waits for at most one request of every flow."""
    world = World(1, each=1, bands=(BandSettings(fairness=RoundRobinFairnessPolicy(), requests_max=0),))
    world.ask("running")
    for number in range(200):
        world.ask(f"flood-{number}", fairness_id="flood")
    running = "running"
    waiting: dict[str, int] = {}
    for turn in range(150):
        if turn % 3 == 0:
            name = f"f{turn % flows}-{turn}"
            world.ask(name, fairness_id=f"f{turn % flows}")
            waiting[name] = turn
        world.end(running)
        (running,) = world.run(0.01)
        since = waiting.pop(running, None)
        if since is not None:
            assert turn - since <= 2 * (flows + 1)
    assert sum(not name.startswith("flood") for name in world.woken) > 40


def test_two_tenants_at_ten_to_one_get_alike() -> None:
    """Jain's index of tokens served, with flows that take turns and with least attained service."""
    for fairness in (RoundRobinFairnessPolicy(), ProgramAwareFairness()):
        world = World(2, each=2, ttl_s=0.0, bands=(BandSettings(fairness=fairness, requests_max=0),))
        running: list[str] = []
        for step in range(600):
            names = [f"big-{step}-{number}" for number in range(10)]
            running += [name for name in names if world.ask(name, fairness_id="big", prompt_tokens=100) is None]
            if world.ask(f"small-{step}", fairness_id="small", prompt_tokens=100) is None:
                running.append(f"small-{step}")
            for name in running[:2]:
                world.end(name)
            running = running[2:] + world.run(0.1)
        assert world.flow.service.tokens.jain(world.clock.now_s(), 60.0) >= 0.95


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["ask", "ask", "ask", "end", "leave", "wait"]), st.integers(1, 900), st.floats(0.0, 7.0), st.sampled_from("ab")
        ),
        max_size=80,
    ),
    st.sampled_from(["10s", "1m"]),
)
def test_no_window_has_more_tokens_than_its_limit_but_for_what_runs(steps: list[tuple[str, int, float, str]], window: str) -> None:
    """Against a list of everything that was counted, and when; of every refusal: who comes back when told to is served."""
    limit = TokenRateLimit(tokens=1_000, window=window)
    window_s, rates, now_s = limit.window_s, Rates(limit), 5.0
    counted: dict[str, list[list[float]]] = {"a": [], "b": []}
    running: list[tuple[LLMRequest, list[float]]] = []
    for kind, tokens, gap_s, tenant in steps:
        now_s += gap_s
        if kind == "ask":
            request = LLMRequest(id="r", path="/", headers={})
            request.fairness_id, request.prompt_tokens = tenant, tokens
            exact = sum(n for at_s, n in counted[tenant] if at_s > now_s - window_s)
            try:
                rates.admit(request, now_s)
            except RateLimitedError as error:
                coarse = sum(n for at_s, n in counted[tenant] if at_s > now_s - window_s * (1 + 1 / SLOTS))
                assert coarse + tokens > limit.tokens
                again = LLMRequest(id="again", path="/", headers={})
                again.fairness_id, again.prompt_tokens = tenant, tokens
                back_s = now_s + min(error.retry_after_s, window_s * (1 + 1 / SLOTS) + 1)
                deepcopy(rates).admit(again, back_s)
            else:
                assert not exact or exact + tokens <= limit.tokens
                note = [now_s, float(tokens)]
                counted[tenant].append(note)
                running.append((request, note))
        elif running and kind != "wait":
            request, note = running.pop(tokens % len(running))
            if kind == "leave":
                rates.returned(request, now_s)
                note[1] = 0.0
            else:
                rates.finished(request, Usage(prompt_tokens=request.prompt_tokens // 2, completion_tokens=tokens), now_s)
                note[1] = float(request.prompt_tokens // 2)
                counted[request.fairness_id].append([now_s, float(tokens)])
        for each, notes in counted.items():
            exact = sum(n for at_s, n in notes if at_s > now_s - window_s)
            coarse = sum(n for at_s, n in notes if at_s > now_s - window_s * (1 + 1.001 / SLOTS))
            assert exact <= rates.used(each, now_s) <= coarse
