"""How many tokens a picture, a video or a sound stands for, and what is hashed in its place.

Nothing is fetched and no pixel is decoded: a picture's size is read from the header of its own base64 bytes, a video is what request
headers say of it. The counts are the reference picker's defaults: width x height / 1024 for a picture (640 x 360 where its size is not
in the request), as much for each of 2 frames a second of a 10 s video, a quarter of its base64 text for a sound. In the prompt stands a
digest of the content, repeated to `TOKEN_BYTES` a token: equal media make equal bytes, different media different ones, and the text
after them stays comparable. Not here: where in a body media are (conversation).

Cost: the digest, about 0.1 µs a KB, and a few µs for a picture's header.
"""

from __future__ import annotations

import binascii
from array import array
from collections.abc import Iterable, Mapping
from itertools import islice
from typing import NamedTuple

import xxhash

from epp.types import TOKEN_BYTES

WIDTH_DEFAULT, HEIGHT_DEFAULT = 640, 360
PIXELS_PER_TOKEN = 1024
VIDEO_DURATION_DEFAULT_S = 10.0
VIDEO_FPS_DEFAULT = 2.0
FPS_HEADER, DURATION_HEADER, RESOLUTION_HEADER = "x-llm-d-video-fps", "x-llm-d-video-duration-seconds", "x-llm-d-video-resolution"
PART_TOKENS_MAX = 1 << 16
"""More than an engine makes of one picture or clip, whatever a header claims."""
REQUEST_TOKENS_MAX = 1 << 18
"""Of all media of one request: what stands in their place is at most 1 MiB."""
SPANS_MAX = 10_000
"""Pictures in one prompt of token ids."""
JPEG_BYTES_MAX = 1 << 17
"""How far into a JPEG its size is looked for, past colour profiles and thumbnails."""
JPEG_SEGMENTS_MAX = 256
HEAD_BYTES = 48
"""Enough of any other format."""

IMAGE, VIDEO, AUDIO, FILE, EMBEDDING = "image", "video", "audio", "file", "embedding"


class Media(NamedTuple):
    """One part of a message that is not text."""

    kind: str
    content: bytes | memoryview
    """Its base64 bytes, data URL, URL or file id, as they stand in the body."""


class Estimator:
    """Counts the media of one request, within `REQUEST_TOKENS_MAX`."""

    __slots__ = ("_headers", "_left", "count")

    def __init__(self, headers: Mapping[str, str]) -> None:
        self._headers = headers
        self._left = REQUEST_TOKENS_MAX
        self.count = 0
        """Images, videos, clips and files; embeddings were made of them before and do not count."""

    def placeholder(self, media: Media) -> bytes:
        """What is hashed in place of `media`."""
        kind, content = media
        if kind == VIDEO:
            tokens = video_tokens(self._headers)
        elif kind == AUDIO:
            tokens = -(-len(content) // 4)
        else:
            tokens = image_tokens(content)
        tokens = max(1, min(tokens, PART_TOKENS_MAX, self._left))
        self._left -= tokens
        self.count += kind != EMBEDDING
        digest = xxhash.xxh3_128_digest(content)
        return (digest * (tokens * TOKEN_BYTES // len(digest) + 1))[: tokens * TOKEN_BYTES]


def mark(tokens: array[int], spans: Iterable[tuple[int, int, bytes]]) -> int:
    """Engines' token ids have the same id for every picture: put digests there. `spans`: offset, length, hash. Returns their number."""
    count, left = 0, len(tokens)
    for offset, length, content in islice(spans, SPANS_MAX):
        count += 1
        end = min(offset + length, len(tokens))
        if 0 <= offset < end and end - offset <= left:  # spans do not overlap, so all of them fit into the prompt once
            left -= end - offset
            tokens[offset:end] = array("I", [xxhash.xxh32_intdigest(content)]) * (end - offset)
    return count


def image_tokens(content: bytes | memoryview) -> int:
    """Of a picture by its base64 bytes or data URL; of one by URL or file id, of the default size."""
    width, height = _image_size(content) or (WIDTH_DEFAULT, HEIGHT_DEFAULT)
    return max(1, width * height // PIXELS_PER_TOKEN)


def video_tokens(headers: Mapping[str, str]) -> int:
    fps = _positive(headers.get(FPS_HEADER)) or VIDEO_FPS_DEFAULT
    duration_s = _positive(headers.get(DURATION_HEADER)) or VIDEO_DURATION_DEFAULT_S
    width, height = _resolution(headers.get(RESOLUTION_HEADER))
    frames = int(min(fps * duration_s, PART_TOKENS_MAX))
    return frames * max(1, width * height // PIXELS_PER_TOKEN)


def _positive(text: str | None) -> float:
    """0 for what is no number above 0, or too large to be one."""
    try:
        value = float(text or 0)
    except ValueError:
        return 0.0
    return value if 0 < value < 1e9 else 0.0


def _resolution(text: str | None) -> tuple[int, int]:
    """`1280x720`."""
    width, cross, height = (text or "").lower().partition("x")
    if cross and len(width) < 10 and len(height) < 10:
        try:
            size = int(width), int(height)
        except ValueError:
            return WIDTH_DEFAULT, HEIGHT_DEFAULT
        if min(size) > 0:
            return size
    return WIDTH_DEFAULT, HEIGHT_DEFAULT


def _image_size(content: bytes | memoryview) -> tuple[int, int] | None:
    url = bytes(content[:256])
    start = url.find(b"base64,") + len(b"base64,") if url.startswith(b"data:") else 0
    head = _bytes_of(content, start, HEAD_BYTES)
    if head.startswith(b"\xff\xd8"):
        size = _jpeg_size(_bytes_of(content, start, JPEG_BYTES_MAX))
    elif head.startswith(b"\x89PNG\r\n\x1a\n"):
        size = int.from_bytes(head[16:20], "big"), int.from_bytes(head[20:24], "big")
    elif head.startswith((b"GIF87a", b"GIF89a")):
        size = int.from_bytes(head[6:8], "little"), int.from_bytes(head[8:10], "little")
    elif head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        size = _webp_size(head)
    else:
        return None
    return size if min(size) > 0 else None


def _bytes_of(content: bytes | memoryview, start: int, count: int) -> bytes:
    """The first `count` bytes of the base64 text at `start`; fewer where it ends or is none."""
    text = bytes(content[start : start + count // 3 * 4])
    if b"\\" in text:
        text = text.replace(b"\\/", b"/")  # how some JSON encoders write a slash
    try:
        return binascii.a2b_base64(text[: len(text) // 4 * 4])
    except binascii.Error:
        return b""


def _jpeg_size(data: bytes) -> tuple[int, int]:
    """From the start-of-frame segment; the segments before it are skipped by their lengths."""
    at = 2
    for _ in range(JPEG_SEGMENTS_MAX):
        if at + 9 > len(data) or data[at] != 0xFF:
            break
        marker = data[at + 1]
        if marker == 0xFF:  # padding
            at += 1
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            return int.from_bytes(data[at + 7 : at + 9], "big"), int.from_bytes(data[at + 5 : at + 7], "big")
        else:
            at += 2 + max(2, int.from_bytes(data[at + 2 : at + 4], "big"))
    return 0, 0


def _webp_size(head: bytes) -> tuple[int, int]:
    """Of the three kinds: lossy, lossless, extended."""
    form = head[12:16]
    if form == b"VP8 ":
        return int.from_bytes(head[26:28], "little") & 0x3FFF, int.from_bytes(head[28:30], "little") & 0x3FFF
    if form == b"VP8L":
        bits = int.from_bytes(head[21:25], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if form == b"VP8X":
        return int.from_bytes(head[24:27], "little") + 1, int.from_bytes(head[27:30], "little") + 1
    return 0, 0
