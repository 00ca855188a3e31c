"""Which endpoints a request may go to: those ready in its pool, within the gateway's subset, that serve its model.

What was found is remembered until the pool changes, so that neither a subset hint nor a model costs a walk over the pool per request.
Not here: who is ready (datastore), who serves what (engines.models), the choice among candidates (scheduling).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from epp.datastore import Datastore
from epp.errors import ModelNotFoundError, NoEndpointsError
from epp.types import Endpoint, Snapshot

MODELS_MAX = 1_000
"""Models whose endpoints are remembered while the pool stays the same."""
SUBSETS_MAX = 64
"""Different subset hints whose candidates are remembered while the pool stays the same."""


class Models(Protocol):
    """Who serves which model, as far as engines say; `epp.engines.models.ModelsView` is one."""

    version: int

    def known(self, model: str) -> bool | None:
        """Whether any endpoint serves it; None: not known."""
        ...

    def by_all(self, model: str) -> bool: ...

    def serves(self, endpoint: Endpoint, model: str) -> bool | None: ...


class Candidates:
    """See the module."""

    def __init__(self, datastore: Datastore, models: Models | None, *, subset_filter: bool) -> None:
        self._datastore = datastore
        self.models = models
        self._subset_filter = subset_filter
        self._subsets: dict[tuple[str, Sequence[str]], Snapshot] = {}
        self._subsets_of: Snapshot | None = None
        self._serving: dict[tuple[int, str], tuple[Snapshot, Snapshot]] = {}
        """(identity of candidates, model) -> the candidates, those of them that serve it."""
        self._serving_of: tuple[Snapshot, int] | None = None
        self._epoch = 0
        self._epoch_of: tuple[Snapshot | None, int] = (None, 0)

    @property
    def epoch(self) -> int:
        """Another number once `of` may find others."""
        ready, version = self._datastore.ready, self.models.version if self.models is not None else 0
        of = self._epoch_of
        if ready is not of[0] or version != of[1]:
            self._epoch_of = ready, version
            self._epoch += 1
        return self._epoch

    def of(self, subset: Sequence[str] | None, pool: str, model: str) -> Snapshot:
        """Raises NoEndpointsError, ModelNotFoundError."""
        found = self._in_pool(subset, pool)
        return found if self.models is None or not model else self._that_serve(model, found, self.models, pool)

    def _in_pool(self, subset: Sequence[str] | None, pool: str) -> Snapshot:
        everywhere = self._datastore.ready
        ready = self._datastore.ready_in[pool] if pool else everywhere
        if subset is None or not self._subset_filter:
            if not ready.endpoints:
                where = f" in the pool {pool}" if pool else ""
                raise NoEndpointsError(f"failed to find endpoint candidates for serving the request: no endpoint is ready{where}")
            return ready
        if everywhere is not self._subsets_of or len(self._subsets) >= SUBSETS_MAX:
            self._subsets_of, self._subsets = everywhere, {}
        found = self._subsets.get((pool, subset))
        if found is None:
            found = self._subsets[pool, subset] = self._in(subset, ready, pool)
        return found

    def _that_serve(self, model: str, candidates: Snapshot, models: Models, pool: str) -> Snapshot:
        """Without the endpoints that say they lack this model."""
        known = models.known(model)
        if known is False:
            raise ModelNotFoundError(f"the model {model!r} does not exist: no endpoint serves it")
        if known is None or models.by_all(model):
            return candidates
        ready = self._datastore.ready
        if self._serving_of is None or self._serving_of[0] is not ready or self._serving_of[1] != models.version:
            self._serving_of, self._serving = (ready, models.version), {}
        key = id(candidates), model
        kept = self._serving.get(key)
        if kept is None:
            if len(self._serving) >= MODELS_MAX:
                self._serving.clear()
            found = Snapshot.of([e for e in candidates.endpoints if models.serves(e, model) is not False])
            kept = self._serving[key] = candidates, found  # the candidates are kept, so that no others take their identity
        found = kept[1]
        if not found.endpoints:
            if pool and all(models.serves(e, model) is False for e in self._datastore.endpoints.values() if pool in e.spec.pools):
                raise ModelNotFoundError(f"the model {model!r} does not exist: no endpoint of the pool {pool} serves it")
            raise NoEndpointsError(f"no endpoint that serves the model {model!r} is ready")
        return found

    def _in(self, subset: Sequence[str], ready: Snapshot, pool: str) -> Snapshot:
        allowed = frozenset(subset)
        found = [e for e in ready.endpoints if _in_subset(e.spec.address.host, e.destination, allowed)]
        if not found:  # one that fails its scrapes is better than none
            staying = [e for e in self._datastore.endpoints.values() if not e.draining and (not pool or pool in e.spec.pools)]
            found = [e for e in staying if _in_subset(e.spec.address.host, e.destination, allowed)]
        if not found:
            raise NoEndpointsError("failed to find endpoint candidates for serving the request: none is in the gateway's subset")
        return Snapshot.of(found)


def _in_subset(host: str, destination: str, allowed: frozenset[str]) -> bool:
    """A bare address allows all its ports, `ip:port` only that one (protocol rule 10)."""
    return destination in allowed or host in allowed or f"[{host}]" in allowed
