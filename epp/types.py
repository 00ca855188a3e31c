"""The nouns everything speaks in: addresses, endpoints and their load, a request, a decision.

Not here: how any of them changes (datastore, director) or travels (extproc). No I/O.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple


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
            self._log.clear()
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
        "changes", "destination", "healthy", "inflight_requests", "inflight_tokens", "kv_capacity_tokens", "kv_usage", "labels", "name",
        "namespace", "picks_total", "running", "scrape_failures", "scraped_at_s", "sent_requests", "sent_tokens", "slot",
        "spec", "waiting",
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
        self.scraped_at_s = float("-inf")
        self.scrape_failures = 0
        """Consecutive."""
        self.healthy = True
        """False once scrapes or connections fail; such an endpoint is picked only while no other is healthy."""
        # our own accounting
        self.inflight_requests = 0
        self.inflight_tokens = 0
        """Uncached prompt tokens sent whose first token has not come back."""
        self.sent_requests = 0
        """Sent since the last reading of /metrics was taken: that reading can't know of them."""
        self.sent_tokens = 0
        """Uncached prompt tokens of those."""
        self.picks_total = 0

    def __repr__(self) -> str:
        state = "healthy" if self.healthy else "failing"
        return (
            f"<Endpoint {self.name} {self.destination} {state} waiting={self.waiting:g} running={self.running:g} "
            f"kv={self.kv_usage:.2f} inflight={self.inflight_requests}/{self.inflight_tokens}t>"
        )

    @property
    def waiting_estimate(self) -> float:
        """Queue depth now: a request sent since the reading joined the queue if there was one, else the running batch."""
        return self.waiting + self.sent_requests if self.waiting else 0.0

    @property
    def running_estimate(self) -> float:
        return self.running if self.waiting else self.running + self.sent_requests

    @property
    def kv_usage_estimate(self) -> float:
        """KV use now: the reading plus the uncached prompt tokens sent since, over the cache's size where it is known; 0 to 1."""
        if not self.kv_capacity_tokens:
            return self.kv_usage
        return min(1.0, self.kv_usage + self.sent_tokens / self.kv_capacity_tokens)


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


class LLMRequest:
    """One inference request as routing sees it. `prompt` is what is hashed for the prefix index, never logged."""

    __slots__ = (
        "body_bytes", "cache_salt", "headers", "id", "max_output_tokens", "model", "path", "prefix", "priority", "prompt", "prompt_tokens",
        "stream", "target_model",
    )  # fmt: skip

    def __init__(self, *, id: str, path: str, headers: Mapping[str, str]) -> None:  # noqa: A002 - the field's own name
        self.id = id
        self.path = path
        self.headers = headers
        self.model = ""
        """As the client named it; empty when the body was not understood (passthrough)."""
        self.target_model = ""
        """As the engine will see it."""
        self.stream = False
        self.max_output_tokens: int | None = None
        self.cache_salt = ""
        self.prompt: bytes | memoryview = b""
        """Canonical bytes of the prompt, `TOKEN_BYTES` a token."""
        self.prompt_tokens = 0
        """Estimated from `prompt`, exact for token-id prompts."""
        self.body_bytes = 0
        self.priority = 0
        self.prefix: PrefixMatch | None = None
        """Set by the prefix producer, read by the prefix scorer."""


TOKEN_BYTES = 4
"""Bytes of text counted as one token where no tokenizer is run (the reference picker's `estimate` backend)."""


class Usage(NamedTuple):
    """Token counts an engine reported; -1 where it did not."""

    prompt_tokens: int = -1
    completion_tokens: int = -1
    cached_tokens: int = -1


class Decision(NamedTuple):
    """Where a request goes."""

    endpoint: Endpoint
    fallbacks: tuple[Endpoint, ...]
    """In order, for gateways that take a list; empty by default."""
    profile: str

    @property
    def destination(self) -> str:
        if not self.fallbacks:
            return self.endpoint.destination
        return ",".join([self.endpoint.destination, *(e.destination for e in self.fallbacks)])


Observer = Callable[[LLMRequest, Endpoint], None]
"""A plugin's hook, called with the request and the endpoint it concerns."""
