"""cost-aware-scorer: what it predicts, what it learns, and that it remembers nothing of what is over."""

from __future__ import annotations

import random
from itertools import count

import pytest

from epp.datastore import Reading
from epp.exchange import Exchange
from epp.plugins import cost_history, cost_lanes, cost_work
from epp.plugins.base import Finished
from epp.plugins.cost_lanes import LOAD_START_S, SLOTS_START, Lane, Lanes, Work
from epp.plugins.cost_model import SAMPLES_MIN, CostModel
from epp.plugins.scorers.cost_aware import LOOP_MAX, CostAwareScorer
from epp.types import Decision, Endpoint, LLMRequest, PrefixMatch
from tests.builders import PATH, Core, core

CONFIG = """
apiVersion: llm-d.ai/v1alpha1
kind: EndpointPickerConfig
plugins: [{type: cost-aware-scorer}]
"""
FRESH = count(1_000)
"""Seeds of prompts nobody has seen before."""
TOKENS_S, PAIRS_S, ONCE_S = 60e-6, 2e-9, 0.015


def world(count: int) -> tuple[Core, CostAwareScorer]:
    made = core(count, config=CONFIG)
    scorer = made.built.plugins["cost-aware-scorer"]
    assert isinstance(scorer, CostAwareScorer)
    return made, scorer


def route(pool: Core, tokens: int, *, text: int = 0, stream: bool = True) -> Exchange:
    request = LLMRequest(id="r", path=PATH, headers={})
    request.model = request.target_model = "m"
    request.stream = stream
    request.prompt = random.Random(text or next(FRESH)).randbytes(tokens * 4)
    request.prompt_tokens = tokens
    return pool.director.route(request, None, None, pool.clock.now_s())


def first_token(exchange: Exchange) -> None:
    exchange.response_headers(200, event_stream=True, served="", code_details="")
    exchange.response_chunk(b"data: x")


def lanes(scorer: CostAwareScorer) -> dict[int, Lane]:
    found: Lanes = scorer.__dict__["lanes"]
    return found.by_slot


def wait_s(pool: Core, endpoint: Endpoint) -> float:
    """As the scorer sees it: what a prompt of one token costs there beyond what it costs where nothing is going on."""
    scorer = pool.built.plugins["cost-aware-scorer"]
    assert isinstance(scorer, CostAwareScorer)
    request = LLMRequest(id="r", path=PATH, headers={})
    request.prompt_tokens = 1
    (score,) = scorer.score(request, (endpoint,))
    return (1 / score - 1) / (1 + scorer.doubt)


# The model


def test_the_model_finds_what_a_linear_world_is_made_of() -> None:
    model, rng = CostModel(), random.Random(5)
    for _ in range(400):
        tokens = int(rng.lognormvariate(8, 1.2)) + 64
        pairs = tokens * (rng.randrange(20_000) + tokens / 2)
        seconds = ONCE_S + TOKENS_S * tokens + PAIRS_S * pairs
        model.learn(1, tokens, pairs, 0, seconds * rng.uniform(0.9, 1.1))
    assert model.by_tokens_s == pytest.approx(TOKENS_S, rel=0.1)
    assert model.by_pairs_s == pytest.approx(PAIRS_S, rel=0.2)
    assert model.once_s == pytest.approx(ONCE_S, rel=0.5)
    assert model.prefill_s(8_000, 8_000 * 4_000, 0) == pytest.approx(ONCE_S + 0.48 + 0.064, rel=0.05)


def test_before_enough_samples_the_proportions_decide() -> None:
    model = CostModel()
    for _ in range(SAMPLES_MIN - 1):
        model.learn(1, 1_000, 0.0, 0, 5.0)
    assert model.prefill_s(2_000, 0.0, 0) == 2 * model.prefill_s(1_000, 0.0, 0) == pytest.approx(0.2)


def test_no_sample_makes_time_run_backwards() -> None:
    model, rng = CostModel(), random.Random(9)
    for _ in range(300):
        model.learn(
            rng.randrange(1, 4), rng.randrange(64, 200_000), rng.random() * 1e10, rng.random() * 1e6, rng.choice([1e-3, 1.0, 500.0])
        )
        assert min(model.once_s, model.by_pairs_s, model.by_context_s) >= 0.0
        assert model.by_tokens_s > 0.0


# The choice


def test_prompts_go_where_the_wait_is_shortest() -> None:
    pool, _ = world(3)
    first = [route(pool, tokens).decision.endpoint.name for tokens in (30_000, 20_000, 10_000)]
    assert sorted(first) == ["pod-1", "pod-2", "pod-3"]
    assert route(pool, 1_000).decision.endpoint.name == first[2], "10 000 tokens are through first"


def test_a_cached_prefix_is_worth_its_wait_and_no_more() -> None:
    pool, _ = world(2)
    holder = route(pool, 8_000, text=7)
    first_token(holder)
    again = [route(pool, 8_000, text=7).decision.endpoint for _ in range(2)]
    assert again == [holder.decision.endpoint] * 2, "a few tokens there against 8 000 elsewhere"
    for blocker in [route(pool, 60_000) for _ in range(2)]:
        if blocker.decision.endpoint is not holder.decision.endpoint:
            first_token(blocker)
    copy = route(pool, 8_000, text=7)
    assert copy.decision.endpoint is not holder.decision.endpoint, "a hot prefix is computed again where nobody waits"


def test_time_passes_for_the_prompt_at_the_head() -> None:
    pool, _ = world(2)
    long, short = route(pool, 40_000), route(pool, 30_000)  # 4 s and 3 s at 10 000 tokens a second
    first_token(short)
    route(pool, 10_000)  # where the short one was
    pool.clock.advance(3.5)  # half a second is left there, by now; nothing came of the other
    assert route(pool, 100).decision.endpoint is not None
    assert wait_s(pool, long.decision.endpoint) == pytest.approx(0.5, abs=0.1)


def test_a_prompt_that_is_overdue_was_not_cached() -> None:
    pool, _ = world(1)
    first_token(route(pool, 50_000, text=3))
    endpoint = route(pool, 50_000, text=3).decision.endpoint
    assert wait_s(pool, endpoint) < 0.1, "it should be there"
    pool.clock.advance(1.0)
    assert wait_s(pool, endpoint) == pytest.approx(4.0, abs=0.2), "5 s of work, one is done"


def test_a_full_cache_counts_until_there_is_room() -> None:
    pool, _ = world(2)
    pool.read(1, waiting=0, running=20, kv_usage=0.95, kv_blocks=1_000, kv_block_tokens=16)
    pool.read(2, waiting=0, running=20, kv_usage=0.10, kv_blocks=1_000, kv_block_tokens=16)
    assert [route(pool, 2_000).decision.endpoint.name for _ in range(2)] == ["pod-2"] * 2


def test_decoding_neighbours_count() -> None:
    pool, _ = world(2)
    busy = [route(pool, 1_000) for _ in range(10)]
    for each in busy:
        first_token(each)
    for each in busy:
        if each.decision.endpoint.name == "pod-2":
            each.finish(complete=True)
    assert {route(pool, 500).decision.endpoint.name for _ in range(3)} >= {"pod-2"}


def test_the_prompt_of_an_answer_that_comes_whole_is_through_when_it_should_be() -> None:
    pool, scorer = world(1)
    whole = route(pool, 10_000, stream=False)
    route(pool, 20_000)
    endpoint = whole.decision.endpoint
    assert wait_s(pool, endpoint) == pytest.approx(3.0, abs=0.1)
    pool.clock.advance(1.5)
    pool.read(1, running=2, waiting=0)
    assert wait_s(pool, endpoint) == pytest.approx(1.5, abs=0.1), "half a second of the second is done"
    whole.finish(complete=True)
    assert wait_s(pool, endpoint) == pytest.approx(1.5, abs=0.1), "its end says nothing of prompts"
    assert lanes(scorer)[endpoint.slot].requests == 1


# What it learns


def test_rates_are_learned_and_a_slow_endpoint_is_seen_as_such() -> None:
    pool, scorer = world(2)
    speeds = {"pod-1": 1.0, "pod-2": 0.25}
    rng = random.Random(2)
    for _ in range(300):
        tokens = rng.randrange(500, 20_000)
        exchange = route(pool, tokens)
        pool.clock.advance((ONCE_S + TOKENS_S * tokens + PAIRS_S * tokens * tokens / 2) / speeds[exchange.decision.endpoint.name])
        first_token(exchange)
        exchange.finish(complete=True)
    slowness = {endpoint.name: lanes(scorer)[endpoint.slot].slowness for endpoint in pool.datastore.endpoints.values()}
    assert slowness["pod-2"] / slowness["pod-1"] > 1.3
    assert {route(pool, 5_000).decision.endpoint.name} == {"pod-1"}, "so it is left alone while the other is free"
    assert scorer.state()["samples"] > 200


def test_nothing_is_left_of_requests_that_are_over_however_they_ended() -> None:
    pool, scorer = world(3)
    rng = random.Random(4)
    exchanges = [route(pool, rng.randrange(100, 5_000)) for _ in range(60)]
    rng.shuffle(exchanges)
    for number, exchange in enumerate(exchanges):
        pool.clock.advance(0.05)
        if number % 3 == 0:
            first_token(exchange)
        if number % 5 == 0:
            exchange.response_headers(200, event_stream=True, served=f"10.0.0.{rng.randrange(1, 4)}:8000", code_details="")
        exchange.finish(complete=number % 2 == 0)
    for lane in lanes(scorer).values():
        assert (len(lane.queue), lane.pending_s, lane.context, lane.requests) == (0, 0.0, 0, 0)


def test_an_endpoint_that_goes_takes_its_lane_along() -> None:
    pool, scorer = world(2)
    exchange = route(pool, 1_000)
    pool.datastore.apply([])
    assert lanes(scorer) == {}
    exchange.finish(complete=True)


def test_the_formula_by_hand() -> None:
    """Before anything is known: 100 us a token, no overhead. One prompt of 10 000 tokens waits on pod-1; pod-2 decodes two requests."""
    pool, scorer = world(2)
    one, two = pool.endpoint(1), pool.endpoint(2)
    sent = [LLMRequest(id="r", path=PATH, headers={}) for _ in range(3)]
    for request, endpoint, tokens in zip(sent, (one, two, two), (10_000, 500, 500), strict=True):
        request.prompt_tokens, request.stream = tokens, True
        scorer.picked(request, Decision(endpoint, (), "default"))
        if endpoint is two:
            scorer.first_token(request, endpoint, 0.1)
    request = LLMRequest(id="r", path=PATH, headers={})
    request.prompt_tokens = 2_000
    request.prefix = PrefixMatch([1], [1_500], 2_000, {one.slot: 1_500})
    # pod-1: wait 1 s x (1 + 0.3) + own 500 x 100 us x (1 + 0.25 x 1) = 1.3625 s; pod-2: own 2 000 x 100 us x (1 + 0.11 x 2) = 0.244 s
    assert scorer.score(request, (one, two)) == pytest.approx([1 / 2.3625, 1 / 1.244])


# In columns


def by_hand(scorer: CostAwareScorer, request: LLMRequest, endpoint: Endpoint, now_s: float) -> float:
    """The docstring's formula for one endpoint, step by step."""
    model: CostModel = scorer.__dict__["model"]
    lane = lanes(scorer)[endpoint.slot]
    cached = request.prefix.matched_tokens.get(endpoint.slot, 0) if request.prefix else 0
    tokens = max(1, request.prompt_tokens - cached)
    own_s = lane.slowness * model.prefill_s(tokens, tokens * (request.prompt_tokens - tokens / 2), lane.context)
    waited_s = lane.history_price_s
    if lane.queue:
        head, *others = lane.queue
        took_s = now_s - max(lane.last_s, head.sent_s)
        waited_s += max(0.0, (head.seconds if took_s <= 1.5 * head.seconds else head.miss_s) - took_s) + sum(
            work.seconds for work in others
        )
    decoding, waiting = float(lane.requests - len(lane.queue)), float(len(lane.queue))
    if lane.others > cost_lanes.OTHERS_MIN:
        theirs = min(lane.others, max(0.0, lane.others_waiting))
        found: Lanes = scorer.__dict__["lanes"]
        waited_s, waiting, decoding = waited_s + theirs * found.mean_s, waiting + theirs, decoding + lane.others - theirs
    if endpoint.kv_capacity_tokens:
        used = lane.kv_used()
        waited_s = max(waited_s, (used + tokens - endpoint.kv_capacity_tokens) / used * lane.decode_s)
    cost_s = waited_s * (1 + scorer.doubt) + own_s * (1 + scorer.harm * decoding + scorer.crowding * waiting)
    cost_s += scorer.spread * model.once_s * decoding
    return 1 / (1 + cost_s)


@pytest.mark.parametrize("count", [3, LOOP_MAX, LOOP_MAX + 1, SLOTS_START + 40])
@pytest.mark.parametrize("seed", range(3))
def test_columns_say_what_the_formula_says_whatever_happened(count: int, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost_lanes, "MEAN_WEIGHT", 0.0)  # rows are not made anew only because the mean moved
    monkeypatch.setattr(cost_history, "BUSY", 100.0)
    monkeypatch.setattr(cost_history, "LOADED", 1e6)
    pool, scorer = world(count)
    rng = random.Random(seed)
    open_: list[Exchange] = []
    priced = 0
    for number in range(6 * count):
        pool.clock.advance(rng.expovariate(2.0 * count))
        open_.append(route(pool, rng.randrange(10, 30_000), text=1 + rng.randrange(40)))
        if number % 3 == 0:
            pool.read(1 + rng.randrange(count), waiting=rng.randrange(5), kv_usage=rng.random(), kv_blocks=4_000, kv_block_tokens=16)
        for exchange in rng.sample(open_, len(open_) // 4):
            first_token(exchange)
            if rng.random() < 0.5:
                exchange.finish(complete=rng.random() < 0.9)
                open_.remove(exchange)
        ready = pool.datastore.ready.endpoints
        endpoints = ready if number % 2 else tuple(rng.sample(ready, rng.randrange(1, count + 1)))
        request = LLMRequest(id="r", path=PATH, headers={})
        request.prompt_tokens = rng.randrange(10, 60_000)
        if rng.random() < 0.7:
            cached = {endpoint.slot: rng.randrange(request.prompt_tokens + 1) for endpoint in rng.sample(ready, 3)}
            request.prefix = PrefixMatch([1], [request.prompt_tokens], request.prompt_tokens, cached)
        scores = scorer.score(request, endpoints)
        priced += any(lane.history_price_s for lane in lanes(scorer).values())
        assert scores == pytest.approx([by_hand(scorer, request, endpoint, pool.clock.now_s()) for endpoint in endpoints], rel=1e-9)
    assert priced > count, "histories are part of it"


def test_endpoints_come_and_go_under_the_columns() -> None:
    pool, scorer = world(5)
    for _ in range(5):
        route(pool, 9_000)
    specs = [endpoint.spec for endpoint in pool.datastore.endpoints.values()]
    pool.datastore.apply(specs[:2] + specs[4:])
    assert len(lanes(scorer)) == 3
    pool.datastore.apply([endpoint.spec for endpoint in core(SLOTS_START + 26).datastore.endpoints.values()])
    assert route(pool, 100).decision.endpoint.spec not in (*specs[:2], specs[4]), "the others have nothing to do"


# What others sent


def test_requests_of_others_are_seen_at_once() -> None:
    """A picker that was just started, or has company."""
    pool, _ = world(2)
    pool.read(1, running=4, waiting=2)
    pool.read(2, running=0, waiting=0)
    assert {route(pool, 1_000).decision.endpoint.name for _ in range(2)} == {"pod-2"}
    assert wait_s(pool, pool.endpoint(1)) > wait_s(pool, pool.endpoint(2)) > 0


def test_a_long_queue_of_others_is_worth_a_prefix() -> None:
    pool, _ = world(2)
    holder = route(pool, 8_000, text=7)
    first_token(holder)
    number = int(holder.decision.endpoint.name.removeprefix("pod-"))
    for _ in range(20):
        pool.clock.advance(0.05)
        pool.read(number, running=1, waiting=0)
        pool.read(3 - number, running=0, waiting=0)
    assert route(pool, 8_000, text=7).decision.endpoint is holder.decision.endpoint, "the one running is ours"
    for _ in range(30):
        pool.clock.advance(0.05)
        pool.read(number, running=12, waiting=40)
        pool.read(3 - number, running=0, waiting=0)
        route(pool, 10).finish(complete=True)
    assert route(pool, 8_000, text=7).decision.endpoint is not holder.decision.endpoint


def test_others_that_have_left_leave_nothing_behind() -> None:
    """Not a trace that would decide between endpoints that are idle alike."""
    pool, _ = world(2)
    pool.read(1, running=4, waiting=2)
    pool.read(2, running=0, waiting=0)
    route(pool, 100).finish(complete=True)
    pool.clock.advance(1.0)
    pool.read(1, running=0, waiting=0)
    chosen = []
    for _ in range(12):
        exchange = route(pool, 1_000)
        chosen.append(exchange.decision.endpoint.name)
        exchange.finish(complete=True)
    assert set(chosen) == {"pod-1", "pod-2"}


@pytest.mark.parametrize("seed", range(5))
def test_our_own_requests_are_never_taken_for_others(seed: int) -> None:
    """Whatever comes between two readings, as long as they tell the truth."""
    pool, scorer = world(3)
    rng = random.Random(seed)
    open_: dict[Exchange, bool] = {}
    for _ in range(300):
        pool.clock.advance(0.01)
        exchange = route(pool, rng.randrange(10, 5_000))
        open_[exchange] = False
        for each in rng.sample(list(open_), len(open_) // 5):
            first_token(each)
            open_[each] = True
            if rng.random() < 0.6:
                each.finish(complete=True)
                del open_[each]
        if rng.random() < 0.5:
            number = rng.randrange(1, 4)
            there = [started for each, started in open_.items() if each.decision.endpoint is pool.endpoint(number)]
            pool.read(number, running=sum(there), waiting=len(there) - sum(there))
        assert all(abs(lane.others) < 1e-9 for lane in lanes(scorer).values())


# LoRA


def adapted(pool: Core, number: int, *active: str, most: int = 2) -> None:
    endpoint = pool.endpoint(number)
    pool.clock.advance(0.01)
    reading = Reading(adapters_active=frozenset(active), adapters_waiting=frozenset(), adapters_max=most)
    pool.datastore.record_reading(endpoint, reading, sent_requests=0, sent_tokens=0)


def ask(pool: Core, adapter: str, tokens: int = 1_000) -> Exchange:
    request = LLMRequest(id="r", path=PATH, headers={})
    request.model = request.target_model = adapter
    request.stream = True
    request.prompt = random.Random(next(FRESH)).randbytes(tokens * 4)
    request.prompt_tokens = tokens
    return pool.director.route(request, None, None, pool.clock.now_s())


@pytest.mark.parametrize("before", range(1, 9))
def test_requests_for_an_adapter_go_where_it_is_loaded_and_others_where_a_slot_is_free(before: int) -> None:
    pool, scorer = world(2)
    adapted(pool, 1, "red", "green", "blue", "black")
    adapted(pool, 2)
    for _ in range(before):  # the names are read with the first; each draws among equals
        route(pool, 10).finish(complete=True)
    homes = {}
    for adapter in ("red", "green", "blue", "black"):
        exchange = ask(pool, adapter)
        homes[adapter] = exchange.decision.endpoint.name
        first_token(exchange)
        pool.clock.advance(0.05)
    assert sorted(homes.values()) == ["pod-1", "pod-1", "pod-2", "pod-2"]
    for adapter, home in homes.items():
        assert ask(pool, adapter).decision.endpoint.name == home
    assert scorer.state()["adapter_load_s"] is not None


def test_a_request_waits_for_a_slot_no_longer_than_it_has_to() -> None:
    pool, _ = world(1)
    adapted(pool, 1, "red", "green", "blue")
    lane = lanes_after(pool)
    model = CostModel()
    for adapter, requests in (("red", 3), ("green", 1)):
        for _ in range(requests):
            lane.add(Work(10, 0, lane, model, streamed=True, adapter=adapter, load_s=0.0, sent_s=0.0))
    assert lane.slot_s("red") == 0.0
    # green ends after decode_s, red with the last of three after twice that: the first of both after two thirds of it
    assert lane.slot_s("blue") == pytest.approx(lane.decode_s / 1.5)
    assert list(lane.loaded) == ["red", "green"]


def lanes_after(pool: Core) -> Lane:
    """The only endpoint's, once the names of adapters are read."""
    route(pool, 10).finish(complete=True)
    scorer = pool.built.plugins["cost-aware-scorer"]
    assert isinstance(scorer, CostAwareScorer)
    (lane,) = lanes(scorer).values()
    return lane


def test_how_long_loading_takes_is_learned_and_does_not_pass_for_work() -> None:
    pool, scorer = world(1)
    adapted(pool, 1, "adapter-0", most=1)
    lanes_after(pool)
    found: Lanes = scorer.__dict__["lanes"]
    assert found.load_s == LOAD_START_S
    adapted(pool, 1, *(f"adapter-{number}" for number in range(10)), most=1)
    for number in range(80):
        exchange = ask(pool, f"adapter-{number % 10}", 2_000)
        pool.clock.advance(0.2 + 1.5)  # 2 000 tokens at 100 us, and loading
        first_token(exchange)
        exchange.finish(complete=True)
    assert found.load_s == pytest.approx(1.5, abs=0.1)
    assert next(iter(lanes(scorer).values())).slowness == 1.0


# What would mislead it


def served(exchange: Exchange, status: int = 200, by: str = "") -> None:
    exchange.response_headers(status, event_stream=status == 200, served=by, code_details="via_upstream")
    exchange.response_chunk(b"data: x")


def test_a_refusal_is_no_first_token() -> None:
    pool, scorer = world(1)
    for _ in range(10):
        route(pool, 8_000)
    before = wait_s(pool, pool.endpoint(1))
    for _ in range(40):
        refused = route(pool, 100_000)
        pool.clock.advance(0.004)
        served(refused, 429)
        refused.finish(complete=True)
    assert wait_s(pool, pool.endpoint(1)) == pytest.approx(before - 40 * 0.004, abs=0.05)
    assert scorer.state()["samples"] == 0
    assert pool.endpoint(1).capacity.prefill_tokens_per_s == 0.0


def test_a_request_the_gateway_moved_teaches_nothing() -> None:
    pool, scorer = world(2)
    for _ in range(60):
        exchange = route(pool, 8_000)
        other = next(e for e in pool.datastore.endpoints.values() if e is not exchange.decision.endpoint)
        pool.clock.advance(0.8)
        served(exchange, by=other.destination)
        exchange.finish(complete=True)
    assert scorer.state()["samples"] == 0
    assert all((lane.requests, len(lane.queue)) == (0, 0) for lane in lanes(scorer).values())


def test_the_next_prompt_begins_when_the_one_before_is_cancelled() -> None:
    pool, scorer = world(1)
    first, _second = route(pool, 100_000), route(pool, 50_000)
    pool.clock.advance(8.0)
    first.finish(complete=False)
    assert wait_s(pool, pool.endpoint(1)) == pytest.approx(5.0, abs=0.1)
    pool.clock.advance(5.0)
    served(_second)
    assert scorer.__dict__["lanes"].by_slot[0].took_s == pytest.approx(cost_lanes.KEPT * cost_work.PRIOR_S + 5.0)


def test_prompts_of_whole_answers_leave_though_nothing_else_happens() -> None:
    """No reading, no other request: an engine without metrics."""
    pool, _ = world(1)
    pool.datastore.record_answer(pool.endpoint(1))
    for _ in range(10):
        route(pool, 1_000, stream=False)
    assert wait_s(pool, pool.endpoint(1)) > 0.8
    pool.clock.advance(30.0)
    assert wait_s(pool, pool.endpoint(1)) < 0.01


def test_streams_a_gateway_does_not_show_are_through_when_they_should_be() -> None:
    pool, _ = world(1)
    hidden = route(pool, 1_000)
    pool.clock.advance(5.0)
    hidden.response_headers(200, event_stream=True, served="", code_details="via_upstream")
    hidden.finish(complete=True)
    for _ in range(20):
        route(pool, 4_000)
    pool.clock.advance(60.0)
    assert wait_s(pool, pool.endpoint(1)) < 0.01
    first_token(route(pool, 10))
    route(pool, 50_000)
    pool.clock.advance(2.0)
    assert wait_s(pool, pool.endpoint(1)) == pytest.approx(3.0, abs=0.2), "once it shows them they are waited for"


def test_two_of_them_in_one_configuration_keep_their_own_books() -> None:
    made = core(
        2,
        config=CONFIG.replace(
            "[{type: cost-aware-scorer}]", "[{type: cost-aware-scorer}, {name: b, type: cost-aware-scorer, parameters: {harm: 1}}]"
        ),
    )
    for number in range(30):
        exchange = route(made, 1_000)
        if number % 2:
            first_token(exchange)
        exchange.finish(complete=True)
    for name in ("cost-aware-scorer", "b"):
        scorer = made.built.plugins[name]
        assert isinstance(scorer, CostAwareScorer)
        for lane in lanes(scorer).values():
            assert (len(lane.queue), lane.pending_s, lane.context, lane.requests, lane.queued_tokens) == (0, 0.0, 0, 0, 0)


def test_prefill_workers_are_charged_until_the_first_token() -> None:
    scorer = CostAwareScorer()
    pool, _ = world(2)
    scorer.__dict__["clock"] = pool.clock
    decode, prefill = pool.endpoint(1), pool.endpoint(2)
    request = LLMRequest(id="r", path=PATH, headers={})
    request.prompt_tokens, request.stream = 10_000, True
    scorer.picked(request, Decision(decode, (), "decode", {"prefill": prefill}))
    tokens = {slot: lane.queued_tokens for slot, lane in lanes(scorer).items()}
    assert tokens == {prefill.slot: 10_000, decode.slot: 1}, "the decode worker gets it cached"
    pool.clock.advance(1.0)
    scorer.first_token(request, decode, 1.0)
    assert {slot: lane.requests for slot, lane in lanes(scorer).items()} == {prefill.slot: 0, decode.slot: 1}
    scorer.finished(request, decode, Finished(200, 1.0, 2.0, None, 0))
    assert all((lane.requests, len(lane.queue), lane.context) == (0, 0, 0) for lane in lanes(scorer).values())


def test_prompts_of_one_length_leave_the_proportions_as_they_were() -> None:
    model = CostModel()
    for _ in range(100):
        model.learn(1, 8_000, 8_000 * 4_000, 0, 0.8)
    assert model.prefill_s(1_000, 500_000, 0) == pytest.approx(0.1, rel=0.05)
    assert model.prefill_s(32_000, 32_000 * 16_000, 0) == pytest.approx(3.2, rel=0.05)
