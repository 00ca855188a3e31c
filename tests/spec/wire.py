"""What the tests of plugins on the wire have in common: configurations, requests in every body mode, what came back."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from google.protobuf import json_format

from epp._pb import epp_ext_proc_pb2 as pb
from epp.extproc.messages import BodyMode
from tests.builders import (
    DESTINATION,
    FULL_DUPLEX,
    Core,
    Stream,
    chat,
    kinds,
    request_body,
    request_headers,
    response_body,
    response_headers,
    set_headers,
)

NONE, STREAMED, BUFFERED, PARTIAL, FULL = (
    BodyMode.NONE,
    BodyMode.STREAMED,
    BodyMode.BUFFERED,
    BodyMode.BUFFERED_PARTIAL,
    BodyMode.FULL_DUPLEX_STREAMED,
)
Modes = tuple[BodyMode, BodyMode] | None
AUDIO = "/v1/audio/transcriptions"
"""A path whose bodies pass by."""
IDLE = (0, 0, 0, 0)
ONE, TWO, THREE = "10.0.0.1:8000", "10.0.0.2:8000", "10.0.0.3:8000"

REQUEST_MODES = [FULL_DUPLEX, (FULL, NONE), (BUFFERED, NONE), (PARTIAL, NONE), (STREAMED, STREAMED), (STREAMED, NONE), (NONE, NONE), None]


def configuration(*plugins: Mapping[str, Any], profiles: Sequence[Mapping[str, Any]] = (), **more: object) -> str:
    document = {"apiVersion": "llm-d.ai/v1alpha1", "kind": "EndpointPickerConfig", "plugins": plugins, **more}
    return json.dumps({**document, "schedulingProfiles": profiles} if profiles else document)


def profile(name: str, **weights: float) -> dict[str, Any]:
    return {"name": name, "plugins": [{"pluginRef": ref, "weight": weight} for ref, weight in weights.items()]}


def request(
    world: Core,
    body: bytes | None = None,
    *,
    modes: Modes = FULL_DUPLEX,
    headers: Mapping[str, str] | None = None,
    path: str = "/v1/chat/completions",
    subset: Sequence[str] | None = None,
) -> Stream:
    """A POST up to its routing, as the gateway of that mode sends it."""
    hint = None if subset is None else {"envoy.lb.subset_hint": {f"{DESTINATION}-subset": list(subset)}}
    stream = Stream(world.session())
    stream.send(request_headers(path=path, modes=modes, headers=headers, body_unasked=modes == (STREAMED, STREAMED), filter_metadata=hint))
    if modes is None or modes[0] is not NONE:
        stream.send(request_body(chat() if body is None else body, end_of_stream=True))
    return stream


def told(replies: Sequence[pb.ProcessingResponse]) -> list[dict[str, Any]]:
    """The dynamic metadata of those replies that have any."""
    return [json_format.MessageToDict(reply.dynamic_metadata) for reply in replies if reply.HasField("dynamic_metadata")]


def answer_of(stream: Stream) -> pb.ImmediateResponse:
    assert stream.got[-1].WhichOneof("response") == "immediate_response", kinds(stream.got)
    return stream.got[-1].immediate_response


def routed(stream: Stream) -> bool:
    return "immediate_response" not in kinds(stream.got)


SSE_ANSWER = (
    b'data: {"choices":[{"delta":{"content":"usage: 9"}}],"usage":null}\n\n'
    b'data: {"choices":[],"usage":{"prompt_tokens":7,"completion_tokens":1}}\n\n'
    b'data: {"choices":[],"usage":{"prompt_tokens":7,"total_tokens":10,"completion_tokens":3}}\n\n'
    b"data: [DONE]\n\n"
)
JSON_ANSWER = b'{"id":"1","choices":[{"message":{"content":"the \\"usage\\" of it"}}],"usage":{"prompt_tokens":7,"completion_tokens":3}}'


def respond(stream: Stream, *parts: bytes, content_type: str = "application/json", status: int = 200) -> list[pb.ProcessingResponse]:
    """A response in these pieces, the last one ends it."""
    replies = stream.send(response_headers(status, content_type=content_type))
    for number, part in enumerate(parts, 1):
        replies += stream.send(response_body(part, end_of_stream=number == len(parts)))
    return replies


def failures(caplog: pytest.LogCaptureFixture) -> list[tuple[str, str]]:
    """Logger and cause of everything that was logged as a warning or worse."""
    return [(r.name, str(r.exc_info[1]) if r.exc_info else "") for r in caplog.records if r.levelno >= logging.WARNING]


LONG = "conversation " * 300


def not_available(stream: Stream) -> bool:
    """Answered 412, in the client's words; anything else than that or a routed request fails."""
    if routed(stream):
        return False
    answer = answer_of(stream)
    assert (answer.status.code, json.loads(answer.body)["error"]["code"]) == (412, "prefix_not_cached")
    assert set_headers(stream.got[-1]) == {"content-type": b"application/json"}, "nothing to wait for: no retry-after"
    return True


IF_AVAILABLE = {"prefer": "if-available"}
