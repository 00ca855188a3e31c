"""What routing reads of OpenAI-style bodies: valid, odd and hostile ones."""

from __future__ import annotations

import json
from array import array

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from epp.errors import BadRequestError
from epp.parsing import openai
from epp.types import LLMRequest
from tests.builders import chat


def parse(body: bytes, kind: openai.Kind = "chat") -> LLMRequest:
    request = LLMRequest(id="r", path="", headers={})
    openai.parse(request, body, kind)
    return request


def test_a_chat() -> None:
    body = b'{"model":"m","stream":true,"max_tokens":5,"messages":[{"role":"user","content":"hi"}],"cache_salt":"s"}'
    request = parse(body)
    assert (request.model, request.target_model, request.stream, request.max_output_tokens, request.cache_salt) == ("m", "m", True, 5, "s")
    assert request.prompt == b'[{"role":"user","content":"hi"}'
    assert request.prompt_tokens == -(-len(request.prompt) // 4)


def test_a_conversation_that_goes_on_has_the_earlier_one_as_prefix() -> None:
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes?"}, {"role": "user", "content": "more"}]
    prompts = [bytes(parse(json.dumps({"model": "m", "messages": turns[: n + 1]}).encode()).prompt) for n in range(3)]
    assert prompts[1].startswith(prompts[0])
    assert prompts[2].startswith(prompts[1])


def test_tools_come_before_the_messages_as_in_chat_templates() -> None:
    assert parse(b'{"model":"m","messages":[1],"tools":[{"a":1}]}').prompt == b'[{"a":1}][1'
    assert parse(b'{"model":"m","messages":[1],"tools":null}').prompt == b"[1"


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ('"max_tokens":5', 5),
        ('"max_completion_tokens":7', 7),
        ('"max_tokens":5,"max_completion_tokens":7', 7),
        ('"max_tokens":null', None),
        ('"x":1', None),
    ],
)
def test_the_longest_answer_asked_for(fields: str, expected: int | None) -> None:
    assert parse(f'{{"model":"m","messages":[1],{fields}}}'.encode()).max_output_tokens == expected


@pytest.mark.parametrize(("written", "stream"), [("true", True), ("false", False), ("null", False)])
def test_stream(written: str, stream: bool) -> None:
    assert parse(f'{{"model":"m","messages":[1],"stream":{written}}}'.encode()).stream is stream


@pytest.mark.parametrize(
    ("prompt", "canonical", "tokens"),
    [
        (b'"hello"', b"hello", 2),
        (b'""', b"", 0),
        (b"[1,2,3]", array("I", [1, 2, 3]).tobytes(), 3),
        (b"[]", b"", 0),
        (b'["a","b"]', b'"a","b"', 2),
        (b"[[1,2],[3]]", b"[1,2],[3]", 3),
        (b"[1,-2]", b"1,-2", 1),
        (b"[99999999999]", b"99999999999", 3),
        (b"null", b"", 0),
        (b"7", b"", 0),
    ],
)
def test_completion_prompts(prompt: bytes, canonical: bytes, tokens: int) -> None:
    request = parse(b'{"model":"m","prompt":' + prompt + b"}", "completion")
    assert (bytes(request.prompt), request.prompt_tokens) == (canonical, tokens)


def test_a_completion_without_a_prompt_is_routed_by_load() -> None:
    request = parse(b'{"model":"m"}', "completion")
    assert (request.model, request.prompt_tokens) == ("m", 0)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b" ",
        b"{",
        b"null",
        b"[]",
        b'"x"',
        b"\xff\xfe",
        b"{}",
        b'{"model":""}',
        b'{"model":null,"messages":[1]}',
        b'{"model":7,"messages":[1]}',
        b'{"model":"m"}',
        b'{"model":"m","messages":[]}',
        b'{"model":"m","messages":[ \n ]}',
        b'{"model":"m","messages":null}',
        b'{"model":"m","messages":"hi"}',
        b'{"model":"m","messages":{}}',
        b'{"model":"m","messages":[1]',
        b'{"model":"\xff","messages":[1]}',
        b'{"model":"m","messages":[1]} trailing',
        # a field of an unexpected type, and worse after it
        b'{"stream":"yes","model":"m"',
        b'{"stream":"yes","model":"\xff"}',
        b'{"stream":"yes","model":"m","x":' + b"[" * 100_000,
        b'{"model":"m","messages":' + b"[" * 100_000,
    ],
    ids=lambda body: repr(body[:40]),
)
def test_what_can_not_be_understood_is_the_clients_fault(body: bytes) -> None:
    with pytest.raises(BadRequestError) as caught:
        parse(body)
    assert caught.value.message


def test_no_error_message_quotes_the_prompt() -> None:
    with pytest.raises(BadRequestError) as caught:
        parse(b'{"model":"m","messages":["my secret"')
    assert "secret" not in caught.value.message


@pytest.mark.parametrize("odd", [b'"stream":"yes"', b'"max_tokens":"many"', b'"cache_salt":7', b'"stream":1', b'"max_tokens":1.5'])
def test_a_field_of_an_unexpected_type_leaves_the_model_alone(odd: bytes) -> None:
    request = parse(b'{"model":"m",' + odd + b',"messages":[1]}')
    assert (request.model, request.prompt_tokens, request.stream) == ("m", 0, False)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=10,
)
FIELDS = st.sampled_from(["model", "stream", "messages", "prompt", "tools", "max_tokens", "max_completion_tokens", "cache_salt", "x"])


@settings(deadline=None, max_examples=500)
@given(st.dictionaries(FIELDS, JSON, max_size=6), st.sampled_from(["chat", "completion", ""]), st.floats(0, 1), st.integers(0, 255))
def test_any_object_cut_or_damaged_is_understood_or_refused(
    document: dict[str, object], kind: openai.Kind, where: float, byte: int
) -> None:
    whole = json.dumps(document).encode()
    at = int(where * len(whole))
    for body in (whole, whole[:at], whole[:at] + bytes([byte]) + whole[at + 1 :]):
        try:
            request = parse(body, kind)
        except BadRequestError:
            continue
        assert request.model
        assert request.target_model == request.model
        assert request.prompt_tokens == -(-len(request.prompt) // 4)


def test_any_language_and_escape_stays_as_it_was_sent() -> None:
    body = '{"model":"m","messages":[{"content":"日本 \\u00e9 🙂"}]}'.encode()
    assert bytes(parse(body).prompt) in body
    assert parse(chat("é")).model == "m"
