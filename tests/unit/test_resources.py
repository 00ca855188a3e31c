"""Objectives and rewrites: whose priority, which rule, which model, and how often."""

from __future__ import annotations

import math
import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from epp.resources import Choice, Counts, Limits, Objective, Resources, Rewrite, Rule, Target


class Drawn(random.Random):
    """A source of the numbers it is told, in turn; counts how many were asked for."""

    def __init__(self, *numbers: float) -> None:
        super().__init__(0)
        self.numbers = list(numbers)
        self.calls = 0

    def random(self) -> float:
        self.calls += 1
        return self.numbers.pop(0)


def rule(*models: str, to: str | tuple[Choice, ...]) -> Rule:
    return Rule(models, (Choice(to),) if isinstance(to, str) else to)


def resources(*rewrites: Rewrite, rng: random.Random | None = None) -> Resources:
    made = Resources(rng or random.Random(1))
    made.apply([], rewrites)
    return made


# Objectives


def test_priorities() -> None:
    made = Resources(random.Random(1))
    made.apply([Objective("chat", priority=10), Objective("batch", priority=-1), Objective("plain")], [])
    asked = ("chat", "batch", "plain", "unknown", "", "Chat")
    assert {name: made.priority(name) for name in asked} == {"chat": 10, "batch": -1, "plain": 0, "unknown": 0, "": 0, "Chat": 0}
    assert made.priorities == {10, -1, 0}


@pytest.mark.parametrize("turned", [False, True])
def test_of_one_name_in_two_namespaces_the_first_namespace_counts(turned: bool) -> None:
    both = [Objective("chat", "a", 1), Objective("chat", "b", 2)]
    made = Resources(random.Random(1))
    made.apply(both[::-1] if turned else both, [])
    assert made.priority("chat") == 1


# Which rule


def test_nothing_is_rewritten_without_rules() -> None:
    made = Resources(random.Random(1))
    assert (made.target("m"), made.target(""), made.priority("m")) == (None, None, 0)
    assert (made.names_rewritten, made.counts) == (frozenset(), Counts())


def test_an_exact_rule_beats_a_generic_one_however_old() -> None:
    made = resources(
        Rewrite("generic", rules=(rule(to="any"),), created_s=1),
        Rewrite("exact", rules=(rule("m", "n", to="special"),), created_s=2),
    )
    assert {model: made.target(model) for model in ("m", "n", "other", "")} == {
        "m": Target("special", "exact"),
        "n": Target("special", "exact"),
        "other": Target("any", "generic"),
        "": Target("any", "generic"),
    }


def test_a_model_no_rule_is_for_stays() -> None:
    made = resources(Rewrite("exact", rules=(rule("m", to="n"),)))
    assert made.target("") is None
    assert made.target("M") is None
    assert made.target("n") is None, "a target is not rewritten again"


@pytest.mark.parametrize(
    ("first", "second", "winner"),
    [
        (Rewrite("b", "x", created_s=1), Rewrite("a", "a", created_s=2), "b"),  # the older
        (Rewrite("b", "a", created_s=1), Rewrite("a", "b", created_s=1), "b"),  # the namespace that sorts first
        (Rewrite("b", "a", created_s=1), Rewrite("a", "a", created_s=1), "a"),  # the name that sorts first
        (Rewrite("b", "a"), Rewrite("a", "a"), "a"),  # without a time, all are of the same age
        (Rewrite("a", "a"), Rewrite("b", "b", created_s=1e12), "b"),  # and newer than one with a time
        (Rewrite("b", "a", created_s=-1), Rewrite("a", "a", created_s=0), "b"),  # before 1970
    ],
)
@pytest.mark.parametrize("models", [("m",), ()])
@pytest.mark.parametrize("turned", [False, True])
def test_ties(first: Rewrite, second: Rewrite, winner: str, models: tuple[str, ...], turned: bool) -> None:
    both = [its._replace(rules=(Rule(models, (Choice(its.name),)),)) for its in (first, second)]
    assert resources(*(both[::-1] if turned else both)).target("m") == Target(winner, winner)


def test_within_an_object_the_rule_written_first_wins() -> None:
    made = resources(Rewrite("r", rules=(rule("m", to="1"), rule("m", "n", to="2"), rule(to="3"), rule(to="4"))))
    assert {model: made.target(model) for model in ("m", "n", "x")} == {
        "m": Target("1", "r"),
        "n": Target("2", "r"),
        "x": Target("3", "r"),
    }


@pytest.mark.parametrize(
    ("rules", "some"), [((), False), ((Rule(("m",), ()),), False), ((rule("m", to="n"),), True), ((rule(to="n"),), True)]
)
def test_whether_anything_is_rewritten(rules: tuple[Rule, ...], some: bool) -> None:
    made = resources(Rewrite("r", rules=rules))
    assert made.rewrites_any is some
    made.apply([], [])
    assert not made.rewrites_any


def test_a_rule_without_choices_counts_as_not_written() -> None:
    made = resources(Rewrite("r", rules=(Rule(("m",), ()), rule(to="any"))))
    assert made.target("m") == Target("any", "r")


# How often


@pytest.mark.parametrize(
    ("weights", "parts"),
    [
        ((None, None, None), (1 / 3, 1 / 3, 1 / 3)),
        ((90, 10), (0.9, 0.1)),
        ((1, 999_999), (1e-6, 1 - 1e-6)),
        ((None, 30, 10), (0.0, 0.75, 0.25)),
        ((5, None), (1.0, 0.0)),
        ((0, 0), (0.5, 0.5)),
        ((0, 7), (0.0, 1.0)),
        ((1_000_000, 1_000_000, 1_000_000), (1 / 3, 1 / 3, 1 / 3)),
    ],
)
def test_parts_of_the_traffic(weights: tuple[int | None, ...], parts: tuple[float, ...]) -> None:
    choices = tuple(Choice(str(i), weight) for i, weight in enumerate(weights))
    made = resources(Rewrite("r", rules=(rule("m", to=choices),)), rng=random.Random(20))
    count = 20_000
    got: Counter[str] = Counter()
    for _ in range(count):
        target = made.target("m")
        assert target is not None
        got[target.model] += 1
    for i, part in enumerate(parts):
        spread = math.sqrt(part * (1 - part) / count)
        assert abs(got[str(i)] / count - part) <= 5 * spread, (weights, got)


def test_where_one_target_ends_and_the_next_begins() -> None:
    rng = Drawn(0.0, 0.2499999, 0.25, 0.9999999, math.nextafter(1.0, 0.0))
    made = resources(Rewrite("r", rules=(rule("m", to=(Choice("a", 1), Choice("nothing"), Choice("b", 3))),)), rng=rng)
    assert [made.target("m") for _ in range(5)] == [Target(model, "r") for model in "aabbb"]


@given(st.lists(st.integers(1, 1_000_000), min_size=2, max_size=40))
def test_the_largest_number_there_is_still_draws_the_last_target(weights: list[int]) -> None:
    choices = tuple(Choice(str(i), weight) for i, weight in enumerate(weights))
    made = resources(Rewrite("r", rules=(rule("m", to=choices),)), rng=Drawn(math.nextafter(1.0, 0.0)))
    assert made.target("m") == Target(str(len(weights) - 1), "r")


def test_one_number_is_drawn_where_there_is_a_choice_and_none_where_there_is_not() -> None:
    rng = Drawn(0.5, 0.5)
    made = resources(
        Rewrite(
            "r", rules=(rule("one", to="a"), rule("weighed", to=(Choice("a", 1), Choice("b"))), rule("two", to=(Choice("a"), Choice("b"))))
        ),
        rng=rng,
    )
    for model in ("one", "weighed", "nobody's", "", "two", "two"):
        made.target(model)
    assert rng.calls == 2


# Pools


@pytest.mark.parametrize(
    ("pool_name", "pool_group", "seen"),
    [
        ("", "", {"ours", "another", "same name"}),
        ("pool", "inference.networking.k8s.io", {"ours"}),
        ("pool", "", {"ours", "same name"}),
        ("", "inference.networking.k8s.io", {"ours", "another"}),
        ("none", "", set()),
    ],
)
def test_only_objects_of_the_pool_count(pool_name: str, pool_group: str, seen: set[str]) -> None:
    refs = {
        "ours": ("pool", "inference.networking.k8s.io"),
        "another": ("other", "inference.networking.k8s.io"),
        "same name": ("pool", "inference.networking.x-k8s.io"),
    }
    made = Resources(random.Random(1), pool_name=pool_name, pool_group=pool_group)
    made.apply(
        [Objective(name, priority=1, pool_name=ref, pool_group=group) for name, (ref, group) in refs.items()],
        [Rewrite(name, rules=(rule(name, to="new " + name),), pool_name=ref, pool_group=group) for name, (ref, group) in refs.items()],
    )
    assert {name for name in refs if made.priority(name)} == seen
    assert {name for name in refs if made.target(name)} == seen
    assert made.names_rewritten == seen | {"new " + name for name in seen}
    assert made.counts == Counts(len(seen), len(seen), len(seen), 2 * (3 - len(seen)))


# Replacing


def test_apply_replaces_everything() -> None:
    made = resources(Rewrite("r", rules=(rule("m", to="n"), rule(to="any"))))
    made.apply([Objective("chat", priority=1)], [])
    assert (made.target("m"), made.target("x"), made.names_rewritten, made.priority("chat")) == (None, None, frozenset(), 1)
    made.apply([], [])
    assert (made.priority("chat"), made.counts, made.priorities) == (0, Counts(), frozenset())


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        (Limits(objects=2), "3 objects, the limit is 2"),
        (Limits(rules=2), "3 rules, the limit is 2"),
        (Limits(models=1), "2 models in matches, the limit is 1"),
        (Limits(choices=4), "5 targets, the limit is 4"),
    ],
)
def test_more_than_a_limit_changes_nothing(limits: Limits, message: str) -> None:
    made = Resources(random.Random(1), limits=limits)
    made.apply([Objective("kept", priority=7)], [Rewrite("kept", rules=(rule("k", to="kept"),))])
    three = (Choice("a"), Choice("b"), Choice("c"))
    with pytest.raises(ValueError, match=message):
        made.apply([Objective("x")], [Rewrite("r", rules=(rule("m", to=three), rule("n", to="n"))), Rewrite("s", rules=(rule(to="o"),))])
    assert (made.priority("kept"), made.target("k"), made.target("m")) == (7, Target("kept", "kept"), None)
    assert made.names_rewritten == {"k", "kept"}


MODELS = st.sampled_from(["a", "b", "c", "d"])
RULES = st.builds(
    Rule,
    st.lists(MODELS, max_size=3).map(tuple),
    st.lists(st.builds(Choice, MODELS, st.none() | st.integers(0, 3)), max_size=3).map(tuple),
)
REWRITES = st.lists(
    st.builds(
        Rewrite,
        st.sampled_from("rst"),
        st.sampled_from("nm"),
        st.lists(RULES, max_size=3).map(tuple),
        st.sampled_from([1.0, 2.0, math.inf]),
    ),
    max_size=5,
    unique_by=lambda its: (its.namespace, its.name),
)


@settings(deadline=None, max_examples=300)
@given(REWRITES, st.randoms(use_true_random=False))
def test_the_tables_say_what_going_through_all_rules_says(rewrites: list[Rewrite], rng: random.Random) -> None:
    made = resources(*rewrites)
    shuffled = rewrites[:]
    rng.shuffle(shuffled)
    same = resources(*shuffled)
    written = [(i, its, rule_) for its in rewrites for i, rule_ in enumerate(its.rules) if rule_.choices]
    for model in ("a", "b", "c", "d", "x", ""):
        its_own = [found for found in written if model in found[2].models]
        generic = [found for found in written if not found[2].models]
        target = made.target(model)
        assert target == same.target(model)  # the same seed, so the same draw
        if not its_own and not generic:
            assert target is None
            continue
        _, winner, rule_ = min(its_own or generic, key=lambda found: (found[1].created_s, found[1].namespace, found[1].name, found[0]))
        possible = {choice.model for choice in rule_.choices if choice.weight} or {choice.model for choice in rule_.choices}
        assert target is not None
        assert target.rewrite == winner.name
        assert target.model in possible
        assert target.model in made.names_rewritten
