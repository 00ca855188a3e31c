"""The Anthropic API: what is hashed, what is left out of it, and usage that comes in pieces."""

from __future__ import annotations

import itertools
import json
import struct
from base64 import b64encode

import pytest

from epp.errors import BadRequestError
from epp.parsing.anthropic import AnthropicParser
from epp.plugins.base import Parser, UsageReader
from epp.types import LLMRequest, Usage

PARSER = AnthropicParser()
PNG = b64encode(b"\x89PNG\r\n\x1a\n" + struct.pack(">I4sII5B", 13, b"IHDR", 640, 480, 8, 2, 0, 0, 0) + b"\0" * 3_000).decode()
HI = {"role": "user", "content": "hi"}


def parse(body: bytes, kind: str = "messages") -> LLMRequest:
    request = LLMRequest(id="r", path="", headers={})
    PARSER.parse(request, body, kind)
    return request


def prompt(spaced: bool = False, **fields: object) -> bytes:
    separators = (", ", ": ") if spaced else (",", ":")
    return bytes(parse(json.dumps({"model": "m", "messages": [HI], **fields}, separators=separators).encode()).prompt)


def test_tools_system_and_messages() -> None:
    body = (
        b'{"messages":[{"role":"user","content":"hi"}],"model":"m","system":"be kind","tools":[{"name":"t"}],"max_tokens":9,"stream":true}'
    )
    request = parse(body)
    assert isinstance(PARSER, Parser)
    assert (request.model, request.target_model, request.max_output_tokens, request.stream) == ("m", "m", 9, True)
    assert request.prompt == b'[{"name":"t"}]"be kind"[{"role":"user","content":"hi"}'
    assert request.prompt_tokens == -(-len(request.prompt) // 4)
    assert prompt(system=None, tools=None) == b'[{"role":"user","content":"hi"}'


def test_tenants() -> None:
    assert parse(b'{"model":"m","messages":[1],"cache_salt":"s"}').cache_salt == "s"


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"null", b"\xff", b"{}", b'{"model":"m"}', b'{"model":"m","messages":[]}', b'{"model":"m","messages":"x"}',
             b'{"model":"m","messages":null}', b'{"model":7,"messages":[1]}', b'{"model":"m","messages":' + b"[" * 100_000],
    ids=lambda body: repr(body[:40]),
)  # fmt: skip
def test_what_can_not_be_understood_is_the_clients_fault(body: bytes) -> None:
    with pytest.raises(BadRequestError):
        parse(body)


def test_a_field_of_an_unexpected_type_leaves_the_model_alone() -> None:
    request = parse(b'{"model":"m","max_tokens":"x","messages":[1]}')
    assert (request.model, request.prompt_tokens) == ("m", 0)


def test_counting_tokens_fills_no_cache() -> None:
    request = parse(b'{"model":"m","messages":[{"role":"user","content":"hi"}]}', "count")
    assert (request.model, request.prompt_tokens) == ("m", 0)
    with pytest.raises(BadRequestError):
        parse(b"{", "count")


def test_the_billing_line_is_not_hashed() -> None:
    def system(line: str) -> list[dict[str, str]]:
        return [{"type": "text", "text": line}, {"type": "text", "text": "You are a coder."}]

    one, other = (prompt(system=system(f"x-anthropic-billing-header: cc_version={n};")) for n in (1, 2))
    assert one == other == b'[{"type":"text","text":"You are a coder."}][{"role":"user","content":"hi"}'
    assert b"see x-anth" in prompt(system=system("see x-anthropic-billing-header"))
    assert b"cc_version" in prompt(system="x-anthropic-billing-header: cc_version=1")
    assert prompt(system=[1, "x-anthropic-billing-header", {"text": 7}]).startswith(b'[1,"x-anthropic-billing-header",{"text":7}]')


@pytest.mark.parametrize("spaced", [False, True])
@pytest.mark.parametrize("mark", [{"type": "ephemeral"}, {"type": "ephemeral", "ttl": "1h"}, None])
def test_cache_marks_that_move_on_do_not_change_what_came_before(mark: object, spaced: bool) -> None:
    def message(n: int, *, marked: bool) -> dict[str, object]:
        last = {"cache_control": mark} if marked else {}
        return {"role": "user", "content": [{"type": "text", "text": f"turn {n}"}, {"type": "text", "text": "more", **last}]}

    system = [{"type": "text", "text": "be kind", "cache_control": mark}]
    tools = [{"name": "t", "cache_control": mark, "input_schema": {}}]
    turns = [prompt(spaced, system=system, tools=tools, messages=[message(i, marked=i == n) for i in range(n + 1)]) for n in range(4)]
    for earlier, later in itertools.pairwise(turns):
        assert later.startswith(earlier)
    bare = prompt(
        spaced, system=[{"type": "text", "text": "be kind"}], tools=[{"name": "t", "input_schema": {}}], messages=[message(0, marked=False)]
    )
    assert turns[0] == bare


def test_a_cache_mark_is_found_wherever_it_is_and_only_there() -> None:
    marked = {"cache_control": {"type": "ephemeral"}, "type": "text", "text": "x"}
    assert prompt(messages=[{"role": "user", "content": [marked]}]) == prompt(
        messages=[{"role": "user", "content": [{"type": "text", "text": "x"}]}]
    )
    for content in ('"cache_control": {"type": "ephemeral"}', ["cache_control", {}], {"x": "cache_control"}, {"cache_control": [1]}):
        message = {"role": "user", "content": content}
        assert prompt(messages=[message]) == b"[" + json.dumps(message, separators=(",", ":")).encode()


@pytest.mark.parametrize(
    ("part", "tokens", "media"),
    [
        ({"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": PNG}}, 300, 1),
        ({"type": "image", "source": {"type": "url", "url": "https://example.com/a.png"}}, 225, 1),
        ({"type": "image", "source": {"type": "file", "file_id": "file_abc"}}, 225, 1),
        ({"type": "document", "source": {"type": "base64", "media_type": "application/pdf", "data": "AAAA"}}, 225, 1),
    ],
)
def test_pictures_and_documents(part: dict[str, object], tokens: int, media: int) -> None:
    around = '[{"role":"user","content":[{"type":"text","text":"a"},]}'
    direct = parse(
        json.dumps({"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, part]}]}, separators=(",", ":")).encode()
    )
    assert len(direct.prompt) == len(around) + 4 * tokens
    assert direct.media == media
    result = {"type": "tool_result", "tool_use_id": "t", "content": [part]}
    inside = parse(json.dumps({"messages": [{"role": "user", "content": [result]}]}).encode())
    assert inside.media == media
    assert tokens <= inside.prompt_tokens < tokens + 40


def test_a_document_that_is_text_is_text() -> None:
    part = {"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "once upon a time"}}
    assert b"once upon a time" in prompt(messages=[{"role": "user", "content": [part]}])


def read(reader: UsageReader | None, *chunks: bytes) -> Usage | None:
    assert reader is not None
    for chunk in chunks:
        reader.feed(chunk)
    return reader.finish()


def events(*data: dict[str, object]) -> bytes:
    return b"".join(f"event: {event['type']}\ndata: {json.dumps(event)}\n\n".encode() for event in data)


STREAM = events(
    {"type": "message_start", "message": {"id": "m", "usage": {"input_tokens": 5, "cache_read_input_tokens": 20, "cache_creation_input_tokens": 3, "output_tokens": 1}}},
    {"type": "content_block_delta", "delta": {"type": "text_delta", "text": 'the "usage"'}},
    {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 15}},
    {"type": "message_stop"},
)  # fmt: skip


def test_usage_of_a_stream_is_merged_wherever_it_is_cut() -> None:
    for at in range(len(STREAM) + 1):
        assert read(PARSER.usage(event_stream=True), STREAM[:at], STREAM[at:]) == Usage(28, 15, 20), at
    for size in range(1, 60):
        pieces = [STREAM[at : at + size] for at in range(0, len(STREAM), size)]
        assert read(PARSER.usage(event_stream=True), *pieces) == Usage(28, 15, 20), size


@pytest.mark.parametrize(
    ("usage", "found"),
    [
        ({"input_tokens": 5, "output_tokens": 2}, Usage(5, 2, -1)),
        ({"input_tokens": 5, "output_tokens": 2, "cache_read_input_tokens": 7}, Usage(12, 2, 7)),
        ({"input_tokens": 5, "output_tokens": 2, "cache_read_input_tokens": None, "cache_creation_input_tokens": 4}, Usage(9, 2, -1)),
        ({"output_tokens": 2}, Usage(-1, 2, -1)),
        ({"input_tokens": -1}, None),
        ({"input_tokens": "many"}, None),
        (None, None),
    ],
)
def test_usage_of_an_answer(usage: object, found: Usage | None) -> None:
    assert read(PARSER.usage(event_stream=False), json.dumps({"type": "message", "usage": usage}).encode()) == found
    long = json.dumps({"content": [{"type": "text", "text": "x" * 100_000}], "usage": usage}).encode()
    assert read(PARSER.usage(event_stream=False), long) == found
    if found:
        assert read(PARSER.usage(event_stream=True), events({"type": "message_delta", "usage": usage})) == found


def test_later_counts_of_a_stream_replace_earlier_ones() -> None:
    text = STREAM + events({"type": "message_delta", "usage": {"input_tokens": 6, "output_tokens": 30}})
    assert read(PARSER.usage(event_stream=True), text) == Usage(29, 30, 20)
    assert read(PARSER.usage(event_stream=True), b'data: {"usage":\n\n' + STREAM + b'data: {"usage":7}\n\n') == Usage(28, 15, 20)


def test_the_answer_to_counting_tokens_says_nothing_of_cost() -> None:
    assert read(PARSER.usage(event_stream=False), b'{"input_tokens":14}') is None
