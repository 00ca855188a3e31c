"""The inputs fuzzing starts from: `python -m tests.fuzz.seeds` writes them to the folder beside this file. An input that found a bug is
kept there too, so that every run begins with it."""

from __future__ import annotations

from pathlib import Path

from tests.builders import chat, metadata, request_body, request_headers, response_body, response_headers
from tests.fuzz.targets import (
    BODY,
    BYTES,
    EVENT,
    FRAME,
    HALF_CLOSE,
    MESSAGE,
    OPEN,
    OPENING,
    PLAIN,
    RAW,
    RESET,
    TARGETS,
    WAIT,
    step,
)

FOLDER = Path(__file__).with_name("seeds")
CHAT = chat("hi", stream=True)
USAGE = b'{"usage":{"prompt_tokens":7,"completion_tokens":2,"prompt_tokens_details":{"cached_tokens":3}}}'
EVENTS = b'data: {"model":"t","choices":[]}\n\ndata: ' + USAGE + b"\n\ndata: [DONE]\n\n"

_hinted = request_headers(filter_metadata={"envoy.lb.subset_hint": {"x-gateway-destination-endpoint-subset": ["10.0.0.1"]}})
_served = response_headers(served="10.0.0.2:8000", upstream_address="10.0.0.3:8000", code_details="via_upstream")
_listed = request_headers()
_listed.metadata_context.CopyFrom(metadata({"envoy.lb.subset_hint": {"x-gateway-destination-endpoint-subset": "10.0.0.1:8000,10.0.0.2"}}))

SEEDS: dict[str, dict[str, bytes]] = {
    "session": {
        "raw": step(RAW, 0, _hinted.SerializeToString(deterministic=True))
        + step(RAW, 0, request_body(CHAT, end_of_stream=True).SerializeToString())
        + step(RAW, 0, _served.SerializeToString(deterministic=True))
        + step(RAW, 0, response_body(EVENTS, end_of_stream=True).SerializeToString()),
        "subset-as-text": step(RAW, 0, _listed.SerializeToString(deterministic=True)) + step(BODY, 1, CHAT),
        "full-duplex": step(OPENING, 0) + step(BODY, 0, CHAT[:20]) + step(BODY, 1, CHAT[20:]) + step(PLAIN, 3) + step(BODY, 2, EVENTS) + step(BODY, 3),
        "trailers": step(OPENING, 0) + step(BODY, 0, CHAT) + step(PLAIN, 0) + step(PLAIN, 2) + step(BODY, 2, USAGE) + step(PLAIN, 1),
        "cut-short": step(OPENING, 0) + step(BODY, 0, CHAT[:20]),
        "half-close": step(OPENING, 8) + step(BODY, 0, CHAT) + step(HALF_CLOSE),
        "passing-by": step(OPENING, 4) + step(BODY, 0, b"x") + step(BODY, 0) + step(HALF_CLOSE),
        "rewrite": step(OPENING, 64) + step(BODY, 1, CHAT) + step(PLAIN, 3) + step(BODY, 2, EVENTS[:15]) + step(BODY, 2, EVENTS[15:]) + step(PLAIN, 1),
        "waiting": step(OPENING, 0) + step(BODY, 0, CHAT) + step(WAIT, 200),
        **{f"mode-{number}": step(OPENING, 16 + 8 * number) + step(BODY, 1, CHAT) + step(PLAIN, 2) + step(BODY, 3, USAGE) for number in range(6)},
    },
    "request": {
        "chat": b"\0" + chat("hi", tools=[{"type": "function"}], max_tokens=5, cache_salt="s"),
        "completion": b"\1" + b'{"model":"m","prompt":"hi \\u00fc","max_completion_tokens":3}',
        "tokens": b"\1" + b'{"prompt":[1,2,3,4294967295],"model":"m"}',
        "texts": b"\2" + b'{"x":{"model":"y"},"model" : "m" ,"prompt":["a","b"]}',
        "models": b"\t" + b'{"model":{"model":"y"},"model" : "m" ,"proel" : "m" ,"prompt":["a","b"]}',
        "usage": b"\2" + USAGE,
        "events": b"\x14" + EVENTS,
    },
    "connection": {
        "exchange": b"\0" + step(OPEN, 0) + step(MESSAGE, 0x20, CHAT) + step(RESET, 0),
        "health": b"\0" + step(OPEN, 0x10) + step(MESSAGE, 0x18, b""),
        "unknown": b"\0" + step(OPEN, 0x28) + step(RESET, 0),
        "noise": b"\1" + step(BYTES, 0, b"GET / HTTP/1.1\r\n\r\n"),
        "frames": b"\0" + step(OPEN, 1) + step(FRAME, 0, b"\x08\0\0\0\0\3\0\0\0\1") + step(FRAME, 0, b"\6\0\0\0\0\0" + bytes(8)),
        "settings": b"\0" + step(FRAME, 0, b"\4\0\0\0\0\0\0\4\0\0\0\0") + step(OPEN, 0) + step(MESSAGE, 0x28, CHAT),
        "goaway": b"\2" + step(OPEN, 0) + step(MESSAGE, 0x20, CHAT) + step(EVENT, 3) + step(OPEN, 1) + step(FRAME, 0, b"\7\0\0\0\0\0" + bytes(8)),
        "paused": b"\2" + step(OPEN, 0) + step(EVENT, 0) + step(MESSAGE, 0x20, CHAT * 50) + step(EVENT, 2) + step(EVENT, 1),
        "no-window": b"\2" + step(FRAME, 0, b"\4\0\0\0\0\0\0\4\0\0\0\0") + b"".join(step(OPEN, n) + step(MESSAGE, 0x20 | n, CHAT * 99) for n in range(5)),
    },
}  # fmt: skip


def load(target: str) -> list[bytes]:
    """Every seed of a target, in the order of the names."""
    return [path.read_bytes() for path in sorted((FOLDER / target).iterdir())]


def write() -> None:
    assert SEEDS.keys() == TARGETS.keys()
    for target, seeds in SEEDS.items():
        (FOLDER / target).mkdir(parents=True, exist_ok=True)
        for name, data in seeds.items():
            (FOLDER / target / name).write_bytes(data)


if __name__ == "__main__":
    write()
