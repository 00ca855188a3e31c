"""What endpoints did lately: sessions that share a prefix are spread over an idle pool, and nobody is moved without need."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from math import exp, inf

import pytest

from epp.plugins import cost_history
from epp.plugins.cost_history import BUSY, HISTORY_S, LOADED, PRICE, PRICE_MAX_S, PRICE_STEP_S, RATIO, WEIGHED_EVERY_S, weigh
from epp.plugins.cost_lanes import Lane, Lanes
from epp.plugins.scorers.cost_aware import CostAwareScorer
from epp.types import Decision, LLMRequest
from tests.builders import PATH, Core, core, pool_of

CONFIG = """
apiVersion: llm-d.ai/v1alpha1
kind: EndpointPickerConfig
plugins: [{type: cost-aware-scorer}]
"""
TOKENS_PER_S = 10_000
"""Of prefill, as the scorer takes it before it knows better."""


def lanes_of(*histories_s: float, slowness: tuple[float, ...] = ()) -> list[Lane]:
    lanes = [Lane(endpoint) for endpoint in pool_of(*[{}] * len(histories_s))]
    for number, (lane, history_s) in enumerate(zip(lanes, histories_s, strict=True)):
        lane.history_s, lane.observed_s, lane.weighed_s = history_s, HISTORY_S, 0.0
        lane.slowness = slowness[number] if slowness else 1.0
    return lanes


def prices_s(lanes: list[Lane], now_s: float = 0.0) -> list[float]:
    list(weigh(lanes, now_s))
    return [lane.history_price_s for lane in lanes]


# The price


def test_what_is_beyond_the_others_share_is_priced() -> None:
    # others of the first: 0.5 s in the mean; the pool spent 3 s of 4 x 600
    faded = 1 - 3 / (4 * HISTORY_S) / BUSY
    assert prices_s(lanes_of(1.5, 0.25, 0.5, 0.75)) == pytest.approx([PRICE * faded * (1.5 - RATIO * 0.5), 0, 0, 0])


def test_no_history_costs_more_than_a_wait_that_anybody_may_have() -> None:
    assert prices_s(lanes_of(30.0, 0.0, 0.0, 0.0)) == [PRICE_MAX_S, 0, 0, 0]


def test_it_fades() -> None:
    lanes = lanes_of(1.0, 0.0)
    at_first, _ = prices_s(lanes)
    later, _ = prices_s(lanes, HISTORY_S)
    assert lanes[0].history_s == pytest.approx(exp(-1))
    assert later == pytest.approx(at_first * exp(-1), rel=0.01)


def test_a_busy_pool_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost_history, "PRICE_MAX_S", inf)
    half = BUSY * HISTORY_S
    assert prices_s(lanes_of(2 * half, 0.0)) == [0.0, 0.0]
    assert prices_s(lanes_of(half, 0.0))[0] == pytest.approx(PRICE * half / 2)


def test_a_pool_with_requests_under_way_has_none() -> None:
    lanes = lanes_of(1.0, 0.0)
    (alone_s, _) = prices_s(lanes)
    lanes[1].requests = int(LOADED)
    assert prices_s(lanes) == pytest.approx([alone_s / 2, 0.0])
    lanes[0].requests = int(LOADED)
    assert prices_s(lanes) == [0.0, 0.0]


def test_a_pool_that_is_busy_from_its_first_moment_on_is_no_idle_one() -> None:
    lanes = [Lane(endpoint) for endpoint in pool_of({}, {})]
    assert prices_s(lanes, 1_000.0) == [0.0, 0.0]
    lanes[0].history_s = 4.0
    assert prices_s(lanes, 1_004.0) == [0.0, 0.0], "half of its time"
    lanes[0].history_s = 0.4
    assert prices_s(lanes, 1_008.0)[0] == pytest.approx(PRICE * 0.4 * (1 - 0.4 / 16 / BUSY), rel=0.05), "a fortieth"


def test_fast_endpoints_do_more_than_slow_ones_and_are_not_priced_for_it() -> None:
    assert prices_s(lanes_of(3.0, 3.0, 0.0, 0.0, slowness=(1.0, 1.2, 2.0, 3.0))) == [0.0] * 4
    one_fast = prices_s(lanes_of(9.0, 0.0, slowness=(1.0, 2.0)))
    assert one_fast == [0.0, 0.0], "there is no other like it"
    slow = prices_s(lanes_of(0.0, 0.0, 1.0, slowness=(1.0, 1.0, 2.0)))
    assert slow[:2] == [0.0, 0.0]
    assert slow[2] > 0.7 * PRICE, "fast ones could have done that"


def test_only_changes_are_told() -> None:
    lanes = lanes_of(5.0, 0.0, 0.0)
    assert list(weigh(lanes, 0.0)) == lanes[:1]
    assert list(weigh(lanes, 0.0)) == []
    assert list(weigh(lanes[:1], 0.0)) == [], "nobody to compare it with"
    assert lanes[0].history_price_s == PRICE_MAX_S
    lanes[0].history_s = 1.0
    assert list(weigh(lanes, 0.0)) == lanes[:1]
    lanes[0].history_s -= PRICE_STEP_S
    assert list(weigh(lanes, 0.0)) == [], "next to nothing"
    lanes[0].history_s = 0.0
    assert list(weigh(lanes, 0.0)) == lanes[:1]


# What comes of it


class Sessions:
    """Sessions that share the beginning of their prompts, one request at a time, each answered long before the next comes."""

    def __init__(self, endpoints: int, *, shared_tokens: int) -> None:
        self.pool: Core = core(endpoints, config=CONFIG)
        self.shared = bytes(shared_tokens * 4)
        self.told: dict[int, bytes] = {}
        self.places: dict[int, list[str]] = {}

    def turn(self, session: int, *, tokens: int = 1_000, pause_s: float = 4.0) -> str:
        pool = self.pool
        told = self.told.get(session, self.shared + session.to_bytes(4, "big") * 64)
        turn = len(self.places.setdefault(session, []))
        self.told[session] = told = told + (session * 1_000 + turn + 1).to_bytes(4, "big") * tokens
        request = LLMRequest(id="r", path=PATH, headers={})
        request.model, request.stream, request.prompt, request.prompt_tokens = "m", True, told, len(told) // 4
        request.target_model = request.model
        pool.clock.advance(pause_s)
        exchange = pool.director.route(request, None, None, pool.clock.now_s())
        assert exchange.decision is not None
        endpoint = exchange.decision.endpoint
        cached = request.prefix.matched_tokens.get(endpoint.slot, 0) if request.prefix else 0
        pool.clock.advance((request.prompt_tokens - cached) / TOKENS_PER_S)
        exchange.response_headers(200, event_stream=True, served="", code_details="")
        exchange.response_chunk(b"data: x")
        pool.clock.advance(0.1)
        exchange.finish(complete=True)
        self.places[session].append(endpoint.name)
        return endpoint.name


@pytest.mark.parametrize("endpoints", [2, 4, 8])
@pytest.mark.parametrize("shared_tokens", [500, 4_000])
def test_paced_sessions_that_share_a_prompt_are_spread_over_an_idle_pool(endpoints: int, shared_tokens: int) -> None:
    sessions = Sessions(endpoints, shared_tokens=shared_tokens)
    number = 8 * endpoints
    for _ in range(6):
        for session in range(number):
            sessions.turn(session)
    homes = Counter(places[-1] for places in sessions.places.values())
    assert max(homes.values()) < 2 * number / endpoints, homes
    moves = sum(a != b for places in sessions.places.values() for a, b in pairwise(places))
    assert moves <= number, "whose prompt is cached somewhere stays there, but for the first of them"


def test_a_session_alone_stays_where_it_is() -> None:
    sessions = Sessions(4, shared_tokens=2_000)
    assert len({sessions.turn(1, tokens=3_000) for _ in range(30)}) == 1


def test_prompts_that_are_given_up_or_fail_are_no_history() -> None:
    pool = core(2, config=CONFIG)
    scorer = pool.built.plugins["cost-aware-scorer"]
    assert isinstance(scorer, CostAwareScorer)
    request = LLMRequest(id="r", path=PATH, headers={})
    request.model = request.target_model = "m"
    request.stream, request.prompt, request.prompt_tokens = True, bytes(40_000), 10_000
    exchange = pool.director.route(request, None, None, pool.clock.now_s())
    pool.clock.advance(WEIGHED_EVERY_S + 1)
    exchange.response_headers(500, event_stream=False, served="", code_details="")
    exchange.finish(complete=True)
    lanes: Lanes = scorer.__dict__["lanes"]
    assert [lane.history_s for lane in lanes.by_slot.values()] == [0.0, 0.0]


def test_an_endpoint_that_is_a_candidate_seldom_is_weighed_then() -> None:
    pool = core(3, config=CONFIG)
    scorer = pool.built.plugins["cost-aware-scorer"]
    assert isinstance(scorer, CostAwareScorer)
    lanes: Lanes = scorer.__dict__["lanes"]
    one, two, three = pool.datastore.ready.endpoints
    lanes.now((two, three), pool.clock.now_s())
    lanes.by_slot[three.slot].history_s = 1.0
    pool.clock.advance(100.0)
    lanes.now((two, three), pool.clock.now_s())
    assert lanes.by_slot[three.slot].history_price_s > 0.1
    for _ in range(1_000):
        pool.clock.advance(HISTORY_S / 100)
        lanes.now((one, two), pool.clock.now_s())
    lanes.now((two, three), pool.clock.now_s())
    assert lanes.by_slot[three.slot].history_s < 0.01
    assert lanes.by_slot[three.slot].history_price_s < 0.001


def test_who_decodes_what_another_computed_did_nothing() -> None:
    pool = core(3, config=CONFIG)
    scorer = pool.built.plugins["cost-aware-scorer"]
    assert isinstance(scorer, CostAwareScorer)
    decode, prefill, _ = pool.datastore.ready.endpoints
    request = LLMRequest(id="r", path=PATH, headers={})
    request.prompt_tokens, request.stream = 100_000, True
    scorer.picked(request, Decision(decode, (), "default", {"prefill": prefill}))
    pool.clock.advance(12.0)
    scorer.first_token(request, decode, 12.0)
    lanes: Lanes = scorer.__dict__["lanes"]
    assert lanes.by_slot[prefill.slot].history_s == 12.0
    assert lanes.by_slot[decode.slot].history_s < 0.1


def test_a_stalled_engine_is_charged_for_its_work_alone() -> None:
    pool = core(2, config=CONFIG)
    scorer = pool.built.plugins["cost-aware-scorer"]
    assert isinstance(scorer, CostAwareScorer)
    request = LLMRequest(id="r", path=PATH, headers={})
    request.prompt_tokens, request.stream = 1_000, True
    endpoint = pool.datastore.ready.endpoints[0]
    scorer.picked(request, Decision(endpoint, (), "default", {}))
    pool.clock.advance(600.0)
    scorer.first_token(request, endpoint, 600.0)
    lanes: Lanes = scorer.__dict__["lanes"]
    assert lanes.by_slot[endpoint.slot].history_s < 1.0
