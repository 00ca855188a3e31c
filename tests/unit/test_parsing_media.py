"""What pictures, videos and sounds count for: sizes from real headers, counts worked out by hand."""

from __future__ import annotations

import base64
import struct
from array import array

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from epp.parsing.media import (
    AUDIO,
    EMBEDDING,
    FILE,
    IMAGE,
    PART_TOKENS_MAX,
    REQUEST_TOKENS_MAX,
    VIDEO,
    Estimator,
    Media,
    image_tokens,
    mark,
    video_tokens,
)


def png(width: int, height: int) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I4sII5B", 13, b"IHDR", width, height, 8, 2, 0, 0, 0) + b"\0" * 40


def segment(marker: int, data: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(data) + 2) + data


def jpeg(width: int, height: int, *before: bytes, start: int = 0xC0) -> bytes:
    frame = segment(start, struct.pack(">BHHB", 8, height, width, 3) + b"\1\x22\0\2\x11\1\3\x11\1")
    return b"\xff\xd8" + segment(0xE0, b"JFIF\0" + b"\0" * 9) + b"".join(before) + frame + segment(0xDA, b"\0" * 10) + b"\xff\xd9"


def gif(width: int, height: int) -> bytes:
    return b"GIF89a" + struct.pack("<HH", width, height) + b"\0" * 30


def webp_lossy(width: int, height: int) -> bytes:
    return b"RIFF\0\0\0\0WEBPVP8 \0\0\0\0" + b"\x10\0\0\x9d\x01\x2a" + struct.pack("<HH", width | 1 << 14, height | 2 << 14) + b"\0" * 20


def webp_lossless(width: int, height: int) -> bytes:
    return b"RIFF\0\0\0\0WEBPVP8L\0\0\0\0\x2f" + struct.pack("<I", width - 1 | height - 1 << 14) + b"\0" * 20


def webp_extended(width: int, height: int) -> bytes:
    size = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    return b"RIFF\0\0\0\0WEBPVP8X\x0a\0\0\0\0\0\0\0" + size + b"\0" * 20


def data_url(content: bytes, type_: str = "image/png") -> bytes:
    return b"data:" + type_.encode() + b";base64," + base64.b64encode(content)


COLOUR_PROFILE = segment(0xE2, b"ICC_PROFILE\0" + b"x" * 60_000)
TABLES = segment(0xC4, b"\0" * 30) + segment(0xDB, b"\0" * 65)


@pytest.mark.parametrize("wrap", [data_url, base64.b64encode], ids=["data-url", "base64"])
@pytest.mark.parametrize(
    ("content", "tokens"),
    [
        (png(1024, 1024), 1024),
        (png(640, 480), 300),
        (png(1, 1), 1),
        (png(100_000, 1_000), 97_656),
        (jpeg(800, 600), 468),
        (jpeg(800, 600, COLOUR_PROFILE, TABLES), 468),
        (jpeg(800, 600, b"\xff" * 3), 468),
        (jpeg(800, 600, start=0xC2), 468),
        (gif(320, 200), 62),
        (webp_lossy(1920, 1080), 2025),
        (webp_lossless(1920, 1080), 2025),
        (webp_extended(4000, 3000), 11_718),
    ],
)
def test_a_pictures_size_is_in_its_header(content: bytes, tokens: int, wrap: object) -> None:
    assert image_tokens(wrap(content)) == tokens  # type: ignore[operator]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"https://example.com/cat.png",
        b"file-abc",
        b"data:image/png;base64,",
        b"data:image/png,no",
        data_url(b"not a picture at all"),
        data_url(png(0, 10)),
        data_url(png(10, 10)[:15]),
        data_url(b"\xff\xd8\xff\xe0"),
        data_url(b"\xff\xd8" + b"\xff" * 100_000),
        data_url(b"\xff\xd8" + segment(0xE0, b"") * 40_000),
        data_url(jpeg(800, 600, *[COLOUR_PROFILE] * 3)),
        data_url(b"RIFF\0\0\0\0WEBPVP9 " + b"\1" * 40),
        b"data:image/png;base64,iVBO=w0KGgo=!!",
    ],
)
def test_a_picture_without_a_size_has_the_default_one(content: bytes) -> None:
    assert image_tokens(content) == 225  # 640 x 360 / 1024


def test_a_slash_may_be_escaped() -> None:
    content = base64.b64encode(png(640, 480)[:17] + b"\xff" * 3 + png(640, 480)[20:])
    assert b"/" in content
    assert image_tokens(content.replace(b"/", b"\\/")) == image_tokens(content)
    assert image_tokens(content) != 225


@pytest.mark.parametrize(
    ("headers", "tokens"),
    [
        ({}, 4500),  # 10 s x 2 fps x 225
        ({"x-llm-d-video-fps": "1"}, 2250),
        ({"x-llm-d-video-duration-seconds": "3.5"}, 1575),
        ({"x-llm-d-video-resolution": "1280x720"}, 18_000),
        ({"x-llm-d-video-resolution": "1280X720", "x-llm-d-video-fps": "0.5", "x-llm-d-video-duration-seconds": "2"}, 900),
        ({"x-llm-d-video-resolution": "16x16", "x-llm-d-video-fps": "4"}, 40),
    ],
)
def test_a_video_is_what_headers_say(headers: dict[str, str], tokens: int) -> None:
    assert video_tokens(headers) == tokens


@pytest.mark.parametrize("bad", ["", "x", "-1", "0", "nan", "inf", "1e300", "9" * 5_000, "2 fps", "\0"])
def test_a_bad_number_is_no_number(bad: str) -> None:
    assert video_tokens({"x-llm-d-video-fps": bad, "x-llm-d-video-duration-seconds": bad}) == 4500


@pytest.mark.parametrize("bad", ["", "x", "1280", "1280x", "x720", "0x0", "-1x-1", "1280x720x3", "axb", "9" * 5_000 + "x1"])
def test_a_bad_resolution_is_the_default_one(bad: str) -> None:
    assert video_tokens({"x-llm-d-video-resolution": bad}) == 4500


def test_a_placeholder_is_four_bytes_a_token_and_as_different_as_the_content() -> None:
    def placeholder(kind: str, content: bytes) -> bytes:
        return Estimator({}).placeholder(Media(kind, content))

    one, other = placeholder(IMAGE, data_url(png(640, 480))), placeholder(IMAGE, data_url(png(640, 480) + b"x"))
    assert len(one) == len(other) == 1200
    assert one[:16] != other[:16]
    assert one == placeholder(IMAGE, data_url(png(640, 480)))
    assert len(placeholder(AUDIO, b"x" * 401)) == 4 * 101
    assert len(placeholder(AUDIO, b"")) == 4
    assert len(placeholder(VIDEO, b"u")) == 4 * 4500
    assert len(placeholder(FILE, b"u")) == len(placeholder(EMBEDDING, b"u")) == 4 * 225


def test_no_claim_makes_a_placeholder_long() -> None:
    assert len(Estimator({}).placeholder(Media(AUDIO, b"x" * 10_000_000))) == 4 * PART_TOKENS_MAX
    huge = {"x-llm-d-video-fps": "1e8", "x-llm-d-video-duration-seconds": "1e8", "x-llm-d-video-resolution": "999999999x999999999"}
    assert len(Estimator(huge).placeholder(Media(VIDEO, b""))) == 4 * PART_TOKENS_MAX
    estimator = Estimator({})
    total = sum(len(estimator.placeholder(Media(IMAGE, data_url(png(60_000, 60_000)) + bytes([n])))) for n in range(100))
    assert 4 * REQUEST_TOKENS_MAX <= total <= 4 * (REQUEST_TOKENS_MAX + 100)
    assert estimator.count == 100


def test_embeddings_do_not_count_as_media() -> None:
    estimator = Estimator({})
    estimator.placeholder(Media(EMBEDDING, b"x"))
    assert estimator.count == 0


def test_digests_replace_the_ids_of_pictures() -> None:
    tokens = array("I", [1, 7, 7, 7, 2, 7, 7])
    assert mark(tokens, [(1, 3, b"a"), (5, 2, b"b")]) == 2
    assert (tokens[0], tokens[4]) == (1, 2)
    assert len(set(tokens[1:4])) == len(set(tokens[5:])) == 1
    assert len({*tokens[1:4], *tokens[5:], 7}) == 3


@pytest.mark.parametrize("span", [(-1, 3), (0, 0), (0, -5), (9, 2), (10**30, 1), (3, 10**30)])
def test_a_span_outside_the_prompt_is_cut_or_left_aside(span: tuple[int, int]) -> None:
    tokens = array("I", range(9))
    assert mark(tokens, [(*span, b"x")]) == 1
    assert len(tokens) == 9
    assert tokens[:3] == array("I", range(3))


def test_spans_over_one_another_cost_no_more_than_the_prompt() -> None:
    tokens = array("I", [0]) * 1_000_000
    assert mark(tokens, [(0, 1_000_000, str(n).encode()) for n in range(9_000)]) == 9_000


@settings(deadline=None, max_examples=300)
@given(
    st.sampled_from(
        [b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8", b"\xff\xd8\xff\xe0", b"GIF89a", b"RIFF\0\0\0\0WEBPVP8 ", b"RIFF\0\0\0\0WEBPVP8X"]
    ),
    st.binary(max_size=60),
    st.sampled_from([b"", b"data:image/png;base64,", b"data:;base64,"]),
)
def test_any_bytes_have_a_size(start: bytes, rest: bytes, prefix: bytes) -> None:
    assert image_tokens(prefix + base64.b64encode(start + rest)) >= 1
    assert image_tokens(prefix + start + rest) >= 1
