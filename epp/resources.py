"""What InferenceObjective and InferenceModelRewrite objects say: the priority behind a name, the model asked for instead of another.

A source (a file, Kubernetes) gives all objects there are; the tables are made anew from them and replaced whole. All on one event loop
between awaits, so no lock. Not here: reading objects (sources), putting the name into a body (parsing.model_name), what is done with a
priority (admission).

Invariants: of the objects only those of our pool count; an exact rule beats a rule without matches, then the older object, then the
namespace and name that sort first, then the rule written first.

Cost per request: `priority` one dict look-up (0.05 µs); `target` one or two, and where there are several targets one random number and
one bisection (0.3 µs).
"""

from __future__ import annotations

import math
import random
from bisect import bisect_right
from collections.abc import Collection, Iterable, Sequence
from itertools import accumulate
from typing import NamedTuple

POOL_GROUP = "inference.networking.k8s.io"
"""API group of a pool where a reference names none."""
NAMESPACE = "default"
"""Of objects that name none."""


class Objective(NamedTuple):
    """How important the requests are that name it."""

    name: str
    namespace: str = NAMESPACE
    priority: int = 0
    pool_name: str = ""
    pool_group: str = POOL_GROUP


class Choice(NamedTuple):
    """One of the models a rule sends requests to."""

    model: str
    weight: int | None = None
    """Its part of the sum of weights. Unset: no part, or an equal part if no choice of the rule has a weight."""


class Rule(NamedTuple):
    models: tuple[str, ...]
    """The names it is for, exactly; empty: every model no other rule is for, and requests without a model."""
    choices: tuple[Choice, ...]
    """A rule that has none counts as not written."""


class Rewrite(NamedTuple):
    """Which models are asked for instead of which."""

    name: str
    namespace: str = NAMESPACE
    rules: tuple[Rule, ...] = ()
    created_s: float = math.inf
    """Seconds since 1970; unset is newer than everything, as an object applied this moment would be."""
    pool_name: str = ""
    pool_group: str = POOL_GROUP


class Target(NamedTuple):
    """What one request's model becomes."""

    model: str
    rewrite: str
    """Name of the Rewrite that said so."""


class Limits(NamedTuple):
    """More than any of these in one `apply` is a fault in the source."""

    objects: int = 10_000
    """Objectives and rewrites, those of other pools too."""
    rules: int = 10_000
    models: int = 20_000
    """Names in the `models` of rules."""
    choices: int = 20_000


class Counts(NamedTuple):
    """What is in the tables."""

    objectives: int = 0
    rewrites: int = 0
    rules: int = 0
    other_pools: int = 0
    """Objects left out because they are of another pool."""


class _Split(NamedTuple):
    """A rule, ready to be drawn from."""

    targets: tuple[Target, ...]
    """Those with a part in the traffic, at least one."""
    bounds: tuple[int, ...]
    """Sums of the weights up to and with each."""

    @classmethod
    def of(cls, choices: Sequence[Choice], rewrite: str) -> _Split:
        weights = [choice.weight or 0 for choice in choices]
        if not any(weights):
            weights = [1] * len(choices)
        chosen = [(choice.model, weight) for choice, weight in zip(choices, weights, strict=True) if weight]
        return cls(tuple(Target(model, rewrite) for model, _ in chosen), tuple(accumulate(weight for _, weight in chosen)))


class Resources:
    """The tables of one pool."""

    def __init__(self, rng: random.Random, *, pool_name: str = "", pool_group: str = "", limits: Limits | None = None) -> None:
        """`pool_name`, `pool_group`: only objects that refer to this pool count; empty: whatever they refer to."""
        self.counts = Counts()
        self.names_rewritten: frozenset[str] = frozenset()
        """Models that rules are for or send to: an operator wrote them, so no metric folds them into `other`."""
        self.rewrites_any = False
        """Whether there is a rule at all."""
        self.priorities: frozenset[int] = frozenset()
        """Those of the objectives."""
        self.objectives: Collection[str] = ()
        """Their names."""
        self.models_rewritten: Collection[str] = ()
        """Models that rules are for by name."""
        self._random = rng.random
        self._pool_name = pool_name
        self._pool_group = pool_group
        self._limits = limits or Limits()
        self._priorities: dict[str, int] = {}
        self._exact: dict[str, _Split] = {}
        self._generic: _Split | None = None

    def __repr__(self) -> str:
        return f"<Resources objectives={self.counts.objectives} rewrites={self.counts.rewrites} rules={self.counts.rules}>"

    def priority(self, name: str) -> int:
        """Of the objective of this name; 0 if there is none, and for no name."""
        return self._priorities.get(name, 0)

    def target(self, model: str) -> Target | None:
        """What to ask the engine for instead of `model` (empty: the request names none), drawn by weight. None: no rule is for it."""
        split = self._exact.get(model) or self._generic
        if split is None:
            return None
        targets, bounds = split
        if len(targets) == 1:
            return targets[0]
        return targets[bisect_right(bounds, self._random() * bounds[-1])]

    def apply(self, objectives: Iterable[Objective], rewrites: Iterable[Rewrite]) -> None:
        """Make the tables exactly this. Raises ValueError when it is more than a limit; they are then unchanged."""
        objectives, rewrites = list(objectives), list(rewrites)
        self._check(objectives, rewrites)
        objectives_ours = [objective for objective in objectives if self._ours(objective)]
        rewrites_ours = [rewrite for rewrite in rewrites if self._ours(rewrite)]
        priorities: dict[str, int] = {}
        for objective in sorted(objectives_ours, key=lambda o: o.namespace):
            priorities.setdefault(objective.name, objective.priority)
        exact: dict[str, _Split] = {}
        generic: _Split | None = None
        names: set[str] = set()
        for rewrite in sorted(rewrites_ours, key=lambda r: (r.created_s, r.namespace, r.name)):
            for rule in rewrite.rules:
                if not rule.choices:
                    continue
                split = _Split.of(rule.choices, rewrite.name)
                for model in rule.models:
                    exact.setdefault(model, split)
                if not rule.models:
                    generic = generic or split
                names.update(rule.models, (choice.model for choice in rule.choices))
        self._priorities, self._exact, self._generic = priorities, exact, generic
        self.names_rewritten = frozenset(names)
        self.rewrites_any = bool(exact) or generic is not None
        self.priorities = frozenset(priorities.values())
        self.objectives, self.models_rewritten = priorities.keys(), exact.keys()
        self.counts = Counts(
            objectives=len(objectives_ours),
            rewrites=len(rewrites_ours),
            rules=sum(len(rewrite.rules) for rewrite in rewrites_ours),
            other_pools=len(objectives) + len(rewrites) - len(objectives_ours) - len(rewrites_ours),
        )

    def _ours(self, item: Objective | Rewrite) -> bool:
        return (not self._pool_name or item.pool_name == self._pool_name) and (not self._pool_group or item.pool_group == self._pool_group)

    def _check(self, objectives: Sequence[Objective], rewrites: Sequence[Rewrite]) -> None:
        rules = [rule for rewrite in rewrites for rule in rewrite.rules]
        for what, count, limit in (
            ("objects", len(objectives) + len(rewrites), self._limits.objects),
            ("rules", len(rules), self._limits.rules),
            ("models in matches", sum(len(rule.models) for rule in rules), self._limits.models),
            ("targets", sum(len(rule.choices) for rule in rules), self._limits.choices),
        ):
            if count > limit:
                raise ValueError(f"{count} {what}, the limit is {limit}")
