"""Media in conversations: what is hashed in their place, what they count for, and that turns stay prefixes of one another."""

from __future__ import annotations

import contextlib
import itertools
import json
import struct
from base64 import b64encode

import pytest

from epp.errors import BadRequestError
from epp.parsing.conversation import DEPTH_MAX, MESSAGES_MAX, PARTS_MAX
from epp.parsing.openai import OpenAIParser
from epp.types import LLMRequest


def png(width: int, height: int, seed: int = 0) -> str:
    header = struct.pack(">I4sII5B", 13, b"IHDR", width, height, 8, 2, 0, 0, 0)
    return b64encode(b"\x89PNG\r\n\x1a\n" + header + bytes([seed]) * 3_000).decode()


def url(content: str) -> str:
    return f"data:image/png;base64,{content}"


def image(content: str) -> dict[str, object]:
    return {"type": "image_url", "image_url": {"url": content}}


def text(content: str) -> dict[str, object]:
    return {"type": "text", "text": content}


def user(*parts: object) -> dict[str, object]:
    return {"role": "user", "content": list(parts)}


def parse(*messages: object, kind: str = "chat", headers: dict[str, str] | None = None, spaced: bool = False) -> LLMRequest:
    field = {"chat": "messages", "response": "input", "conversation": "items", "embedding": "messages"}[kind]
    request = LLMRequest(id="r", path="", headers=headers or {})
    body = json.dumps({"model": "m", field: messages}, separators=(", ", ": ") if spaced else (",", ":")).encode()
    OpenAIParser().parse(request, body, kind)
    return request


SMALL, LARGE = url(png(64, 64)), url(png(640, 480))
SMALL_TOKENS, LARGE_TOKENS = 4, 300


def test_a_picture_counts_for_its_size_and_not_for_its_text() -> None:
    request = parse(user(text("what is it?"), image(LARGE)))
    around = b'[{"role":"user","content":[{"type":"text","text":"what is it?"},]}'
    assert request.media == 1
    assert len(request.prompt) == len(around) + 4 * LARGE_TOKENS
    assert request.prompt_tokens == -(-len(request.prompt) // 4)
    assert b"base64" not in bytes(request.prompt)
    assert bytes(request.prompt).startswith(around[:-2])
    assert bytes(request.prompt).endswith(b"]}")


def test_equal_pictures_are_equal_and_different_ones_are_not() -> None:
    def prompt(content: str) -> bytes:
        return bytes(parse(user(image(content), text("what is it?"))).prompt)

    assert prompt(url(png(64, 64, 1))) == prompt(url(png(64, 64, 1)))
    assert prompt(url(png(64, 64, 1))) != prompt(url(png(64, 64, 2)))
    one, other = prompt(url(png(64, 64, 1))), prompt(url(png(64, 64, 2)))
    assert len(one) == len(other)
    after = len('{"type":"text","text":"what is it?"}]}')
    assert one[-after:] == other[-after:]  # the text after stays comparable
    assert prompt("https://example.com/a.png") != prompt("https://example.com/b.png")


@pytest.mark.parametrize(
    ("part", "tokens", "count"),
    [
        (image(SMALL), SMALL_TOKENS, 1),
        ({"type": "image_url", "image_url": SMALL}, SMALL_TOKENS, 1),
        ({"image_url": {"url": SMALL, "detail": "high"}}, SMALL_TOKENS, 1),
        (image("https://example.com/a.png"), 225, 1),
        ({"type": "input_image", "image_url": SMALL}, SMALL_TOKENS, 1),
        ({"type": "input_image", "file_id": "file-abc"}, 225, 1),
        ({"type": "image", "image_x": 1, "image": SMALL}, SMALL_TOKENS, 1),
        ({"type": "video_url", "video_url": {"url": "https://example.com/v.mp4"}}, 4500, 1),
        ({"type": "input_audio", "input_audio": {"data": "A" * 400, "format": "wav"}}, 100, 1),
        ({"type": "audio_url", "audio_url": {"url": "data:audio/wav;base64," + "A" * 78}}, 25, 1),
        ({"type": "file", "file": {"file_data": "data:application/pdf;base64,AAAA", "filename": "a.pdf"}}, 225, 1),
        ({"type": "file", "file": {"file_id": "file-abc"}}, 225, 1),
        ({"type": "input_file", "file_url": "https://example.com/a.pdf"}, 225, 1),
        ({"type": "image_embeds", "image_embeds": "A" * 4_000}, 225, 0),
        ({"type": "image_url"}, 225, 1),
        ({"type": "image_url", "image_url": None}, 225, 1),
        ({"type": "image_url", "image_url": {"x": 1}}, 225, 1),
    ],
    ids=lambda part: json.dumps(part)[:40],
)
def test_every_kind_of_part(part: dict[str, object], tokens: int, count: int) -> None:
    for spaced in (False, True):
        request = parse(user(part), spaced=spaced)
        assert len(request.prompt) == len('[{"role":"user","content":[]}') + 4 * tokens
        assert request.media == count


@pytest.mark.parametrize(
    "message",
    [
        {"role": "user", "content": "an image_url in prose"},
        {"role": "user", "content": '{"type":"image_url","image_url":{"url":"data:image/png;base64,AAAA"}}'},
        user(text('{"type": "image_url"} and input_audio')),
        user(text("a"), text("b_c")),
        user("a plain string_part"),
        {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": {"name": "image_url", "arguments": "{}"}}]},
        {"role": "tool", "tool_call_id": "call_1", "content": "input_image"},
        {"role": "user", "content": []},
        {"role": "user_", "content": {"type": "text"}},
        ["image_url"],
        "image_url",
        7,
        None,
    ],
    ids=lambda message: json.dumps(message)[:50],
)
@pytest.mark.parametrize("spaced", [False, True])
def test_what_is_no_media_stays_as_it_was_sent(message: object, spaced: bool) -> None:
    request = parse(message, spaced=spaced)
    assert bytes(request.prompt) == b"[" + json.dumps(message, separators=(", ", ": ") if spaced else (",", ":")).encode()
    assert request.media == 0


@pytest.mark.parametrize("spaced", [False, True])
@pytest.mark.parametrize(
    "message",
    [
        {"content": [image(SMALL)], "role": "user"},
        {"role": "user", "name": "bob", "content": [image(SMALL)]},
        {"role": "tool", "tool_call_id": "call_1", "content": [image(SMALL)]},
        {"role": "user", "x": {"content": "no"}, "content": [text("a"), image(SMALL), text("b")]},
        {"content": ["a", image(SMALL)]},
        {"role": 7, "content": [image(SMALL), 7]},
        user({"type": "group", "content": [image(SMALL)]}),
        user({"content": [image(SMALL)]}),
        {"role": "user", "content": image(SMALL)},
        image(SMALL),
    ],
)
def test_a_picture_is_found_wherever_it_is(message: object, spaced: bool) -> None:
    request = parse({"role": "system", "content": "short"}, message, {"role": "user", "content": "x"}, spaced=spaced)
    assert request.media == 1
    assert b"base64" not in bytes(request.prompt)


def test_the_turns_of_a_conversation_with_pictures_are_prefixes() -> None:
    turns = [
        {"role": "system", "content": "be kind"},
        user(text("what is it?"), image(SMALL), image("https://example.com/a.png")),
        {"role": "assistant", "content": "a cat_"},
        user(text("and this?"), image(LARGE)),
        {"role": "assistant", "content": [text("a dog")]},
        user({"type": "input_audio", "input_audio": {"data": "A" * 400, "format": "wav"}}),
    ]
    prompts = [parse(*turns[: n + 1]) for n in range(len(turns))]
    for earlier, later in itertools.pairwise(prompts):
        assert bytes(later.prompt).startswith(bytes(earlier.prompt))
    assert [request.media for request in prompts] == [0, 2, 2, 3, 3, 4]


def test_a_video_is_as_long_as_its_headers_say() -> None:
    part = {"type": "video_url", "video_url": {"url": "v"}}
    headers = {"x-llm-d-video-fps": "1", "x-llm-d-video-duration-seconds": "4", "x-llm-d-video-resolution": "64x64"}
    assert len(parse(user(part), headers=headers).prompt) == len('[{"role":"user","content":[]}') + 4 * 16


@pytest.mark.parametrize(
    ("item", "count"),
    [
        ({"role": "user", "content": [{"type": "input_text", "text": "x"}, {"type": "input_image", "image_url": SMALL}]}, 1),
        ({"type": "message", "role": "user", "content": [{"type": "input_image", "image_url": SMALL}]}, 1),
        ({"type": "function_call_output", "call_id": "c", "output": [{"type": "input_image", "image_url": SMALL}]}, 1),
        ({"type": "computer_call_output", "call_id": "c", "output": {"type": "computer_screenshot", "image_url": SMALL}}, 1),
        ({"type": "image_generation_call", "id": "i", "result": png(64, 64)}, 1),
        ({"type": "function_call_output", "call_id": "c", "output": "input_image"}, 0),
        ({"type": "function_call", "call_id": "c", "name": "f", "arguments": '{"image_url":1}'}, 0),
        ({"role": "assistant", "content": [{"type": "output_text", "text": "x"}]}, 0),
        ({"type": "reasoning", "encrypted_content": "AAAA", "summary": []}, 0),
    ],
    ids=lambda part: json.dumps(part)[:60],
)
@pytest.mark.parametrize("kind", ["response", "conversation"])
def test_items_of_the_responses_api(item: dict[str, object], count: int, kind: str) -> None:
    request = parse(item, kind=kind)
    assert request.media == count
    if count:
        assert b"base64" not in bytes(request.prompt)
        assert request.prompt_tokens < 60
    else:
        assert bytes(request.prompt) == b"[" + json.dumps(item, separators=(",", ":")).encode()


def test_a_picture_to_embed() -> None:
    assert parse(user(image(SMALL)), kind="embedding").media == 1


def test_a_document_that_is_text_is_text() -> None:
    part = {"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "once upon a time"}}
    request = parse(user(part))
    assert request.media == 0
    assert b"once upon a time" in bytes(request.prompt)


def test_what_is_nested_too_deeply_is_left_as_it_is() -> None:
    nested: object = image(SMALL)
    for _ in range(DEPTH_MAX):
        nested = {"type": "group", "content": [nested]}
    request = parse(user(nested, {"x": 1}))
    assert request.media == 0
    assert b"base64" in bytes(request.prompt)


def test_a_part_nested_as_deeply_as_json_may_be_is_no_error() -> None:
    for depth in (100, 400, 800, 900, 950, 960, 970, 980, 990):
        body = b'{"model":"m","messages":[{"_":1,"content":' + b'[{"content":' * depth + b"1" + b"}]" * depth + b"}]}"
        request = LLMRequest(id="r", path="", headers={})
        with contextlib.suppress(BadRequestError):
            OpenAIParser().parse(request, body, "chat")


def test_the_parts_looked_into_are_bounded() -> None:
    many = parse(user(*[{"type": "image_url"}] * (PARTS_MAX + 50)))
    assert many.media == PARTS_MAX - 1  # the message is looked into too
    long = parse(*[{"role": "user", "content": "_"}] * MESSAGES_MAX, user(image(SMALL)))
    assert long.media == 0
    assert parse(user(image(SMALL)), *[{"role": "user", "content": "_"}] * MESSAGES_MAX).media == 1
    assert parse(*[{"role": "user", "content": "_"}] * (MESSAGES_MAX - 1), user(image(SMALL))).media == 1
