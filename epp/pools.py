"""The pools one picker serves, and which of them a request is for.

Usually one: an InferencePool, or what flags and files name. With several (`--pool-name` repeated) all endpoints are in one datastore and
one prefix index; a pool is a subset of them with objectives and rewrites of its own. A gateway does not say in ext_proc which pool it
asks for, so it is told by the `:authority` of its stream, which names the Service of the pool's `endpointPickerRef` (or the pool): a
Service a pool, all of them in front of this picker. Where it tells nothing, a model that only one pool's rewrites are for does; else every
pool's endpoints are candidates, of which the model's (`/v1/models`) and the gateway's subset remain.

Not here: what is in a pool (sources), the snapshots (datastore). Cost per request: nothing with one pool, else a look-up (0.1 µs).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from epp.resources import POOL_GROUP, Resources, Target

AUTHORITIES_MAX = 256
"""Authorities remembered: gateways have one for each pool."""
_NO_NAME = re.compile(r"[^a-z0-9-]+")


class Pool:
    """One InferencePool as its source knows it."""

    __slots__ = ("app_protocol", "exists", "group", "name", "namespace", "resources", "service", "service_port", "synced", "view_as_of_s")

    def __init__(self, name: str, resources: Resources, *, namespace: str = "default", group: str = POOL_GROUP) -> None:
        self.name = name
        self.namespace = namespace
        self.group = group
        self.resources = resources
        """Objectives and rewrites that refer to it."""
        self.exists = False
        """The object is there."""
        self.synced = False
        """Its endpoints were listed at least once."""
        self.app_protocol = ""
        """Of its model servers: `http`, `kubernetes.io/h2c`; empty: not said."""
        self.service = ""
        """What its endpointPickerRef names."""
        self.service_port: int | None = None
        self.view_as_of_s = float("-inf")
        """When the view of it was last known to be the API server's, by our clock."""

    def __repr__(self) -> str:
        return f"<Pool {self.namespace}/{self.name} exists={self.exists} synced={self.synced}>"


class Pools:
    """See the module."""

    def __init__(self, pools: Sequence[Pool]) -> None:
        self.all = tuple(pools)
        self.several = len(self.all) > 1
        self._by_name = {pool.name: pool for pool in self.all}
        self._told: dict[str, tuple[tuple[str, ...], str]] = {}
        """authority -> the Services' names when it was looked up, and the pool's."""

    def __iter__(self) -> Iterator[Pool]:
        return iter(self.all)

    @property
    def live(self) -> bool:
        """Every pool was looked for, and there is one: a picker without any has nothing to route to."""
        return all(pool.synced for pool in self.all) and any(pool.exists for pool in self.all)

    @property
    def rewrites_any(self) -> bool:
        return any(pool.resources.rewrites_any for pool in self.all)

    @property
    def names_rewritten(self) -> frozenset[str]:
        return self.all[0].resources.names_rewritten.union(*(pool.resources.names_rewritten for pool in self.all[1:]))

    def of(self, authority: str) -> str:
        """The pool that a stream with this `:authority` is for; empty where it does not say, or there is but one."""
        if not self.several:
            return ""
        services = tuple(pool.service for pool in self.all)
        known = self._told.get(authority)
        if known is not None and known[0] == services:
            return known[1]
        if len(self._told) >= AUTHORITIES_MAX:
            self._told.clear()
        words = frozenset(filter(None, _NO_NAME.split(authority.lower())))
        named = [pool.name for pool in self.all if pool.service in words and services.count(pool.service) == 1]
        named = named or [pool.name for pool in self.all if pool.name in words]
        name = named[0] if len(named) == 1 else ""
        self._told[authority] = services, name
        return name

    def priority(self, name: str, objective: str) -> int:
        """Of that objective in the pool of this name; empty: in the first pool that has it. 0 if there is none."""
        pool = self._by_name.get(name)
        if pool is not None:
            return pool.resources.priority(objective)
        return next((each.resources.priority(objective) for each in self.all if objective in each.resources.objectives), 0)

    def of_model(self, model: str) -> str:
        """The one pool that has a rewrite for exactly this model; empty if there is none, or several have."""
        named = [pool.name for pool in self.all if model in pool.resources.models_rewritten]
        return named[0] if len(named) == 1 else ""

    def target(self, name: str, model: str) -> Target | None:
        """What the pool of this name asks its engines for instead; where no pool is named nothing is rewritten."""
        pool = self._by_name.get(name)
        return None if pool is None else pool.resources.target(model)
