"""Whose a request is, and how many tokens each may have: for flow control, before a request waits.

An identity plugin has `identify(request) -> str`; flow control asks them in the configuration's order where the client named no fairness id.
Not here: the counting (admission.rates), the queues. Cost: api-key-identity 1.5 µs a request.
"""

from __future__ import annotations

import os
import secrets
from hashlib import blake2b
from typing import Annotated, ClassVar

import msgspec

from epp.config.units import Duration, duration_s
from epp.plugins.base import Plugin
from epp.types import LLMRequest

API_KEY_HEADERS = ("authorization", "x-api-key", "api-key")
HASH_BYTES = 8
"""Of a fairness id: two of 10 000 tenants are taken for one with a probability of 3e-12."""
HASH_KEY_BYTES = 32
HASH_KEY_BYTES_MAX = 64
"""BLAKE2b takes no longer ones; what is longer is hashed itself first."""
PREFIX = "key-"
Tokens = Annotated[int, msgspec.Meta(gt=0)]


class ApiKeyIdentity(Plugin):
    """The fairness id is a keyed hash of the client's API key: `key-` and 16 hexadecimal digits. The key itself goes nowhere.

    The first of `headers` that is there counts, without a leading `Bearer`. hashKeyEnv: the environment variable with the hash's secret, the
    same for all replicas if ids are to be the same; without it the secret is random, and ids are other ones with every start. override: the
    key counts even where the client names a fairness id; leave it off where the gateway sets that header.
    """

    type: ClassVar[str] = "api-key-identity"
    roles: ClassVar[tuple[str, ...]] = ("identity",)

    headers: tuple[str, ...] = API_KEY_HEADERS
    hash_key_env: str = ""
    override: bool = False

    def __post_init__(self) -> None:
        if not self.headers:
            raise ValueError("headers: name at least one")
        secret = os.environ.get(self.hash_key_env, "").encode() if self.hash_key_env else secrets.token_bytes(HASH_KEY_BYTES)
        if not secret:
            raise ValueError(f"hashKeyEnv: the environment variable {self.hash_key_env} is not set")
        if len(secret) > HASH_KEY_BYTES_MAX:
            secret = blake2b(secret).digest()
        self.__dict__["secret"] = secret
        self.__dict__["names"] = tuple(header.strip().lower() for header in self.headers)

    def identify(self, request: LLMRequest) -> str:
        """Empty where there is no key."""
        headers = request.headers
        for name in self.__dict__["names"]:
            value = headers.get(name)
            if value:
                if value[:7].lower() == "bearer ":
                    value = value[7:]
                value = value.strip()
                if value:
                    digest = blake2b(value.encode(errors="replace"), digest_size=HASH_BYTES, key=self.__dict__["secret"])
                    return PREFIX + digest.hexdigest()
        return ""


class TokenRateLimit(Plugin):
    """Prompt and output tokens each fairness id may have in a sliding window: who has had them is told 429, and when to come back.

    `tenants`: other limits by fairness id. A prompt counts when its request comes and is given back if it is not served, an answer when it
    ended: those that run are not cut off, so that the limit can be exceeded by what they say. A request larger than the limit is served when
    its tenant has had nothing in the window.
    """

    type: ClassVar[str] = "token-rate-limit"
    roles: ClassVar[tuple[str, ...]] = ("token-rate-limit",)

    tokens: Tokens
    window: Duration = "60s"
    tenants: dict[str, Tokens] = msgspec.field(default_factory=dict)

    def __post_init__(self) -> None:
        if duration_s(self.window) <= 0:
            raise ValueError("window must be above 0")

    @property
    def window_s(self) -> float:
        return duration_s(self.window)

    def limit(self, fairness_id: str) -> int:
        return self.tenants.get(fairness_id, self.tokens)
