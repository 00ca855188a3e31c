"""What the two session-affinity plugins share: which endpoint a session belongs to. Not a plugin.

A session is told by a token we gave the client (`SessionTokens`: the endpoint's name, signed) or by an id the client gave us
(`SessionBindings`: remembered here). Tokens are made when an endpoint comes and looked up per request: no signature is computed then.
Cost per request: a few dict look-ups.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
from base64 import b64encode, urlsafe_b64encode
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import msgspec

from epp.clock import Clock
from epp.plugins.base import Context, Plugin
from epp.types import Decision, Endpoint, LLMRequest

KEY_VARIABLE = "EPP_SESSION_KEY"
"""The key tokens are signed with; it stands in no configuration. Every replica must have the same."""
KEY_BYTES_MIN = 16
SIGNATURE_BYTES = 16
SESSIONS_MAX = 100_000
"""Default of sessionIdConfig.sessionsMax: about 30 MB."""
SESSION_ID_CHARS_MAX = 64
"""Longer ids are remembered by their hash: clients choose them."""
SWEPT_MAX = 4
"""Expired sessions forgotten per new one: it never takes long, and expired ones never pile up."""


class SessionTokens:
    """Signed names of the endpoints there are: `base64(namespace/name).base64url(HMAC-SHA256, 16 bytes)`.

    A token that is not one of them (forged, signed with another key, of an endpoint that is gone) means nothing.
    """

    def __init__(self, key: bytes) -> None:
        self._key = key
        self._endpoints: dict[str, Endpoint] = {}
        self._tokens: dict[Endpoint, tuple[str, str]] = {}
        """Endpoint -> its name and the token of that."""

    def add(self, endpoint: Endpoint) -> str:
        name = f"{endpoint.namespace}/{endpoint.name}"
        signature = hmac.digest(self._key, name.encode(), "sha256")[:SIGNATURE_BYTES]
        token = f"{b64encode(name.encode()).decode()}.{urlsafe_b64encode(signature).decode().rstrip('=')}"
        self.remove(endpoint)
        self._endpoints[token] = endpoint
        self._tokens[endpoint] = name, token
        return token

    def remove(self, endpoint: Endpoint) -> None:
        _, token = self._tokens.pop(endpoint, ("", ""))
        if self._endpoints.get(token) is endpoint:  # its name may be another's by now
            del self._endpoints[token]

    def token_of(self, endpoint: Endpoint) -> str:
        """Empty for one that is not there."""
        known = self._tokens.get(endpoint)
        if known is None:
            return ""
        return known[1] if known[0] == f"{endpoint.namespace}/{endpoint.name}" else self.add(endpoint)  # renamed in place

    def endpoint_of(self, token: str) -> Endpoint | None:
        endpoint = self._endpoints.get(token)
        return endpoint if endpoint is not None and self.token_of(endpoint) == token else None


class SessionBindings:
    """Session id -> endpoint, for as long as the session is used every `ttl_s` and the endpoint takes requests."""

    def __init__(self, ttl_s: float, sessions_max: int) -> None:
        self._ttl_s = ttl_s
        self._sessions_max = sessions_max
        self._bound: dict[str | bytes, tuple[Endpoint, float]] = {}
        """Id -> endpoint and when it was last used; the longest unused first."""
        self._present: set[Endpoint] = set()
        self.evicted_total = 0
        """Sessions forgotten before their time, for there were too many."""

    def __len__(self) -> int:
        return len(self._bound)

    def add(self, endpoint: Endpoint) -> None:
        self._present.add(endpoint)

    def remove(self, endpoint: Endpoint) -> None:
        """Its sessions are bound anew when they next come."""
        self._present.discard(endpoint)

    def endpoint_of(self, session: str, now_s: float) -> Endpoint | None:
        endpoint, used_s = self._bound.get(_key(session), (None, 0.0))
        return endpoint if endpoint in self._present and now_s - used_s <= self._ttl_s else None

    def bind(self, session: str, endpoint: Endpoint, now_s: float, *, moved: bool = False) -> None:
        """The session was sent to `endpoint`. It stays where it is bound while that endpoint takes requests, unless it has `moved`."""
        bound = self.endpoint_of(session, now_s)
        if bound is None or not bound.healthy or moved:
            bound = endpoint
        key = _key(session)
        self._bound.pop(key, None)
        self._sweep(now_s)
        if len(self._bound) >= self._sessions_max:
            self.evicted_total += 1
            del self._bound[next(iter(self._bound))]
        self._bound[key] = bound, now_s

    def _sweep(self, now_s: float) -> None:
        for _ in range(min(SWEPT_MAX, len(self._bound))):
            oldest = next(iter(self._bound))
            if now_s - self._bound[oldest][1] <= self._ttl_s:
                return
            del self._bound[oldest]


def _key(session: str) -> str | bytes:
    if len(session) <= SESSION_ID_CHARS_MAX:
        return session
    return hashlib.blake2b(session.encode(errors="surrogateescape"), digest_size=16).digest()


class EncodedEndpointHeaderConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The header of requests and responses that carries the token."""

    header: Annotated[str, msgspec.Meta(min_length=1)] = "x-session-token"


class SessionSource(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A request header, or a request attribute, of a named producer where several make it."""

    header: str = ""
    attribute: str = ""
    producer: str = ""

    def __post_init__(self) -> None:
        if bool(self.header) is bool(self.attribute):
            raise ValueError("write header or attribute, one of them")


class SessionIdConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="camel"):
    """Where the id of a session is, how long it is remembered unused, how many are. evictionSweepSeconds is accepted: sweeping is lazy."""

    sources: tuple[SessionSource, ...] = ()
    eviction_ttl_seconds: Annotated[float, msgspec.Meta(gt=0)] = 300.0
    eviction_sweep_seconds: Annotated[float, msgspec.Meta(gt=0)] = 10.0
    sessions_max: Annotated[int, msgspec.Meta(gt=0)] = SESSIONS_MAX


class SessionAffinity(Plugin):
    """Base of session-affinity-filter and session-affinity-scorer: finds the endpoint a request is pinned to, and keeps it.

    Tokens are signed with the environment variable EPP_SESSION_KEY (16 bytes or more). Without it the key is random: tokens then end
    with the process, and replicas don't know each other's.
    """

    uses: ClassVar[tuple[str, ...]] = ("session-id", "agent-identity")

    strategy: Literal["encoded_endpoint_header", "session_id"] = "encoded_endpoint_header"
    encoded_endpoint_header_config: EncodedEndpointHeaderConfig = EncodedEndpointHeaderConfig()
    session_id_config: SessionIdConfig = SessionIdConfig()
    profile_name: str = ""

    def __post_init__(self) -> None:
        ids = self.session_id_config
        self.__dict__.update(
            _header=self.encoded_endpoint_header_config.header.lower(),
            _sources=tuple(
                (source.header.lower(), source.attribute, source.producer)
                for source in ids.sources or (SessionSource(header="x-session-id"),)
            ),
            _bindings=SessionBindings(ids.eviction_ttl_seconds, ids.sessions_max) if self.strategy == "session_id" else None,
        )

    def bind(self, context: Context) -> None:
        key = os.environ.get(KEY_VARIABLE, "").encode()
        if 0 < len(key) < KEY_BYTES_MIN:
            raise ValueError(f"the environment variable {KEY_VARIABLE} must have {KEY_BYTES_MIN} bytes or more, or not be set")
        self.__dict__.update(_tokens=SessionTokens(key or secrets.token_bytes(32)), _clock=context.clock)

    @property
    def bindings(self) -> SessionBindings | None:
        """None for the other strategy."""
        found: SessionBindings | None = self.__dict__["_bindings"]
        return found

    def pinned(self, request: LLMRequest) -> Endpoint | None:
        """Where the request's session belongs. It need not be a candidate."""
        state = self.__dict__
        bindings: SessionBindings | None = state["_bindings"]
        if bindings is None:
            token = request.headers.get(state["_header"])
            tokens: SessionTokens = state["_tokens"]
            return tokens.endpoint_of(token) if token else None
        session = self._session(request)
        clock: Clock = state["_clock"]
        return bindings.endpoint_of(session, clock.now_s()) if session else None

    def added(self, endpoint: Endpoint) -> None:
        self.__dict__["_tokens"].add(endpoint)
        if self.bindings is not None:
            self.bindings.add(endpoint)

    def removed(self, endpoint: Endpoint) -> None:
        self.__dict__["_tokens"].remove(endpoint)
        if self.bindings is not None:
            self.bindings.remove(endpoint)

    def picked(self, request: LLMRequest, decision: Decision) -> None:
        stage = self.profile_name
        target = decision.endpoint if stage in ("", decision.profile) else decision.targets.get(stage)
        if self.__dict__["_bindings"] is not None:
            self._bind_session(request, target)
        elif stage:
            request.attributes[self.name] = target

    def served(self, request: LLMRequest, endpoint: Endpoint) -> None:
        if self.__dict__["_bindings"] is not None and not self.profile_name:
            self._bind_session(request, endpoint, moved=True)

    def response_headers(self, request: LLMRequest, endpoint: Endpoint) -> Mapping[str, str] | None:
        state = self.__dict__
        if state["_bindings"] is not None:
            return None
        target = request.attributes.get(self.name) if self.profile_name else endpoint
        if not isinstance(target, Endpoint):
            return None
        token = state["_tokens"].token_of(target)
        return {state["_header"]: token} if token else None

    def _bind_session(self, request: LLMRequest, endpoint: Endpoint | None, *, moved: bool = False) -> None:
        session = self._session(request)
        if session and endpoint is not None:
            bindings: SessionBindings = self.__dict__["_bindings"]
            clock: Clock = self.__dict__["_clock"]
            bindings.bind(session, endpoint, clock.now_s(), moved=moved)

    def _session(self, request: LLMRequest) -> str:
        """The id from the first source that has one."""
        for header, attribute, producer in self.__dict__["_sources"]:
            found: Any = request.headers.get(header) if header else request.attributes.get(producer or attribute)
            if found is None and producer:
                found = request.attributes.get(attribute)
            if isinstance(found, str) and (found := found.strip()):
                return str(found)
        return ""
