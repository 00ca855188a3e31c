"""Running requests that give way to queued ones of higher priority: what their clients are told, and that it is told once and in time."""

from __future__ import annotations

import pytest

from epp.extproc.messages import BodyMode
from tests.builders import FULL_DUPLEX, Stream, kinds, request_body, request_headers, response_body, response_headers
from tests.spec.flow_wire import OBJECTIVE, Queued, one_each, queued, refused
from tests.spec.wire import IDLE, JSON_ANSWER, NONE, STREAMED, Modes, respond, routed

PRIORITIES = {"batch": -1, "worse": -2, "chat": 5}


def evicting(endpoints: int = 1, *, on: bool = True) -> Queued:
    return queued(endpoints, priorities=PRIORITIES, enableEviction=on)


def errors(world: Queued) -> dict[str, int]:
    found: dict[str, int] = {}
    for series in world.world.metrics._series.values():
        for code, count in series.errors.items():
            found[code] = found.get(code, 0) + count
    return found


def ask(world: Queued, objective: str, modes: Modes = FULL_DUPLEX) -> Stream:
    return world.ask(headers={OBJECTIVE: objective}, modes=modes)


@pytest.mark.parametrize("begun", [False, True], ids=["before its response", "in the middle of it"])
def test_who_gives_way_is_told_to_come_back_and_the_queued_goes(begun: bool) -> None:
    world = evicting()
    batch = ask(world, "batch")
    assert routed(batch)
    if begun:
        batch.send(response_headers(), response_body(b"data: {}\n\n"))
    chats = ask(world, "chat")
    assert chats.session.waiting
    world.run()
    assert refused(batch, 429, "evicted", "evicted") <= 60
    assert kinds(batch.got).count("immediate_response") == 1
    batch.close()
    world.run(0.02)
    assert routed(chats), "once the detector has had time to see it"
    assert errors(world) == {"ResourceExhausted": 1}, "it is no client that left"
    chats.close()
    assert world.world.inflight == IDLE
    assert world.flow.evictor is not None
    assert (len(world.flow.evictor), world.flow.evictor.confirmed) == (0, 1)


def test_nobody_of_the_same_priority_or_higher_gives_way() -> None:
    world = evicting()
    plain = ask(world, "")
    for objective in ("", "batch"):
        assert ask(world, objective).session.waiting
    assert ask(world, "chat").session.waiting, "what runs is not sheddable"
    world.run(1.0)
    assert not plain.session.answered


def test_the_lowest_goes_first() -> None:
    world = evicting(2)
    batch, worse = ask(world, "batch"), ask(world, "worse")
    chats = ask(world, "chat")
    world.run()
    assert worse.session.answered
    assert not batch.session.answered
    world.run(0.02)
    assert routed(chats)


def test_without_the_setting_nobody_gives_way() -> None:
    world = evicting(on=False)
    batch = ask(world, "batch")
    assert not batch.session.unprompted
    assert ask(world, "chat").session.waiting
    world.run(60.0)
    assert not batch.session.answered


def test_a_response_that_ends_first_is_whole() -> None:
    world = evicting()
    batch = ask(world, "batch")
    chats = ask(world, "chat")
    world.timers.run()  # the pump: it is told to go, its transport has not heard of it
    respond(batch, JSON_ANSWER)
    world.run(0.02)
    assert kinds(batch.got)[-1] == "response_body"
    assert not batch.session.answered
    assert routed(chats)


def test_a_client_that_leaves_first_is_not_answered() -> None:
    world = evicting()
    batch = ask(world, "batch")
    chats = ask(world, "chat")
    world.timers.run()
    batch.close()
    world.run(0.02)
    assert "immediate_response" not in kinds(batch.got)
    assert routed(chats)
    assert errors(world) == {"ClientDisconnected": 1}


@pytest.mark.parametrize("modes", [FULL_DUPLEX, (STREAMED, STREAMED), (BodyMode.BUFFERED, NONE), (NONE, NONE), None])
def test_in_every_mode(modes: Modes) -> None:
    world = evicting()
    batch = ask(world, "batch", modes)
    chats = ask(world, "chat", modes)
    world.run(0.02)
    assert refused(batch, 429, "evicted", "evicted")
    world.run(0.02)
    assert routed(chats)


def test_a_body_that_still_passes_by_is_answered_too() -> None:
    world = evicting()
    upload = Stream(world.world.session())
    upload.send(request_headers(path="/v1/audio/transcriptions", headers={OBJECTIVE: "batch"}), request_body(b"one"))
    world.wait(upload)
    assert ask(world, "chat").session.waiting
    world.run()
    assert refused(upload, 429, "evicted", "evicted")
    assert upload.send(request_body(b"two")) == [], "nothing is said after the answer"


def test_it_may_be_turned_on_and_off_while_requests_run() -> None:
    world = evicting(on=False)
    early = ask(world, "batch")

    def use(*, on: bool) -> None:
        world.world.use(one_each(enableEviction=on))
        world.queueing.follow(world.world.director, PRIORITIES.values())

    use(on=True)
    chats = ask(world, "chat")
    world.run(1.0)
    assert not early.session.answered, "it began while nobody had to give way"
    early.close()
    world.run()
    chats.close()
    late = ask(world, "batch")
    use(on=False)
    assert ask(world, "chat").session.waiting
    world.run(60.0)
    assert not late.session.answered
