"""How prompts are cut into blocks, and that equal hashes mean equal prefixes of one model and tenant."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from epp.prefix.hashing import Blocks, blocks, chain, seed
from epp.types import TOKEN_BYTES

LAYOUT = blocks(64, 131_072, 2_048)


def test_the_geometric_layout() -> None:
    sizes = [b - a for a, b in zip((0, *LAYOUT.cumulative), LAYOUT.cumulative, strict=False)]
    assert sizes == [64] * 32 + [128] * 16 + [256] * 16 + [512] * 16 + [1024] * 16 + [2048] * 16 + [4096] * 16
    assert LAYOUT.cumulative[-1] == 131_072
    assert [part.stop for part in LAYOUT.slices] == [TOKEN_BYTES * tokens for tokens in LAYOUT.cumulative]
    assert [part.start for part in LAYOUT.slices] == [0, *(part.stop for part in LAYOUT.slices[:-1])]


@pytest.mark.parametrize(
    ("tokens", "count"), [(63, 0), (64, 1), (127, 1), (2_048, 32), (4_096, 48), (128_000, 127), (131_072, 128), (200_000, 128)]
)
def test_blocks_of_a_prompt(tokens: int, count: int) -> None:
    assert len(chain(bytes(TOKEN_BYTES * tokens), LAYOUT, 1)) == count


def test_resolution_is_a_few_percent_of_the_depth_at_worst() -> None:
    before = 0
    for tokens in LAYOUT.cumulative:
        if before >= 2_048:
            assert (tokens - before) / tokens < 0.06
        before = tokens


def test_the_uniform_layout_and_both_limits() -> None:
    assert Blocks(64, 1_000, 100, geometric=False).cumulative == tuple(range(64, 1_000, 64))
    assert len(Blocks(64, 131_072, 50, geometric=False).cumulative) == 50
    assert len(Blocks(64, 131_072, 50, geometric=True).cumulative) == 50
    assert Blocks(64, 63, 50, geometric=True).cumulative == ()
    assert chain(bytes(1_000), Blocks(64, 63, 50, geometric=True), 1) == []


@settings(deadline=None, max_examples=150)
@given(st.integers(0, 6_000), st.integers(0, 6_000), st.integers(0, 6_000), st.booleans())
def test_a_common_prefix_is_as_many_equal_hashes_as_it_has_whole_blocks(common: int, more: int, other: int, geometric: bool) -> None:
    layout = blocks(64, 131_072, 2_048, geometric=geometric)
    shared = bytes(number % 256 for number in range(common * TOKEN_BYTES))
    one = chain(shared + b"a" * (more * TOKEN_BYTES), layout, 7)
    two = chain(shared + b"b" * (other * TOKEN_BYTES), layout, 7)
    equal = sum(tokens <= common for tokens in layout.cumulative)
    assert one[:equal] == two[:equal]
    assert len(one) >= equal
    assert not set(one[equal:]) & set(two[equal:]), "after they part nothing is equal again"
    assert len(set(one)) == len(one), "equal text at another depth is another block"


def test_a_memoryview_hashes_as_its_bytes() -> None:
    prompt = bytes(range(256)) * 20
    assert chain(memoryview(prompt), LAYOUT, 5) == chain(prompt, LAYOUT, 5)


def test_models_and_salts_share_nothing() -> None:
    prompt = bytes(4_096)
    seeds = [seed("m", ""), seed("n", ""), seed("m", "s"), seed("m", "t"), seed("", "m"), seed("ms", "")]
    assert len(set(seeds)) == len(seeds)
    hashes = [tuple(chain(prompt, LAYOUT, start)) for start in seeds]
    assert len({block for each in hashes for block in each}) == sum(map(len, hashes))
    assert seed("m", "s") == seed("m", "s")
    assert seed("日本", "🙂") != seed("日本", "")
