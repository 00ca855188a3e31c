"""Flow control on the wire: who waits is answered as if it had not, and each refusal has its status, its reason and its retry-after."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from epp.engines.models import ModelsView
from epp.queueing import SAFE_TTL_S
from tests.builders import (
    FULL_DUPLEX,
    Stream,
    chat,
    core,
    echoed,
    ends,
    kinds,
    request_body,
    request_headers,
    request_trailers,
    response_headers,
    set_headers,
)
from tests.spec.flow_wire import FAIRNESS, OBJECTIVE, REASON, TTL, Queued, queued, refused
from tests.spec.wire import (
    AUDIO,
    BUFFERED,
    IDLE,
    JSON_ANSWER,
    NONE,
    ONE,
    REQUEST_MODES,
    STREAMED,
    TWO,
    Modes,
    answer_of,
    respond,
    routed,
)

# who waits


@pytest.mark.parametrize("modes", REQUEST_MODES, ids=str)
def test_who_waited_is_answered_as_if_it_had_not(modes: Modes) -> None:
    world = queued()
    body = chat("tell me" * 500)
    at_once = world.ask(body, modes=modes)
    assert routed(at_once)
    later = world.ask(body, modes=modes)
    assert later.session.waiting
    before = list(later.got)
    world.run(5.0)
    assert later.got == before, "not a word while it waits"
    respond(at_once, JSON_ANSWER)
    world.run()
    assert later.got == at_once.got[: len(later.got)]
    assert kinds(later.got) == kinds(at_once.got)[: len(later.got)]
    respond(later, JSON_ANSWER)
    assert world.world.inflight == IDLE
    assert world.outcomes == {"Dispatched": 2}


@pytest.mark.parametrize("modes", [FULL_DUPLEX, (BUFFERED, NONE), (STREAMED, NONE), (NONE, NONE), None], ids=str)
def test_requests_without_a_body_wait_too(modes: Modes) -> None:
    world = queued()
    first = world.ask()
    get = Stream(world.world.session())
    get.send(request_headers(path="/v1/models", modes=modes, end_of_stream=True, headers={":method": "GET"}))
    assert get.session.waiting
    world.wait(get)
    first.close()
    world.run()
    assert kinds(get.got) == ["request_headers"]
    get.close()
    assert world.world.inflight == IDLE


def test_a_body_that_passes_by_waits_with_its_request() -> None:
    world = queued()
    first = world.ask()
    upload = Stream(world.world.session())
    upload.send(request_headers(path=AUDIO))
    assert upload.session.waiting, "at once, not after the upload"
    world.wait(upload)
    upload.send(request_body(b"one"), request_body(b"two"))
    assert upload.got == []
    first.close()
    world.run()
    upload.send(request_body(b"three", end_of_stream=True))
    assert kinds(upload.got)[0] == "request_headers"
    assert echoed(upload.got) == b"onetwothree"
    assert ends(upload.got)[-1]
    upload.close()
    assert world.world.inflight == IDLE


def test_priority_is_the_objective_s() -> None:
    world = queued(priorities={"batch": -1, "chat": 5})
    first = world.ask()
    batch, plain, chats = (world.ask(headers=headers) for headers in ({OBJECTIVE: "batch"}, {}, {OBJECTIVE: "chat"}))
    order = []
    for _ in range(3):
        first.close()
        world.run()
        (first,) = [stream for stream in (batch, plain, chats) if kinds(stream.got) and stream not in order]
        order.append(first)
    assert order == [chats, plain, batch], "the sheddable wait as well where flow control is on"


def test_tenants_take_turns() -> None:
    world = queued(defaultPriorityBand={"fairnessPolicyRef": "round-robin-fairness-policy"})
    running = world.ask()
    names = ["a", "a", "a", "b"]
    streams = [world.ask(headers={FAIRNESS: name}) for name in names]
    order = []
    for _ in names:
        running.close()
        world.run()
        (running,) = [stream for stream in streams if kinds(stream.got) and stream not in order]
        order.append(running)
    assert [names[streams.index(stream)] for stream in order] == ["a", "b", "a", "a"]


def test_a_subset_that_is_free_is_not_held_by_one_that_is_full() -> None:
    world = queued(2)
    assert routed(world.ask(subset=[ONE]))
    assert world.ask(subset=[ONE]).session.waiting
    free = world.ask(subset=[TWO])
    assert not free.session.waiting
    assert routed(free)


@pytest.mark.parametrize("leave", [lambda stream: stream.close(), lambda stream: stream.half_close()], ids=["reset", "half-closed"])
def test_a_client_that_leaves_is_out_of_the_queue_at_once(leave: Callable[[Stream], object]) -> None:
    world = queued(defaultPriorityBand={"maxRequests": 1})
    first, waits = world.ask(), world.ask()
    assert world.flow.requests == 1
    leave(waits)
    assert (world.flow.requests, world.flow.size_bytes) == (0, 0)
    assert waits.got == []
    following = world.ask()
    assert following.session.waiting, "its place is free"
    first.close()
    world.run()
    assert routed(following)
    assert world.outcomes == {"Dispatched": 2, "EvictedContextCancelled": 1}


def test_a_client_that_leaves_after_its_turn_came_takes_nobody_s_place() -> None:
    world = queued()
    first, second, third = world.ask(), world.ask(), world.ask()
    first.close()
    world.timers.run()  # the pump: it is the second one's turn, its transport has not heard of it
    assert second.session.waiting
    second.close()
    world.run()
    assert second.got == []
    assert routed(third)
    third.close()
    assert world.world.inflight == IDLE


# who is refused


def test_a_full_queue() -> None:
    world = queued(defaultPriorityBand={"maxRequests": 1})
    world.ask()
    world.ask()
    assert refused(world.ask(), 429, "rejected-saturated", "queue_full") <= 60
    assert world.world.errors("m")["ResourceExhausted"] == 1


def test_retry_after_is_by_the_drain_rate() -> None:
    world = queued(defaultPriorityBand={"maxRequests": 20})
    running = world.ask()
    for _ in range(100):
        waits = world.ask()
        world.run(0.5)
        running.close()
        world.run()
        running = waits
    for _ in range(20):
        world.ask()
    assert 9 <= refused(world.ask(), 429, "rejected-saturated", "queue_full") <= 12, "21 at two a second"


@pytest.mark.parametrize(("name", "written", "after_s"), [(TTL, "2s", 2.0), ("x-gateway-request-ttl", "500ms", 0.5), (TTL, "3", 3.0)])
def test_a_wait_ends_with_the_time_the_request_names(name: str, written: str, after_s: float) -> None:
    world = queued()
    world.ask()
    waits = world.ask(headers={name: written})
    world.run(after_s - 0.01)
    assert waits.got == []
    world.run(0.02)
    refused(waits, 429, "rejected-ttl-expired", "queue_timeout")
    assert world.flow.requests == 0


def test_a_wait_ends_with_the_time_of_the_configuration() -> None:
    world = queued(defaultRequestTTL="7s")
    world.ask()
    waits = world.ask()
    world.run(7.01)
    refused(waits, 429, "rejected-ttl-expired", "queue_timeout")


def test_who_may_not_wait_is_told_so_at_once() -> None:
    world = queued()
    assert routed(world.ask(headers={TTL: "0s"})), "it need not"
    refused(world.ask(headers={TTL: "0s"}), 429, "rejected-ttl-expired", "queue_timeout")


def test_the_engine_does_not_see_how_long_the_client_would_wait() -> None:
    stream = queued().ask(headers={TTL: "30s"})
    assert list(stream.got[0].request_headers.response.header_mutation.remove_headers) == [TTL]


def empty(world: Queued) -> None:
    world.world.datastore.apply([])


def test_an_empty_pool_holds_requests_for_a_time_of_its_own() -> None:
    world = queued(noEndpointRequestTTL="5s")
    specs = [each.spec for each in world.world.datastore.endpoints.values()]
    empty(world)
    gone, served = world.ask(), None
    world.run(3.0)
    served = world.ask()
    world.run(2.1)
    refused(gone, 503, "rejected-no-endpoints", "no_endpoints")
    world.world.datastore.apply(specs)
    world.run()
    assert routed(served)
    assert kinds(served.got) == ["request_headers", "request_body"]
    assert world.outcomes == {"EvictedNoEndpoints": 1, "Dispatched": 1}


def test_an_empty_pool_with_a_full_queue() -> None:
    world = queued(defaultPriorityBand={"maxRequests": 1})
    empty(world)
    world.ask()
    refused(world.ask(), 503, "rejected-no-endpoints", "no_endpoints")
    refused(world.ask(headers={TTL: "0"}), 503, "rejected-no-endpoints", "no_endpoints")


def test_who_fills_the_queue_gives_way() -> None:
    world = queued(defaultPriorityBand={"maxRequests": 2, "fairnessPolicyRef": "round-robin-fairness-policy"})
    world.ask()
    world.ask(headers={FAIRNESS: "flood"})
    flood = world.ask(headers={FAIRNESS: "flood"})
    small = world.ask(headers={FAIRNESS: "small"})
    world.run()
    assert small.session.waiting
    refused(flood, 429, "evicted-queue-pressure", "queue_pressure")


def test_who_had_its_tokens_is_told_when_to_come_back() -> None:
    limit = {"type": "epp.plugins.flow_control.tenants:TokenRateLimit", "name": "limit", "parameters": {"tokens": 1_000, "window": "30s"}}
    world = queued(4, limit)
    long = chat("word " * 600)
    assert routed(world.ask(long, headers={FAIRNESS: "t"}))
    retry_after_s = refused(world.ask(long, headers={FAIRNESS: "t"}), 429, "rejected-rate-limited", "token_rate_exceeded")
    assert retry_after_s in (30, 31)
    assert routed(world.ask(long, headers={FAIRNESS: "other"}))
    world.run(retry_after_s)
    assert routed(world.ask(long, headers={FAIRNESS: "t"}))


def test_a_key_is_a_tenant_and_goes_nowhere(caplog: pytest.LogCaptureFixture) -> None:
    world = queued(2, {"type": "epp.plugins.flow_control.tenants:ApiKeyIdentity", "name": "by-key"})
    with caplog.at_level("DEBUG"):
        streams = [world.ask(headers={"authorization": f"Bearer sk-{key}-secret"}) for key in ("one", "two", "one")]
    names = {key[0] for key in world.flow.counts.series}
    assert len(names) == 2
    assert all(name.startswith("key-") for name in names)
    assert "secret" not in caplog.text + repr(world.flow.counts.series) + repr([stream.got for stream in streams])
    assert not list(streams[0].got[0].request_headers.response.header_mutation.remove_headers), "the engine gets the client's own"


def test_who_comes_while_the_picker_stops() -> None:
    world = queued()
    first, waits = world.ask(), world.ask()
    world.queueing.close("drain")
    refused_at_once = world.ask()
    answer = answer_of(refused_at_once)
    assert (answer.status.code, set_headers(refused_at_once.got[-1])[REASON]) == (503, b"rejected-shutting-down")
    first.close()
    world.run()
    assert routed(waits), "who waits is served"


def test_who_waits_when_the_picker_stops_may_be_refused_at_once() -> None:
    world = queued()
    first, waits = world.ask(), world.ask()
    world.queueing.close("reject")
    world.run()
    answer = answer_of(waits)
    assert (answer.status.code, set_headers(waits.got[-1])[REASON]) == (503, b"rejected-shutting-down")
    first.close()
    assert world.world.inflight == IDLE


# what comes first


@pytest.mark.parametrize(
    ("path", "body", "headers", "status"),
    [
        ("/v1/chat/completions", b"{", {}, 400),
        ("/v1/chat/completions", b'{"messages":[{"role":"user","content":"x"}]}', {}, 400),
        ("/no/such/path", chat(), {}, 404),
        ("/v1/chat/completions", chat(), {TTL: "soon"}, 400),
    ],
    ids=["no JSON", "no model", "no such path", "no time"],
)
def test_what_can_t_be_served_does_not_wait(path: str, body: bytes, headers: dict[str, str], status: int) -> None:
    world = queued()
    world.ask()
    stream = world.ask(body, path=path, headers=headers)
    assert answer_of(stream).status.code == status
    assert REASON not in set_headers(stream.got[-1])
    assert world.flow.requests == 0


def test_a_model_nobody_has_is_not_found_however_full_the_pool_is() -> None:
    world = queued()
    view = ModelsView()
    view.record(world.world.endpoint(1), frozenset({"m"}))
    world.world.director.candidates.models = view
    world.ask()
    assert world.ask().session.waiting
    assert answer_of(world.ask(chat(model="nobody's"))).status.code == 404


def test_a_subset_with_nobody_in_it_is_an_error_and_no_wait() -> None:
    world = queued()
    world.ask()
    assert answer_of(world.ask(subset=["10.9.9.9"])).status.code == 503


def test_trailers_and_responses_while_it_waits_break_nothing() -> None:
    world = queued()
    first = world.ask()
    waits = world.ask(chat("x"))
    waits.send(request_trailers())
    assert waits.session.waiting
    waits.send(response_headers(504))  # the gateway gave up on us
    assert not waits.session.waiting
    assert world.flow.requests == 0
    first.close()
    world.run()
    waits.close()
    assert world.world.inflight == IDLE


# without a word of it in the configuration


def test_in_the_form_on_by_default_nobody_waits_for_a_pool_that_has_room() -> None:
    world = Queued(core(2))
    for _ in range(50):
        stream = world.ask()
        assert routed(stream)
        respond(stream, JSON_ANSWER)
    assert world.outcomes == {"Dispatched": 50}
    assert world.world.inflight == IDLE


def test_in_the_form_on_by_default_a_burst_waits_for_its_turn_and_all_of_it_is_served() -> None:
    world = Queued(core(2))
    streams = [world.ask(chat(f"{number} word " * 5_000)) for number in range(40)]
    waiting = [stream for stream in streams if stream.session.waiting]
    assert 10 < len(waiting) < 40, "10 000 tokens each, and two engines of which nothing is known"
    for _ in range(len(streams)):
        for stream in streams:
            if kinds(stream.got) and not stream.session.answered and stream.session._exchange is not None:
                respond(stream, JSON_ANSWER)
        world.run(0.05)
    assert all(map(routed, streams))
    assert not any(stream.session.waiting for stream in streams)
    assert world.outcomes == {"Dispatched": 40}
    assert world.world.inflight == IDLE


def test_in_the_form_on_by_default_an_empty_pool_is_an_error_at_once() -> None:
    world = Queued(core(0))
    answer = answer_of(world.ask())
    assert answer.status.code == 503


def test_in_the_form_on_by_default_the_sheddable_are_refused_where_others_wait() -> None:
    world = Queued(core(1), priorities={"batch": -1})
    assert routed(world.ask(chat("word " * 50_000)))
    world.world.read(1, waiting=4.0)
    assert world.ask(chat("word " * 50_000)).session.waiting
    retry_after_s = refused(world.ask(headers={OBJECTIVE: "batch"}), 429, "rejected-saturated", "saturated")
    assert retry_after_s == 2, "it and the one that waits, at the one a second that was let through"
    assert world.outcomes == {"Dispatched": 1, "RejectedCapacity": 1}


def test_in_the_form_on_by_default_no_client_waits_longer_than_the_operator_lets_it() -> None:
    world = Queued(core(1))
    assert routed(world.ask(chat("word " * 50_000)))
    world.world.read(1, waiting=4.0)
    waits = world.ask(chat("word " * 50_000), headers={TTL: "3600s"})
    assert waits.session.waiting
    world.world.read(1, waiting=400.0)
    world.run(SAFE_TTL_S + 1.0)
    refused(waits, 429, "rejected-ttl-expired", "queue_timeout")
