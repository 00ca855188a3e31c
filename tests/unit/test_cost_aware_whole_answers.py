"""cost-aware-scorer where answers are not streamed: what their ends teach, and which of them teach nothing."""

from __future__ import annotations

import heapq
import random

import pytest

from bench.replay import cells
from bench.replay.cells import Settings, configured
from bench.replay.product import ProductPolicy
from bench.replay.profiles import profile_of
from bench.replay.scenarios import SCENARIOS, Setting
from bench.replay.simulation import Scrapes, Simulation, engines_of
from epp.datastore import Reading
from epp.plugins import cost_history
from epp.plugins.base import Finished
from epp.plugins.cost_lanes import TOLD_MAX, Lane
from epp.plugins.cost_model import BATCH, SAMPLES_MIN, CostModel
from epp.plugins.scorers.cost_aware import CostAwareScorer
from epp.types import Endpoint, LLMRequest, Usage
from tests.builders import PATH
from tests.unit.test_cost_aware_books import World

STEP_S, CONTEXT_S, TOKEN_S, PAIR_S = 0.01, 5e-8, 60e-6, 2e-9


def end(world: World, request: LLMRequest, endpoint: Endpoint, said: int, *, status: int = 200, usage: Usage | None = None) -> None:
    world.scorer.finished(request, endpoint, Finished(status, 1.0, 1.0, usage or Usage(request.prompt_tokens, said), 0))


def serve(world: World, endpoint: Endpoint, tokens: int, said: int, *, speed: float = 1.0) -> None:
    """One request alone, by an engine that takes exactly this long."""
    request = world.pick(endpoint, tokens, stream=False)
    steps_s = (said + 1) * (STEP_S + CONTEXT_S * tokens / 2)  # nothing there when it was sent, itself when it ends
    world.clock.advance((steps_s + TOKEN_S * tokens + PAIR_S * tokens * tokens / 2) / speed)
    end(world, request, endpoint, said)


def learned(world: World) -> CostModel:
    found: CostModel = world.scorer.__dict__["model"]
    return found


def test_the_model_finds_what_whole_answers_are_made_of() -> None:
    world, rng = World(1), random.Random(3)
    (endpoint,) = world.endpoints()
    for _ in range(400):
        serve(world, endpoint, 100 + int(rng.lognormvariate(8, 1.0)), rng.randrange(1, 400))
    model = learned(world)
    assert (model.once_s, model.by_tokens_s) == (pytest.approx(STEP_S, rel=0.01), pytest.approx(TOKEN_S, rel=0.02))
    assert (model.by_pairs_s, model.step_by_context_s) == (pytest.approx(PAIR_S, rel=0.1), pytest.approx(CONTEXT_S, rel=0.1))
    assert model.samples == model.whole == 400
    assert world.lanes.by_slot[endpoint.slot].slowness == 1.0
    assert model.prefill_s(10_000, 10_000 * 5_000, 0) == pytest.approx(STEP_S + 10_000 * TOKEN_S + 5e7 * PAIR_S, rel=0.02)


def test_a_slow_endpoint_is_seen_as_such() -> None:
    world, rng = World(4), random.Random(4)
    for _ in range(300):
        for endpoint, speed in zip(world.endpoints(), (1.0, 1.0, 1.0, 0.4), strict=True):
            serve(world, endpoint, 100 + int(rng.lognormvariate(8, 1.0)), rng.randrange(1, 400), speed=speed)
    *usual, slow = [world.lanes.by_slot[endpoint.slot].slowness for endpoint in world.endpoints()]
    assert usual == [1.0, 1.0, 1.0]
    assert slow == pytest.approx(2.5, rel=0.15)
    assert learned(world).by_tokens_s == pytest.approx(TOKEN_S, rel=0.1), "the slow one's answers teach what the others' do"


def test_of_a_prompt_under_way_as_much_counts_as_there_was_time_for() -> None:
    world = World(1)
    (endpoint,) = world.endpoints()
    world.pick(endpoint, 10_000, stream=False)  # 1 s by what is known in the beginning
    lane: Lane = world.lanes.by_slot[endpoint.slot]
    seen = []
    for _ in range(3):
        world.clock.advance(0.4)
        lane.settle(world.clock.now_s())
        seen.append(lane.computed(world.clock.now_s()))
    tokens, pairs = zip(*seen, strict=True)
    assert tokens == pytest.approx((4_000, 8_000, 10_000), rel=1e-6)
    assert pairs == pytest.approx((2e7, 4e7, 5e7), rel=1e-6)


@pytest.mark.parametrize("scenario", ["rag", "bursts"])
def test_whole_answers_of_a_batching_engine_teach_what_its_prompts_take(scenario: str) -> None:
    """Many requests at a time, and nobody tells when one begins to be answered."""
    profile = profile_of(Settings().profile)
    workload = SCENARIOS[scenario](Setting(4, profile, 1))
    policy = ProductPolicy(configured("cost-aware"), "cost-aware", profile, random.Random(1), adapters_max=0, usage=False)
    Simulation(workload, engines_of(profile, 4, workload), policy, Scrapes(), [0.1, 0.3, 0.5, 0.7], whole=1.0).run()
    scorer = policy._policy.built.plugins["cost-aware-scorer"]
    assert isinstance(scorer, CostAwareScorer)
    model: CostModel = scorer.__dict__["model"]
    assert model.samples == model.whole > 1_000
    tokens, pairs = 8_000, 8_000 * 4_000
    really_s = profile.step_base_s + tokens * profile.prefill_token_s + pairs * profile.attention_pair_s
    assert model.prefill_s(tokens, pairs, 0.0) == pytest.approx(really_s, rel=0.15)
    assert model.once_s == pytest.approx(profile.step_base_s, rel=0.25)


def test_an_answer_that_comes_early_takes_the_prompts_before_it_along() -> None:
    world = World(1)
    (endpoint,) = world.endpoints()
    for _ in range(2):
        world.pick(endpoint, 10_000, stream=False)
    third = world.pick(endpoint, 1_000, stream=False)
    world.clock.advance(0.5)  # all three should take 2.1 s
    end(world, third, endpoint, 3)
    assert not world.lanes.by_slot[endpoint.slot].queue
    assert world.waits_s() == pytest.approx([0.0], abs=0.01)


def test_where_answers_are_streamed_first_tokens_teach_alone() -> None:
    world = World(1)
    (endpoint,) = world.endpoints()

    def both() -> None:
        streamed = world.pick(endpoint, 1_000)
        world.clock.advance(0.2)
        world.scorer.first_token(streamed, endpoint, 0.2)
        end(world, streamed, endpoint, 10)
        serve(world, endpoint, 1_000, 10)

    for _ in range(200):
        both()
    assert world.lanes.told > TOLD_MAX
    before = learned(world).whole
    for _ in range(20):
        both()
    assert learned(world).whole == before < 50
    while world.lanes.told > TOLD_MAX:
        serve(world, endpoint, 1_000, 10)
    serve(world, endpoint, 1_000, 10)
    assert learned(world).whole > before, "and when they come whole, those"


def test_answers_nobody_can_learn_from_teach_nothing() -> None:
    world = World(3)
    one, two, three = world.endpoints()

    def ask(**named: object) -> LLMRequest:
        request = world.pick(one, 2_000, stream=False, **named)  # type: ignore[arg-type]
        world.clock.advance(1.0)
        return request

    end(world, ask(), one, 10, status=500)
    end(world, ask(), one, 10, usage=Usage())  # nobody counted
    world.scorer.finished(ask(), one, Finished(200, 1.0, 1.0, None, 0))
    end(world, ask(prefill=two), one, 10)  # its prompt was computed elsewhere
    moved = ask()
    world.scorer.served(moved, three)  # where it stood in line there is not known
    end(world, moved, three, 10)
    world.datastore.record_reading(one, Reading(running=20, waiting=0), sent_requests=0, sent_tokens=0)
    for _ in range(3):  # somebody else has twenty there
        end(world, ask(), one, 10)
        world.datastore.record_reading(one, Reading(running=20, waiting=0), sent_requests=0, sent_tokens=0)
    assert learned(world).samples == 0
    assert all((lane.requests, len(lane.queue), lane.context) == (0, 0, 0) for lane in world.lanes.by_slot.values())
    end(world, world.pick(two, 2_000, stream=False), two, 10)
    assert learned(world).samples == 0, "nor one that came in no time"


def test_a_count_that_can_be_none_teaches_nothing() -> None:
    """Anything an engine, or what stands in for one, writes into its usage."""
    world, rng = World(2), random.Random(8)
    for _ in range(300):
        for endpoint in world.endpoints():
            serve(world, endpoint, 100 + int(rng.lognormvariate(8, 1.0)), rng.randrange(1, 400))
    before = learned(world).samples
    request = world.pick(world.endpoints()[0], 2_000, stream=False)
    world.clock.advance(2.0)
    end(world, request, world.endpoints()[0], 10_000_000)
    assert learned(world).samples == before
    assert [lane.slowness for lane in world.lanes.by_slot.values()] == [1.0, 1.0]


def test_a_few_answers_that_take_their_time_make_no_endpoint_slow() -> None:
    """A picture to fetch, a tool to call, a client that reads slowly."""
    world, rng = World(2), random.Random(9)
    one, two = world.endpoints()
    for number in range(1_500):
        for endpoint in (one, two):
            request = world.pick(endpoint, 500 + rng.randrange(4_000), stream=False)
            said = rng.randrange(1, 100)
            world.clock.advance(
                (said + 1) * STEP_S + TOKEN_S * request.prompt_tokens + (60.0 if endpoint is two and not number % 100 else 0.0)
            )
            end(world, request, endpoint, said)
    assert [world.lanes.by_slot[endpoint.slot].slowness for endpoint in (one, two)] == [1.0, 1.0]


def test_what_was_given_up_halfway_was_computed_halfway() -> None:
    """Requests sent while it was at the head have seen that half; without it they would have seen less than nothing done since."""
    world = World(1)
    (endpoint,) = world.endpoints()
    long = world.pick(endpoint, 100_000, stream=False)  # 10 s
    lane: Lane = world.lanes.by_slot[endpoint.slot]
    world.clock.advance(5.0)
    short = world.pick(endpoint, 1_000, stream=False)
    halfway = lane.computed(world.clock.now_s())
    assert halfway[0] == pytest.approx(50_000)
    world.scorer.finished(long, endpoint, Finished(0, -1.0, 5.0, None, 0))
    assert lane.computed(world.clock.now_s()) == pytest.approx(halfway)
    world.clock.advance(0.1)
    end(world, short, endpoint, 0)
    assert lane.computed(world.clock.now_s())[0] == pytest.approx(51_000)


def test_what_makes_no_tokens_teaches_what_prompts_take() -> None:
    """Embeddings: their usage names the prompt alone."""
    world, rng = World(1), random.Random(6)
    (endpoint,) = world.endpoints()
    for _ in range(SAMPLES_MIN + BATCH):
        request = world.pick(endpoint, rng.randrange(200, 8_000), stream=False)
        world.clock.advance(STEP_S + TOKEN_S * request.prompt_tokens)
        end(world, request, endpoint, 0, usage=Usage(request.prompt_tokens))
    assert learned(world).prefill_s(5_000, 0, 0) == pytest.approx(STEP_S + 5_000 * TOKEN_S, rel=0.1)


def test_the_bench_tells_policies_of_no_first_token_where_answers_come_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[float] = []
    hear = ProductPolicy.first_token
    monkeypatch.setattr(ProductPolicy, "first_token", lambda self, job, now_s: (told.append(now_s), hear(self, job, now_s)))
    rows = {}
    for whole in (0.0, 0.25, 1.0):
        told.clear()
        settings = Settings(replicas=2, whole=whole)
        rows[whole] = cells.row_of(settings, cells.Cell("cost-aware", configured("cost-aware"), "rag", 1.0, 1))
        assert len(told) == pytest.approx((1 - whole) * float(str(rows[whole]["requests"])), abs=2)
        assert rows[whole]["errors"] == 0


@pytest.mark.parametrize("said", [1, 100, 0], ids=["one token", "as many each time", "many or few"])
def test_time_that_passes_whatever_is_asked_is_no_work_that_others_wait_for(said: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines with room for all, or a stand-in for one: a second, and 10 ms a token."""
    monkeypatch.setattr(cost_history, "PRICE", 0.0)  # what was predicted before anything was known would be made good for
    world, rng = World(4), random.Random(7)
    endpoints, running = world.endpoints(), list[tuple[float, int, LLMRequest, Endpoint, int]]()
    sent = dict.fromkeys(endpoints, 0)
    for number in range(2_000):
        world.clock.advance(0.05)
        while running and running[0][0] <= world.clock.now_s():
            _, _, ended, endpoint, tokens = heapq.heappop(running)
            end(world, ended, endpoint, tokens)
        question = LLMRequest(id="r", path=PATH, headers={})
        question.prompt_tokens = 50 + int(rng.lognormvariate(6, 1))
        scores = world.scorer.score(question, endpoints)
        chosen = max(endpoints, key=lambda endpoint: (scores[endpoints.index(endpoint)], rng.random()))
        sent[chosen] += 1
        tokens = said or rng.randrange(1, 300)
        request = world.pick(chosen, question.prompt_tokens, stream=False)
        heapq.heappush(running, (world.clock.now_s() + 1.0 + tokens * 0.01, number, request, chosen, tokens))
    assert max(world.waits_s()) < 0.2
    assert max(sent.values()) < 1.1 * min(sent.values())
