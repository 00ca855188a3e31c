"""What routing reads of OpenAI-style bodies: valid, odd and hostile ones."""

from __future__ import annotations

import json
from array import array

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from epp.errors import BadRequestError
from epp.parsing.base import OUTPUT_TOKENS_MAX
from epp.parsing.conversation import ELEMENTS_MAX, LARGE_BYTES
from epp.parsing.model_name import CHARS_MAX
from epp.parsing.openai import OpenAIParser
from epp.types import LLMRequest

PARSER = OpenAIParser()
KINDS = [*dict.fromkeys(OpenAIParser.suffixes.values()), ""]


def parse(body: bytes, kind: str = "chat") -> LLMRequest:
    request = LLMRequest(id="r", path="", headers={})
    PARSER.parse(request, body, kind)
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


def test_how_messages_are_spaced_between_makes_no_difference() -> None:
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes?"}]
    spaced = json.dumps({"model": "m", "messages": turns}).encode()
    assert b"}, {" in spaced
    assert parse(spaced).prompt == b'[{"role": "user", "content": "hi"},{"role": "assistant", "content": "yes?"}'


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
        ('"max_tokens":-1', None),
        ('"max_tokens":0', 0),
        ('"max_tokens":99999999999999999999999999', OUTPUT_TOKENS_MAX),
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
        (b"[[1,2],[3]]", array("I", [1, 2, 3]).tobytes(), 3),
        (b"[ [1,2], [] ]", array("I", [1, 2]).tobytes(), 2),
        (b'[[1,2],"a"]', b'[1,2],"a"', 3),
        (b"[[1,-2]]", b"[1,-2]", 2),
        (b'["hello"]', b"hello", 2),
        (b'[ "hello" ]', b"hello", 2),
        (b'["he","llo"]', b'"he","llo"', 3),
        (b"[4294967295]", array("I", [4294967295]).tobytes(), 1),
        (b"[4294967296]", b"4294967296", 3),
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


@pytest.mark.parametrize("messages", ["[]", "null", "7"])
def test_a_refusal_is_counted_under_the_model_asked_for(messages: str) -> None:
    request = LLMRequest(id="r", path="", headers={})
    with pytest.raises(BadRequestError, match="valid messages"):
        PARSER.parse(request, f'{{"model":"m","messages":{messages}}}'.encode(), "chat")
    assert request.model == "m"


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
FIELDS = st.sampled_from([
    "model", "stream", "messages", "prompt", "tools", "max_tokens", "max_completion_tokens", "cache_salt", "extra_key", "input",
    "instructions", "items", "max_output_tokens", "x",
])  # fmt: skip


@settings(deadline=None, max_examples=500)
@given(st.dictionaries(FIELDS, JSON, max_size=6), st.sampled_from(KINDS), st.floats(0, 1), st.integers(0, 255))
def test_any_object_cut_or_damaged_is_understood_or_refused(document: dict[str, object], kind: str, where: float, byte: int) -> None:
    whole = json.dumps(document).encode()
    at = int(where * len(whole))
    for body in (whole, whole[:at], whole[:at] + bytes([byte]) + whole[at + 1 :]):
        try:
            request = parse(body, kind)
        except BadRequestError:
            continue
        assert request.target_model == request.model
        assert request.prompt_tokens == -(-len(request.prompt) // 4)
        assert request.media >= 0
        assert request.max_output_tokens is None or 0 <= request.max_output_tokens <= OUTPUT_TOKENS_MAX


def test_any_language_and_escape_stays_as_it_was_sent() -> None:
    body = '{"model":"m","messages":[{"content":"日本 \\u00e9 🙂"}]}'.encode()
    assert bytes(parse(body).prompt) in body


def test_a_body_without_a_model_is_the_directors_business() -> None:
    assert parse(b'{"messages":[1]}').model == ""
    assert parse(b'{"model":"","prompt":"x"}', "completion").prompt == b"x"


def test_a_name_that_is_too_long_is_refused() -> None:
    assert parse(b'{"model":"%b","messages":[1]}' % (b"m" * CHARS_MAX)).model == "m" * CHARS_MAX
    for kind in KINDS:
        with pytest.raises(BadRequestError, match="longer than"):
            parse(b'{"model":"%b","messages":[1],"input":"x"}' % (b"m" * (CHARS_MAX + 1)), kind)
        with pytest.raises(BadRequestError, match="longer than"):
            parse(b'{"model":"%b","stream":7,"messages":[1]}' % (b"m" * (CHARS_MAX + 1)), kind)


def test_what_separates_tenants() -> None:
    def salt(fields: bytes, kind: str = "chat") -> str:
        return parse(b'{"model":"m","messages":[1],"prompt":"x","input":"x","items":[1]%b}' % fields, kind).cache_salt

    for kind in KINDS:
        assert salt(b',"cache_salt":"a"', kind) == "a"
        assert salt(b"", kind) == salt(b',"cache_salt":null', kind) == ""
    salts = [salt(fields) for fields in (b"", b',"cache_salt":"a"', b',"extra_key":"a"', b',"cache_salt":"a","extra_key":"b"')]
    assert len(set(salts)) == 4
    assert salt(b',"extra_key":["a"]') == salt(b',"extra_key":null') == ""


def response(**fields: object) -> LLMRequest:
    return parse(json.dumps({"model": "m", **fields}, separators=(",", ":")).encode(), "response")


def test_a_response_is_instructions_tools_and_input() -> None:
    request = response(
        instructions="be kind", tools=[{"name": "t"}], input=[{"role": "user", "content": "hi"}], max_output_tokens=9, stream=True
    )
    assert request.prompt == b'"be kind"[{"name":"t"}][{"role":"user","content":"hi"}'
    assert (request.model, request.max_output_tokens, request.stream) == ("m", 9, True)
    assert response(instructions="be kind", input=[], previous_response_id="r").prompt == b'"be kind"'
    assert response(instructions=None, tools=None, input=[1]).prompt == b"[1"
    assert response(input=None).prompt == b""


def test_an_input_that_is_a_string_is_a_prefix_of_the_list_it_becomes_part_of() -> None:
    first = response(instructions="x", input="hi").prompt
    later = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes?"}, {"role": "user", "content": "more"}]
    assert bytes(response(instructions="x", input=later).prompt).startswith(bytes(first))


def test_a_conversation_is_its_items() -> None:
    items = [{"type": "message", "role": "user", "content": "hi"}]
    assert parse(json.dumps({"items": items}, separators=(",", ":")).encode(), "conversation").prompt == (
        b'[{"type":"message","role":"user","content":"hi"}'
    )
    assert parse(b"{}", "conversation").prompt == b""


@pytest.mark.parametrize(
    ("fields", "prompt"),
    [
        ('"input":"hi"', b"hi"),
        ('"input":["hi"]', b"hi"),
        ('"input":["a","b"]', b'"a","b"'),
        ('"input":[1,2]', array("I", [1, 2]).tobytes()),
        ('"input":[[1],[2]]', array("I", [1, 2]).tobytes()),
        ('"messages":[{"role":"user","content":"hi"}]', b'[{"role":"user","content":"hi"}'),
        ('"input":{"x":1}', b""),
        ('"x":1', b""),
    ],
)
def test_embeddings(fields: str, prompt: bytes) -> None:
    assert parse(f'{{"model":"m",{fields}}}'.encode(), "embedding").prompt == prompt


def test_an_image_is_made_of_a_prompt() -> None:
    assert parse(b'{"model":"m","prompt":"a cat","n":2}', "image").prompt == b"a cat"


@pytest.mark.parametrize(
    ("fields", "prompt"),
    [('"messages":["x"]', b'["x"'), ('"input":"x"', b'[{"role":"user","content":"x"}'), ('"prompt":"x"', b"x"), ("", b"")],
)
def test_without_a_kind_the_body_tells(fields: str, prompt: bytes) -> None:
    assert parse(("{" + fields + "}").encode(), "").prompt == prompt


def test_of_a_key_given_twice_the_last_one_counts() -> None:
    request = parse(b'{"model":"a","messages":[1],"model":"b","messages":[2]}')
    assert (request.model, request.prompt) == ("b", b"[2")


def test_a_list_of_a_million_messages_is_refused_before_it_is_one() -> None:
    crowded = b'{"model":"m","messages":[' + b"1," * (ELEMENTS_MAX + 1) + b"1]}"
    assert len(crowded) > LARGE_BYTES
    for kind in ("chat", "embedding"):
        with pytest.raises(BadRequestError, match="elements"):
            parse(crowded, kind)
    assert parse(b'{"model":"m","messages":["' + b"x" * LARGE_BYTES + b'"]}').prompt_tokens > LARGE_BYTES // 4
