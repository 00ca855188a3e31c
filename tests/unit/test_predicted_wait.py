"""predicted-wait-detector where nobody tells much: answers that come whole, engines without metrics, old readings, endpoints that go."""

from __future__ import annotations

import random
from collections.abc import Mapping

import msgspec
import pytest

from epp.clock import VirtualClock
from epp.plugins.base import Context, Finished, Plugin
from epp.plugins.detectors.predicted_wait import PredictedWaitDetector
from epp.plugins.producers.inflight_load import InflightLoadProducer
from epp.types import Decision, Endpoint, LLMRequest
from tests.builders import Core, Stream, chat, core, llm_request, pool_of, response_body, response_headers
from tests.spec.flow_wire import Queued


def detector(plugins: Mapping[str, Plugin] | None = None, **parameters: object) -> tuple[PredictedWaitDetector, VirtualClock]:
    clock = VirtualClock(1_000.0)
    made = msgspec.convert({"maxWait": "1s", **parameters}, PredictedWaitDetector)
    made.bind(Context(clock, random.Random(1), plugins or {}))
    return made, clock


def one(rate: float = 1_000.0, **state: float) -> Endpoint:
    """An endpoint that has shown how fast it is."""
    (endpoint,) = pool_of(state)
    endpoint.capacity.prefill_tokens_per_s = rate
    return endpoint


def send(made: PredictedWaitDetector, endpoint: Endpoint, tokens: int, *, stream: bool) -> LLMRequest:
    """As the director does: picked, then charged."""
    request = llm_request(prompt_tokens=tokens, stream=stream)
    made.picked(request, Decision(endpoint, (), "default"))
    endpoint.inflight_requests += 1
    endpoint.inflight_tokens += tokens
    return request


def end(made: PredictedWaitDetector, endpoint: Endpoint, request: LLMRequest, *, ttft_s: float = 0.1, charged: bool = True) -> None:
    endpoint.inflight_requests -= 1
    endpoint.inflight_tokens -= request.prompt_tokens if charged else 0
    made.finished(request, endpoint, Finished(200, ttft_s, 1.0, None, 0))


# answers that come whole


def test_the_prompt_of_a_whole_answer_is_through_when_it_should_be() -> None:
    made, clock = detector()
    endpoint = one()
    first = send(made, endpoint, 500, stream=False)
    second = send(made, endpoint, 300, stream=False)
    assert made.saturation([endpoint]) == pytest.approx(0.8)
    clock.advance(0.5)
    assert made.saturation([endpoint]) == pytest.approx(0.3)
    clock.advance(10.0)
    assert made.saturation([endpoint]) == 0.0, "both are being decoded"
    streamed = send(made, endpoint, 400, stream=True)
    assert made.saturation([endpoint]) == pytest.approx(0.4)
    for request in (first, second, streamed):
        end(made, endpoint, request)
    assert made.saturation([endpoint]) == 0.0
    send(made, endpoint, 700, stream=True)
    assert made.saturation([endpoint]) == pytest.approx(0.7), "nothing of what ended is left in the books"


def test_so_are_streams_where_the_gateway_does_not_show_them() -> None:
    made, clock = detector()
    endpoint = one()
    end(made, endpoint, send(made, endpoint, 100, stream=True), ttft_s=-1.0)
    send(made, endpoint, 900, stream=True)
    clock.advance(5.0)
    assert made.saturation([endpoint]) == 0.0
    end(made, endpoint, send(made, endpoint, 100, stream=True), ttft_s=0.1)
    clock.advance(5.0)
    send(made, endpoint, 600, stream=True)
    clock.advance(5.0)
    assert made.saturation([endpoint]) == pytest.approx(0.6), "it shows them now"


def test_tokens_in_flight_that_are_not_prompts_alone_are_not_taken_for_such() -> None:
    producer = InflightLoadProducer(add_estimated_output_tokens=True)
    made, clock = detector({"inflight-load-producer": producer})
    endpoint = one()
    send(made, endpoint, 500, stream=True)
    endpoint.inflight_tokens += 100_000
    assert made.saturation([endpoint]) == pytest.approx(0.5)
    clock.advance(1.0)
    assert made.saturation([endpoint]) == 0.0


def test_a_whole_answer_served_elsewhere_leaves_the_books_of_where_it_was_sent() -> None:
    made, _ = detector()
    sent, serving = pool_of({}, {})
    for endpoint in (sent, serving):
        endpoint.capacity.prefill_tokens_per_s = 1_000.0
    request = send(made, sent, 800, stream=False)
    sent.inflight_tokens -= 800
    serving.inflight_tokens += 800
    made.served(request, serving)
    send(made, sent, 600, stream=True)
    assert made.saturation([sent]) >= 0.6
    end(made, serving, request)
    send(made, serving, 300, stream=True)
    assert made.saturation([serving]) == pytest.approx(0.3)


# what is not known


def test_a_guess_counts_no_more_than_what_was_sent_since_a_reading_that_says_nothing_waits() -> None:
    made, clock = detector(initialPrefillTokensPerSecond=1_000)
    (endpoint,) = pool_of({"inflight_tokens": 30_000, "sent_tokens": 400, "inflight_requests": 30, "scraped_at_s": 999.0})
    assert made.saturation([endpoint]) == pytest.approx(0.4)
    endpoint.waiting = 1.0
    assert made.saturation([endpoint]) == pytest.approx(30.0)
    endpoint.waiting = 0.0
    clock.advance(1.5)
    assert made.saturation([endpoint]) == pytest.approx(30.0), "a reading of 2.5 s ago"
    endpoint.scraped_at_s = clock.now_s()
    endpoint.capacity.prefill_tokens_per_s = 10_000.0
    assert made.saturation([endpoint]) == pytest.approx(3.0), "no guess any more"


def test_an_engine_that_tells_nothing_is_not_full_while_nobody_knows_how_fast_it_is() -> None:
    made, _ = detector()
    (endpoint,) = pool_of({"inflight_tokens": 10**6, "inflight_requests": 40, "trusted": 0.0})
    assert made.saturation([endpoint]) == 0.0
    endpoint.capacity.prefill_tokens_per_s = 10_000.0
    assert made.saturation([endpoint]) == pytest.approx(100.0)


@pytest.mark.parametrize(("trusted", "full"), [(1.0, 2.0), (0.5, 1.0), (0.0, 0.0)])
def test_what_an_engine_said_long_ago_holds_nobody_up_nor_does_what_we_have_in_flight_there(trusted: float, full: float) -> None:
    made, clock = detector()
    endpoint = one(waiting=4.0, inflight_requests=50)
    made.level([endpoint])
    for _ in range(200):
        clock.advance(0.5)
        made.finished(llm_request(), endpoint, Finished(200, 0.1, 1.0, None, 0))
    endpoint.trusted = trusted
    assert made.saturation([endpoint]) == pytest.approx(full)


def test_an_end_at_an_endpoint_that_is_gone_says_nothing_of_its_successor() -> None:
    made, clock = detector()
    old, new = one(inflight_requests=3), one(inflight_requests=1, waiting=1.0)
    assert old.slot == new.slot
    made.level([old])
    made.removed(old)
    made.finished(llm_request(), old, Finished(200, 0.1, 1.0, None, 0))
    clock.advance(50.0)
    made.level([new])
    made.finished(llm_request(), new, Finished(200, 0.1, 1.0, None, 0))
    assert made.saturation([new]) == pytest.approx(0.05), "no time between two ends is known"
    assert list(made.state()["ends_apart_s"]) == [str(new.slot)]


# in the form that is on by default


LLM_D = "apiVersion: llm-d.ai/v1alpha1\nkind: EndpointPickerConfig\nprofile: llm-d\n"


def answered(world: Core, stream: Stream, *, streamed: bool) -> None:
    stream.send(response_headers())
    stream.send(response_body(b'data: {"choices":[]}\n\n' if streamed else b"{}", end_of_stream=True))
    stream.close()


@pytest.mark.parametrize("config", ["", LLM_D], ids=["cost-aware", "llm-d"])
@pytest.mark.parametrize("streamed", [True, False], ids=["streams", "whole"])
@pytest.mark.parametrize("metrics", [True, False], ids=["metrics", "none"])
def test_an_engine_with_room_is_never_held_back_by_what_nobody_knows_of_it(config: str, streamed: bool, metrics: bool) -> None:
    """Five prompts of 4 000 tokens a second, each answered after 10 s: 50 at a time, which it takes without a queue."""
    world = core(1, config=config)
    queued = Queued(world)
    (endpoint,) = world.datastore.endpoints.values()
    running: list[Stream] = []
    for number in range(120):
        body = chat(f"{number} " * (16_000 // len(f"{number} ")), **({"stream": True} if streamed else {}))
        stream = queued.ask(body)
        running.append(stream)
        assert not stream.session.waiting, f"number {number}, {endpoint.inflight_requests} in flight"
        if streamed:
            stream.send(response_headers(), response_body(b'data: {"choices":[]}\n\n'))
        if len(running) > 50:
            answered(world, running.pop(0), streamed=streamed)
        queued.run(0.2)
        if metrics:
            world.read(1, waiting=0.0, running=float(endpoint.inflight_requests))
        else:
            world.datastore.record_answer(endpoint)
    assert queued.outcomes == {"Dispatched": 120}
