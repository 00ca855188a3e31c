"""The reference picker's own table of scenarios (its hermetic suite), run against this one: the same state and the same messages.

Where the answer differs on purpose the test says so. For every routed request: the reference sets back each header of the request
and rewrites its JSON with sorted keys, we change only what we must, so headers do not come back and the body keeps its order.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

import pytest

from epp._pb import epp_ext_proc_pb2 as pb
from epp.errors import NoEndpointsError
from epp.types import Address, EndpointSpec
from tests.builders import (
    DESTINATION,
    Core,
    Stream,
    core,
    echoed,
    ends,
    kinds,
    request_body,
    response_body,
    response_headers,
    set_headers,
)

CONFIG = """
apiVersion: llm-d.ai/v1alpha1
kind: EndpointPickerConfig
plugins: [{type: queue-scorer}, {type: kv-cache-utilization-scorer}, {type: prefix-cache-scorer}, {type: max-score-picker}]
schedulingProfiles:
- name: default
  plugins:
  - {pluginRef: queue-scorer, weight: 1}
  - {pluginRef: kv-cache-utilization-scorer, weight: 1}
  - {pluginRef: prefix-cache-scorer, weight: 1}
  - {pluginRef: max-score-picker}
"""
"""The suite's, but for its scorer of LoRA adapters."""
JSON_ANSWER = b'{"object":"text_completion","model":"m","choices":[{"text":"x"}],"usage":{"prompt_tokens":7,"completion_tokens":10}}'
SUBSET_NAMESPACE = "envoy.lb.subset_hint"


def pods(*states: tuple[float, float]) -> Core:
    """P(n, queue, kv) of the table: pod-n at 192.168.1.(n+1)."""
    specs = [EndpointSpec(name=f"pod-{number}", address=Address(f"192.168.1.{number + 1}", 8000)) for number in range(len(states))]
    world = core(specs, config=CONFIG)
    for number, (queue, kv) in enumerate(states):
        world.read(number, waiting=float(queue), kv_usage=kv)
    return world


def headers(model: str = "", target: str = "", *, end_of_stream: bool = False, subset: list[str] | None = None) -> pb.ProcessingRequest:
    """As the suite sends them: no `:path`, no protocol_config."""
    names = {"hi": "mom", "x-request-id": "test-request-id"}
    names |= {"x-gateway-inference-objective": model} if model else {}
    names |= {"x-gateway-model-name-rewrite": target} if target else {}
    message = pb.ProcessingRequest()
    message.request_headers.end_of_stream = end_of_stream
    for name, value in names.items():
        message.request_headers.headers.headers.add(key=name, raw_value=value.encode())
    if subset is not None:
        fields = message.metadata_context.filter_metadata[SUBSET_NAMESPACE]
        fields.update({f"{DESTINATION}-subset": subset})
    return message


def prompt(model: str, text: str = "test1") -> bytes:
    return json.dumps({"max_tokens": 100, "model": model, "prompt": text, "temperature": 0}).encode()


def assert_routed(stream: Stream, endpoint: str, body: Mapping[str, object]) -> None:
    route, *rest = stream.got
    assert set_headers(route)[DESTINATION] == f"{endpoint}:8000".encode()
    assert route.dynamic_metadata["envoy.lb"][DESTINATION] == f"{endpoint}:8000"
    assert kinds(rest) == ["request_body"]
    assert ends(rest) == [True]
    text = echoed(rest)
    assert json.loads(text) == body
    assert list(json.loads(text)) == list(body), "the order of the keys is the client's"
    assert set_headers(route)["content-length"] == b"%d" % len(text)
    assert "hi" not in set_headers(route), "only what changed is set"


def sent(world: Core, model: str, target: str, *, subset: list[str] | None = None) -> Stream:
    stream = Stream(world.session())
    stream.send(headers(model, target, subset=subset), request_body(prompt(model), end_of_stream=True))
    return stream


def told(model: str) -> dict[str, object]:
    return {"max_tokens": 100, "model": model, "prompt": "test1", "temperature": 0}


def test_case_1_the_lower_queue_and_cache_use_are_selected() -> None:
    world = pods((3, 0.2), (0, 0.1), (10, 0.2))
    stream = sent(world, "my-model", "my-model-12345")
    assert_routed(stream, "192.168.1.2", told("my-model-12345"))
    assert world.metrics.series("my-model", "my-model-12345").requests == 1
    assert b"inference_pool_ready_pods{" in world.metrics.exposition()[0]
    ready = [line for line in world.metrics.exposition()[0].decode().splitlines() if line.startswith("inference_pool_ready_pods{")]
    assert all(float(line.rsplit(" ", 1)[1]) == 3 for line in ready)


def test_case_4_a_body_that_is_not_json_is_passed_through() -> None:
    """The reference needs its passthrough parser for this; here a body without a path that is no JSON object is passed on."""
    world = pods((3, 0.2), (0, 0.1), (10, 0.2))
    stream = Stream(world.session())
    stream.send(headers("my-model"), request_body(b"passthrough-parser", end_of_stream=True))
    assert set_headers(stream.got[0])[DESTINATION] == b"192.168.1.2:8000"
    assert echoed(stream.got) == b"passthrough-parser"
    assert world.metrics.series("", "").requests == 1


def test_case_5_nobody_is_shed_though_every_endpoint_is_loaded() -> None:
    """The case's own choice of endpoint rests on its LoRA adapters; without them the emptier cache wins over the shorter queue."""
    world = pods((6, 0.2), (0, 0.85), (10, 0.9))
    stream = sent(world, "sql-lora", "sql-lora-1fdg3")
    assert_routed(stream, "192.168.1.2" if 1.0 + 0.15 > 0.4 + 0.8 else "192.168.1.1", told("sql-lora-1fdg3"))


def test_case_6_a_chat_body_that_is_not_json_is_a_400() -> None:
    """The reference answers in plain text with Go's message; we in OpenAI's JSON. It takes a request without a path for a completion,
    we look at the body, which here says nothing (case 4): so the path is given."""
    message = headers("sql-lora")
    message.request_headers.headers.headers.add(key=":path", raw_value=b"/v1/completions")
    stream = Stream(pods((0, 0.2)).session())
    (reply,) = stream.send(message, request_body(b"no healthy upstream", end_of_stream=True))
    assert reply.immediate_response.status.code == 400
    error = json.loads(reply.immediate_response.body)["error"]
    assert error["message"].startswith("the request body is not valid JSON")


def test_case_7_a_body_in_two_chunks_is_put_together() -> None:
    world = pods((4, 0.2), (4, 0.85), (4, 0.9))
    body = prompt("sql-lora-sheddable")
    stream = Stream(world.session())
    stream.send(headers("sql-lora-sheddable", "sql-lora-1fdg3"), request_body(body[:30]))
    assert stream.got == []
    stream.send(request_body(body[30:], end_of_stream=True))
    assert_routed(stream, "192.168.1.1", told("sql-lora-1fdg3"))


def test_case_8_a_get_with_no_pods_is_a_503() -> None:
    """The reference answers 500; the protocol's own document says 503, as for any request nobody can take."""
    message = headers(end_of_stream=True)
    message.request_headers.headers.headers.add(key=":path", raw_value=b"/v1/models")
    (reply,) = Stream(core(0).session()).send(message)
    assert reply.immediate_response.status.code == NoEndpointsError.http_status == 503


def test_case_9_a_missing_model_is_a_400_even_with_no_pods() -> None:
    stream = Stream(core(0).session())
    (reply,) = stream.send(headers(), request_body(b'{"prompt":"hello world"}', end_of_stream=True))
    assert reply.immediate_response.status.code == 400
    assert json.loads(reply.immediate_response.body)["error"]["message"] == "model not found in request body"


@pytest.mark.parametrize(
    ("subset", "endpoint"),
    [
        (["192.168.1.1:8000", "192.168.1.2:8000", "192.168.1.3:8000"], "192.168.1.2"),
        (["192.168.1.3:8000"], "192.168.1.3"),
    ],
    ids=["case 10: the best of three", "case 11: only one, loaded as it is"],
)
def test_cases_10_and_11_the_pick_stays_inside_the_subset(subset: list[str], endpoint: str) -> None:
    world = pods((0, 0.2), (0, 0.1), (10, 0.2))
    assert_routed(sent(world, "sql-lora", "sql-lora-1fdg2", subset=subset), endpoint, told("sql-lora-1fdg2"))


def test_case_12_a_subset_without_any_of_our_pods_is_a_503_with_its_reason() -> None:
    stream = sent(pods((0, 0.2), (0, 0.1)), "sql-lora", "sql-lora-1fdg2", subset=["192.168.1.99:8000"])
    (reply,) = stream.got
    assert reply.immediate_response.status.code == 503
    message = json.loads(reply.immediate_response.body)["error"]["message"]
    assert message.startswith("failed to find endpoint candidates for serving the request")
    assert set_headers(reply)["x-llm-d-request-dropped-reason"] == b"rejected-no-endpoints"


def test_case_13_a_model_nobody_declared_is_routed_in_two_chunks() -> None:
    world = pods((4, 0.2), (4, 0.85), (4, 0.9))
    body = prompt("direct-model")
    stream = Stream(world.session())
    stream.send(headers("direct-model", "direct-model"), request_body(body[:50]), request_body(body[50:], end_of_stream=True))
    assert_routed(stream, "192.168.1.1", told("direct-model"))
    assert world.metrics.series("direct-model", "direct-model").requests == 1


def test_case_15_a_get_is_answered_with_an_endpoint() -> None:
    """The suite asserts no response here. The reference picks at random among all pods; we pick by load."""
    world = pods((3, 0.2), (0, 0.1), (10, 0.2))
    stream = Stream(world.session())
    (reply,) = stream.send(headers(end_of_stream=True))
    assert set_headers(reply)[DESTINATION] == b"192.168.1.2:8000"


@pytest.mark.parametrize(
    "chunks",
    [
        [(JSON_ANSWER[:40], False), (JSON_ANSWER[40:], True)],
        [(b"no healthy upstream", True)],
        [(JSON_ANSWER, False), (b"", True)],
    ],
    ids=["case 16: in several chunks", "case 17: not JSON", "case 18: an empty last chunk"],
)
def test_cases_16_to_18_a_response_alone_passes_chunk_by_chunk(chunks: list[tuple[bytes, bool]]) -> None:
    """The reference joins the chunks of an answer that does not stream and sets `x-went-into-resp-headers`; we hold nothing back and
    set no header: the bytes are the same, each chunk is echoed with its own end."""
    stream = Stream(pods((0, 0.2)).session())
    (reply,) = stream.send(response_headers())
    assert reply == pb.ProcessingResponse(response_headers=pb.HeadersResponse())
    for body, end in chunks:
        (reply,) = stream.send(response_body(body, end_of_stream=end))
        assert (echoed([reply], "response_body"), ends([reply], "response_body")) == (body, [end])


EVENTS = [b"data: {}\n\n", b'data: {"usage":{"prompt_tokens":7,"total_tokens":17,"completion_tokens":10}}\n\ndata: [DONE]\n\n', b""]


def test_case_19_the_events_of_a_stream_are_echoed_and_their_tokens_counted() -> None:
    """In the reference's case the response comes without a request and is counted for a model without a name. A response whose request
    we did not route (another filter's, Envoy's own) says nothing of our pool: it is echoed, and counted with its request only."""
    world = pods((0, 0.2))
    alone, whole = Stream(world.session()), sent(world, "m", "m")
    for stream in (alone, whole):
        stream.send(response_headers(content_type="text/event-stream"))
        for number, body in enumerate(EVENTS):
            (reply,) = stream.send(response_body(body, end_of_stream=number == 2))
            assert (echoed([reply], "response_body"), ends([reply], "response_body")) == (body, [number == 2])
    assert world.metrics.series("m", "m").input_tokens.sum == 7
    assert world.metrics.series("", "").input_tokens.count == 0
