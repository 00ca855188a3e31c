"""How a request ended: which endings are normal, which are the client's doing, and who served it in the end."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from epp._pb import epp_ext_proc_pb2 as pb
from epp.extproc.messages import BodyMode
from tests.builders import (
    FULL_DUPLEX,
    LLM_D,
    Core,
    Stream,
    chat,
    core,
    destination_of,
    kinds,
    request_body,
    request_headers,
    response_body,
    response_headers,
    response_trailers,
)

BUFFERED, STREAMED, FULL, NONE = BodyMode.BUFFERED, BodyMode.STREAMED, BodyMode.FULL_DUPLEX_STREAMED, BodyMode.NONE
LEFT = {"ClientDisconnected": 1}
HALF_CLOSE = "half-close"
TOKEN, END = response_body(b"data: 1\n\n"), response_body(end_of_stream=True)

Modes = tuple[BodyMode, BodyMode] | None
ENDINGS: list[tuple[str, Modes, Sequence[pb.ProcessingRequest | str], dict[str, int]]] = [
    ("a whole answer", FULL_DUPLEX, [response_headers(), TOKEN, END], {}),
    ("a whole answer, then the peer's end", FULL_DUPLEX, [response_headers(), TOKEN, END, HALF_CLOSE], {}),
    ("trailers", FULL_DUPLEX, [response_headers(), TOKEN, response_trailers()], {}),
    ("an answer without a body", FULL_DUPLEX, [response_headers(204, end_of_stream=True)], {"ModelServerError": 1}),
    ("an answer of headers alone", FULL_DUPLEX, [response_headers(end_of_stream=True)], {}),
    ("the client left before the answer", FULL_DUPLEX, [], LEFT),
    ("the client left after the headers", FULL_DUPLEX, [response_headers()], LEFT),
    ("the client left mid-answer", FULL_DUPLEX, [response_headers(), TOKEN, TOKEN], LEFT),
    ("the client left mid-answer, Envoy closes tidily", FULL_DUPLEX, [response_headers(), TOKEN, HALF_CLOSE], LEFT),
    ("the client left mid-answer, streamed", (FULL, STREAMED), [response_headers(), TOKEN], LEFT),
    ("the client left mid-answer, buffered", (FULL, BUFFERED), [response_headers()], LEFT),
    ("we are not shown the body", (FULL, NONE), [response_headers()], {}),
    ("we are not shown the body of an error", (FULL, NONE), [response_headers(500)], {"ModelServerError": 1}),
    ("we are not shown the body, buffered request", (BUFFERED, NONE), [response_headers()], {}),
    ("we are not shown the body, streamed request", (STREAMED, NONE), [response_headers()], {}),
    ("we are not shown the body, the client left before the headers", (FULL, NONE), [], LEFT),
    ("we asked not to be shown the body, and were not", (BUFFERED, BUFFERED), [response_headers()], {}),
    (
        "we asked not to be shown the body, and were",
        (BUFFERED, BUFFERED),
        [response_headers(), response_body(b"{}", end_of_stream=True)],
        {},
    ),
    ("we asked not to be shown the body, the client left before", (BUFFERED, BUFFERED), [], LEFT),
    ("a peer with no response phase", None, [HALF_CLOSE], {}),
    ("a peer with no response phase that was reset", None, [], LEFT),
]


@pytest.mark.parametrize(("modes", "after", "errors"), [case[1:] for case in ENDINGS], ids=[case[0] for case in ENDINGS])
def test_how_a_request_ended_is_counted(modes: Modes, after: Sequence[pb.ProcessingRequest | str], errors: dict[str, int]) -> None:
    world = core()
    stream = Stream(world.session())
    stream.send(request_headers(modes=modes), request_body(chat(), end_of_stream=True))
    assert world.inflight[0] == 1
    for step in after:
        _ = stream.half_close() if isinstance(step, str) else stream.send(step)
    stream.close()
    assert world.errors("m") == errors
    assert world.inflight == (0, 0, 0, 0)


@pytest.mark.parametrize("path", ["/v1/audio/transcriptions", "/v1/chat/completions"])
def test_a_half_close_before_the_body_ended_is_a_normal_end_for_a_peer_without_a_response_phase(path: str) -> None:
    world = core()
    stream = Stream(world.session())
    stream.send(request_headers(path=path, modes=None), request_body(chat()))
    stream.half_close()
    stream.close()
    assert not any(series.errors for series in world.metrics._series.values())
    assert world.inflight == (0, 0, 0, 0)


def test_without_the_response_phase_nothing_is_made_up() -> None:
    """No duration, no time to first token: when the answer ended is not known."""
    world = core()
    for modes, after in [((FULL, NONE), [response_headers()]), (None, [HALF_CLOSE])]:
        stream = Stream(world.session())
        stream.send(request_headers(modes=modes), request_body(chat(), end_of_stream=True))
        world.clock.advance(3)
        for step in after:
            _ = stream.half_close() if isinstance(step, str) else stream.send(step)
        stream.close()
    series = world.metrics.series("m", "m")
    assert (series.requests, series.duration_s.count, series.ttft_s.count, series.streaming_ttft_s.count) == (2, 0, 0, 0)


def test_one_that_is_not_shown_the_body_holds_its_place_until_the_stream_ends() -> None:
    world = core()
    stream = Stream(world.session())
    stream.send(request_headers(modes=(FULL, NONE)), request_body(chat(), end_of_stream=True), response_headers())
    assert world.inflight[0] == 1
    stream.close()
    assert world.inflight == (0, 0, 0, 0)


# Who served it


def elsewhere(world: Core, chosen: str) -> str:
    (other,) = {each.destination for each in world.datastore.endpoints.values()} - {chosen}
    return other


@pytest.mark.parametrize("modes", [FULL_DUPLEX, (FULL, NONE), (BUFFERED, BUFFERED), (BUFFERED, NONE), (STREAMED, STREAMED)])
@pytest.mark.parametrize("told", ["served", "upstream_address"])
def test_the_charge_moves_to_who_served_whatever_the_mode(modes: Modes, told: str) -> None:
    world = core(2)
    stream = Stream(world.session())
    stream.send(request_headers(modes=modes), request_body(chat(), end_of_stream=True))
    ours = next(e for e in world.datastore.endpoints.values() if e.inflight_requests)
    other = world.datastore.by_destination[elsewhere(world, ours.destination)]
    assert kinds(stream.send(response_headers(**{told: other.destination}))) == ["response_headers"]
    assert (ours.inflight_requests, other.inflight_requests) == (0, 1)
    stream.close()
    assert world.inflight == (0, 0, 0, 0)


def test_the_metadata_is_believed_before_the_attribute() -> None:
    world = core(3)
    stream = Stream(world.session())
    stream.send(request_headers(), request_body(chat(), end_of_stream=True))
    stream.send(response_headers(served="10.0.0.2:8000", upstream_address="10.0.0.3:8000"))
    assert [world.endpoint(n).inflight_requests for n in (1, 2, 3)] == [0, 1, 0]


@pytest.mark.parametrize("served", ["10.0.0.2", "10.0.0.2:9000", "nonsense", "10.0.0.1:8000,10.0.0.2:8000"])
def test_an_address_that_is_no_endpoints_moves_nothing(served: str) -> None:
    world = core(2, config=LLM_D)
    world.read(2, waiting=50.0)
    stream = Stream(world.session())
    stream.send(request_headers(), request_body(chat(), end_of_stream=True), response_headers(served=served))
    assert (world.endpoint(1).inflight_requests, world.endpoint(2).inflight_requests) == (1, 0)


def test_the_next_turn_of_a_conversation_follows_the_cache_to_who_served() -> None:
    world = core(2)
    (index,) = world.built.indexes.values()
    for conversation in range(12):
        prompt = f"conversation {conversation} " * 500
        first = Stream(world.session())
        (route, *_) = first.send(request_headers(), request_body(chat(prompt), end_of_stream=True))
        other = elsewhere(world, destination_of(route))
        first.send(response_headers(served=other), response_body(b"{}", end_of_stream=True))
        ours = world.datastore.by_destination[destination_of(route)]
        index.forget(ours.slot, lambda _slot: None)  # what it would have cached, had it served
        for _ in range(10):
            index.tick()
        again = Stream(world.session())
        (route, *_) = again.send(request_headers(), request_body(chat(prompt + "and more"), end_of_stream=True))
        assert destination_of(route) == other
        again.close()
