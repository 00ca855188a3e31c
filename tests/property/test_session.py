"""Whatever a peer sends, in whatever order and pieces: nothing is lost, doubled or reordered, one decision, nothing left charged."""

from __future__ import annotations

import json

from hypothesis import event as note
from hypothesis import given, settings
from hypothesis import strategies as st

from epp.extproc.messages import (
    BodyMode,
    ContinueBody,
    ContinueHeaders,
    ContinueTrailers,
    Event,
    Immediate,
    Reply,
    RequestBody,
    RequestHeaders,
    RequestTrailers,
    ResponseBody,
    ResponseHeaders,
    ResponseTrailers,
    RouteReply,
    StreamedBody,
    UnknownMessage,
)
from epp.extproc.request_replies import CHUNK_BYTES_MAX
from epp.extproc.session import Session
from tests.builders import PATH, Core, chat, chat_of, core

BODY_BYTES_MAX = 150_000
BUFFERED_BYTES_MAX = 250_000
REFUSALS = {400, 404, 413, 503}
"""What a client may be told here: its own faults, and that the buffers are full. 500 would be a bug of ours."""
HALF_CLOSE = "half-close"
CLOSE = "close"
Step = Event | str


def headers(
    path: str = PATH, *, end_of_stream: bool = False, mode: BodyMode | None = BodyMode.FULL_DUPLEX_STREAMED, bad: str = ""
) -> RequestHeaders:
    made = RequestHeaders({":path": path} if path else {}, end_of_stream=end_of_stream)
    made.request_mode = mode
    made.response_mode = mode
    made.bad_header = bad
    return made


def response_headers(status: int, event_stream: bool, served: str, details: str, end_of_stream: bool) -> ResponseHeaders:
    return ResponseHeaders(status, event_stream=event_stream, served=served, code_details=details, end_of_stream=end_of_stream)


SSE = (
    b'data: {"choices":[{"delta":{"content":"a"}}]}\n\n'
    b'data: {"choices":[],"usage":{"prompt_tokens":5,"completion_tokens":7}}\n\ndata: [DONE]\n\n'
)
BODIES = st.one_of(
    st.text(max_size=50).map(chat),
    st.sampled_from([500, CHUNK_BYTES_MAX - 1, CHUNK_BYTES_MAX, CHUNK_BYTES_MAX + 1, 2 * CHUNK_BYTES_MAX, 140_000, 160_000]).map(chat_of),
    st.lists(st.integers(0, 100_000), max_size=300).map(lambda ids: json.dumps({"model": "m", "prompt": ids, "stream": True}).encode()),
    st.sampled_from([b"", b"{", b"[]", b'{"model":"m"}', b'{"messages":[1]}', b"\xff\xfe", b'{"model":"m","messages":7}']),
    st.binary(max_size=40),
)
RESPONSE_HEADERS = st.builds(
    response_headers,
    st.sampled_from([0, 200, 404, 503]),
    st.booleans(),
    st.sampled_from(["", "10.0.0.1:8000", "10.0.0.2:8000", "10.9.9.9:1"]),
    st.sampled_from(["", "via_upstream", "upstream_reset_before_response_started{connection_failure}"]),
    st.booleans(),
)
RESPONSE_BODY = st.builds(
    ResponseBody, st.sampled_from([b"", SSE, SSE[:30], SSE[30:], b'{"usage":{"prompt_tokens":1}}', b"\0\xff"]), st.booleans()
)
RESPONSE = st.one_of(RESPONSE_HEADERS, RESPONSE_BODY, st.builds(ResponseTrailers))


@st.composite
def cuts(draw: st.DrawFn, body: bytes) -> list[bytes]:
    """`body` in pieces, some of them empty."""
    at = sorted(draw(st.lists(st.integers(0, len(body)), max_size=6)))
    return [body[a:b] for a, b in zip([0, *at], [*at, len(body)], strict=True)]


@st.composite
def full_duplex_flows(draw: st.DrawFn) -> list[Step]:
    """A legal request in full duplex, a legal response, and what a peer may throw in between; cut short anywhere."""
    mode = draw(st.sampled_from([BodyMode.FULL_DUPLEX_STREAMED, None]))
    path = draw(st.sampled_from([PATH, "/v1/completions", "/v1/embeddings", ""]))
    ending = draw(st.sampled_from(["eos", "empty eos", "trailers", HALF_CLOSE, "headers only"]))
    steps: list[Step] = [headers(path, mode=mode, end_of_stream=ending == "headers only")]
    if ending != "headers only":
        parts = draw(cuts(draw(BODIES)))
        steps += [RequestBody(part, False) for part in parts[:-1]]
        steps.append(RequestBody(parts[-1], ending == "eos"))
        if ending == "empty eos":
            steps.append(RequestBody(b"", True))
        elif ending == "trailers":
            steps.append(RequestTrailers())
        elif ending == HALF_CLOSE:
            steps.append(HALF_CLOSE)
    for _ in range(draw(st.integers(0, 3))):  # what may come early, twice, or not be known at all
        extra = draw(st.one_of(st.builds(UnknownMessage), RESPONSE, st.just(headers())))
        steps.insert(draw(st.integers(1, len(steps))), extra)
    if ending in {"eos", "empty eos"} and draw(st.booleans()):
        steps.append(RequestBody(b"once more", draw(st.booleans())))
    if ending != HALF_CLOSE:
        steps.append(draw(RESPONSE_HEADERS))
        steps += draw(st.lists(RESPONSE_BODY, max_size=5))
        steps += draw(st.lists(st.builds(ResponseTrailers), max_size=1))
    return [*steps[: draw(st.integers(0, len(steps)))], CLOSE] if draw(st.booleans()) else [*steps, CLOSE]


ANY_STEP = st.one_of(
    st.builds(
        headers,
        st.sampled_from([PATH, "/v1/models", "/nowhere", ""]),
        end_of_stream=st.booleans(),
        mode=st.sampled_from([*BodyMode, None]),
        bad=st.sampled_from(["", "", "", "x-bad"]),
    ),
    st.builds(RequestBody, BODIES, st.booleans()),
    st.builds(RequestTrailers),
    RESPONSE,
    st.builds(UnknownMessage),
    st.just(HALF_CLOSE),
    st.just(CLOSE),
)


def take(session: Session, step: Step) -> list[Reply]:
    if isinstance(step, Event):
        return session.receive(step)
    if step == HALF_CLOSE:
        return session.half_closed()
    session.closed()
    return []


class FullDuplexPeer:
    """What a gateway in full duplex holds the picker to, message by message: headers, then body, then trailers; whether the body comes
    back as it was sent or all at the end is the picker's choice."""

    def __init__(self) -> None:
        self.asked = False
        self.sent = b""
        self.bodies = 0
        self.ended_by: Step | None = None
        self.answered = False
        self.decisions = 0
        self.echoed = b""
        self.echo_ended = False

    def check(self, step: Step, replies: list[Reply]) -> None:
        if step == CLOSE:
            self.answered = True
            assert replies == []
        elif self.answered:
            assert replies == [], "nothing may follow the end of the stream or an immediate response"
        elif isinstance(step, ResponseHeaders | ResponseBody | ResponseTrailers):
            self.check_response(step, replies)
        elif replies and isinstance(replies[0], Immediate):
            assert len(replies) == 1
            assert not self.decisions, "a routed request can't be refused any more"
            assert replies[0].status in REFUSALS, (replies[0].status, replies[0].body)
            self.answered = True
        else:
            self.check_request(step, replies)

    def check_request(self, step: Step, replies: list[Reply]) -> None:
        first_headers = isinstance(step, RequestHeaders) and not self.asked
        collecting = self.asked and self.ended_by is None
        if isinstance(step, RequestTrailers) and replies and isinstance(replies[-1], ContinueTrailers):
            assert not replies.pop().response
        if not (first_headers or collecting):
            assert replies == [], f"{step!r} makes no sense here and is to be ignored"
            return
        self.asked = True
        if isinstance(step, RequestBody):
            self.sent += step.body
            self.bodies += 1
        if isinstance(step, RequestTrailers) or step == HALF_CLOSE or getattr(step, "end_of_stream", False):
            self.ended_by = step
        for reply in replies:
            self.check_reply(reply)
        if self.ended_by is None:
            assert self.sent.startswith(self.echoed)
            assert not self.echo_ended
            return
        assert self.decisions == 1
        assert self.echoed == self.sent
        assert self.echo_ended == (bool(self.bodies) and not isinstance(step, RequestTrailers))

    def check_reply(self, reply: Reply) -> None:
        if isinstance(reply, RouteReply):
            self.decisions += 1
            assert self.decisions == 1
            assert not reply.in_body
            assert reply.destination
            assert reply.content_length in ({-1} if self.ended_by is None else {len(self.sent) or -1})
            return
        assert isinstance(reply, StreamedBody)
        assert not reply.response
        assert self.decisions == 1, "headers come before the body"
        assert not self.echo_ended, "nothing after the end"
        assert len(reply.body) <= CHUNK_BYTES_MAX
        self.echoed += bytes(reply.body)
        self.echo_ended = reply.end_of_stream

    def check_response(self, step: Event, replies: list[Reply]) -> None:
        (reply,) = replies
        if isinstance(step, ResponseBody):
            assert isinstance(reply, StreamedBody)
            assert reply.response
            assert (bytes(reply.body), reply.end_of_stream) == (step.body, step.end_of_stream)
        else:
            assert isinstance(reply, ContinueHeaders if isinstance(step, ResponseHeaders) else ContinueTrailers)
            assert reply.response


def small_core() -> Core:
    return core(3, body_bytes_max=BODY_BYTES_MAX, buffered_bytes_max=BUFFERED_BYTES_MAX)


def assert_within_bounds(world: Core) -> None:
    requests, tokens, running, held = world.inflight
    assert 0 <= requests <= len(world.sessions)
    assert running == requests
    assert tokens >= 0
    assert 0 <= held <= BUFFERED_BYTES_MAX


@settings(deadline=None, max_examples=300)
@given(full_duplex_flows())
def test_a_full_duplex_flow_is_answered_to_the_letter(steps: list[Step]) -> None:
    world = small_core()
    session = world.session()
    peer = FullDuplexPeer()
    for step in steps:
        peer.check(step, take(session, step))
        assert_within_bounds(world)
        world.clock.advance(0.01)
    note(f"decisions: {peer.decisions}")
    assert peer.decisions <= 1
    assert world.inflight == (0, 0, 0, 0)
    session.closed()
    assert world.inflight == (0, 0, 0, 0)


@settings(deadline=None, max_examples=150)
@given(st.lists(full_duplex_flows(), min_size=2, max_size=4), st.randoms(use_true_random=False))
def test_sessions_side_by_side_do_not_disturb_each_other(flows: list[list[Step]], rng: object) -> None:
    world = small_core()
    running = [(world.session(), FullDuplexPeer(), iter(flow)) for flow in flows]
    while running:
        chosen = rng.choice(running)  # type: ignore[attr-defined]
        session, peer, rest = chosen
        step = next(rest, None)
        if step is None:
            running.remove(chosen)
            continue
        peer.check(step, take(session, step))
        assert_within_bounds(world)
    assert world.inflight == (0, 0, 0, 0)


@settings(deadline=None, max_examples=400)
@given(st.lists(ANY_STEP, max_size=14))
def test_no_sequence_of_messages_escapes_or_leaks(steps: list[Step]) -> None:
    world = small_core()
    session = world.session()
    decisions, mode, closed = 0, BodyMode.FULL_DUPLEX_STREAMED, False
    asked = False
    answered: list[Immediate] = []
    for step in steps:
        if isinstance(step, RequestHeaders) and not asked:
            asked, mode = True, step.request_mode or mode if step.request_mode is not BodyMode.NONE else BodyMode.NONE
        replies = take(session, step)
        assert not (replies and (closed or answered)), "nothing follows the end"
        closed = closed or step == CLOSE
        decisions += sum(isinstance(reply, RouteReply) for reply in replies)
        answered += [reply for reply in replies if isinstance(reply, Immediate)]
        for reply in replies:
            if isinstance(reply, StreamedBody) and not reply.response:
                assert mode is BodyMode.FULL_DUPLEX_STREAMED, "a streamed reply in another mode is spurious"
            if isinstance(reply, ContinueBody) and not reply.response:
                assert mode is not BodyMode.FULL_DUPLEX_STREAMED, "an unstreamed reply in full duplex is spurious"
        assert_within_bounds(world)
    note(f"decisions: {decisions}, answered: {[reply.status for reply in answered]}")
    assert decisions <= 1
    assert len(answered) <= 1
    ours = [reply for reply in answered if reply.details != "epp_gateway_misconfigured"]  # a body before its headers
    assert all(reply.status in REFUSALS for reply in ours), "500 means a bug of ours"
    session.closed()
    assert world.inflight == (0, 0, 0, 0)
    session.closed()
    assert world.inflight == (0, 0, 0, 0)
    assert session.receive(RequestBody(b"late", True)) == []
    assert session.half_closed() == []


@settings(deadline=None, max_examples=150)
@given(
    st.sampled_from([BodyMode.FULL_DUPLEX_STREAMED, None]),
    st.integers(1, 200_000),
    st.lists(st.integers(1, 90_000), min_size=1, max_size=8),
)
def test_a_body_beyond_its_limit_is_one_413_and_holds_nothing(mode: BodyMode | None, size: int, parts: list[int]) -> None:
    world = small_core()
    session = world.session()
    session.receive(headers(mode=mode))
    sent = 0
    replies: list[Reply] = []
    for part in [size, *parts]:
        sent += part
        replies += session.receive(RequestBody(b"x" * part, False))
    statuses = [reply.status for reply in replies if isinstance(reply, Immediate)]
    assert statuses == ([413] if sent > BODY_BYTES_MAX else [])
    assert world.limits.buffered_bytes == (0 if sent > BODY_BYTES_MAX else sent)
    session.closed()
    assert world.inflight == (0, 0, 0, 0)
