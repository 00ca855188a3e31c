"""What bytes from outside may reach, as functions of one input: they return, or raise what is a bug.

`session`: ext_proc messages, valid, mutated or noise, into one Session. `request`: a request body and a response's text into every
reader of them. `connection`: HTTP/2 frames, well-formed or not, into one H2Connection. The pool they share is the real one, renewed
now and then; after each input nothing may be charged or held.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

import hpack
import msgspec
from hyperframe import frame as frames

from epp._pb import epp_ext_proc_pb2 as pb
from epp.errors import BadRequestError, NotFoundError
from epp.extproc import codec
from epp.extproc.grpc_frames import framed
from epp.extproc.h2 import H2Connection
from epp.extproc.h2_policy import H2Limits, Shared
from epp.extproc.health import Health
from epp.extproc.messages import BodyMode, Event, Immediate, Reply
from epp.extproc.server import HEALTH_CHECK, HEALTH_LIST
from epp.extproc.session import Session
from epp.parsing.media import REQUEST_TOKENS_MAX
from epp.parsing.model_name import ModelRestorer
from epp.parsing.routes import Routes
from epp.parsing.usage import JsonUsage, SseUsage
from epp.types import LLMRequest
from tests.builders import (
    FULL_DUPLEX,
    PATH,
    Core,
    core,
    request_body,
    request_headers,
    request_trailers,
    response_body,
    response_headers,
    response_trailers,
)

WORLD_INPUTS = 20_000
"""A pool serves so many inputs: then what it has learnt of them is thrown away."""
HEAVY_INPUTS = 500
"""How often the checks that cost as much as an input are made."""


class _Loud(logging.Handler):
    """An error that is logged and answered as a 500, or swallowed so that the client has its response, is a bug all the same."""

    def emit(self, record: logging.LogRecord) -> None:
        raise AssertionError(record.getMessage()) from (record.exc_info[1] if record.exc_info else None)


_log = logging.getLogger("epp")


class loud:  # noqa: N801 - reads as a verb
    """While it lasts, whatever the picker logs as an error is raised."""

    def __enter__(self) -> None:
        self._handler = _Loud(logging.ERROR)
        _log.addHandler(self._handler)

    def __exit__(self, *_: object) -> None:
        _log.removeHandler(self._handler)


class _World:
    """The pool all inputs share."""

    def __init__(self) -> None:
        self.inputs = 0
        self._core: Core | None = None

    def next(self) -> Core:
        if self._core is None or self.inputs % WORLD_INPUTS == 0:
            self._core = core(3, body_bytes_max=1 << 20, buffered_bytes_max=1 << 21)
            self._core.limits.header_count_max = 50
        self.inputs += 1
        return self._core

    def check(self) -> None:
        world = self._core
        assert world is not None
        world.sessions.clear()
        assert world.limits.buffered_bytes == 0
        for each in world.datastore.endpoints.values():
            assert (each.inflight_requests, each.inflight_tokens) == (0, 0)
        if self.inputs % HEAVY_INPUTS == 0:
            assert world.inflight == (0, 0, 0, 0)
            world.metrics.exposition()


_world = _World()


# ext_proc messages


def _named(path: str, **headers: str) -> pb.ProcessingRequest:
    return request_headers(path=path, headers={name.replace("_", "-"): value for name, value in headers.items()})


_OPENINGS = [
    request_headers(modes=modes, path=path, body_unasked=unasked)
    for modes in (FULL_DUPLEX, None, *[(mode, mode) for mode in BodyMode])
    for path in (PATH, "/v1/completions", "/v1/embeddings", "")
    for unasked in (False, True)
] + [_named(PATH, x_gateway_model_name_rewrite="t"), _named(PATH, upgrade="websocket"), _named("/nowhere")]
_OPENING_EVENTS = [codec.decode(message.SerializeToString()) for message in _OPENINGS]
_PLAIN_EVENTS = [
    codec.decode(message.SerializeToString())
    for message in (
        request_trailers(),
        response_trailers(),
        response_headers(),
        response_headers(content_type="text/event-stream", served="10.0.0.2:8000"),
        response_headers(503, code_details="upstream_reset_before_response_started{connection_failure}"),
        response_headers(end_of_stream=True),
    )
]
_BODIES: list[Callable[[bytes], pb.ProcessingRequest]] = [
    request_body,
    lambda payload: request_body(payload, end_of_stream=True),
    response_body,
    lambda payload: response_body(payload, end_of_stream=True),
]
RAW, OPENING, BODY, PLAIN, HALF_CLOSE, WAIT = range(6)
"""Kinds of step in an input of `session`: one byte, one more to choose with, two of length, the payload."""
STEPS_MAX = 40


def session(data: bytes) -> None:
    """See the module."""
    world = _world.next()
    made = Session(world.director, world.limits, world.clock)
    answered = False
    try:
        for kind, choice, payload in _steps(data):
            for reply in _step(made, world, kind, choice, payload):
                assert not answered, "nothing follows an immediate response"
                answered = answered or _is_answer(reply)
                pb.ProcessingResponse.FromString(codec.encode(reply))
            world.clock.advance(0.001)
    except codec.MalformedMessageError:
        pass
    made.closed()
    assert made.half_closed() == []
    made.closed()
    _world.check()


def _steps(data: bytes) -> list[tuple[int, int, bytes]]:
    steps, at = [], 0
    while len(data) - at >= 4 and len(steps) < STEPS_MAX:
        end = at + 4 + int.from_bytes(data[at + 2 : at + 4], "little")
        steps.append((data[at] % 6, data[at + 1], data[at + 4 : end]))
        at = end
    return steps


def step(kind: int, choice: int = 0, payload: bytes = b"") -> bytes:
    """One step of an input of `session` or `connection`."""
    return bytes([kind, choice]) + len(payload).to_bytes(2, "little") + payload


def _step(made: Session, world: Core, kind: int, choice: int, payload: bytes) -> list[Reply]:
    if kind == HALF_CLOSE:
        return made.half_closed()
    if kind == WAIT:
        world.clock.advance(choice)
        return made.expire(world.clock.now_s())
    event: Event
    if kind == RAW:
        event = codec.decode(payload)
    elif kind == OPENING:
        event = _OPENING_EVENTS[choice % len(_OPENING_EVENTS)]
    elif kind == PLAIN:
        event = _PLAIN_EVENTS[choice % len(_PLAIN_EVENTS)]
    else:
        event = codec.decode(_BODIES[choice % len(_BODIES)](payload).SerializeToString())
    return made.receive(event)


def _is_answer(reply: Reply) -> bool:
    if isinstance(reply, Immediate):
        assert reply.status != 500 or reply.details == "epp_gateway_misconfigured", reply.body
        return True
    return False


# Request bodies and responses

_routes = Routes.default(unknown_paths_ok=False)
_PATHS = (
    PATH, "/v1/completions", "", "/v1/embeddings", "/nowhere", "/v1/responses", "/v1/conversations", "/v1/images/generations", "/v1/messages",
    "/generate", "/inference/v1/generate", "/vllm.grpc.engine.VllmEngine/Generate", "/vllm.grpc.engine.VllmEngine/Embed",
    "/google.cloud.aiplatform.v1.PredictionService/ChatCompletions", "/google.cloud.aiplatform.v1.PredictionService/RawPredict",
)  # fmt: skip


class _Named(msgspec.Struct):
    model: msgspec.Raw
    """The last one counts where a body has several, of whatever types: so do the engines' decoders."""


_decode_named = msgspec.json.Decoder(_Named).decode


def request(data: bytes) -> None:
    """The first byte is the path's number, and where a response is cut; the rest the body."""
    head, body = data[0] if data else 0, data[1:]
    read = LLMRequest(id="r", path=_PATHS[head % len(_PATHS)], headers={})
    try:
        parser = _routes.parse(read, body)
    except (BadRequestError, NotFoundError):
        return
    finally:
        _respond(head, body)
    if parser is not None:
        for event_stream in (False, True):
            usage = parser.usage(event_stream=event_stream)
            if usage is not None:
                usage.feed(body[:head])
                usage.feed(body[head:])
                usage.finish()
    assert 0 <= read.prompt_tokens <= len(body) + (2 * REQUEST_TOKENS_MAX if read.media or b"embeds" in body else 0)
    changed = parser.with_model(body, "t") if read.model and parser is not None else None
    if changed is not None:
        assert msgspec.json.decode(_decode_named(changed).model) == "t"


def _respond(cut: int, body: bytes) -> None:
    restorer = ModelRestorer("t", "mine")
    restored = b""
    for usage in (SseUsage(), JsonUsage()):
        for part in (body[:cut], body[cut:]):
            usage.feed(part)
        found = usage.finish()
        assert found is None or all(-1 <= count <= 1 << 53 for count in found)
    for number, part in enumerate((body[:cut], body[cut:])):
        restored += restorer.feed(part, last=number == 1)
    if b'"model' not in body:
        assert restored == body


# HTTP/2


class Wire(asyncio.Transport):
    """The connection's way out: what it writes is kept, closing is remembered."""

    def __init__(self) -> None:
        super().__init__()
        self.written = b""
        self.closed = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.written = bytes(data)

    def close(self) -> None:
        self.closed = True

    def abort(self) -> None:
        self.closed = True

    def is_closing(self) -> bool:
        return self.closed


_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frames.SettingsFrame(0).serialize()
_health = Health()
_health.ready = True
_BLOCKS = [
    hpack.Encoder().encode(
        [(":method", "POST"), (":scheme", "http"), (":path", path), (":authority", "x"), ("content-type", "application/grpc")]
    )
    for path in ("/envoy.service.ext_proc.v3.ExternalProcessor/Process", "/grpc.health.v1.Health/Check", "/a/b")
]
FRAME, OPEN, MESSAGE, RESET, BYTES, EVENT = range(6)
"""Kinds of step in an input of `connection`; `choice` holds stream and flags."""


def connection(data: bytes) -> None:
    """See the module. The first byte says whether a preface comes by itself, and how much of the input is one read."""
    world = _world.next()
    shared = Shared(
        limits=H2Limits(message_bytes_max=1 << 16, stream_window_bytes=1 << 17, stream_queued_bytes_max=1 << 12, queued_bytes_max=1 << 14),
        session_limits=world.limits,
        clock=world.clock,
        new_session=lambda _authority: Session(world.director, world.limits, world.clock),
        unary={HEALTH_CHECK: _health.check, HEALTH_LIST: _health.list},
    )
    made = H2Connection(shared)
    wire = Wire()
    made.connection_made(wire)
    head, data = data[0] if data else 0, data[1:]
    pending = b"" if head & 1 else _PREFACE
    for kind, choice, payload in _steps(data):
        if kind == EVENT:
            _read(made, wire, pending)
            pending = b""
            _happens(made, wire, world, choice)
        else:
            pending += _frame(kind, choice, payload)
            if head & 2:
                _read(made, wire, pending)
                pending = b""
    _read(made, wire, pending)
    made.connection_lost(None)
    assert not shared.connections
    assert shared.open_streams == 0
    _world.check()


def _read(made: H2Connection, wire: Wire, data: bytes) -> None:
    if data and not wire.closed:
        made.get_buffer(-1)[: len(data)] = data
        made.buffer_updated(len(data))


def _happens(made: H2Connection, wire: Wire, world: Core, choice: int) -> None:
    if wire.closed:
        return
    if choice & 3 == 0:
        made.pause_writing()
    elif choice & 3 == 1:
        made.resume_writing()
    elif choice & 3 == 2:
        world.clock.advance(choice)
        made.check_alive(world.clock.now_s())
    else:
        made.announce_shutdown()


def _frame(kind: int, choice: int, payload: bytes) -> bytes:
    stream_id = (choice & 7) * 2 + 1
    ends = choice >> 3 & 1
    if kind == FRAME and len(payload) >= 5:  # anything, but of the length it says
        return len(payload[5:]).to_bytes(3, "big") + payload
    if kind == OPEN:
        block = _BLOCKS[choice >> 4 & 3 if choice >> 4 & 3 < 3 else 0]
        return len(block).to_bytes(3, "big") + bytes([1, 4 | ends]) + stream_id.to_bytes(4, "big") + block
    if kind == MESSAGE:
        if choice >> 4 & 3 == 1:
            payload = framed(payload)
        elif choice >> 4 & 3 == 2:
            payload = framed(_OPENINGS[choice % 16].SerializeToString()) + framed(
                request_body(payload, end_of_stream=True).SerializeToString()
            )
        return len(payload).to_bytes(3, "big") + bytes([0, ends]) + stream_id.to_bytes(4, "big") + payload
    if kind == RESET:
        return b"\0\0\4\3\0" + stream_id.to_bytes(4, "big") + b"\0\0\0\x08"
    return payload


TARGETS: dict[str, Callable[[bytes], None]] = {"session": session, "request": request, "connection": connection}
