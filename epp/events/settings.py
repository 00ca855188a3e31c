"""Where engines publish their KV-cache events, and every limit on getting them. Not here: what the configuration calls these (plugins)."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from epp.prefix.precise import VIEWS_MAX
from epp.types import Address, Endpoint
from epp.zmtp.connection import CONNECT_S
from epp.zmtp.wire import MESSAGE_BYTES_MAX

SOCKET_PORT = 5557
TOPIC_FILTER = "kv@"
EVENTS_PORT_LABEL = "llm-d.ai/kv-events-port"
REPLAY_PORT_LABEL = "llm-d.ai/kv-events-replay-port"
"""Of an endpoint: its own ports, for engines that share a host without being ranks of one server."""
QUEUE_BYTES_MAX = 16 << 20
PORT_DIGITS_MAX = 5
_SCHEMES = {"redis": "redis", "rediss": "rediss", "valkey": "redis", "valkeys": "rediss"}
_RANK = re.compile(r"-rank-(\d{1,5})(?:-\d+)?$")


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendSettings:
    """The server where replicas of the picker share what they hear. Raises ValueError, which does not quote the address."""

    url: str = field(repr=False)
    """`redis://`, `valkey://` or, with TLS, `rediss://`, `valkeys://`, then `user:password@host:port/database`; a bare `host:port` too."""
    timeout_s: float = 2.0
    """Of connecting, and of each answer."""
    linger_s: float = 0.02
    """How long the first frame waits for others to go with it."""
    kept_s: float = 900.0
    """Frames of an engine that no picker hears any more."""
    backoff_s: float = 0.1
    backoff_max_s: float = 5.0
    reads_max: int = 8
    """Publishers whose frames are read at a time; a page each is held."""
    queue_bytes_max: int = QUEUE_BYTES_MAX
    """Waiting to be written, of all publishers."""

    def __post_init__(self) -> None:
        scheme, marked, rest = self.url.partition("://")
        if not marked:
            scheme, rest = "redis", self.url
        if scheme not in _SCHEMES:
            raise ValueError("the address must begin with redis://, rediss://, valkey:// or valkeys://")
        object.__setattr__(self, "url", f"{_SCHEMES[scheme]}://{rest}")
        try:
            parts = urlsplit(self.url)
            good = bool(parts.hostname) and parts.port != 0
        except ValueError:
            good = False
        if not good:
            raise ValueError("the address is not as redis://user:password@host:6379")
        if self.reads_max < 1 or self.queue_bytes_max < 1 or self.kept_s <= 0:
            raise ValueError("reads_max, queue_bytes_max and kept_s must be more than 0")

    @property
    def shown(self) -> str:
        """For people: without a password."""
        parts = urlsplit(self.url)
        host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname
        return f"{parts.scheme}://{host}:{parts.port or 6379}"


@dataclass(frozen=True, slots=True, kw_only=True)
class EventSettings:
    """Raises ValueError that says which is wrong."""

    subscribe: bool = True
    """Connect to every endpoint."""
    socket_port: int = SOCKET_PORT
    """Of data-parallel rank 0; the next ranks' ports follow it."""
    replay_port: int = 0
    """Where lost frames can be asked for, likewise; 0: nowhere."""
    ranks: int = 1
    """Publishers of one endpoint: data-parallel ranks inside one server."""
    bind: str = ""
    """`tcp://*:5557`: engines connect to us, and their topics tell who they are."""
    topic_filter: str = TOPIC_FILTER
    """Topics begin with it; empty: all."""
    trtllm_poll_s: float = 0.0
    """How often a TensorRT-LLM server is asked for its events, which are then nobody else's; 0: never."""
    backoff_s: float = 0.1
    backoff_max_s: float = 5.0
    """Before connecting again."""
    connect_s: float = CONNECT_S
    absent_s: float = 10.0
    """An endpoint whose publisher can't be reached for so long is in doubt."""
    replay_idle_s: float = 2.0
    replay_total_s: float = 120.0
    replay_rest_s: float = 30.0
    """After a replay that brought too little."""
    replay_pause_s: float = 1.0
    """After one that brought all."""
    replays_max: int = 8
    """At a time."""
    message_bytes_max: int = MESSAGE_BYTES_MAX
    connections_max: int = 10_000
    """Of engines that connect to us."""
    backend: BackendSettings | None = None
    """Where what is heard is shared with other replicas."""

    def __post_init__(self) -> None:
        for name in ("socket_port", "replay_port"):
            if not 0 <= getattr(self, name) + self.ranks - 1 <= 65_535:
                raise ValueError(f"{name}: {getattr(self, name)} for {self.ranks} ranks is not 0 to 65535")
        if self.ranks > VIEWS_MAX:
            raise ValueError(f"data-parallel ranks behind one endpoint: {self.ranks}; of at most {VIEWS_MAX} it is known what they have")
        if self.ranks < 1 or self.replays_max < 1 or self.connections_max < 1:
            raise ValueError("ranks, replays_max and connections_max must be at least 1")
        if self.bind:
            bind_address(self.bind)

    def address(self, endpoint: Endpoint, rank: int) -> Address | None:
        """Where that endpoint's publisher of that rank listens; None where no port says."""
        return _at(endpoint, EVENTS_PORT_LABEL, self.socket_port, rank)

    def publisher_key(self, endpoint: Endpoint, publisher: str) -> str:
        """What every replica calls that publisher; a pod that takes a gone one's address is another."""
        return f"{endpoint.name}@{endpoint.destination}/{publisher}"

    def replay_address(self, endpoint: Endpoint, rank: int) -> Address | None:
        return _at(endpoint, REPLAY_PORT_LABEL, self.replay_port, rank)


def bind_address(text: str) -> tuple[str | None, int]:
    """Host (None: any) and port of `tcp://*:5557`. Raises ValueError."""
    try:
        parts = urlsplit(text.replace("://*", "://[::]", 1))
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = None, None
    if not host or port is None or parts.scheme != "tcp" or parts.path:
        raise ValueError(f"{text!r} is not an address to listen on, as tcp://*:5557")
    return (None if host == "::" and "*" in text else host), port


def rank_of(endpoint: Endpoint) -> int:
    """Which of a pod's ports it is, as the endpoint's source named it."""
    found = _RANK.search(endpoint.name)
    return int(found[1]) if found else 0


def _at(endpoint: Endpoint, label: str, port: int, rank: int) -> Address | None:
    own = endpoint.labels.get(label, "")
    if own.isascii() and own.isdigit() and len(own) <= PORT_DIGITS_MAX and 0 < int(own) <= 65_535:
        port = int(own) + rank
    elif port:
        port += rank_of(endpoint) + rank
    return Address(endpoint.spec.address.host, port) if 0 < port <= 65_535 else None
