"""Shedding without flow control: 429 for the sheddable while the pool is full."""

from __future__ import annotations

import json

import pytest

from epp.engines.models import ModelsView
from epp.resources import Objective
from tests.builders import (
    FULL_DUPLEX,
    Core,
    Stream,
    chat,
    core,
    request_body,
    request_headers,
    request_trailers,
    response_headers,
    set_headers,
)
from tests.spec.wire import (
    AUDIO,
    BUFFERED,
    IDLE,
    IF_AVAILABLE,
    JSON_ANSWER,
    LONG,
    NONE,
    ONE,
    REQUEST_MODES,
    STREAMED,
    THREE,
    Modes,
    answer_of,
    configuration,
    not_available,
    profile,
    request,
    respond,
    routed,
    told,
)

OBJECTIVE = "x-llm-d-inference-objective"
SHEDDABLE = {OBJECTIVE: "batch"}
ONE_EACH = configuration(
    {"type": "queue-scorer"},
    {"type": "concurrency-detector", "parameters": {"maxConcurrency": 1}},
    profiles=[profile("default", **{"queue-scorer": 1})],  # all that may filter does so where there is no profile, and detectors may
    flowControl={"saturationDetector": {"pluginRef": "concurrency-detector"}},
)


def pool(*waiting: float, priority: int = -1) -> Core:
    """Endpoints with queues of these lengths, 5 counts as full; the objective `batch` may be shed."""
    world = core(len(waiting))
    world.resources.apply([Objective("batch", priority=priority), Objective("interactive", priority=1)], [])
    for number, length in enumerate(waiting, 1):
        world.read(number, waiting=length)
    return world


def shed(stream: Stream) -> bool:
    """Answered 429, in the client's words; anything else than that or a routed request fails."""
    if routed(stream):
        return False
    answer = answer_of(stream)
    assert answer.status.code == 429
    assert json.loads(answer.body) == {
        "error": {"message": "system saturated, sheddable request dropped", "type": "rate_limit_error", "code": "saturated"}
    }
    assert set_headers(stream.got[-1]) == {
        "content-type": b"application/json",
        "x-llm-d-request-dropped-reason": b"rejected-saturated",
        "retry-after": b"1",
    }
    assert told(stream.got) == []
    return True


@pytest.mark.parametrize("modes", REQUEST_MODES, ids=str)
@pytest.mark.parametrize("header", [OBJECTIVE, "x-gateway-inference-objective"])
def test_a_sheddable_request_is_dropped_while_the_pool_is_full(header: str, modes: Modes) -> None:
    world = pool(5.0, 5.0)
    state = [repr(each) for each in world.datastore.endpoints.values()]
    stream = request(world, chat(LONG), modes=modes, headers={header: "batch"})
    assert shed(stream)
    assert stream.session.answered
    assert stream.send(request_body(b"more", end_of_stream=True), request_trailers(), response_headers()) == []
    assert world.inflight == IDLE, "before the stream is over"
    stream.close()
    assert world.inflight == IDLE
    assert [repr(each) for each in world.datastore.endpoints.values()] == state
    assert all(each.sent_requests == each.picks_total == 0 for each in world.datastore.endpoints.values())
    assert sum(series.errors["ResourceExhausted"] for series in world.metrics._series.values()) == 1
    assert not_available(request(world, chat(LONG), headers=IF_AVAILABLE)), "no endpoint is thought to have its prompt"


@pytest.mark.parametrize(
    ("waiting", "dropped"), [((5.0,), True), ((4.0,), False), ((10.0, 0.0), True), ((9.0, 0.0), False), ((0.0, 0.0, 15.0), True)]
)
def test_full_is_a_mean_of_1_and_more(waiting: tuple[float, ...], dropped: bool) -> None:
    assert shed(request(pool(*waiting), headers=SHEDDABLE)) == dropped


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {OBJECTIVE: "interactive"},
        {OBJECTIVE: "nobody's"},
        {OBJECTIVE: ""},
        {OBJECTIVE: "interactive", "x-gateway-inference-objective": "batch"},
    ],
    ids=["none", "important", "unknown", "empty", "the new name first"],
)
def test_others_are_routed_however_full_the_pool_is(headers: dict[str, str]) -> None:
    world = pool(500.0, 500.0)
    stream = request(world, headers=headers)
    assert routed(stream)
    assert world.inflight[0] == 1
    respond(stream, JSON_ANSWER)
    assert world.inflight == IDLE


@pytest.mark.parametrize(("priority", "dropped"), [(-1, True), (-1_000, True), (0, False), (1, False)])
def test_it_is_the_priority_that_makes_a_request_sheddable(priority: int, dropped: bool) -> None:
    assert shed(request(pool(5.0, priority=priority), headers=SHEDDABLE)) == dropped


def test_an_objective_that_changes_counts_from_the_next_request_on() -> None:
    world = pool(5.0)
    assert shed(request(world, headers=SHEDDABLE))
    world.resources.apply([], [])
    assert routed(request(world, headers=SHEDDABLE))


@pytest.mark.parametrize("modes", [FULL_DUPLEX, (BUFFERED, NONE), (STREAMED, NONE), (NONE, NONE), None], ids=str)
def test_requests_without_a_body_are_shed_alike(modes: Modes) -> None:
    world = pool(5.0)
    for headers, dropped in [(SHEDDABLE, True), ({}, False)]:
        get = Stream(world.session())
        get.send(request_headers(path="/v1/models", modes=modes, end_of_stream=True, headers={":method": "GET", **headers}))
        assert shed(get) == dropped
        upload = Stream(world.session())
        upload.send(request_headers(path=AUDIO, modes=modes, headers=headers))
        assert shed(upload) == dropped, "at once, not after the upload"
        for stream in (get, upload):
            stream.close()
        assert world.inflight == IDLE


def test_the_sheddable_are_let_in_again_when_there_is_room() -> None:
    world = core(2, config=ONE_EACH)
    world.resources.apply([Objective("batch", priority=-1)], [])
    streams = [request(world), request(world, headers=SHEDDABLE)]
    assert all(map(routed, streams)), "half full"
    assert shed(request(world, headers=SHEDDABLE))
    assert shed(request(world, headers=SHEDDABLE)), "the first refusal took no place, and this one gives none back"
    more = request(world)
    assert routed(more), "beyond the limit, but not sheddable"
    respond(streams[0], JSON_ANSWER)
    assert shed(request(world, headers=SHEDDABLE))
    respond(more, JSON_ANSWER)
    last = request(world, headers=SHEDDABLE)
    assert routed(last)
    for stream in (streams[1], last):
        stream.close()
    assert world.inflight == IDLE


def test_the_engine_does_not_see_what_was_asked_of_us() -> None:
    stream = request(pool(0.0), headers=SHEDDABLE)
    assert list(stream.got[0].request_headers.response.header_mutation.remove_headers) == [OBJECTIVE]


def test_engines_that_were_never_or_long_ago_heard_of_count_as_full() -> None:
    """As in the reference picker, but not before 3 s: idle engines are read once a second."""
    world = pool(0.0)
    world.clock.advance(2.9)
    assert routed(request(world, headers=SHEDDABLE))
    world.clock.advance(0.2)
    assert shed(request(world, headers=SHEDDABLE))
    unheard = core(1)
    unheard.resources.apply([Objective("batch", priority=-1)], [])
    assert shed(request(unheard, headers=SHEDDABLE))


def test_engines_that_have_no_metrics_are_as_full_as_what_we_sent_them() -> None:
    """They are never read. The reference picker takes them for full, idle or not: no sheddable request would ever get to them."""
    world = core(2)
    world.resources.apply([Objective("batch", priority=-1)], [])
    assert shed(request(world, headers=SHEDDABLE)), "nobody knows yet"
    for number in (1, 2):
        world.datastore.record_answer(world.endpoint(number))
    world.clock.advance(3600.0)
    streams = [request(world, headers=SHEDDABLE) for _ in range(10)]
    assert all(map(routed, streams))
    assert shed(request(world, headers=SHEDDABLE)), "five on each count as five that wait"
    streams[0].close()
    assert routed(request(world, headers=SHEDDABLE))
    for number in (1, 2):  # they fall silent
        each = world.endpoint(number)
        each.scrape_failures += 1
        world.datastore.record_silence(each)
    for stream in streams:
        stream.close()
    assert shed(request(world, headers=SHEDDABLE))


def test_of_endpoints_that_lack_the_model_nobody_asks_how_full_they_are() -> None:
    world = pool(5.0, 0.0, 5.0)
    view = ModelsView()
    for number, models in ((1, {"m", "n"}), (2, {"n"}), (3, {"m"})):
        view.record(world.endpoint(number), frozenset(models))
    world.director.candidates.models = view
    assert shed(request(world, headers=SHEDDABLE))
    assert routed(request(world, chat(model="n"), headers=SHEDDABLE)), "half full"
    unheard_of = request(world, chat(model="x"), headers=SHEDDABLE, subset=[ONE, THREE])
    assert answer_of(unheard_of).status.code == 404, "no wait will change that"
    world.datastore.set_draining(world.endpoint(2), draining=True)
    world.datastore.set_draining(world.endpoint(1), draining=True)
    assert shed(request(world, chat(model="n"), headers=SHEDDABLE)), "nobody is left who serves it"
    assert answer_of(request(world, chat(model="n"))).status.code == 503


@pytest.mark.parametrize("subset", [[], ["10.9.9.9"]], ids=str)
def test_a_subset_without_endpoints_is_full_too(subset: list[str]) -> None:
    """The reference picker's detector is given what is in the subset, and nobody is 1 to it."""
    world = pool(0.0)
    assert shed(request(world, headers=SHEDDABLE, subset=subset))
    assert answer_of(request(world, subset=subset)).status.code == 503


def test_a_pool_without_endpoints_is_full_before_it_is_empty() -> None:
    """The reference picker's order: admission comes before it looks for endpoints."""
    world = pool()
    assert shed(request(world, headers=SHEDDABLE))
    assert answer_of(request(world)).status.code == 503


def test_what_can_not_be_understood_is_a_400_before_anything_is_shed() -> None:
    assert answer_of(request(pool(5.0), b"{", headers=SHEDDABLE)).status.code == 400


def test_a_grpc_client_is_told_that_a_resource_is_exhausted() -> None:
    stream = request(pool(5.0), headers={**SHEDDABLE, "content-type": "application/grpc"})
    assert answer_of(stream).grpc_status.status == 8


@pytest.mark.parametrize(("waiting", "dropped"), [((5.0, 0.0), True), ((0.0, 50.0), False)])
def test_within_a_subset_it_is_the_subset_that_is_full(waiting: tuple[float, ...], dropped: bool) -> None:
    """The reference picker gives its detector the candidates."""
    assert shed(request(pool(*waiting), headers=SHEDDABLE, subset=[ONE])) == dropped
