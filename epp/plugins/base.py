"""What a plugin is.

A plugin is one class in one file. Its fields are its configuration (`parameters` in EndpointPickerConfig, camelCase there; an
unknown field is an error); `type` is the name users write. It becomes a scorer, filter, picker or producer by having the method:

    Filter.keep      which candidates stay
    Scorer.score     one float in [0, 1] per endpoint, in order
    Picker.pick      one or more endpoints from totals
    Producer.produce puts data about this request on the request before filters run

`score_sparse` is for scorers that are zero for most endpoints (a prefix hit): it replaces `score` on the request path. A scorer
whose result depends on endpoint load alone says `per_request = False`, and is computed when load changes, not per request: for all
endpoints, or only for those that changed if it also says how each stands by itself (`PointwiseScorer`, `RangeScorer`).
Optional hooks, found once when the pipeline is built: `picked(request, endpoint)`, `removed(endpoint)`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Protocol, runtime_checkable

import msgspec

from epp.types import Endpoint, LLMRequest


class Plugin(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, rename="camel", dict=True, eq=False):
    """Base of every plugin. Fields are parameters; state that is not configuration is set in `__post_init__`."""

    type: ClassVar[str]
    aliases: ClassVar[tuple[str, ...]] = ()
    """Deprecated names still accepted."""

    @property
    def name(self) -> str:
        """The instance name from the configuration; the type when it gave none."""
        return str(self.__dict__.get("_name", self.type))

    def named(self, name: str) -> None:
        self.__dict__["_name"] = name


@runtime_checkable
class Filter(Protocol):
    def keep(self, request: LLMRequest, endpoints: Sequence[Endpoint]) -> Sequence[Endpoint]:
        """The endpoints that stay, in order."""
        ...


@runtime_checkable
class Scorer(Protocol):
    per_request: ClassVar[bool]

    def score(self, request: LLMRequest, endpoints: Sequence[Endpoint]) -> Sequence[float]:
        """One float in [0, 1] per endpoint, in the endpoints' order; higher is better."""
        ...


@runtime_checkable
class SparseScorer(Protocol):
    def score_sparse(self, request: LLMRequest) -> Mapping[int, float]:
        """slot -> score in [0, 1]; an absent slot scores 0."""
        ...


@runtime_checkable
class Picker(Protocol):
    def pick(self, totals: Sequence[float], endpoints: Sequence[Endpoint], rng: random.Random) -> Sequence[Endpoint]:
        """At least one endpoint, best first; the second and further are fallbacks."""
        ...


@runtime_checkable
class Producer(Protocol):
    def produce(self, request: LLMRequest, mask: int) -> None:
        """Put data on the request; `mask` has bit `slot` set for each candidate."""
        ...


class PointwiseScorer(Plugin):
    """A scorer of load whose score of an endpoint depends on that endpoint alone."""

    per_request: ClassVar[bool] = False

    def score_one(self, endpoint: Endpoint) -> float:
        """In [0, 1]."""
        raise NotImplementedError

    def score(self, _request: LLMRequest, endpoints: Sequence[Endpoint]) -> Sequence[float]:
        return [self.score_one(endpoint) for endpoint in endpoints]


class RangeScorer(Plugin):
    """A scorer of load: (max - x) / (max - min) of a measure over the candidates, 1 for all when they are equal."""

    per_request: ClassVar[bool] = False

    def measure(self, endpoint: Endpoint) -> float:
        """Finite; the lower the better."""
        raise NotImplementedError

    def score(self, _request: LLMRequest, endpoints: Sequence[Endpoint]) -> Sequence[float]:
        measures = [self.measure(endpoint) for endpoint in endpoints]
        low, high = min(measures), max(measures)
        return [range_score(measure, low, high) for measure in measures]


def range_score(measure: float, low: float, high: float) -> float:
    """(high - x) / (high - low); 1 where there is no range."""
    return (high - measure) / (high - low) if high > low else 1.0


PickedHook = Callable[[LLMRequest, Endpoint], None]
RemovedHook = Callable[[Endpoint], None]


def hook(plugin: Any, name: str) -> Any | None:
    """The plugin's optional hook of that name, or None."""
    found = getattr(plugin, name, None)
    return found if callable(found) else None
