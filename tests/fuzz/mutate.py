"""Seeded mutations of inputs, for where no coverage-guided fuzzer is installed and for the slice that every test run includes."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

INPUT_BYTES_MAX = 8_192
WORDS = [
    b'"model":"m"', b'"model"', b'"usage":{', b'"prompt_tokens":', b"9" * 30, b"1e999", b"-1", b"[", b"{", b"}", b"]", b"\\u00fc", b"\\", b'"', b"null",
    b"true", b"\xff", b"\0", b"\xed\xa0\x80", b"data: ", b"\n\n", b"[DONE]", b"\x7f\xff\xff\xff", b"\xff\xff\xff\xff", b"\x80\x80\x80\x80\x10", b",", b":",
]  # fmt: skip
EDGES = [0, 1, 2, 3, 4, 5, 8, 16, 32, 63, 64, 127, 128, 254, 255]


def mutations(seeds: Sequence[bytes], rng: random.Random) -> Iterator[bytes]:
    """The seeds themselves, then without end what one to five changes make of one of them."""
    yield from seeds
    while True:
        data = bytearray(rng.choice(seeds))
        for _ in range(rng.randint(1, 5)):
            data = _changed(data, seeds, rng)
        yield bytes(data[:INPUT_BYTES_MAX])


def _changed(data: bytearray, seeds: Sequence[bytes], rng: random.Random) -> bytearray:
    at = rng.randrange(len(data) + 1)
    to = min(len(data), at + 1 + int(rng.expovariate(0.1)))
    match rng.randrange(9):
        case 0 if at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        case 1 if at < len(data):
            data[at] = rng.choice(EDGES)
        case 2 if at < len(data):
            data[at] = rng.randrange(256)
        case 3:
            del data[at:to]
        case 4:
            data[at:at] = data[at:to] * rng.choice([1, 1, 2, 50])
        case 5:
            data[at:at] = rng.choice(WORDS)
        case 6:
            data[at:to] = rng.choice(WORDS)
        case 7:
            other = rng.choice(seeds)
            data[at:] = other[rng.randrange(len(other) + 1) :]
        case _:
            data[at:at] = rng.randbytes(rng.choice([1, 2, 4, 20]))
    return data
