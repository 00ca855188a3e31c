"""Every parser, whatever the bytes: a request is understood or refused, work and memory stay bounded, and usage does not depend on
where a response is cut."""

from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from epp.errors import BadRequestError, NotFoundError
from epp.parsing.media import REQUEST_TOKENS_MAX
from epp.parsing.passthrough import PassthroughParser
from epp.parsing.routes import Routes
from epp.types import LLMRequest, Usage

ROUTES = Routes.default(unknown_paths_ok=False)
PARSERS = {type(parser).__name__: parser for parser, _ in (ROUTES.match(suffix) for suffix, _ in ROUTES._by_suffix)}
ENTRANCES = [(parser, kind) for parser in PARSERS.values() for kind in dict.fromkeys(parser.suffixes.values())]  # type: ignore[union-attr]
IDS = [f"{type(parser).__name__}-{kind}" for parser, kind in ENTRANCES]
PATHS = [suffix if suffix.startswith("/") else f"/google.{suffix}" for suffix, _ in ROUTES._by_suffix]

TYPES = st.sampled_from([
    "text", "image_url", "input_image", "image", "video_url", "input_audio", "audio_url", "file", "document", "image_embeds", "tool_result",
    "computer_screenshot", "message",
])  # fmt: skip
KEYS = st.sampled_from([
    "type", "role", "content", "output", "source", "url", "data", "file_id", "text", "image_url", "input_audio", "video_url", "image",
    "offset", "length", "mm_hashes", "mm_placeholders", "max_tokens", "max_new_tokens", "cache_control",
])  # fmt: skip
STRINGS = TYPES | st.sampled_from(
    ["user", "ephemeral", "https://x/y.png", "x-anthropic-billing-header", "data:image/png;base64,iVBORw0KGgo=", "\ud7ff", "\0"]
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.just(10**400) | st.floats(allow_nan=False, allow_infinity=False) | STRINGS,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(KEYS, inner, max_size=4)
        | st.fixed_dictionaries({"type": TYPES, "content": st.lists(inner, max_size=2)})
    ),
    max_leaves=20,
)
FIELDS = st.sampled_from([
    "model", "stream", "messages", "prompt", "tools", "system", "max_tokens", "max_completion_tokens", "max_output_tokens", "cache_salt", "extra_key",
    "input", "instructions", "items", "token_ids", "features", "sampling_params", "input_ids", "text", "image_data", "video_data", "audio_data",
])  # fmt: skip
DOCUMENTS = st.dictionaries(FIELDS, JSON, max_size=7)
TOKENS_ADDED_MAX = 2 * REQUEST_TOKENS_MAX + 10_000


def check(request: LLMRequest, body: bytes) -> None:
    assert request.target_model == request.model
    assert 0 <= request.prompt_tokens <= len(body) + TOKENS_ADDED_MAX
    assert len(request.prompt) <= 4 * (len(body) + TOKENS_ADDED_MAX)
    assert request.media >= 0
    assert request.max_output_tokens is None or 0 <= request.max_output_tokens <= 1 << 31
    assert isinstance(request.stream, bool)
    f"{request.model}\0{request.cache_salt}".encode()  # what is hashed with every prompt


def read(entrance: int, body: bytes, headers: dict[str, str] | None = None) -> LLMRequest | None:
    parser, kind = ENTRANCES[entrance]
    assert parser is not None
    request = LLMRequest(id="r", path="", headers=headers or {})
    try:
        parser.parse(request, body, kind)
    except BadRequestError:
        return None
    check(request, body)
    return request


@pytest.mark.parametrize("entrance", range(len(ENTRANCES)), ids=IDS)
@settings(deadline=None, max_examples=120)
@given(document=DOCUMENTS, where=st.floats(0, 1), byte=st.integers(0, 255), resolution=st.text(max_size=8))
def test_any_object_cut_or_damaged_is_understood_or_refused(
    entrance: int, document: dict[str, object], where: float, byte: int, resolution: str
) -> None:
    whole = json.dumps(document).encode()
    wrapped = _http_body(whole)
    for body in (whole, wrapped):
        at = int(where * len(body))
        for variant in (body, body[:at], body[:at] + bytes([byte]) + body[at + 1 :]):
            read(entrance, variant, {"x-llm-d-video-resolution": resolution, "x-llm-d-video-fps": resolution})


@pytest.mark.parametrize("entrance", range(len(ENTRANCES)), ids=IDS)
@settings(deadline=None, max_examples=120)
@given(body=st.binary(max_size=300))
def test_any_bytes_are_understood_or_refused(entrance: int, body: bytes) -> None:
    for variant in (body, b"\0" + len(body).to_bytes(4, "big") + body, _http_body(body), b'{"messages":[' + body + b"]}"):
        read(entrance, variant)


DEEP = [
    b'{"%b":' % key + opening * depth + b"1" + closing * depth + b"}"
    for key in (b"messages", b"input", b"items", b"prompt", b"system", b"token_ids", b"features", b"image_data", b"x")
    for opening, closing in ((b"[", b"]"), (b'{"content":', b"}"), (b'[{"_":0,"source":1,"content":', b"}]"))
    for depth in (50, 300, 470, 480, 485, 490, 495, 900, 940, 960, 970, 980, 990, 1_000, 50_000)
]


@pytest.mark.parametrize("entrance", range(len(ENTRANCES)), ids=IDS)
def test_json_nested_ever_so_deeply_is_understood_or_refused(entrance: int) -> None:
    for body in DEEP:
        read(entrance, body)
        read(entrance, _http_body(body))


HUGE = [b"9" * 400, b"9" * 10_000, b"-" + b"9" * 400, b"1e999999", b"1" + b"0" * 300 + b".5"]


@pytest.mark.parametrize("entrance", range(len(ENTRANCES)), ids=IDS)
def test_numbers_ever_so_large_are_understood_or_refused(entrance: int) -> None:
    for number in HUGE:
        for key in (b"max_tokens", b"max_completion_tokens", b"max_output_tokens", b"prompt", b"model", b"stream", b"cache_salt", b"x"):
            read(
                entrance,
                b'{"messages":[1],"token_ids":[1],"input":[%b],"input_ids":[%b],"prompt":[%b],"%b":%b}'
                % (number, number, number, key, number),
            )
        read(entrance, b'{"token_ids":[1],"sampling_params":{"max_tokens":%b,"max_new_tokens":%b}}' % (number, number))
        places = b'{"mm_hashes":{"image":[""]},"mm_placeholders":{"image":[{"offset":%b,"length":%b}]}}' % (number, number)
        read(entrance, b'{"token_ids":[1,2],"features":%b}' % places)


def _varint(value: int) -> bytes:
    return (bytes([value & 0x7F | 0x80]) + _varint(value >> 7)) if value > 0x7F else bytes([value])


def _field(number: int, data: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def _http_body(data: bytes) -> bytes:
    message = _field(2, _field(2, data))
    return b"\0" + len(message).to_bytes(4, "big") + message


@settings(deadline=None, max_examples=300)
@given(
    st.sampled_from([*PATHS, "", "/nowhere", "/v1/models", "/"]) | st.text(max_size=20), DOCUMENTS, st.binary(max_size=20), st.booleans()
)
def test_any_path_and_body_end_in_a_request_or_an_error_of_ours(
    path: str, document: dict[str, object], noise: bytes, with_passthrough: bool
) -> None:
    made = Routes([*(p for p in PARSERS.values() if p), PassthroughParser()], unknown_paths_ok=False) if with_passthrough else ROUTES
    for body in (json.dumps(document).encode(), noise, None):
        request = LLMRequest(id="r", path=path, headers={})
        try:
            parser = made.parse(request, body)
        except (BadRequestError, NotFoundError):
            continue
        assert parser is not None or not with_passthrough
        check(request, body or b"")


@settings(deadline=None, max_examples=150)
@given(
    st.lists(
        st.fixed_dictionaries(
            {"role": st.sampled_from(["user", "assistant"]), "content": st.text(max_size=20) | st.lists(JSON, max_size=3)}
        ),
        min_size=2,
        max_size=5,
    ),
    st.sampled_from([",", ", "]),
)
def test_earlier_turns_are_a_prefix_of_later_ones(turns: list[dict[str, object]], comma: str) -> None:
    for path, field in (
        ("/v1/chat/completions", "messages"),
        ("/v1/messages", "messages"),
        ("/v1/responses", "input"),
        ("/v1/conversations", "items"),
    ):
        prompts = []
        for count in range(1, len(turns) + 1):
            request = LLMRequest(id="r", path=path, headers={})
            ROUTES.parse(request, json.dumps({"model": "m", "system": "x", field: turns[:count]}, separators=(comma, ":")).encode())
            prompts.append(bytes(request.prompt))
        for earlier, later in itertools.pairwise(prompts):
            assert later.startswith(earlier)


FRAGMENTS = st.sampled_from([
    b'data: {"usage":{"prompt_tokens":5,"completion_tokens":6}}\n\n',
    b'data: {"usage":null}\n\n',
    b'data: {"type":"message_start","message":{"usage":{"input_tokens":3}}}\n\n',
    b'data: {"type":"response.completed","response":{"usage":{"input_tokens":3,"output_tokens":1}}}\r\n\r\n',
    b'data: {"meta_info":{"prompt_tokens":7,"completion_tokens":8}}\n\n',
    b'{"usage":{"prompt_tokens":1}}',
    b'{"meta_info":{"prompt_tokens":2,"completion_tokens":8}}',
    b"data: ", b'"usage"', b"\n", b"{", b"}", b"[DONE]", b"\xff", b"\0\0\0\0\x04\x12\x02\x18\x05", b"\0\0\0\0\x04\x0a\x02\x10\x05", b"\1\0\0\0\x02ab",
    b"\0\0\0\0\x03\x12\x01{", b"\0\0\0\0\x00", b"\0\0\0",
])  # fmt: skip


def _padded(parts: tuple[list[bytes], int, bytes]) -> bytes:
    """Long enough for what readers keep of a line or an answer to matter."""
    fragments, size, padding = parts
    middle = len(fragments) // 2
    return b"".join((*fragments[:middle], padding * size, *fragments[middle:]))


RESPONSES = st.tuples(
    st.lists(FRAGMENTS | st.binary(max_size=6), max_size=10), st.just(0) | st.integers(0, 70_000), st.sampled_from([b"x", b"\n", b"\0"])
).map(_padded)


@pytest.mark.parametrize("event_stream", [False, True])
@pytest.mark.parametrize("name", [*PARSERS, "PassthroughParser"])
@settings(deadline=None, max_examples=120)
@given(text=RESPONSES, cuts=st.lists(st.floats(0, 1), max_size=8))
def test_usage_is_the_same_wherever_a_response_is_cut(name: str, event_stream: bool, text: bytes, cuts: list[float]) -> None:
    parser = PARSERS.get(name) or PassthroughParser()
    found: list[Usage | None] = []
    for at in ([0, len(text)], [0, *sorted(int(cut * len(text)) for cut in cuts), len(text)], [*range(0, len(text), 997), len(text)]):
        reader = parser.usage(event_stream=event_stream)
        assert reader is not None
        for a, b in itertools.pairwise(at):
            reader.feed(text[a:b])
        found.append(reader.finish())
    assert found[0] == found[1] == found[2]
    assert found[0] is None or all(-1 <= count <= 1 << 55 for count in found[0])
