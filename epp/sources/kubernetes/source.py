"""Keeps the pools as a Kubernetes cluster says: which endpoints they have, which objectives and rewrites refer to them.

Watches, each a Reflector: the InferencePools; the pods; InferenceObjectives and InferenceModelRewrites. One pool's pods are selected by
the API server; of several pools all pods of the namespace are watched once and told apart here, so that a pool more is not a connection
more, and another selector needs no list. Without pools (`--endpoint-selector`) there are pods only: no CRDs are needed, priorities are 0.

Of kinds with an older API group, that one counts only where the server does not have the newer (as with the reference picker; the file
source, which sees both at once, lets the newer win object by object), or has just got it and nothing in it.

What changes is applied together, at most once in `COALESCE_S`: five thousand pods that arrive cost a few updates of the datastore.

Invariants: nothing that goes wrong with the API server takes an endpoint away; a pool that is deleted loses its endpoints at once, one
with another selector only when the pods it selects now were listed; an object with a fault is left out and blocks no other.
`Pool.view_as_of_s` is the older of what is known of the pools and of the pods: up to a minute old when all is well and quiet.

Not here: list and watch (reflector), what an endpoint is (endpoints), who leads (election).
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from epp.aio import Sleep
from epp.clock import Clock
from epp.datastore import Datastore
from epp.errors import ConfigError, Problem
from epp.pools import Pool
from epp.resources import POOL_GROUP, Objective, Rewrite
from epp.sources.kubernetes.api import Api
from epp.sources.kubernetes.endpoints import Membership, PoolView
from epp.sources.kubernetes.kinds import Kind
from epp.sources.kubernetes.objects import POOL_GROUP_OLD, Pod, PoolObject, read_pod, read_pool, read_pool_old, read_resource
from epp.sources.kubernetes.reflector import Reflector
from epp.sources.kubernetes.selector import Selector

COALESCE_S = 0.02
"""Changes that come within it are applied together."""

_log = logging.getLogger(__name__)


def _nobody(_: str) -> None:
    pass


class KubernetesSource:
    """See the module. `run` keeps the datastore and the pools as the cluster says, until cancelled."""

    what = "kubernetes"

    def __init__(
        self,
        api: Api,
        pools: Sequence[Pool],
        *,
        datastore: Datastore,
        clock: Clock,
        rng: random.Random,
        sleep: Sleep = asyncio.sleep,
        endpoint_selector: str = "",
        target_ports: Sequence[int] = (),
        limit_hit: Callable[[str], None] = _nobody,
    ) -> None:
        """`pools`: all of one namespace and group. `endpoint_selector`, `target_ports`: instead of an InferencePool; `pools` is then one.

        Raises ConfigError for a selector that is none.
        """
        self._pools = tuple(pools)
        self._namespace = namespace = self._pools[0].namespace
        self._datastore = datastore
        self._clock = clock
        self._sleep = sleep
        self._selector: Selector | None = None
        if endpoint_selector:
            try:
                self._selector = Selector.parse(endpoint_selector)
            except ValueError as error:
                raise ConfigError("command line", [Problem("--endpoint-selector", str(error))]) from None
        self._target_ports = tuple(target_ports)
        self._membership = Membership()
        self._dirty = asyncio.Event()
        self._synced = asyncio.Event()
        self._view_dirty, self._resources_dirty = True, False
        """What has to be worked out anew. Of resources nothing before they are listed: without pools they are somebody else's."""
        self._selected: str | None = None
        """The label selector of the watch of pods; None: there is none yet."""
        self._pods_task: asyncio.Task[None] | None = None
        self._told = ""

        def reflector(kinds: Sequence[Kind], changed: Callable[[], None], params: Mapping[str, str] | None = None) -> Reflector[Any]:
            return Reflector(
                api,
                kinds,
                clock=clock,
                sleep=sleep,
                rng=rng,
                params=params,
                changed=changed,
                seen=self._dirty.set,
                limit_hit=limit_hit,
                namespace=namespace,
            )

        self._pods: Reflector[Pod] = reflector([Kind("pods", f"/api/v1/namespaces/{namespace}/pods", read_pod)], self._view_changed)
        self._objects: Reflector[PoolObject] | None = None
        self._resources: tuple[Reflector[Objective | Rewrite], ...] = ()
        if self._selector is None:
            named = {"fieldSelector": f"metadata.name={self._pools[0].name}"} if len(self._pools) == 1 else None
            self._objects = reflector(pool_kinds(self._pools[0].group, namespace), self._view_changed, named)
            self._resources = tuple(
                reflector(resource_kinds(plural, namespace), self._resources_changed)
                for plural in ("inferenceobjectives", "inferencemodelrewrites")
            )
        self._all: list[Reflector[Any]] = [each for each in (self._pods, self._objects, *self._resources) if each is not None]

    def __repr__(self) -> str:
        return f"<KubernetesSource {self._namespace} pools={len(self._pools)} pods={len(self._pods.objects)}>"

    @property
    def pools(self) -> Sequence[Pool]:
        return self._pools

    @property
    def poll_errors_total(self) -> int:
        return sum(each.errors_total for each in self._all)

    @property
    def events_total(self) -> int:
        return sum(each.events_total for each in self._all)

    @property
    def relists_total(self) -> int:
        return sum(each.relists_total for each in self._all)

    def age_s(self, pool: Pool) -> float:
        """How long ago the view of this pool was last known to be right; infinite before the first."""
        return self._clock.now_s() - pool.view_as_of_s

    async def first_sync(self, timeout_s: float) -> bool:
        """Wait until every pool was looked for, its pods, objectives and rewrites were listed; `run` has to be running. False if that takes
        too long: what is missing then comes later."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._synced.wait()
        except TimeoutError:
            return False
        return True

    async def run(self) -> None:
        """Until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            for each in self._all:
                if each is not self._pods:
                    tasks.create_task(each.run(), name=f"watch {each.kind.name}")
            self._follow(tasks)
            while True:
                await self._dirty.wait()
                await self._sleep(COALESCE_S)
                self._dirty.clear()
                self.once()
                self._follow(tasks)

    def once(self) -> None:
        """Bring pools and datastore up to date with what was watched."""
        objects = self._pool_objects()
        for pool in self._pools:
            self._describe(pool, objects.get(pool.name))
        if self._view_dirty and self._pods.synced and self._pods_are_theirs():
            self._view_dirty = False
            if self._membership.update(self._pods.objects, self._views(objects)):
                self._apply()
        if self._resources_dirty:
            self._apply_resources()
        if not self._synced.is_set() and all(pool.synced for pool in self._pools) and all(each.synced for each in self._resources):
            self._synced.set()
            fields = {
                "namespace": self._namespace,
                "pools": sum(pool.exists for pool in self._pools),
                "endpoints": len(self._membership.specs),
            }
            _log.info("pools of Kubernetes in view", extra={"fields": fields})

    def _pool_objects(self) -> Mapping[str, PoolObject]:
        if self._objects is None:
            return {}
        return {each.name: each for each in self._objects.objects.values() if not each.terminating}

    def _views(self, objects: Mapping[str, PoolObject]) -> list[PoolView]:
        if self._selector is not None:
            return [PoolView(self._pools[0].name, self._target_ports, None)]
        found = [objects[pool.name] for pool in self._pools if pool.name in objects]
        return [PoolView(each.name, each.ports, each.selector) for each in found]

    def _describe(self, pool: Pool, found: PoolObject | None) -> None:
        if self._objects is None:
            pool.exists, pool.synced, pool.view_as_of_s = True, self._pods.synced, self._pods.as_of_s
            return
        if self._objects.synced and pool.exists is not (found is not None):
            _log.info("pool found" if found else "pool gone", extra={"fields": {"pool": f"{pool.namespace}/{pool.name}"}})
        pool.exists = found is not None
        pool.synced = self._objects.synced and (found is None or self._pods.synced)
        pool.view_as_of_s = self._objects.as_of_s if found is None else min(self._objects.as_of_s, self._pods.as_of_s)
        if found is not None:
            pool.app_protocol, pool.service, pool.service_port = found.app_protocol, found.service, found.service_port

    def _apply(self) -> None:
        specs = self._membership.specs
        try:
            if self._membership.replaced:  # first without those whose place another pod has taken: nothing of the old one is left there
                there = [endpoint.spec for endpoint in self._datastore.endpoints.values()]
                self._datastore.apply([spec for spec in there if spec.address not in self._membership.replaced])
            self._datastore.apply(specs.values())
        except ValueError as error:
            self._tell(f"pods: {error}; the endpoints there were stay")

    def _view_changed(self) -> None:
        self._view_dirty = True
        self._dirty.set()

    def _resources_changed(self) -> None:
        self._resources_dirty = True
        self._dirty.set()

    def _apply_resources(self) -> None:
        self._resources_dirty = False
        items = [item for each in self._resources for item in each.objects.values()]
        objectives = [item for item in items if isinstance(item, Objective)]
        rewrites = [item for item in items if isinstance(item, Rewrite)]
        try:
            for pool in self._pools:
                pool.resources.apply(objectives, rewrites)
        except ValueError as error:
            self._tell(f"objectives and rewrites: {error}; those there were stay")

    def _follow(self, tasks: asyncio.TaskGroup) -> None:
        """Have the pods watched that the pools select now."""
        selector = self._pods_selector()
        if selector is None or selector == self._selected:
            return
        if self._pods_task is not None:
            self._pods_task.cancel()
        self._selected = selector
        self._pods.use(_params(selector))
        self._pods_task = tasks.create_task(self._pods.run(), name="watch pods")

    def _pods_selector(self) -> str | None:
        """None: not known yet, or no more; the pods watched until then go on being watched."""
        if self._selector is not None:
            return str(self._selector)
        if len(self._pools) > 1:
            return ""
        found = self._pool_objects().get(self._pools[0].name)
        return str(found.selector) if found else None

    def _pods_are_theirs(self) -> bool:
        """Whether the pods here are those that the pools select now: of what another selector listed, the new one would leave hardly any."""
        selector = self._pods_selector()
        return selector is None or self._pods.listed_by == _params(selector)

    def _tell(self, why: str) -> None:
        if why != self._told:
            _log.warning("what Kubernetes says can't be used", extra={"fields": {"namespace": self._namespace, "reason": why}})
        self._told = why


def _params(selector: str) -> dict[str, str]:
    return {"labelSelector": selector} if selector else {}


def pool_kinds(group: str, namespace: str) -> list[Kind]:
    """Where InferencePools of this group are; of the newer group, the older version is the way out on clusters that lack it."""
    old = Kind(f"inferencepools.{POOL_GROUP_OLD}", f"/apis/{POOL_GROUP_OLD}/v1alpha2/namespaces/{namespace}/inferencepools", read_pool_old)
    if group == POOL_GROUP_OLD:
        return [old]
    return [
        Kind(f"inferencepools.{group}", f"/apis/{group}/v1/namespaces/{namespace}/inferencepools", read_pool),
        *([old] if group == POOL_GROUP else []),
    ]


def resource_kinds(plural: str, namespace: str) -> list[Kind]:
    """Where InferenceObjectives or InferenceModelRewrites are, the newer group first."""
    return [
        Kind(f"{plural}.{group}", f"/apis/{group}/v1alpha2/namespaces/{namespace}/{plural}", read_resource)
        for group in ("llm-d.ai", "inference.networking.x-k8s.io")
    ]
