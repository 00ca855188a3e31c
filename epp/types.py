"""The nouns everything speaks in: addresses, endpoints and their load, a request, a decision.

Not here: how any of them changes (datastore, director) or travels (extproc). No I/O.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from epp.capacity import Capacity
from epp.freshness import faded


class Address(NamedTuple):
    """Where an endpoint listens. `host` is an IP address without brackets."""

    host: str
    port: int

    def __str__(self) -> str:
        """As the destination header wants it: `10.0.0.5:8000`, `[2001:db8::1]:8000` (protocol section 4)."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @classmethod
    def parse(cls, text: str) -> Address:
        """`1.2.3.4:80` or `[::1]:80`. Raises ValueError that says what is wrong: the destination header takes no host names."""
        host, colon, port_text = text.strip().rpartition(":")
        if not colon:
            raise ValueError(f"{text!r} is not HOST:PORT")
        bracketed = host.startswith("[") and host.endswith("]")
        if ":" in host and not bracketed:
            raise ValueError(f"{text!r}: write an IPv6 address in brackets, [::1]:8000")
        try:
            ip = ipaddress.ip_address(host[1:-1] if bracketed else host)
        except ValueError:
            raise ValueError(f"{text!r}: {host!r} is not an IP address (the destination header takes no host names)") from None
        if not (port_text.isascii() and port_text.isdigit() and 1 <= int(port_text) <= 65535):
            raise ValueError(f"{text!r}: port must be 1 to 65535")
        return cls(str(ip), int(port_text))


class EndpointSpec(NamedTuple):
    """An endpoint as a source (flags, a file, Kubernetes) describes it: identity, never load."""

    name: str
    address: Address
    namespace: str = "default"
    labels: Mapping[str, str] = {}
    metrics_address: Address | None = None
    """Where `/metrics` is served, if not at `address`."""
    draining: bool = False
    """It is going away (a terminating pod, a machine about to be taken back): no new requests."""
    pools: tuple[str, ...] = ()
    """Names of the pools it is in, where the picker serves several."""


class Changes:
    """Which endpoints' load changed, in order: what was computed from load is brought up to date for those alone.

    A reader remembers `count`; `since(count)` tells the slots changed after that, or None when it is too long ago to know.
    """

    __slots__ = ("_log", "count")

    LOG_MAX = 1_024

    def __init__(self) -> None:
        self.count = 0
        self._log: list[int] = []

    def add(self, slot: int) -> None:
        if len(self._log) == self.LOG_MAX:
            del self._log[: self.LOG_MAX // 2]
        self._log.append(slot)
        self.count += 1

    def since(self, count: int) -> Sequence[int] | None:
        """May name a slot more than once."""
        new = self.count - count
        return self._log[-new:] if 0 < new <= len(self._log) else None


class Endpoint:
    """One model server: identity, the last reading of its metrics, and what we have sent it.

    All of it is changed on one event loop, between awaits; a reader never sees half an update. `slot` is the endpoint's bit in
    the prefix index's masks, unique among living endpoints.
    """

    __slots__ = (
        "adapters_active", "adapters_max", "adapters_waiting", "attributes", "capacity", "changes", "destination", "drain_marked", "ejected",
        "half_open", "healthy", "inflight_requests", "inflight_tokens", "kv_capacity_tokens", "kv_usage", "labels", "name", "namespace",
        "picks_total", "running", "scrape_failures", "scraped_at_s", "sent_requests", "sent_tokens", "slot", "spec", "trusted", "untold_tokens",
        "waiting",
    )  # fmt: skip

    def __init__(self, spec: EndpointSpec, slot: int, changes: Changes) -> None:
        self.spec = spec
        self.slot = slot
        self.changes = changes
        """The pool's; whoever changes the fields below that scores depend on says so there."""
        self.name = spec.name
        self.namespace = spec.namespace
        self.labels = spec.labels
        self.destination = str(spec.address)
        # the last reading of /metrics
        self.waiting = 0.0
        """Requests queued in the engine."""
        self.running = 0.0
        """Requests in the engine's running batch."""
        self.kv_usage = 0.0
        """Fraction of the KV cache in use, 0 to 1."""
        self.kv_capacity_tokens = 0
        """Tokens the KV cache holds; 0 while unknown."""
        self.adapters_active: frozenset[str] = frozenset()
        """LoRA adapters of running requests."""
        self.adapters_waiting: frozenset[str] = frozenset()
        """LoRA adapters of waiting requests."""
        self.adapters_max = 0
        """LoRA adapters the engine runs at once; 0 while unknown."""
        self.attributes: dict[str, float] = {}
        """What else a data source read, by attribute key (`GPUUtilization`)."""
        self.scraped_at_s = float("-inf")
        self.scrape_failures = 0
        """Consecutive."""
        self.trusted = 1.0
        """How much the reading still counts: the rest is our own count of what is in flight there (freshness)."""
        self.healthy = True
        """False while scrapes fail; such an endpoint is picked only while no other is healthy."""
        self.ejected = False
        """Requests sent to it failed: it is left out for a while (outliers)."""
        self.half_open = False
        """Its time out is over: one request may try it."""
        self.drain_marked = False
        """An operator wants it to go (`POST /drain`)."""
        # our own accounting
        self.inflight_requests = 0
        self.inflight_tokens = 0
        """Uncached prompt tokens sent whose first token has not come back."""
        self.untold_tokens = 0
        """Those of them whose answer comes whole: nobody tells of their first token, so most of them are through with long since."""
        self.sent_requests = 0
        """Sent since the last reading of /metrics was taken: that reading can't know of them."""
        self.sent_tokens = 0
        """Uncached prompt tokens of those."""
        self.picks_total = 0
        self.capacity = Capacity()
        """How fast it turned out to be."""

    def __repr__(self) -> str:
        return (
            f"<Endpoint {self.name} {self.destination} {self.state} waiting={self.waiting:g} running={self.running:g} "
            f"kv={self.kv_usage:.2f} inflight={self.inflight_requests}/{self.inflight_tokens}t>"
        )

    @property
    def state(self) -> str:
        """In a word: `draining`, `ejected`, `half-open`, `failing` or `healthy`."""
        if self.draining:
            return "draining"
        if self.ejected:
            return "ejected"
        if not self.healthy:
            return "failing"
        return "half-open" if self.half_open else "healthy"

    @property
    def draining(self) -> bool:
        """Going away: it gets no new request and finishes those it has."""
        return self.drain_marked or self.spec.draining

    @property
    def waiting_estimate(self) -> float:
        """Queue depth now: a request sent since the reading joined the queue if there was one, else the running batch.

        As the reading ages everything in flight counts as waiting, so that an engine that went silent attracts nobody.
        """
        waiting = self.waiting + self.sent_requests if self.waiting else 0.0
        return waiting if self.trusted == 1.0 else faded(waiting, self.inflight_requests, self.trusted)

    @property
    def running_estimate(self) -> float:
        running = self.running if self.waiting else self.running + self.sent_requests
        return running if self.trusted == 1.0 else faded(running, self.inflight_requests, self.trusted)

    @property
    def kv_usage_estimate(self) -> float:
        """KV use now: the reading plus the uncached prompt tokens sent since, over the cache's size where it is known; 0 to 1."""
        capacity = self.kv_capacity_tokens
        if not capacity:
            return self.kv_usage * self.trusted
        usage = min(1.0, self.kv_usage + self.sent_tokens / capacity)
        return usage if self.trusted == 1.0 else faded(usage, min(1.0, self.inflight_tokens / capacity), self.trusted)


class Snapshot(NamedTuple):
    """The endpoints a request may go to, frozen: rebuilt when membership or health changes, never per request."""

    endpoints: tuple[Endpoint, ...]
    mask: int
    """Bit `slot` set for each of `endpoints`."""
    by_slot: Mapping[int, int]
    """slot -> position in `endpoints`."""

    @classmethod
    def of(cls, endpoints: Sequence[Endpoint]) -> Snapshot:
        mask = 0
        for endpoint in endpoints:
            mask |= 1 << endpoint.slot
        return cls(tuple(endpoints), mask, {e.slot: i for i, e in enumerate(endpoints)})


class PrefixMatch:
    """What the prefix index knows of one prompt."""

    __slots__ = ("hashes", "matched_tokens", "prompt_tokens", "sizes")

    def __init__(self, hashes: list[int], sizes: Sequence[int], prompt_tokens: int, matched_tokens: dict[int, int]) -> None:
        self.hashes = hashes
        """One chained hash a block."""
        self.sizes = sizes
        """Cumulative tokens after each block; may be longer than `hashes`."""
        self.prompt_tokens = prompt_tokens
        self.matched_tokens = matched_tokens
        """slot -> prompt tokens that endpoint has cached; an absent slot has none."""


class Prediction(NamedTuple):
    """What one request should see on one endpoint; headroom is its service objective minus that, or 0 minus that where it has none."""

    ttft_s: float
    tpot_s: float
    ttft_headroom_s: float
    tpot_headroom_s: float


class LLMRequest:
    """One inference request as routing sees it. `prompt` is what is hashed for the prefix index, never logged."""

    __slots__ = (
        "attributes", "body_bytes", "cache_salt", "fairness_id", "headers", "id", "max_output_tokens", "media", "model", "path", "pool", "prefix",
        "priority", "prompt", "prompt_tokens", "stream", "target_model",
    )  # fmt: skip

    def __init__(self, *, id: str, path: str, headers: Mapping[str, str]) -> None:  # noqa: A002 - the field's own name
        self.id = id
        self.path = path
        self.headers = headers
        self.model = ""
        """As the client named it; empty when the body was not understood (passthrough)."""
        self.target_model = ""
        """As the engine will see it."""
        self.pool = ""
        """The pool it is for, where the picker serves several and can tell."""
        self.stream = False
        self.max_output_tokens: int | None = None
        self.cache_salt = ""
        self.prompt: bytes | memoryview = b""
        """Canonical bytes of the prompt, `TOKEN_BYTES` a token."""
        self.prompt_tokens = 0
        """Estimated from `prompt`, exact for token-id prompts."""
        self.body_bytes = 0
        self.media = 0
        """Images, videos and audio clips in the prompt."""
        self.priority = 0
        """Of the request's InferenceObjective; below 0 it may be dropped when the pool is saturated."""
        self.fairness_id = ""
        """Whose request it is, where the client or a plugin says."""
        self.prefix: PrefixMatch | None = None
        """Of the first prefix producer, read by scorers that name none."""
        self.attributes: dict[str, Any] = {}
        """What producers found out about this request, by producer name or data key."""

    def uncached_on(self, endpoint: Endpoint) -> int:
        """Prompt tokens that endpoint would have to compute."""
        match = self.prefix
        return self.prompt_tokens if match is None else max(0, self.prompt_tokens - match.matched_tokens.get(endpoint.slot, 0))


TOKEN_BYTES = 4
"""Bytes of text counted as one token where no tokenizer is run (the reference picker's `estimate` backend)."""


TOKEN_IDS = "tokens"  # noqa: S105 - no secret, a name
"""Of a request's attributes: the prompt's token ids where they are known, uint32 little-endian."""
TOKEN_MEDIA = "tokens-media"  # noqa: S105 - a name too
"""And which of them stand for a picture, a video or a sound."""
ASKED_ABOUT = "asked-about"
"""Of a request nobody sent (`/debug/explain`): what it would get is worked out, and not counted."""


class Usage(NamedTuple):
    """Token counts an engine reported; -1 where it did not."""

    prompt_tokens: int = -1
    completion_tokens: int = -1
    cached_tokens: int = -1


NO_TARGETS: Mapping[str, Endpoint] = MappingProxyType({})
NO_HEADERS: Mapping[str, str] = MappingProxyType({})


class Decision(NamedTuple):
    """Where a request goes."""

    endpoint: Endpoint
    fallbacks: tuple[Endpoint, ...]
    """In order, for gateways that take a list; empty by default."""
    profile: str
    targets: Mapping[str, Endpoint] = NO_TARGETS
    """Profile -> endpoint, of the other profiles that ran (`prefill`, `encode`): each does a part of the request's work."""
    headers: Mapping[str, str] = NO_HEADERS
    """What to tell the engine in request headers (`x-prefiller-host-port`)."""
    instead: str = ""
    """The destination to give the gateway where it is not the endpoint itself (data-parallel ranks behind one port)."""

    @property
    def destination(self) -> str:
        if self.instead:
            return self.instead
        if not self.fallbacks:
            return self.endpoint.destination
        return ",".join([self.endpoint.destination, *(e.destination for e in self.fallbacks)])
