"""A third party's hooks that fail, or say what can't be sent: the request goes on, the log says it."""

from __future__ import annotations

import asyncio
import json
import math
import random
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import grpc
import grpc.aio
import pytest

from epp._pb import epp_ext_proc_pb2 as pb
from epp.errors import EppError
from epp.plugins.base import Finished, Outcome, Plugin, RunProfile
from epp.types import Decision, Endpoint, LLMRequest, Usage
from tests.builders import (
    DESTINATION,
    FULL_DUPLEX,
    Core,
    Stream,
    chat,
    core,
    destination_of,
    echoed,
    kinds,
    pieces,
    request_body,
    request_headers,
    response_body,
    response_headers,
    set_headers,
)
from tests.integration.test_transports import PROCESS, TRANSPORTS, WAIT_S, channel_to, eventually, serving
from tests.spec.wire import (
    BUFFERED,
    FULL,
    IDLE,
    JSON_ANSWER,
    ONE,
    REQUEST_MODES,
    SSE_ANSWER,
    STREAMED,
    TWO,
    Modes,
    answer_of,
    configuration,
    failures,
    request,
    respond,
    told,
)


class Listens(Plugin):
    """Has every hook of a request, and fails in those it is told to."""

    type: ClassVar[str] = "listens"
    roles: ClassVar[tuple[str, ...]] = ("reporter",)

    fails: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self.__dict__["heard"] = []

    @property
    def heard(self) -> list[str]:
        heard: list[str] = self.__dict__["heard"]
        return heard

    def _hear(self, hook: str) -> None:
        self.heard.append(hook)
        if hook in self.fails:
            raise RuntimeError(f"{hook} of a third party")

    def picked(self, request: LLMRequest, decision: Decision) -> None:
        self._hear("picked")

    def served(self, request: LLMRequest, endpoint: Endpoint) -> None:
        self._hear("served")

    def response_headers(self, request: LLMRequest, endpoint: Endpoint) -> Mapping[str, str] | None:
        self._hear("response_headers")
        return {f"x-{self.name}": endpoint.destination}

    def first_token(self, request: LLMRequest, endpoint: Endpoint, ttft_s: float) -> None:
        self._hear("first_token")

    def report(self, usage: Usage) -> tuple[str, str, float] | None:
        self._hear("report")
        return "envoy.lb", self.name, 5.0

    def finished(self, request: LLMRequest, endpoint: Endpoint, outcome: Finished) -> None:
        self._hear("finished")


class Returns(Plugin):
    """Answers as it is told to."""

    type: ClassVar[str] = "returns"
    roles: ClassVar[tuple[str, ...]] = ("reporter",)

    def response_headers(self, request: LLMRequest, endpoint: Endpoint) -> Any:
        return self.__dict__.get("headers")

    def report(self, usage: Usage) -> Any:
        return self.__dict__.get("report_")


IN_ORDER = ["picked", "served", "response_headers", "first_token", "finished", "report"]
LOGGERS = {hook: "epp.decision" if hook == "picked" else "epp.exchange" for hook in IN_ORDER}


def listening(*fails: str) -> Core:
    """Two endpoints; three plugins that listen, of which the middle one fails."""
    plugins = [
        {"name": name, "type": f"{__name__}:Listens", "parameters": {"fails": list(fails) if name == "second" else []}}
        for name in ("first", "second", "third")
    ]
    return core(2, config=configuration({"type": "queue-scorer"}, *plugins))


def play(world: Core, modes: Modes) -> Stream:
    """A request that the gateway sent elsewhere, and its streamed answer, whole."""
    stream = request(world, chat(stream=True), modes=modes)
    ours = told(stream.got)[0]["envoy.lb"][DESTINATION]
    stream.send(response_headers(content_type="text/event-stream", served=TWO if ours == ONE else ONE))
    for piece in [SSE_ANSWER] if modes is not None and modes[1] is BUFFERED else [*pieces(SSE_ANSWER, 50), b""]:
        stream.send(response_body(piece, end_of_stream=not piece or piece is SSE_ANSWER))
    stream.close()
    return stream


@pytest.mark.parametrize("modes", [FULL_DUPLEX, (FULL, STREAMED), (BUFFERED, BUFFERED), (STREAMED, STREAMED), None], ids=str)
@pytest.mark.parametrize("fails", [*([hook] for hook in IN_ORDER), IN_ORDER, []], ids=" ".join)
def test_a_hook_that_fails_costs_its_request_nothing(fails: list[str], modes: Modes, caplog: pytest.LogCaptureFixture) -> None:
    world, fine = listening(*fails), listening()
    got, expected = play(world, modes).got, play(fine, modes).got
    for reply in expected:  # but for what the failed hook itself would have said
        if reply.HasField("response_headers") and "response_headers" in fails:
            options = reply.response_headers.response.header_mutation.set_headers
            kept = [option for option in options if option.header.key != "x-second"]
            del options[:]
            options.extend(kept)
        if reply.HasField("response_body") and reply.HasField("dynamic_metadata") and "report" in fails:
            reply.dynamic_metadata.fields["envoy.lb"].struct_value.fields.pop("second")
    assert got == expected
    told_last = {"first": 5.0, "third": 5.0, **({} if "report" in fails else {"second": 5.0})}
    assert told(got)[1:] == [{"envoy.lb": told_last}]
    assert failures(caplog) == [(LOGGERS[hook], f"{hook} of a third party") for hook in IN_ORDER if hook in fails]
    for name in ("first", "second", "third"):
        plugin = world.built.plugins[name]
        assert isinstance(plugin, Listens)
        assert plugin.heard == IN_ORDER, name
    assert world.inflight == IDLE
    assert world.errors("m") == {}
    assert world.metrics.series("m", "m").duration_s.count == 1
    assert world.metrics.series("m", "m").output_tokens.count == 1


@pytest.mark.parametrize("after", [0, 1, 2])
def test_a_hook_that_fails_as_its_client_leaves_keeps_nothing_charged(after: int, caplog: pytest.LogCaptureFixture) -> None:
    world = listening(*IN_ORDER)
    stream = request(world)
    stream.send(*[response_headers(), response_body(b"{")][:after])
    stream.close()
    assert world.inflight == IDLE
    assert world.errors("m") == {"ClientDisconnected": 1}
    hooks = ["picked", *["response_headers", "first_token"][:after], "finished"]
    assert failures(caplog) == [(LOGGERS[hook], f"{hook} of a third party") for hook in hooks]


def test_a_failing_hook_is_logged_for_every_request_it_fails(caplog: pytest.LogCaptureFixture) -> None:
    world = listening("report")
    for _ in range(3):
        assert told(respond(request(world), JSON_ANSWER)) == [{"envoy.lb": {"first": 5.0, "third": 5.0}}]
    assert failures(caplog) == [("epp.exchange", "report of a third party")] * 3


def returning(**answers: Any) -> Core:
    plugins = [{"name": "odd", "type": f"{__name__}:Returns"}, {"name": "after", "type": f"{__name__}:Listens"}]
    world = core(config=configuration({"type": "queue-scorer"}, *plugins))
    world.built.plugins["odd"].__dict__.update(answers)
    return world


FINE = {"envoy.lb": {"after": 5.0}}


@pytest.mark.parametrize(
    "report",
    [("ns", "name"), ("ns", "name", "many"), ("ns", "name", None), ("ns", "name", [1]), ("ns", "name", 10**400), 7, (), {}],
    ids=str,
)
def test_a_report_that_is_none_is_left_out_and_logged(report: object, caplog: pytest.LogCaptureFixture) -> None:
    assert told(respond(request(returning(report_=report)), JSON_ANSWER)) == [FINE]
    assert [name for name, _ in failures(caplog)] == ["epp.exchange"]


@pytest.mark.parametrize(
    ("report", "value"),
    [(("ns", "n", 3), 3.0), (("ns", "n", True), 1.0), (("ns", "n", 0), 0.0), (("ns", "n", 2**60 + 1), 2.0**60), (None, None)],
)
def test_a_report_is_a_number(report: object, value: float | None, caplog: pytest.LogCaptureFixture) -> None:
    expected = FINE if value is None else {**FINE, "ns": {"n": value}}
    assert told(respond(request(returning(report_=report)), JSON_ANSWER)) == [expected]
    assert failures(caplog) == []


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_report_that_is_no_finite_number_is_left_out(value: float) -> None:
    replies = respond(request(returning(report_=("ns", "n", value))), JSON_ANSWER)
    assert [dict(reply.dynamic_metadata).keys() for reply in replies[-1:]] == [{"envoy.lb"}]


@pytest.mark.parametrize("headers", [["x-a"], "x-a: b", 7, [("x-a", "b")]], ids=str)
def test_response_headers_that_are_none_are_left_out_and_logged(headers: object, caplog: pytest.LogCaptureFixture) -> None:
    world = returning(headers=headers)
    stream = request(world)
    (reply,) = stream.send(response_headers())
    assert set_headers(reply) == {"x-after": ONE.encode()}
    assert [name for name, _ in failures(caplog)] == ["epp.exchange"]
    assert told(stream.send(response_body(JSON_ANSWER, end_of_stream=True))) == [FINE]
    assert world.inflight == IDLE


@pytest.mark.parametrize("headers", [None, {}, {"x-a": "ü", "x-b": "", "x-c": 1}], ids=str)
def test_response_headers_are_texts(headers: dict[str, object] | None, caplog: pytest.LogCaptureFixture) -> None:
    (reply,) = request(returning(headers=headers)).send(response_headers())
    assert set_headers(reply) == {"x-after": ONE.encode(), **{name: str(value).encode() for name, value in (headers or {}).items()}}
    assert failures(caplog) == []


HALF = b"\xff".decode("utf-8", "surrogateescape")
"""Text that UTF-8 can't say, as `surrogateescape` makes it of bytes that were none."""


@pytest.mark.parametrize(
    "answers",
    [{"headers": {"x-a": HALF}}, {"headers": {HALF: "b"}}, {"report_": (HALF, "n", 1.0)}, {"report_": ("ns", HALF, 1.0)}],
    ids=["value", "name", "namespace", "key"],
)
def test_text_of_a_plugins_that_is_no_utf8_costs_its_request_nothing(answers: dict[str, object]) -> None:
    world = returning(**answers)
    stream = request(world)
    (reply,) = stream.send(response_headers())
    assert set_headers(reply)["x-after"] == ONE.encode()
    replies = stream.send(response_body(JSON_ANSWER, end_of_stream=True))
    assert echoed(replies, "response_body") == JSON_ANSWER
    assert told(replies)[0]["envoy.lb"] == FINE["envoy.lb"]
    assert world.inflight == IDLE


UNSENDABLE = {
    "a line": {"x-a": "b\r\nx-c: d"},
    "a return": {"x-a": "b\rc"},
    "a NUL": {"x-a": "b\0"},
    "a DEL": {"x-a": "\x7f"},
    "half a character": {"x-a": HALF},
    "half a character in the name": {HALF: "b"},
    "no name": {"": "b"},
    "a blank in the name": {"x a": "b"},
    "a line in the name": {"x-a\n": "b"},
    "letters beyond ASCII in the name": {"x-ü": "b"},
    "a pseudo-header": {":status": "200"},
    "a length": {"Content-Length": "3"},
    "a framing": {"transfer-encoding": "chunked"},
}
"""Headers for which Envoy answers the client with a 500, or which break the response for it."""
SENDABLE = {"x-a": "b\tc ü\xa0€", "X-Upper": "B", "x-empty": "", "x-number": 7, "x!#$%&'*+.^_`|~": '"'}
SENT = {"x-a": "b\tc ü\xa0€".encode(), "x-upper": b"B", "x-empty": b"", "x-number": b"7", "x!#$%&'*+.^_`|~": b'"'}


@pytest.mark.parametrize("headers", UNSENDABLE.values(), ids=UNSENDABLE)
def test_response_headers_that_can_not_be_sent_are_left_out_and_logged(headers: dict[str, str], caplog: pytest.LogCaptureFixture) -> None:
    stream = request(returning(headers={**headers, "x-fine": "1"}))
    (reply,) = stream.send(response_headers())
    assert set_headers(reply) == {"x-fine": b"1", "x-after": ONE.encode()}
    assert failures(caplog) == [("epp.exchange", "")]


def test_any_other_response_header_is_sent(caplog: pytest.LogCaptureFixture) -> None:
    (reply,) = request(returning(headers=SENDABLE)).send(response_headers())
    assert set_headers(reply) == {**SENT, "x-after": ONE.encode()}
    assert failures(caplog) == []


class Handles(Plugin):
    """A third party's profile handler: says what it is told to."""

    type: ClassVar[str] = "handles"
    own_headers: ClassVar[tuple[str, ...]] = ("x-mine", "x-a")

    def check(self, profiles: Sequence[str]) -> None:
        """It works with any."""

    def schedule(self, request: LLMRequest, run: RunProfile, profiles: Sequence[str]) -> Outcome:
        says = self.__dict__
        return Outcome(profiles[0], run(profiles[0]), headers=says.get("headers", {}), instead=says.get("instead", ""))


def handled(**says: Any) -> Core:
    world = core(config=configuration({"type": f"{__name__}:Handles", "name": "handler"}, {"type": "queue-scorer"}))
    world.built.plugins["handler"].__dict__.update(says)
    return world


def only_ours(reply: pb.ProcessingResponse) -> dict[str, bytes]:
    """The request headers a routing reply sets beside its own."""
    return {name: value for name, value in set_headers(reply).items() if name not in {DESTINATION, "content-length", "x-request-id"}}


@pytest.mark.parametrize("modes", REQUEST_MODES, ids=str)
@pytest.mark.parametrize("headers", UNSENDABLE.values(), ids=UNSENDABLE)
def test_a_handlers_headers_that_can_not_be_sent_are_left_out_and_logged(
    headers: dict[str, str], modes: Modes, caplog: pytest.LogCaptureFixture
) -> None:
    """A decode worker that is not told of its prefill worker does that part itself: less is lost than with the request."""
    world = handled(headers={**headers, "x-mine": "1"})
    stream = request(world, modes=modes, headers={"x-a": "the client's", "x-mine": "the client's too"})
    (route,) = [reply for reply in stream.got if reply.HasField("dynamic_metadata")]
    assert only_ours(route) == {"x-mine": b"1"}
    mutation = getattr(route, route.WhichOneof("response") or "").response.header_mutation
    assert list(mutation.remove_headers) == ["x-a"], "what only a handler may set is no client's to set in its place"
    assert set_headers(route)[DESTINATION] == ONE.encode()
    assert failures(caplog) == [("epp.exchange", "")]
    stream.close()
    assert world.inflight == IDLE


def test_any_other_header_of_a_handlers_is_sent(caplog: pytest.LogCaptureFixture) -> None:
    for headers, sent in ((SENDABLE, SENT), ({"x-mine": "1"}, {"x-mine": b"1"})):
        assert only_ours(request(handled(headers=headers)).got[0]) == sent
    assert failures(caplog) == []


@pytest.mark.parametrize("instead", [HALF, "10.0.0.1:8000\r\nx-a: b", "10.0.0.1:8000\0", 7], ids=ascii)
def test_a_request_whose_handler_names_a_destination_that_is_none_is_refused(instead: object, caplog: pytest.LogCaptureFixture) -> None:
    """No other place is known to be where the handler wanted it."""
    world = handled(instead=instead)
    stream = request(world)
    answer = answer_of(stream)
    assert (answer.status.code, json.loads(answer.body)["error"]["message"]) == (500, "internal error in the endpoint picker")
    assert [name for name, _ in failures(caplog)] == ["epp.decision"]
    assert (world.inflight, world.errors("m")) == (IDLE, {"Internal": 1})
    assert told(request(handled(instead="10.0.0.1:9000")).got) == [{"envoy.lb": {DESTINATION: "10.0.0.1:9000"}}]


class OddError(EppError):
    """A third party's own."""

    http_status = 429
    code_name = "Odd"


class UnsayableError(OddError):
    dropped_reason = HALF


class Refuses(Plugin):
    """Turns away who asks for it, in words of its own."""

    type: ClassVar[str] = "refuses"

    def admit(self, request: LLMRequest, candidates: Sequence[Endpoint]) -> None:
        if "x-odd" in request.headers:
            raise OddError(f"half {HALF} a character")
        if "x-unsayable" in request.headers:
            raise UnsayableError("no")


REFUSING = configuration({"type": f"{__name__}:Refuses"}, {"type": "queue-scorer"})


def test_a_refusal_in_a_plugins_words_is_an_answer_whatever_they_are() -> None:
    world = core(config=REFUSING)
    answer = answer_of(request(world, headers={"x-odd": "1"}))
    assert (answer.status.code, json.loads(answer.body)["error"]["message"]) == (429, "half ? a character")
    assert (world.inflight, world.errors("m")) == (IDLE, {"Odd": 1})


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_a_reply_that_can_not_be_written_ends_its_own_call_and_no_other(transport: str, caplog: pytest.LogCaptureFixture) -> None:
    world = core(config=REFUSING)
    async with serving(transport, world) as server, channel_to(server) as channel, asyncio.timeout(WAIT_S):
        process = channel.stream_stream(PROCESS)
        fine, refused = process(), process()
        await fine.write(request_headers().SerializeToString())
        await fine.write(request_body(chat(), end_of_stream=True).SerializeToString())
        route = pb.ProcessingResponse.FromString(await fine.read())
        assert destination_of(route) == ONE
        get = request_headers(path="/v1/models", end_of_stream=True, headers={":method": "GET", "x-unsayable": "1"})
        await refused.write(get.SerializeToString())
        with pytest.raises(grpc.aio.AioRpcError):
            await refused.read()
        assert await refused.code() in {grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN}
        await fine.write(response_headers(end_of_stream=True).SerializeToString())
        assert kinds([pb.ProcessingResponse.FromString(await fine.read()) for _ in range(2)]) == ["request_body", "response_headers"]
        await fine.done_writing()
        assert await fine.read() is grpc.aio.EOF
        assert await fine.code() is grpc.StatusCode.OK
        await eventually(lambda: world.inflight == IDLE, "everything given back")
    if transport == "h2":
        assert [name for name, _ in failures(caplog)] == ["epp.h2"]


def test_failing_hooks_change_no_decision() -> None:
    world, fine = listening(*IN_ORDER), listening()
    rng = random.Random(5)
    for _ in range(50):
        prompt = f"{rng.randrange(5)} " * 300
        asked = [request(each, chat(prompt)) for each in (world, fine)]
        assert destination_of(asked[0].got[0]) == destination_of(asked[1].got[0])
        if rng.random() < 0.5:
            for stream in asked:
                respond(stream, JSON_ANSWER)
