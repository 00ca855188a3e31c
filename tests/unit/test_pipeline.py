"""One decision: weights, clamping, filters, ties, sparse scores, and that what is kept between decisions is never stale."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from math import inf, nan
from typing import ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from epp.clock import VirtualClock
from epp.config.load import load
from epp.datastore import Datastore, Reading, Ticket
from epp.errors import SaturatedError
from epp.plugins.base import Plugin
from epp.plugins.pickers.max_score import MaxScorePicker
from epp.plugins.registry import Registry
from epp.plugins.scorers.kv_cache_utilization import KvCacheUtilizationScorer
from epp.plugins.scorers.prefix_cache import PrefixCacheScorer
from epp.plugins.scorers.queue import QueueScorer
from epp.plugins.scorers.running_requests_size import RunningRequestsSizeScorer
from epp.scheduling.build import build
from epp.scheduling.load_scores import Weighted
from epp.scheduling.pipeline import Profile, Scheduler
from epp.types import Endpoint, LLMRequest, PrefixMatch, Snapshot
from tests.builders import LLM_D, core, llm_request, pool_of, spec


class Says(Plugin):
    """A scorer that says what it was told to, by slot."""

    type: ClassVar[str] = "says"
    per_request: ClassVar[bool] = True

    scores: list[float]

    def score(self, request: LLMRequest, endpoints: Sequence[Endpoint]) -> Sequence[float]:
        return [self.scores[e.slot] for e in endpoints]


class SaysOfLoad(Says):
    type: ClassVar[str] = "says-of-load"
    per_request: ClassVar[bool] = False


class SaysSparsely(Plugin):
    type: ClassVar[str] = "says-sparsely"
    per_request: ClassVar[bool] = True

    scores: dict[int, float]

    def score(self, request: LLMRequest, endpoints: Sequence[Endpoint]) -> Sequence[float]:
        raise AssertionError("the sparse form replaces the dense one on the request path")

    def score_sparse(self, request: LLMRequest) -> Mapping[int, float]:
        return self.scores


class Keeps(Plugin):
    type: ClassVar[str] = "keeps"

    slots: list[int]

    def keep(self, request: LLMRequest, endpoints: Sequence[Endpoint]) -> Sequence[Endpoint]:
        return [e for e in endpoints if e.slot in self.slots]


class Totals(Plugin):
    """A picker that only looks: it keeps the totals it was given."""

    type: ClassVar[str] = "totals"

    def pick(self, totals: Sequence[float], endpoints: Sequence[Endpoint], rng: random.Random) -> Sequence[Endpoint]:
        self.__dict__["seen"] = dict(zip((e.slot for e in endpoints), totals, strict=True))
        return [max(zip(totals, endpoints, strict=True), key=lambda pair: pair[0])[1]]

    @property
    def seen(self) -> dict[int, float]:
        seen: dict[int, float] = self.__dict__["seen"]
        return seen


def totals(endpoints: Sequence[Endpoint], *scorers: tuple[Plugin, float], filters: Sequence[Keeps] = ()) -> dict[int, float]:
    looks = Totals()
    profile = Profile("p", filters, [Weighted(scorer, weight) for scorer, weight in scorers], looks)  # type: ignore[arg-type]
    profile.run(llm_request(), Snapshot.of(endpoints), random.Random(1))
    return looks.seen


@pytest.mark.parametrize("cls", [Says, SaysOfLoad])
def test_totals_are_weighted_sums_not_normalised(cls: type[Says]) -> None:
    found = totals(pool_of({}, {}), (cls(scores=[0.5, 1.0]), 2.0), (cls(scores=[1.0, 0.25]), 3.0))
    assert found == {0: 4.0, 1: 2.75}


@pytest.mark.parametrize("cls", [Says, SaysOfLoad])
def test_scores_are_clamped_and_what_is_no_number_counts_for_nothing(cls: type[Says]) -> None:
    scores = [-0.5, 1.5, nan, inf, -inf, 0.5]
    assert totals(pool_of(*[{}] * 6), (cls(scores=scores), 2.0)) == {0: 0.0, 1: 2.0, 2: 0.0, 3: 2.0, 4: 0.0, 5: 1.0}
    assert totals(pool_of({}), (cls(scores=[nan]), 2.0)) == {0: 0.0}


def test_sparse_scores_are_clamped_too_and_may_name_endpoints_that_are_no_candidates() -> None:
    sparse = SaysSparsely(scores={0: 7.0, 1: nan, 2: 0.5, 99: 1.0})
    assert totals(pool_of({}, {}, {}, {}), (sparse, 3.0)) == {0: 3.0, 1: 0.0, 2: 1.5, 3: 0.0}


@pytest.mark.parametrize("cls", [Says, SaysOfLoad])
def test_a_scorer_that_says_too_little_is_a_bug_not_a_pick(cls: type[Says]) -> None:
    class Short(cls):  # type: ignore[misc, valid-type]
        def score(self, request: LLMRequest, endpoints: Sequence[Endpoint]) -> Sequence[float]:
            return [1.0]

    with pytest.raises(ValueError, match="zip"):
        totals(pool_of({}, {}), (Short(scores=[]), 1.0))


def test_without_scorers_everyone_is_equal() -> None:
    assert totals(pool_of({}, {})) == {0: 0.0, 1: 0.0}


def test_filters_run_one_after_the_other_before_the_scorers() -> None:
    found = totals(pool_of({}, {}, {}), (Says(scores=[0.1, 0.2, 0.3]), 1.0), filters=[Keeps(slots=[0, 1]), Keeps(slots=[1, 2])])
    assert found == {1: 0.2}


def test_when_filters_leave_nobody_the_request_is_shed() -> None:
    with pytest.raises(SaturatedError):
        totals(pool_of({}, {}), filters=[Keeps(slots=[0]), Keeps(slots=[1])])


def test_scores_are_normalised_over_those_the_filters_left() -> None:
    endpoints = pool_of({"waiting": 100.0}, {"waiting": 4.0}, {"waiting": 2.0})
    assert totals(endpoints, (QueueScorer(), 1.0), filters=[Keeps(slots=[1, 2])]) == {1: 0.0, 2: 1.0}


def test_kept_totals_are_not_spoilt_by_a_requests_own_scores() -> None:
    endpoints = pool_of({}, {"kv_usage": 0.5})
    looks = Totals()
    profile = Profile("p", (), [Weighted(KvCacheUtilizationScorer(), 1.0), Weighted(PrefixCacheScorer(), 1.0)], looks)
    candidates = Snapshot.of(endpoints)
    hit = llm_request(prefix=PrefixMatch([], [], 100, {1: 100}))
    for _ in range(2):
        profile.run(hit, candidates, random.Random(1))
        assert looks.seen == {0: 1.0, 1: 1.5}
        profile.run(llm_request(), candidates, random.Random(1))
        assert looks.seen == {0: 1.0, 1: 0.5}


def test_ties_are_broken_evenly_and_the_best_wins() -> None:
    profile = Profile("p", (), [Weighted(Says(scores=[1.0, 0.5, 1.0, 1.0]), 1.0)], MaxScorePicker())
    candidates = Snapshot.of(pool_of(*[{}] * 4))
    rng = random.Random(3)
    counts = Counter(profile.run(llm_request(), candidates, rng)[0].slot for _ in range(3_000))
    assert sorted(counts) == [0, 2, 3]
    assert min(counts.values()) > 900


def test_producers_run_first_and_hooks_are_told_of_the_pick() -> None:
    registry = Registry()
    built = build(load(LLM_D, source="t", catalogue=registry), registry, random.Random(1), VirtualClock())
    candidates = Snapshot.of(pool_of({}, {}))
    request = llm_request(prompt=bytes(4096), prompt_tokens=1024, target_model="m")
    decision = built.scheduler.schedule(request, candidates)
    assert request.prefix is not None
    assert decision.profile == "default"
    for picked in built.scheduler.picked:
        picked(request, decision)
    again = llm_request(prompt=bytes(4096), prompt_tokens=1024, target_model="m")
    for _ in range(10):
        assert built.scheduler.schedule(again, candidates).endpoint is decision.endpoint, "its prefix is cached there"


# What is kept between decisions

SCORERS = [QueueScorer(), RunningRequestsSizeScorer(), KvCacheUtilizationScorer()]


class Whole(Plugin):
    """A scorer of load of neither known kind."""

    type: ClassVar[str] = "whole"
    per_request: ClassVar[bool] = False

    def score(self, request: LLMRequest, endpoints: Sequence[Endpoint]) -> Sequence[float]:
        return QueueScorer().score(request, endpoints)


ACTIONS = st.one_of(
    st.tuples(st.just("pick"), st.integers(0, 5), st.integers(0, 300)),
    st.tuples(st.just("first token"), st.integers(0, 30), st.just(0)),
    st.tuples(st.just("release"), st.integers(0, 30), st.just(0)),
    st.tuples(st.just("move"), st.integers(0, 30), st.integers(0, 5)),
    st.tuples(st.just("read"), st.integers(0, 5), st.sampled_from([0, 1, 2, 5, 5, 9])),
    st.tuples(st.just("health"), st.integers(0, 5), st.integers(0, 1)),
    st.tuples(st.just("membership"), st.integers(1, 63), st.just(0)),
    st.tuples(st.just("subset"), st.integers(1, 63), st.just(0)),
)


@settings(deadline=None, max_examples=250)
@given(st.lists(st.tuples(ACTIONS, st.booleans()), max_size=60))
def test_totals_kept_through_any_history_are_those_worked_out_anew(history: list[tuple[tuple[str, int, int], bool]]) -> None:
    datastore = Datastore(VirtualClock(1000.0))
    datastore.apply([spec(number + 1) for number in range(6)])
    datastore.subscribe(removed=lambda e: datastore.free_slot(e.slot))
    looks = Totals()
    weights = [Weighted(scorer, weight) for scorer, weight in zip([*SCORERS, Whole()], [2.0, 0.7, 3.0, 1.1], strict=True)]
    kept = Profile("p", (), weights, looks)
    tickets: list[Ticket] = []

    def compare(candidates: Snapshot) -> None:
        fresh = Totals()
        kept.run(llm_request(), candidates, random.Random(1))
        Profile("p", (), weights, fresh).run(llm_request(), candidates, random.Random(1))
        assert looks.seen == pytest.approx(fresh.seen)

    compare(datastore.ready)
    for (action, which, much), look in history:
        endpoints = list(datastore.endpoints.values())
        endpoint = endpoints[which % len(endpoints)]
        ticket = tickets[which % len(tickets)] if tickets else None
        if action == "pick":
            tickets.append(Ticket(endpoint, much))
        elif action == "first token" and ticket:
            ticket.first_token()
        elif action == "release" and ticket:
            ticket.release()
        elif action == "move" and ticket:
            ticket.move(endpoints[much % len(endpoints)])
        elif action == "read":
            reading = Reading(waiting=float(much), running=float(much * 2), kv_usage=much / 10, kv_block_tokens=16, kv_blocks=100)
            datastore.record_reading(endpoint, reading, sent_requests=endpoint.sent_requests, sent_tokens=endpoint.sent_tokens)
        elif action == "health":
            datastore.set_healthy(endpoint, healthy=bool(much))
        elif action == "membership":
            datastore.apply([spec(number + 1) for number in range(6) if which >> number & 1])
        elif action == "subset":
            compare(Snapshot.of([e for e in datastore.ready.endpoints if which >> (e.slot % 6) & 1] or datastore.ready.endpoints))
        if look:
            compare(datastore.ready)
    compare(datastore.ready)


def test_a_pick_repels_the_next_one() -> None:
    """Between two scrapes what we sent is all we know: eight requests over four idle endpoints do not herd."""
    world = core(4, config="{apiVersion: llm-d.ai/v1alpha1, kind: EndpointPickerConfig, plugins: [{type: running-requests-size-scorer}]}")
    counts: Counter[str] = Counter()
    for _ in range(8):
        request = llm_request()
        counts[world.director.route(request, None, None, 0.0).decision.endpoint.name] += 1
    assert set(counts.values()) == {2}


def test_the_scheduler_hands_on_fallbacks() -> None:
    profile = Profile("p", (), [Weighted(Says(scores=[0.1, 0.9, 0.5]), 1.0)], MaxScorePicker(max_num_of_endpoints=3))
    decision = Scheduler([profile], None, [], random.Random(1)).schedule(llm_request(), Snapshot.of(pool_of({}, {}, {})))
    assert (decision.endpoint.slot, [e.slot for e in decision.fallbacks]) == (1, [2, 0])
