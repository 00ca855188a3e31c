"""The engines' own HTTP APIs: vLLM's and SGLang's generate, and the parser that reads nothing."""

from __future__ import annotations

import itertools
import json
import struct
from array import array
from base64 import b64encode

import pytest

from epp.errors import BadRequestError
from epp.parsing.base import set_prompt
from epp.parsing.passthrough import PassthroughParser
from epp.parsing.sglang_http import SglangHttpParser
from epp.parsing.vllm_http import VllmHttpParser
from epp.plugins.base import Parser
from epp.types import TOKEN_IDS, LLMRequest, Usage

PNG = b64encode(b"\x89PNG\r\n\x1a\n" + struct.pack(">I4sII5B", 13, b"IHDR", 64, 64, 8, 2, 0, 0, 0) + b"\0" * 300).decode()


def ids(*tokens: int) -> bytes:
    return array("I", tokens).tobytes()


def vllm(body: bytes) -> LLMRequest:
    request = LLMRequest(id="r", path="", headers={})
    VllmHttpParser().parse(request, body, "generate")
    return request


def test_vllm_generate() -> None:
    request = vllm(b'{"token_ids":[1,2,3],"sampling_params":{"max_tokens":7,"n":1},"model":"m","stream":true,"cache_salt":"s"}')
    assert (request.model, request.max_output_tokens, request.stream, request.cache_salt) == ("m", 7, True, "s")
    assert (request.prompt, request.prompt_tokens, request.media) == (ids(1, 2, 3), 3, 0)
    assert isinstance(VllmHttpParser(), Parser)
    assert not VllmHttpParser.model_required


@pytest.mark.parametrize(
    "body",
    [b"", b"[]", b"{", b"{}", b'{"token_ids":[]}', b'{"token_ids":null}', b'{"token_ids":"x"}', b'{"token_ids":[1.5]}', b'{"token_ids":[-1]}',
     b'{"token_ids":[4294967296]}', b'{"token_ids":[' + b"9" * 5000 + b"]}", b'{"token_ids":[[1]]}', b'{"token_ids":[1],"model":7}'],
    ids=lambda body: repr(body[:30]),
)  # fmt: skip
def test_vllm_generate_must_have_token_ids(body: bytes) -> None:
    with pytest.raises(BadRequestError):
        vllm(body)


def test_a_refusal_is_counted_under_the_model_asked_for() -> None:
    request = LLMRequest(id="r", path="", headers={})
    with pytest.raises(BadRequestError):
        VllmHttpParser().parse(request, b'{"model":"m","token_ids":[]}', "generate")
    assert request.model == "m"


@pytest.mark.parametrize(
    "rest", ['"sampling_params":7', '"sampling_params":{"max_tokens":"x"}', '"sampling_params":null', '"features":[1]', '"features":null']
)
def test_what_else_is_odd_in_it_is_the_engines_business(rest: str) -> None:
    request = vllm(f'{{"token_ids":[1],{rest}}}'.encode())
    assert (request.prompt_tokens, request.max_output_tokens, request.media) == (1, None, 0)


def test_pictures_in_token_ids_are_told_apart_by_their_hashes() -> None:
    def prompt(*hashes: str) -> LLMRequest:
        places = [{"offset": 1, "length": 2}, {"offset": 4, "length": 1}]
        features = {"mm_hashes": {"image": list(hashes)}, "mm_placeholders": {"image": places}, "kwargs_data": None}
        return vllm(json.dumps({"token_ids": [1, 9, 9, 2, 9], "features": features}).encode())

    assert prompt("a", "b").media == 2
    assert prompt("a", "b").prompt == prompt("a", "b").prompt
    assert len({bytes(prompt(*hashes).prompt) for hashes in (("a", "b"), ("b", "a"), ("a", "c"), ("a",), ())}) == 5
    one, other = array("I", bytes(prompt("a", "b").prompt)), array("I", bytes(prompt("a", "c").prompt))
    assert one[:4] == other[:4]
    assert (one[0], one[3], len(one)) == (1, 2, 5)


def sglang(body: bytes | dict[str, object], headers: dict[str, str] | None = None) -> LLMRequest:
    request = LLMRequest(id="r", path="", headers=headers or {})
    SglangHttpParser().parse(request, body if isinstance(body, bytes) else json.dumps(body).encode(), "generate")
    return request


def test_sglang_generate() -> None:
    request = sglang(b'{"input_ids":[1,2],"sampling_params":{"max_new_tokens":7},"stream":true,"extra_key":"s"}')
    assert (request.prompt, request.prompt_tokens) == (ids(1, 2), 2)
    assert (request.model, request.max_output_tokens, request.stream, request.cache_salt) == ("", 7, True, "s")
    assert isinstance(SglangHttpParser(), Parser)
    assert not SglangHttpParser.model_required
    assert sglang(b'{"text":"hi there"}').prompt == b"hi there"
    assert sglang(b'{"text":["hi there"],"input_ids":null}').prompt == b"hi there"
    assert sglang(b'{"input_ids":[[1,2],[3]]}').prompt == ids(1, 2, 3)


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b"null", b"\xff", b'{"text":' + b"[" * 100_000])
def test_what_is_no_json_object_is_the_clients_fault(body: bytes) -> None:
    with pytest.raises(BadRequestError):
        sglang(body)


@pytest.mark.parametrize(
    "body",
    [
        {"inputs": "hi", "parameters": {}},  # TGI
        {"text_input": "hi"},  # Triton
        {"input_ids": {"x": 1}, "model": 7, "stream": "yes", "extra_key": ["s"], "sampling_params": [{"max_new_tokens": 1}]},
        {"sampling_params": {"max_new_tokens": -1}},
        {},
    ],
)
def test_what_is_not_sglangs_is_routed_by_load(body: dict[str, object]) -> None:
    request = sglang(body)
    assert (request.model, request.prompt_tokens, request.stream, request.cache_salt, request.max_output_tokens) == ("", 0, False, "", None)


@pytest.mark.parametrize(
    ("fields", "tokens", "media"),
    [
        ({"image_data": PNG}, 4, 1),
        ({"image_data": [f"data:image/png;base64,{PNG}", {"url": PNG}]}, 8, 2),
        ({"image_data": [[PNG, PNG], [PNG]]}, 8, 2),
        ({"image_data": "https://example.com/a.png", "audio_data": ["A" * 40]}, 235, 2),
        ({"video_data": ["https://example.com/v.mp4"]}, 4500, 1),
        ({"image_data": None, "video_data": [], "audio_data": [None]}, 0, 0),
    ],
)
def test_media_come_before_the_prompt(fields: dict[str, object], tokens: int, media: int) -> None:
    request = sglang({"text": "what is it?", **fields})
    assert request.media == media
    assert len(request.prompt) == 4 * tokens + 11
    assert bytes(request.prompt).endswith(b"what is it?")
    ids_too = sglang({"input_ids": [1, 2], **fields})
    assert ids_too.prompt_tokens == tokens + 2


def read(text: bytes, *, event_stream: bool, size: int = 1 << 30) -> Usage | None:
    reader = SglangHttpParser().usage(event_stream=event_stream)
    assert reader is not None
    for at in range(0, len(text), size):
        reader.feed(text[at : at + size])
    return reader.finish()


@pytest.mark.parametrize(
    ("info", "found"),
    [
        ({"prompt_tokens": 3, "completion_tokens": 4, "cached_tokens": 2, "finish_reason": None}, Usage(3, 4, 2)),
        ({"prompt_tokens": 3, "completion_tokens": 4}, Usage(3, 4, -1)),
        ({"completion_tokens": 4}, Usage(-1, 4, -1)),
        ({"id": "x"}, None),
        ({"prompt_tokens": "x"}, None),
        (None, None),
        (7, None),
    ],
)
def test_sglang_usage_is_in_meta_info(info: object, found: Usage | None) -> None:
    answer = json.dumps({"text": 'the "meta_info" {', "meta_info": info}).encode()
    long = json.dumps({"text": "x" * 100_000, "meta_info": info, "output_ids": [1]}).encode()
    earlier = b'data: {"text":"a","meta_info":{"prompt_tokens":1,"completion_tokens":1}}\n\n'
    for size in (1, 7, 1 << 30):
        assert read(answer, event_stream=False, size=size) == found
        assert read(b"data: " + answer + b"\n\ndata: [DONE]\n\n", event_stream=True, size=size) == found
    assert read(long, event_stream=False, size=10_000) == found
    assert read(earlier + b"data: " + answer + b"\n\n", event_stream=True) == (found or Usage(1, 1, -1))


def test_passthrough_reads_nothing() -> None:
    parser = PassthroughParser()
    assert isinstance(parser, Parser)
    assert not parser.body_wanted
    assert not parser.model_required
    request = LLMRequest(id="r", path="/x", headers={})
    for body in (b"", b"{", b'{"model":"m","messages":[]}'):
        parser.parse(request, body, "")
    assert (request.model, request.prompt_tokens) == ("", 0)
    assert parser.with_model(b'{"model":"m"}', "n") is None


def test_models_are_renamed_in_json_bodies() -> None:
    for parser, name in itertools.product((VllmHttpParser(), SglangHttpParser()), ("n", "a/b")):
        assert parser.with_model(b'{"x":{"model":1},"model":"m"}', name) == b'{"x":{"model":1},"model":"%b"}' % name.encode()


def test_a_client_s_own_token_ids_are_known_as_such() -> None:
    request = LLMRequest(id="r", path="", headers={})
    set_prompt(request, b"[1, 2, 70000]")
    assert request.attributes[TOKEN_IDS] == request.prompt == array("I", [1, 2, 70_000]).tobytes()
    several = LLMRequest(id="r", path="", headers={})
    set_prompt(several, b"[[1, 2], [3]]")
    assert several.prompt_tokens == 3
    assert TOKEN_IDS not in several.attributes
