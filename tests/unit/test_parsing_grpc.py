"""gRPC bodies against an independent encoder: messages of vLLM's and Vertex AI's services built by the protobuf runtime."""

from __future__ import annotations

import itertools
import json
from array import array
from typing import Any

import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from hypothesis import given, settings
from hypothesis import strategies as st

from epp.errors import BadRequestError
from epp.parsing.base import OUTPUT_TOKENS_MAX
from epp.parsing.vertexai import VertexAIParser
from epp.parsing.vllm_grpc import VllmGrpcParser
from epp.parsing.wire import FIELDS_MAX, FRAME_BYTES_MAX, TOKENS_MAX, Frames, fields, packed, unframed
from epp.plugins.base import Parser, UsageReader
from epp.types import LLMRequest, Usage

MESSAGES = {
    "TokenizedInput": [("original_text", 1, "string"), ("input_ids", 2, "*uint32")],
    "UnpackedInput": [("input_ids", 2, "-uint32")],
    "SamplingParams": [("temperature", 1, "float"), ("stop", 10, "*string"), ("max_tokens", 8, "uint32"), ("seed", 24, "int32")],
    "PlaceholderRange": [("offset", 1, "uint32"), ("length", 2, "uint32")],
    "MultimodalInputs": [("pixels", 2, "bytes"), ("mm_placeholders", 5, "*PlaceholderRange"), ("mm_hashes", 6, "*string")],
    "GenerateRequest": [
        ("request_id", 1, "string"),
        ("tokenized", 2, "TokenizedInput"),
        ("text", 3, "string"),
        ("sampling_params", 4, "SamplingParams"),
        ("stream", 5, "bool"),
        ("mm_inputs", 7, "MultimodalInputs"),
        ("rank", 9, "int32"),
        ("fixed", 20, "fixed64"),
        ("fixed4", 21, "fixed32"),
    ],
    "EmbedRequest": [("request_id", 1, "string"), ("tokenized", 2, "TokenizedInput")],
    "Chunk": [
        ("token_ids", 1, "*uint32"),
        ("prompt_tokens", 2, "uint32"),
        ("completion_tokens", 3, "uint32"),
        ("cached_tokens", 4, "uint32"),
    ],
    "Complete": [
        ("output_ids", 1, "*uint32"),
        ("finish_reason", 2, "string"),
        ("prompt_tokens", 3, "uint32"),
        ("completion_tokens", 4, "uint32"),
        ("cached_tokens", 5, "uint32"),
        ("index", 8, "uint32"),
    ],
    "GenerateResponse": [("chunk", 1, "Chunk"), ("complete", 2, "Complete")],
    "EmbedResponse": [("embedding", 1, "*float"), ("prompt_tokens", 2, "uint32"), ("embedding_dim", 3, "uint32")],
    "HttpBody": [("content_type", 1, "string"), ("data", 2, "bytes")],
    "PredictRequest": [("endpoint", 1, "string"), ("http_body", 2, "HttpBody")],
}


def _classes() -> dict[str, Any]:
    file = descriptor_pb2.FileDescriptorProto(name="t.proto", package="t", syntax="proto3")
    for name, listed in MESSAGES.items():
        message = file.message_type.add(name=name)
        for field_name, number, type_ in listed:
            field = message.field.add(name=field_name, number=number, label=3 if type_[0] in "*-" else 1)
            type_ = type_.lstrip("*-")  # noqa: PLW2901 - what is left of it
            if type_ in MESSAGES:
                field.type, field.type_name = 11, f".t.{type_}"
            else:
                field.type = descriptor_pb2.FieldDescriptorProto.Type.Value(f"TYPE_{type_.upper()}")
            if listed is MESSAGES["UnpackedInput"]:
                field.options.packed = False
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"t.{name}")) for name in MESSAGES}


pb = _classes()


def framed(message: Any, *, flag: int = 0) -> bytes:
    data = message if isinstance(message, bytes) else message.SerializeToString()
    return bytes([flag]) + len(data).to_bytes(4, "big") + data


def parse(body: bytes, kind: str = "generate") -> LLMRequest:
    request = LLMRequest(id="r", path="", headers={})
    VllmGrpcParser().parse(request, body, kind)
    return request


def generate(**values: Any) -> LLMRequest:
    return parse(framed(pb["GenerateRequest"](**values)))


IDS = [0, 1, 127, 128, 16_383, 16_384, 151_643, 2**21, 2**28, 2**32 - 1]


def test_generate_with_token_ids() -> None:
    request = generate(
        request_id="x", tokenized={"original_text": "hi", "input_ids": IDS}, sampling_params={"temperature": 0.5, "max_tokens": 9, "stop": ["a"]},
        stream=True, rank=-1, fixed=7, fixed4=8,
    )  # fmt: skip
    assert (request.prompt, request.prompt_tokens) == (array("I", IDS).tobytes(), len(IDS))
    assert (request.model, request.max_output_tokens, request.stream, request.media) == ("", 9, True, 0)
    assert isinstance(VllmGrpcParser(), Parser)
    assert not VllmGrpcParser.model_required
    assert VllmGrpcParser().with_model(b"x", "m") is None


def test_generate_with_text() -> None:
    request = generate(text="hi thére")
    assert (request.prompt, request.prompt_tokens, request.stream, request.max_output_tokens) == ("hi thére".encode(), 3, False, None)
    assert parse(framed(b"\x1a\0")).prompt_tokens == 0  # there, but empty


def test_ids_need_not_be_packed() -> None:
    unpacked = pb["UnpackedInput"](input_ids=IDS).SerializeToString()
    packed_too = pb["TokenizedInput"](input_ids=[5, 6]).SerializeToString()
    body = framed(b"\x12" + bytes([len(unpacked + packed_too)]) + unpacked + packed_too)
    assert parse(body).prompt == array("I", [*IDS, 5, 6]).tobytes()


def test_embed() -> None:
    request = parse(framed(pb["EmbedRequest"](tokenized={"input_ids": [1, 2, 3]})), "embed")
    assert (request.prompt, request.prompt_tokens) == (array("I", [1, 2, 3]).tobytes(), 3)
    with pytest.raises(BadRequestError, match="no input"):
        parse(framed(pb["GenerateRequest"](text="x")), "embed")


def test_pictures() -> None:
    def request(*hashes: str) -> LLMRequest:
        places = [{"offset": 1, "length": 2}, {"offset": 4, "length": 1}]
        return generate(
            tokenized={"input_ids": [1, 9, 9, 2, 9]}, mm_inputs={"pixels": b"x" * 100, "mm_placeholders": places, "mm_hashes": hashes}
        )

    assert request("a", "b").media == 2
    assert len({bytes(request(*hashes).prompt) for hashes in (("a", "b"), ("b", "a"), ("a",), ())}) == 4
    assert request("a", "b").prompt_tokens == 5


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\0\0\0\0",
        framed(b""),
        framed(b"\x0a\x01x"),
        framed(pb["GenerateRequest"](text="x"), flag=1),
        framed(pb["GenerateRequest"](text="x"))[:-1],
        b"\0\xff\xff\xff\xff\x1a\x01x",
        framed(b"\x1a\x05x"),
        framed(b"\x1a"),
        framed(b"\x80" * 20),
        framed(b"\x1b\x01"),
        framed(b"\x1f"),
        framed(b"\x19\0\0"),
        framed(b"\x1d\0\0"),
        framed(b"\x28\x01" * (FIELDS_MAX + 1)),
        framed(b"\x12\x03\x12\x01\xff"),
        framed(b"\x12\x0e\x12\x0c" + b"\xff" * 11 + b"\x01"),
    ],
    ids=lambda body: repr(body[:20]),
)
def test_what_is_malformed_is_the_clients_fault(body: bytes) -> None:
    with pytest.raises(BadRequestError) as caught:
        parse(body)
    assert caught.value.message


def test_a_compressed_message_says_so() -> None:
    with pytest.raises(BadRequestError, match="compressed"):
        parse(framed(b"x", flag=1))


def test_a_longer_prompt_than_is_hashed_is_counted_whole() -> None:
    count = TOKENS_MAX + 1_000
    request = parse(framed(pb["EmbedRequest"](tokenized={"input_ids": [2**31] * count})), "embed")
    assert request.prompt_tokens == count
    assert len(request.prompt) == 4 * TOKENS_MAX


def test_an_answer_may_be_as_long_as_anyone_asks() -> None:
    assert parse(framed(b"\x1a\x01x" + b"\x22\x0b\x40" + b"\xff" * 9 + b"\x01")).max_output_tokens == OUTPUT_TOKENS_MAX


def test_of_a_number_of_more_than_32_bits_the_lower_ones_count() -> None:
    assert packed(b"\xff" * 9 + b"\x01" + b"\x05") == (array("I", [2**32 - 1, 5]), 2)
    for data in (b"\xff" * 11 + b"\x01", b"\x01" + b"\xff" * 3_000_000 + b"\x01", b"\x80"):
        with pytest.raises(BadRequestError, match="does not end"):
            packed(data)


@settings(deadline=None, max_examples=200)
@given(st.lists(st.integers(0, 2**32 - 1), max_size=50))
def test_packed_numbers(numbers: list[int]) -> None:
    data = pb["TokenizedInput"](input_ids=numbers).SerializeToString()
    found = [packed(value) for number, _, _, value in fields(data) if number == 2]
    assert found == ([(array("I", numbers), len(numbers))] if numbers else [])


@settings(deadline=None, max_examples=500)
@given(st.binary(max_size=200))
def test_any_bytes_are_fields_or_refused(data: bytes) -> None:
    try:
        total = sum(len(value) for _, _, _, value in fields(data))
    except BadRequestError:
        return
    assert total <= len(data)


@settings(deadline=None, max_examples=300)
@given(st.lists(st.tuples(st.sampled_from([0, 0, 0, 1]), st.binary(max_size=20)), max_size=8), st.lists(st.integers(0, 300), max_size=8))
def test_frames_cut_anywhere(messages: list[tuple[int, bytes]], cuts: list[int]) -> None:
    text = b"".join(framed(data, flag=flag) for flag, data in messages)
    at = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    frames = Frames()
    found = [message for a, b in itertools.pairwise(at) for message in frames.feed(text[a:b])]
    assert found == [data for flag, data in messages if not flag]


@pytest.mark.parametrize("size", [1_000, 65_536, 1 << 30])
def test_a_message_too_long_to_keep_is_skipped(size: int) -> None:
    text = framed(b"a") + framed(b"x" * (FRAME_BYTES_MAX + 1)) + framed(b"y" * FRAME_BYTES_MAX) + framed(b"b")
    frames = Frames()
    found = [message[:1] for at in range(0, len(text), size) for message in frames.feed(text[at : at + size])]
    assert found == [b"a", b"y", b"b"]
    assert frames.feed(framed(b"x" * (FRAME_BYTES_MAX + 1))[:-1]) == []
    assert len(frames._held) == 0


def test_a_request_has_one_message_and_what_comes_after_it_is_left_aside() -> None:
    assert bytes(unframed(framed(b"abc") + b"rest")) == b"abc"


def read(reader: UsageReader | None, text: bytes, size: int = 1 << 30) -> Usage | None:
    assert reader is not None
    for at in range(0, len(text), size):
        reader.feed(text[at : at + size])
    return reader.finish()


def chunk(**values: Any) -> bytes:
    return framed(pb["GenerateResponse"](chunk=values))


def complete(**values: Any) -> bytes:
    return framed(pb["GenerateResponse"](complete=values))


COUNTS = {"prompt_tokens": 300, "completion_tokens": 4, "cached_tokens": 256}


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (chunk(token_ids=[1]) + chunk(token_ids=[2], **COUNTS), Usage(300, 4, 256)),
        (
            chunk(token_ids=[1], prompt_tokens=300, completion_tokens=1) + complete(output_ids=[1, 2], finish_reason="stop", **COUNTS),
            Usage(300, 4, 256),
        ),
        (complete(**COUNTS), Usage(300, 4, 256)),
        (chunk(**COUNTS) + complete(finish_reason="abort"), Usage(300, 4, 256)),
        (chunk(**COUNTS) + complete(**COUNTS)[:-3], Usage(300, 4, 256)),
        (chunk(**COUNTS) + framed(b"\xff\xff"), Usage(300, 4, 256)),
        (complete(completion_tokens=4), Usage(0, 4, 0)),
        (framed(pb["EmbedResponse"](embedding=[0.5] * 100, prompt_tokens=7, embedding_dim=100)), Usage(7, -1, -1)),
        (chunk(token_ids=[1]), None),
        (framed(b""), None),
        (b"", None),
        (b"<html>not found</html>", None),
    ],
)
def test_usage_of_vllm(text: bytes, found: Usage | None) -> None:
    for size in (1, 2, 3, 5, 8, 13, 1 << 30):
        assert read(VllmGrpcParser().usage(event_stream=False), text, size) == found


def test_usage_of_a_long_stream() -> None:
    text = b"".join(chunk(token_ids=[n], prompt_tokens=9, completion_tokens=n) for n in range(2_000)) + complete(**COUNTS)
    assert read(VllmGrpcParser().usage(event_stream=False), text, 4_096) == Usage(300, 4, 256)


# Vertex AI


def vertex(data: bytes, kind: str = "chat") -> LLMRequest:
    request = LLMRequest(id="r", path="", headers={})
    body = pb["PredictRequest"](endpoint="projects/p", http_body={"content_type": "application/json", "data": data})
    VertexAIParser().parse(request, framed(body), kind)
    return request


def test_vertex_carries_openai_bodies() -> None:
    request = vertex(b'{"model":"m","messages":[{"role":"user","content":"hi"}],"max_tokens":3,"stream":true}')
    assert (request.model, request.max_output_tokens, request.stream) == ("m", 3, True)
    assert request.prompt == b'[{"role":"user","content":"hi"}'
    assert isinstance(VertexAIParser(), Parser)
    assert VertexAIParser().with_model(b"x", "m") is None


@pytest.mark.parametrize(
    ("data", "prompt"),
    [
        (b'{"model":"m","input":"hi"}', b'[{"role":"user","content":"hi"}'),
        (b'{"messages":["hi"]}', b'["hi"'),
        (b' {"prompt":"hi"}', b"hi"),
        (b'{"instances":[1]}', b""),
        (b"", b""),
        (b"\xff\xfe", b""),
        (b"[1]", b""),
    ],
)
def test_a_raw_prediction_may_be_anything(data: bytes, prompt: bytes) -> None:
    assert vertex(data, "raw").prompt == prompt


@pytest.mark.parametrize("kind", ["chat", "raw"])
@pytest.mark.parametrize(
    "body", [b"", b"x", framed(b""), framed(b"\x0a\x01x"), framed(b"\x12\x05x"), framed(b"\x12\x02\x12\x05"), framed(b"x", flag=1)]
)
def test_without_an_http_body_it_is_the_clients_fault(body: bytes, kind: str) -> None:
    with pytest.raises(BadRequestError):
        VertexAIParser().parse(LLMRequest(id="r", path="", headers={}), body, kind)


@pytest.mark.parametrize("data", [b"", b"{", b"{}", b"[]", b'{"messages":[]}'])
def test_a_chat_must_be_one(data: bytes) -> None:
    with pytest.raises(BadRequestError):
        vertex(data)


def http(data: bytes) -> bytes:
    return framed(pb["HttpBody"](content_type="text/x", data=data))


ANSWER = json.dumps({"choices": [{"text": "x"}], "usage": {"prompt_tokens": 3, "completion_tokens": 4}}).encode()
EVENTS = b'data: {"choices":[]}\n\ndata: ' + ANSWER + b"\n\ndata: [DONE]\n\n"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (http(ANSWER), Usage(3, 4, -1)),
        (http(b"") + http(b"\n ") + http(ANSWER[:10]) + http(ANSWER[10:]), Usage(3, 4, -1)),
        (http(EVENTS), Usage(3, 4, -1)),
        (b"".join(http(EVENTS[at : at + 7]) for at in range(0, len(EVENTS), 7)), Usage(3, 4, -1)),
        (framed(b"\xff\xff") + http(ANSWER), Usage(3, 4, -1)),
        (http(b"not json"), None),
        (b"", None),
        (b"\0", None),
    ],
)
def test_usage_of_vertex(text: bytes, found: Usage | None) -> None:
    for size in (1, 2, 3, 5, 8, 13, 1 << 30):
        assert read(VertexAIParser().usage(event_stream=False), text, size) == found
