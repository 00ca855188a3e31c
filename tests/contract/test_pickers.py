"""The contract of every picker, and the distributions they promise."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.builders import pool_of
from tests.contract.situations import Case, cases, ready

PICKERS = [case.type for case in cases("pick")]
TOTALS = st.lists(st.sampled_from([0.0, 0.5, 1.0, 7.0]) | st.floats(0, 7), min_size=1, max_size=12)
DRAWS = 12_000


def picks(type_: str, totals: Sequence[float], wanted: int = 1, draws: int = DRAWS) -> list[tuple[int, ...]]:
    """Slots picked, draw by draw."""
    picker = ready(Case(type_, {"maxNumOfEndpoints": wanted}))
    endpoints = pool_of(*[{} for _ in totals])
    rng = random.Random(11)
    return [tuple(e.slot for e in picker.pick(totals, endpoints, rng)) for _ in range(draws)]


def chi_square(counts: Mapping[object, int], shares: Mapping[object, float]) -> float:
    """Below 21 with p > 0.99 at 8 degrees of freedom or fewer; seeds are fixed."""
    assert set(counts) <= {key for key, share in shares.items() if share > 0}
    draws = sum(counts.values())
    return sum((counts.get(key, 0) - draws * share) ** 2 / (draws * share) for key, share in shares.items() if share > 0)


@pytest.mark.parametrize("type_", PICKERS)
@settings(deadline=None, max_examples=200)
@given(TOTALS, st.integers(-1, 5), st.randoms(use_true_random=False))
def test_a_picker_picks_as_many_as_it_may_each_once_and_changes_nothing(
    type_: str, totals: list[float], wanted: int, rng: random.Random
) -> None:
    picker = ready(Case(type_, {"maxNumOfEndpoints": wanted}))
    endpoints = pool_of(*[{} for _ in totals])
    given_totals, given_endpoints = list(totals), list(endpoints)
    picked = picker.pick(totals, endpoints, rng)
    assert (totals, endpoints) == (given_totals, given_endpoints)
    assert len(picked) == min(max(1, wanted), len(endpoints))
    assert len({e.slot for e in picked}) == len(picked)
    assert set(map(id, picked)) <= set(map(id, endpoints))


@pytest.mark.parametrize("type_", PICKERS)
@pytest.mark.parametrize("wanted", [1, 2])
@pytest.mark.parametrize("totals", [[1.0] * 5, [0.0] * 3])
def test_a_picker_is_uniform_among_equals(type_: str, wanted: int, totals: list[float]) -> None:
    counts = Counter(picked[0] for picked in picks(type_, totals, wanted))
    assert chi_square(counts, {slot: 1 / len(totals) for slot in range(len(totals))}) < 21, counts


@pytest.mark.parametrize("type_", PICKERS)
def test_fallbacks_are_uniform_among_equals_too(type_: str) -> None:
    counts = Counter(picked[1] for picked in picks(type_, [0.0] * 4, 2))
    assert chi_square(counts, dict.fromkeys(range(4), 0.25)) < 21, counts


@settings(deadline=None, max_examples=200)
@given(TOTALS, st.integers(1, 5))
def test_max_score_picks_the_best_first(totals: list[float], wanted: int) -> None:
    (picked,) = picks("max-score-picker", totals, wanted, draws=1)
    assert [totals[slot] for slot in picked] == sorted(totals, reverse=True)[: len(picked)]


@pytest.mark.parametrize("wanted", [1, 3])
def test_max_score_is_uniform_among_ties(wanted: int) -> None:
    counts = Counter(picked[0] for picked in picks("max-score-picker", [0.0, 1.0, 1.0, 0.5, 1.0], wanted))
    assert chi_square(counts, dict.fromkeys((1, 2, 4), 1 / 3)) < 21, counts


@pytest.mark.parametrize("wanted", [1, 2])
def test_random_does_not_look_at_totals(wanted: int) -> None:
    counts = Counter(picked[0] for picked in picks("random-picker", [0.0, 100.0, 1.0], wanted))
    assert chi_square(counts, dict.fromkeys(range(3), 1 / 3)) < 21, counts


@pytest.mark.parametrize("wanted", [1, 2])
def test_weighted_random_picks_in_proportion_and_never_a_zero(wanted: int) -> None:
    counts = Counter(picked[0] for picked in picks("weighted-random-picker", [1.0, 2.0, 3.0, 0.0, 4.0], wanted))
    assert chi_square(counts, {0: 0.1, 1: 0.2, 2: 0.3, 4: 0.4}) < 21, counts


def test_weighted_random_draws_fallbacks_in_proportion_of_what_is_left() -> None:
    # totals 1, 2, 5: P(second is b | first is a) = b / (8 - a)
    shares = {(a, b): w[0] / 8 * w[1] / (8 - w[0]) for a, b, w in ((0, 1, (1, 2)), (0, 2, (1, 5)), (1, 0, (2, 1)), (1, 2, (2, 5)))}
    shares |= {(2, 0): 5 / 8 * 1 / 3, (2, 1): 5 / 8 * 2 / 3}
    assert sum(shares.values()) == pytest.approx(1.0)
    assert chi_square(Counter(picks("weighted-random-picker", [1.0, 2.0, 5.0], 2)), shares) < 21


def test_weighted_random_puts_zeros_last() -> None:
    assert {picked[0] for picked in picks("weighted-random-picker", [0.0, 3.0, 0.0], 3, draws=200)} == {1}
    assert {picked[1:] for picked in picks("weighted-random-picker", [0.0, 3.0, 0.0], 3, draws=200)} == {(0, 2), (2, 0)}


@pytest.mark.parametrize("wanted", [1, 2])
def test_weighted_random_keeps_proportions_where_totals_are_tiny(wanted: int) -> None:
    counts = Counter(picked[0] for picked in picks("weighted-random-picker", [1e-12, 3e-12], wanted))
    assert chi_square(counts, {0: 0.25, 1: 0.75}) < 21, counts
