"""Requests that wait before they are decided: what the session does meanwhile, and that nothing is lost or held for good."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from epp.arrival import Arrival
from epp.errors import EppError, SaturatedError
from epp.extproc.messages import BodyMode, Immediate
from tests.builders import (
    Core,
    Stream,
    chat,
    core,
    echoed,
    ends,
    kinds,
    request_body,
    request_headers,
    request_trailers,
    response_body,
    response_headers,
)


class Held:
    """One request's wait."""

    def __init__(self, arrival: Arrival) -> None:
        self.arrival = arrival
        self.error: EppError | None = None
        self.cancelled = False

    def cancel(self) -> None:
        self.cancelled = True

    def go(self, error: EppError | None = None) -> None:
        self.error = error
        self.arrival.wake()


class Gate:
    """A stage that has every request wait until it is told otherwise."""

    def __init__(self, *, opened: bool = False, error: EppError | None = None) -> None:
        self.opened = opened
        self.error = error
        self.held: list[Held] = []

    def begin(self, arrival: Arrival) -> Held | None:
        if self.error is not None:
            raise self.error
        if self.opened:
            return None
        self.held.append(Held(arrival))
        return self.held[-1]


def gated(*gates: Gate) -> Core:
    world = core(2)
    world.director.stages = gates
    return world


def start(world: Core) -> tuple[Stream, list[int]]:
    """A stream, and how often its transport was notified."""
    stream, told = Stream(world.session()), [0]

    def notify() -> None:
        told[0] += 1

    stream.session.notify = notify
    return stream, told


def resumed(stream: Stream) -> list[str]:
    return kinds(stream.resume())


def test_a_request_waits_and_is_then_answered_in_full() -> None:
    gate = Gate()
    world = gated(gate)
    stream, told = start(world)
    body = chat("tell me")
    assert stream.send(request_headers(), request_body(body, end_of_stream=True)) == []
    assert stream.session.waiting
    assert world.inflight == (0, 0, 0, len(body))
    gate.held[0].go()
    assert told == [1]
    assert resumed(stream) == ["request_headers", "request_body"]
    assert echoed(stream.got) == body
    assert ends(stream.got) == [True]
    assert not stream.session.waiting
    assert world.inflight[0] == 1
    assert world.inflight[3] == 0


def test_what_a_stage_refuses_is_an_answer() -> None:
    world = gated(Gate(error=SaturatedError("full")))
    stream, _ = start(world)
    stream.send(request_headers(), request_body(chat(), end_of_stream=True))
    assert stream.got[-1].immediate_response.status.code == 429
    assert world.errors("m") == {"ResourceExhausted": 1}


def test_a_wait_may_end_in_a_refusal() -> None:
    gate = Gate()
    world = gated(gate)
    stream, _ = start(world)
    stream.send(request_headers(), request_body(chat(), end_of_stream=True))
    gate.held[0].go(SaturatedError("too long"))
    assert resumed(stream) == ["immediate_response"]
    assert world.inflight == (0, 0, 0, 0)
    assert world.errors("m") == {"ResourceExhausted": 1}
    assert stream.session.answered


def test_stages_are_passed_in_their_order() -> None:
    first, second, third = Gate(), Gate(opened=True), Gate()
    world = gated(first, second, third)
    stream, told = start(world)
    stream.send(request_headers(), request_body(chat(), end_of_stream=True))
    assert (len(first.held), len(third.held)) == (1, 0)
    first.held[0].go()
    assert resumed(stream) == []
    assert stream.session.waiting
    third.held[0].go()
    assert resumed(stream) == ["request_headers", "request_body"]
    assert told == [2]


@pytest.mark.parametrize("leave", [lambda stream: stream.close(), lambda stream: stream.half_close()])
def test_a_client_that_leaves_waits_no_more(leave: Callable[[Stream], object]) -> None:
    gate = Gate()
    world = gated(gate)
    stream, _ = start(world)
    stream.send(request_headers(), request_body(chat(), end_of_stream=True))
    leave(stream)
    assert gate.held[0].cancelled
    assert world.inflight == (0, 0, 0, 0)
    assert stream.resume() == []
    assert not stream.session.waiting


def test_a_gateway_that_half_closes_before_the_answer_gets_it() -> None:
    """NGINX Gateway Fabric says no modes and half-closes behind the body (rule 9)."""
    gate = Gate()
    world = gated(gate)
    stream, _ = start(world)
    stream.send(request_headers(modes=None), request_body(chat(), end_of_stream=True))
    assert stream.half_close() == []
    assert not gate.held[0].cancelled
    gate.held[0].go()
    assert resumed(stream)[0] == "request_headers"


def test_trailers_that_ended_the_body_are_answered_at_the_end_of_the_wait() -> None:
    gate = Gate()
    stream, _ = start(gated(gate))
    body = chat()
    assert stream.send(request_headers(), request_body(body), request_trailers()) == []
    gate.held[0].go()
    assert resumed(stream) == ["request_headers", "request_body", "request_trailers"]
    assert echoed(stream.got) == body


def test_a_body_that_passes_by_is_kept_while_its_request_waits() -> None:
    gate = Gate()
    world = gated(gate)
    stream, _ = start(world)
    assert stream.send(request_headers(path="/v1/audio/transcriptions")) == []
    assert stream.send(request_body(b"abc"), request_body(b"def", end_of_stream=True)) == []
    assert world.inflight[3] == 6
    gate.held[0].go()
    assert resumed(stream) == ["request_headers", "request_body", "request_body"]
    assert echoed(stream.got) == b"abcdef"
    assert ends(stream.got) == [False, True]
    assert world.inflight[3] == 0


def test_what_is_kept_of_a_body_that_passes_by_is_limited() -> None:
    gate = Gate()
    world = core(2, body_bytes_max=8)
    world.director.stages = (gate,)
    stream, _ = start(world)
    stream.send(request_headers(path="/v1/audio/transcriptions"), request_body(b"12345"), request_body(b"6789"))
    assert stream.got[-1].immediate_response.status.code == 413
    assert gate.held[0].cancelled
    assert world.inflight == (0, 0, 0, 0)


def test_in_buffered_mode_the_body_s_reply_waits() -> None:
    gate = Gate()
    stream, _ = start(gated(gate))
    modes = (BodyMode.BUFFERED, BodyMode.NONE)
    assert kinds(stream.send(request_headers(modes=modes))) == ["request_headers"]
    assert stream.send(request_body(chat(), end_of_stream=True)) == []
    gate.held[0].go()
    assert resumed(stream) == ["request_body"]


def test_a_request_that_waits_does_not_expire_as_one_whose_body_stopped() -> None:
    gate = Gate()
    world = gated(gate)
    stream, _ = start(world)
    stream.send(request_headers(), request_body(chat(), end_of_stream=True))
    assert stream.session.expire(world.clock.now_s() + 1e6) == []
    assert stream.session.waiting


def test_a_body_that_can_not_be_read_does_not_wait() -> None:
    gate = Gate()
    stream, _ = start(gated(gate))
    stream.send(request_headers(), request_body(b"{", end_of_stream=True))
    assert stream.got[-1].immediate_response.status.code == 400
    assert gate.held == []


def test_a_gateway_that_answers_in_our_place_ends_the_wait() -> None:
    gate = Gate()
    world = gated(gate)
    stream, _ = start(world)
    stream.send(request_headers(), request_body(chat(), end_of_stream=True))
    assert kinds(stream.send(response_headers(status=504))) == ["response_headers"]
    assert gate.held[0].cancelled
    assert stream.resume() == []
    assert world.inflight == (0, 0, 0, 0)
    assert kinds(stream.send(response_body(b"late", end_of_stream=True))) == ["response_body"]


def test_who_waits_when_the_picker_stops_is_refused() -> None:
    gate = Gate()
    world = gated(gate)
    stream, _ = start(world)
    stream.send(request_headers(), request_body(chat(), end_of_stream=True))
    world.limits.closing = True
    (reply,) = stream.session.expire(world.clock.now_s())
    assert isinstance(reply, Immediate)
    assert reply.status == 503
    assert gate.held[0].cancelled
    assert stream.session.answered


def test_empty_pieces_of_a_body_that_passes_by_are_not_kept() -> None:
    gate = Gate()
    stream, _ = start(gated(gate))
    stream.send(request_headers(path="/v1/audio/transcriptions"), *[request_body(b"")] * 50, request_body(b"x", end_of_stream=True))
    assert len(stream.session._late) == 1
    gate.held[0].go()
    assert resumed(stream) == ["request_headers", "request_body"]


def test_a_body_that_passes_by_may_end_with_its_peer_s_half_close() -> None:
    gate = Gate()
    stream, _ = start(gated(gate))
    stream.send(request_headers(modes=None, path="/v1/audio/transcriptions"), request_body(b"abc"))
    assert stream.half_close() == []
    gate.held[0].go()
    assert resumed(stream) == ["request_headers", "request_body", "request_body"]
    assert ends(stream.got) == [False, True]
