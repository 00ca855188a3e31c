"""What a plugin is.

A plugin is one class in one file. Its fields are its configuration (`parameters` in EndpointPickerConfig, camelCase there; an
unknown field is an error); `type` is the name users write. What it is for follows from the methods it has:

    Filter.keep                which candidates stay
    Scorer.score               one float in [0, 1] per endpoint, in order
    Picker.pick                one or more endpoints from totals
    Producer.produce           puts data about this request on the request, before anything decides
    Admitter.admit             raises if the request is not to be served now
    ProfileHandler.schedule    which profiles run, and what their results mean
    Decider.disaggregate       whether a further stage is worth it for this request
    Detector.saturation        how full the pool is
    Parser.parse               a request's body to what routing needs

`score_sparse` is for scorers that are zero for most endpoints (a prefix hit): it replaces `score` on the request path. A scorer
whose result depends on endpoint load alone says `per_request = False`, and is computed when load changes, not per request: for all
endpoints, or only for those that changed if it also says how each stands by itself (`PointwiseScorer`, `RangeScorer`). A filter
whose result depends on nothing but which endpoints there are and their labels says `per_request = False` too.

Optional hooks, found once when the pipeline is built: see `Hooks`. Optional `bind(context)` is called once before any of them, with
the clock, the random generator and the other plugins; what it raises as ValueError is a fault of the configuration.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, runtime_checkable

import msgspec

from epp.clock import Clock
from epp.types import NO_HEADERS, NO_TARGETS, Decision, Endpoint, LLMRequest, Snapshot, Usage


class Plugin(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, rename="camel", dict=True, eq=False):
    """Base of every plugin. Fields are parameters; state that is not configuration is set in `__post_init__`, in `__dict__`."""

    type: ClassVar[str]
    aliases: ClassVar[tuple[str, ...]] = ()
    """Deprecated names still accepted."""
    deprecated: ClassVar[str] = ""
    """What to use in its place, where the whole type is deprecated."""
    stability: ClassVar[Literal["beta", "alpha"]] = "beta"
    """Alpha plugins need `--allow-experimental-plugins`."""
    roles: ClassVar[tuple[str, ...]] = ()
    """What it is for, where no method says so."""
    produces: ClassVar[tuple[str, ...]] = ()
    """Data keys this producer puts on requests."""
    requires: ClassVar[tuple[str, ...]] = ()
    """Data keys that must be on requests: a default producer is added for one nobody produces."""
    uses: ClassVar[tuple[str, ...]] = ()
    """Data keys it can do without; its producers run before it."""

    @property
    def name(self) -> str:
        """The instance name from the configuration; the type when it gave none."""
        name: str = self.__dict__.get("_name") or self.type
        return name

    def named(self, name: str) -> None:
        self.__dict__["_name"] = name


@dataclass(frozen=True, slots=True)
class Context:
    """What `bind` gets."""

    clock: Clock
    rng: random.Random
    plugins: Mapping[str, Plugin]
    """Every configured plugin, by instance name."""

    def plugin(self, name: str, role: type[Any], *, parameter: str) -> Any:
        """The plugin a parameter names. Raises ValueError that says what is wrong."""
        found = self.plugins.get(name)
        if found is None:
            raise ValueError(f"{parameter}: no plugin is named {name!r}")
        if not isinstance(found, role):
            raise ValueError(f"{parameter}: {name!r} is no {role.__name__.lower()}")  # noqa: TRY004 - a fault of the configuration
        return found


@runtime_checkable
class Filter(Protocol):
    def keep(self, request: LLMRequest, endpoints: Sequence[Endpoint]) -> Sequence[Endpoint]:
        """The endpoints that stay, in order."""
        ...


@runtime_checkable
class Scorer(Protocol):
    per_request: ClassVar[bool]
    # in_range: ClassVar[bool], optional: scores are always within [0, 1], so they are not looked at again

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
    def produce(self, request: LLMRequest, candidates: Snapshot) -> None:
        """Put data on the request. What it raises is logged and the request goes on without the data."""
        ...


@runtime_checkable
class Admitter(Protocol):
    def admit(self, request: LLMRequest, candidates: Sequence[Endpoint]) -> None:
        """Raises an EppError (SaturatedError: 429) if the request is not to be served now."""
        ...


class Outcome(NamedTuple):
    """What a profile handler decided."""

    profile: str
    """The profile whose result is the destination."""
    chosen: Sequence[Endpoint]
    """The destination, then fallbacks."""
    targets: Mapping[str, Endpoint] = NO_TARGETS
    """As `Decision.targets`."""
    headers: Mapping[str, str] = NO_HEADERS
    instead: str = ""


RunProfile = Callable[[str], Sequence[Endpoint]]
"""Runs the profile of that name: the picker's choice, best first. Raises SaturatedError when its filters leave nobody."""


@runtime_checkable
class ProfileHandler(Protocol):
    own_headers: ClassVar[tuple[str, ...]]
    """Request headers only the picker may set: a client's copies are removed."""

    def check(self, profiles: Sequence[str]) -> None:
        """Raises ValueError if it can't work with profiles of these names."""
        ...

    def schedule(self, request: LLMRequest, run: RunProfile, profiles: Sequence[str]) -> Outcome: ...


@runtime_checkable
class Decider(Protocol):
    def disaggregate(self, request: LLMRequest, endpoint: Endpoint) -> bool:
        """Whether a further stage (prefill, encode) elsewhere is worth it for a request that decodes on `endpoint`."""
        ...


@runtime_checkable
class Detector(Protocol):
    def saturation(self, endpoints: Sequence[Endpoint]) -> float:
        """0 idle, 1 full, more is overloaded; 1 when there are no endpoints."""
        ...


class UsageReader(Protocol):
    """Finds token counts in a response, chunk by chunk, without holding it."""

    def feed(self, chunk: bytes) -> None: ...

    def finish(self) -> Usage | None:
        """What was found by the end of the response; None if nothing was."""
        ...


GRPC_PROTOCOLS = frozenset({"kubernetes.io/h2c"})
HTTP_PROTOCOLS = GRPC_PROTOCOLS | {"http"}
"""`appProtocol`s of an InferencePool whose requests a parser of gRPC, and one of HTTP, can read."""


@runtime_checkable
class Parser(Protocol):
    suffixes: ClassVar[Mapping[str, str]]
    """Path suffix -> kind of body; over all parsers the longest suffix wins. Empty: any path, if no other parser wants it."""
    body_wanted: ClassVar[bool]
    """Whether `parse` reads the body; if not, the decision does not wait for it."""
    model_required: ClassVar[bool]
    """Whether a body without a model is a bad request."""

    # protocols: ClassVar[frozenset[str]], optional: the `appProtocol`s of pools it can read, where not HTTP_PROTOCOLS

    def parse(self, request: LLMRequest, body: bytes, kind: str) -> None:
        """Fill in `request`. Raises BadRequestError for a body that can't be understood."""
        ...

    def with_model(self, body: bytes, model: str) -> bytes | None:
        """The same body asking for another model; None if that can't be done in this format."""
        ...

    def usage(self, *, event_stream: bool) -> UsageReader | None:
        """A reader for one response; None where responses say nothing of their cost."""
        ...


@runtime_checkable
class EndpointIndex(Protocol):
    """What a plugin's `index` has to be to be told of endpoints that go or are started anew; `epp.prefix.index.PrefixIndex` is one."""

    @property
    def blocks(self) -> int: ...

    def reset(self, slot: int) -> None:
        """The engine there was started anew."""

    def forget(self, slot: int, then: Callable[[int], None] | None = None) -> None:
        """The endpoint is gone; `then` is called when nothing of it is left."""

    def tick(self) -> int:
        """Called a few times a second; how much is still to be forgotten."""


class Finished(NamedTuple):
    """How a request went, for `Hooks.finished`. -1: not known."""

    status: int
    ttft_s: float
    """From the request's arrival to the first byte of the response's body."""
    duration_s: float
    usage: Usage | None
    uncached_tokens: int
    """Prompt tokens the endpoint was charged with."""


class Hooks(Protocol):
    """The optional hooks of a plugin: any of these methods it has is called. One that raises is logged, the request goes on."""

    def added(self, endpoint: Endpoint) -> None:
        """An endpoint came; those already there are told of too."""

    def removed(self, endpoint: Endpoint) -> None:
        """An endpoint is gone."""

    def picked(self, request: LLMRequest, decision: Decision) -> None:
        """The decision is final."""

    def served(self, request: LLMRequest, endpoint: Endpoint) -> None:
        """Another endpoint than the decision's served the request (a retry by the gateway)."""

    def response_headers(self, request: LLMRequest, endpoint: Endpoint) -> Mapping[str, str] | None:
        """Headers to add to the response that `endpoint` gave."""

    def first_token(self, request: LLMRequest, endpoint: Endpoint, ttft_s: float) -> None:
        """The first piece of the response's body passed."""

    def report(self, usage: Usage) -> tuple[str, str, float] | None:
        """Namespace, name and number to put in the gateway's dynamic metadata at the end of a response."""

    def ready(self) -> bool:
        """Whether requests may come: while it says no, health is NOT_SERVING for gateways. Asked with every check."""

    def state(self) -> Mapping[str, Any]:
        """What `/debug/plugins/state` shows of it: bounded, as JSON, nothing of any prompt."""

    def finished(self, request: LLMRequest, endpoint: Endpoint, outcome: Finished) -> None:
        """The response ended, or the stream did before it (status 0)."""


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


def match_of(request: LLMRequest, producer: str) -> Any:
    """The PrefixMatch of that producer, of the first one if the name is empty; None when there is none."""
    return request.attributes.get(producer) if producer else request.prefix


def hook(plugin: Any, name: str) -> Any | None:
    """The plugin's optional hook of that name, or None."""
    found = getattr(plugin, name, None)
    return found if callable(found) else None
