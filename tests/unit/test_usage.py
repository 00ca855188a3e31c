"""Token counts out of responses, however they are cut, whatever is in them."""

from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from epp.parsing.usage import LINE_BYTES_MAX, TAIL_BYTES_MAX, JsonUsage, SseUsage
from epp.plugins.base import UsageReader
from epp.types import Usage

SSE = (
    b'data: {"id":"1","choices":[{"delta":{"content":"say \\"usage\\" "}}],"usage":null}\n\n'
    b": a comment\n\n"
    b'data: {"choices":[{"delta":{"content":"b"}}]}\r\n\r\n'
    b'data:{"choices":[],"usage":{"prompt_tokens":11,"completion_tokens":22,"prompt_tokens_details":{"cached_tokens":3}}}\n\n'
    b"data: [DONE]\n\n"
)
FOUND = Usage(11, 22, 3)


def read(reader: UsageReader, *chunks: bytes) -> Usage | None:
    for chunk in chunks:
        reader.feed(chunk)
    return reader.finish()


def test_server_sent_events_cut_in_two_at_every_byte() -> None:
    for at in range(len(SSE) + 1):
        assert read(SseUsage(), SSE[:at], SSE[at:]) == FOUND, at


def test_server_sent_events_in_pieces_of_every_size() -> None:
    for size in range(1, len(SSE) + 1):
        assert read(SseUsage(), *[SSE[at : at + size] for at in range(0, len(SSE), size)]) == FOUND, size


@settings(deadline=None, max_examples=200)
@given(st.lists(st.integers(0, len(SSE)), max_size=12))
def test_server_sent_events_cut_anywhere(cuts: list[int]) -> None:
    at = [0, *sorted(cuts), len(SSE)]
    assert read(SseUsage(), *[SSE[a:b] for a, b in itertools.pairwise(at)]) == FOUND


def test_the_last_usage_wins_and_null_is_none() -> None:
    running = b"".join(b'data: {"usage":{"prompt_tokens":5,"completion_tokens":%d}}\n\n' % n for n in range(1, 5))
    assert read(SseUsage(), running) == Usage(5, 4, -1)
    assert read(SseUsage(), running + b'data: {"usage":null}\n\n') == Usage(5, 4, -1)


def test_an_unfinished_last_line_counts() -> None:
    assert read(SseUsage(), b'data: {"usage":{"prompt_tokens":5}}') == Usage(5, -1, -1)


@pytest.mark.parametrize(
    ("usage", "found"),
    [
        ({"prompt_tokens": 1, "completion_tokens": 2}, Usage(1, 2, -1)),
        ({"input_tokens": 1, "output_tokens": 2, "input_tokens_details": {"cached_tokens": 1}}, Usage(1, 2, 1)),
        ({"prompt_tokens": 0, "completion_tokens": 0, "prompt_tokens_details": None}, Usage(0, 0, -1)),
        ({"prompt_tokens": 1, "input_tokens": 9}, Usage(1, -1, -1)),
        ({"prompt_tokens": 1, "prompt_tokens_details": {}}, Usage(1, -1, -1)),
        ({}, Usage(-1, -1, -1)),
        (None, None),
        ({"prompt_tokens": "many"}, None),
        ({"prompt_tokens": 1.5}, None),
        ([1], None),
        (7, None),
    ],
)
def test_the_shapes_of_usage(usage: object, found: Usage | None) -> None:
    text = json.dumps({"choices": [{"text": "x"}], "usage": usage}).encode()
    assert read(JsonUsage(), text) == found
    assert read(SseUsage(), b"data: " + text + b"\n\n") == found


def test_json_in_pieces_of_every_size() -> None:
    text = json.dumps({"choices": [{"text": 'the "usage" of {braces}'}], "usage": {"prompt_tokens": 3, "completion_tokens": 4}}).encode()
    for size in range(1, len(text) + 1):
        assert read(JsonUsage(), *[text[at : at + size] for at in range(0, len(text), size)]) == Usage(3, 4, -1), size


@pytest.mark.parametrize("tail", [b"}", b', "x": [{"usage_of": 1}]}', b',\n  "system_fingerprint": null\n}\n'])
def test_a_long_json_answer_has_its_usage_at_the_end(tail: bytes) -> None:
    text = b'{"choices":[{"text":"' + b"\\u65e5" * 100_000 + b'"}],"usage": {"prompt_tokens":3,"completion_tokens":4}' + tail
    assert read(JsonUsage(), *[text[at : at + 10_000] for at in range(0, len(text), 10_000)]) == Usage(3, 4, -1)
    assert read(JsonUsage(), text) == Usage(3, 4, -1)


def test_what_is_held_is_bounded() -> None:
    for reader in (JsonUsage(), SseUsage()):
        for _ in range(200):
            reader.feed(b"data: " + b"x" * 5_000)
            held = reader._tail if isinstance(reader, JsonUsage) else reader._pending
            assert len(held) <= (TAIL_BYTES_MAX if isinstance(reader, JsonUsage) else LINE_BYTES_MAX)
        assert reader.finish() is None


def test_a_line_too_long_to_keep_does_not_hide_the_usage_after_it() -> None:
    reader = SseUsage()
    for _ in range(40):
        reader.feed(b"data: " + b"x" * 5_000)
    assert read(reader, b"\n\n", SSE) == FOUND


GARBAGE = [
    b"",
    b"\0\xff" * 10_000,
    b'data: {"usage":\n\n',
    b'data: {"usage":{\n\n' * 100,
    b'{"usage":{"prompt_tokens":1',
    b'{"usage":' * 5_000,
    b'data: {"usage":' + b'{"a":' * 5_000 + b"\n\n",
    b" " * 20_000 + b'"usage":',
    b" " * 20_000 + b'"usage":{"prompt_tokens":1',
    b" " * 20_000 + b'"usage":' + b'{"a":' * 3_000,
    b" " * 20_000 + b'"usage":' + b"[" * 3_000 + b"{",
    b" " * 20_000 + b'"usage":{"prompt_tokens":' + b"9" * 5_000 + b"}}",
    b'data: {"usage":{"prompt_tokens":"\xff"}}\n\n',
]


@pytest.mark.parametrize("garbage", GARBAGE, ids=lambda garbage: repr(garbage[:30]))
@pytest.mark.parametrize("make", [SseUsage, JsonUsage])
def test_garbage_is_no_usage_and_no_error(make: type[SseUsage | JsonUsage], garbage: bytes) -> None:
    assert read(make(), garbage) is None
    assert read(make(), *[garbage[at : at + 700] for at in range(0, len(garbage), 700)]) is None


@settings(deadline=None, max_examples=300)
@given(st.lists(st.binary(max_size=50) | st.sampled_from([b'"usage"', b'data: {"usage":{', b"\n", b"}", b":1"]), max_size=12))
def test_noise_is_no_error(chunks: list[bytes]) -> None:
    for reader in (SseUsage(), JsonUsage()):
        read(reader, *chunks)


def completed(text: str) -> bytes:
    """The last events of a stream of the Responses API."""
    usage = {"input_tokens": 5, "input_tokens_details": {"cached_tokens": 2}, "output_tokens": 7}
    events = [
        {"type": "response.created", "response": {"id": "r", "usage": None}},
        {"type": "response.output_text.delta", "delta": 'the "usage"'},
        {"type": "response.completed", "response": {"output": [{"text": text}], "usage": usage, "user": None}},
    ]
    return b"".join(f"event: {event['type']}\ndata: {json.dumps(event)}\n\n".encode() for event in events)


def test_the_responses_api_has_usage_in_the_response() -> None:
    text = completed("hi")
    for at in range(len(text) + 1):
        assert read(SseUsage(), text[:at], text[at:]) == Usage(5, 7, 2), at
    assert read(JsonUsage(), b'{"object":"response","usage":{"input_tokens":5,"output_tokens":7}}') == Usage(5, 7, -1)
    assert read(SseUsage(), b'data: {"response":"the \\"usage\\"","usage":{"prompt_tokens":1}}\n\n') == Usage(1, -1, -1)
    assert read(SseUsage(), b'data: {"response":"text","x":"usage","usage":null}\n\n') is None


@pytest.mark.parametrize("size", [LINE_BYTES_MAX - 400, LINE_BYTES_MAX, LINE_BYTES_MAX * 3])
def test_an_answer_repeated_whole_at_the_end_has_its_usage_at_its_end(size: int) -> None:
    text = SSE + completed("x" * size)
    for piece in (7_001, 16_384, 65_536, len(text)):
        assert read(SseUsage(), *[text[at : at + piece] for at in range(0, len(text), piece)]) == Usage(5, 7, 2), piece
    assert read(SseUsage(), text.rstrip(b"\n")) == Usage(5, 7, 2)


@settings(deadline=None, max_examples=60)
@given(
    st.integers(LINE_BYTES_MAX - 700, LINE_BYTES_MAX + 700),
    st.lists(st.integers(0, 3 * LINE_BYTES_MAX), max_size=6),
    st.sampled_from([b"data: ", b": ", b""]),
)
def test_where_a_long_line_is_cut_makes_no_difference(size: int, cuts: list[int], start: bytes) -> None:
    text = SSE + start + completed("x" * size)[-size:] + b"data: " + b"y" * 2 * size + b"\n" + SSE[:70]
    at = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    assert read(SseUsage(), *[text[a:b] for a, b in itertools.pairwise(at)]) == read(SseUsage(), text)


def test_empty_chunks_are_nothing() -> None:
    assert read(SseUsage(), b"", SSE[:50], b"", SSE[50:], b"") == FOUND
    assert read(JsonUsage(), b"", b'{"usage":', b"", b'{"prompt_tokens":1}}', b"") == Usage(1, -1, -1)
