"""What a Kubernetes cluster adds to a picker: where its pools are watched, who leads, who may read the metrics.

Put together here because the composition root needs it whole or not at all. Not here: the watch, the election and the reviews themselves
(sources.kubernetes), what follows from them (health, datastore).
"""

from __future__ import annotations

import os
import random
import re
import socket
from collections.abc import Callable, Coroutine, Iterator, Sequence
from typing import Any

from epp.clock import Clock
from epp.config.options import ServeOptions
from epp.datastore import Datastore
from epp.pools import Pool
from epp.resources import Resources
from epp.sources.kubernetes.api import Api
from epp.sources.kubernetes.election import Elector, lease_name, replica_identity
from epp.sources.kubernetes.reviews import Reviewer
from epp.sources.kubernetes.source import KubernetesSource

_POD = re.compile(r"(.+)-[a-z0-9]+-[a-z0-9]+")
"""A Deployment's pod."""


def pools_of(options: ServeOptions, rng: random.Random, *, named_here: bool) -> list[Pool]:
    """The pools the flags name. `named_here`: flags or files say what their endpoints are; then there is one, and it is there."""
    namespace = options.pool_namespace or os.environ.get("NAMESPACE", "") or "default"
    group = options.pool_group
    if options.endpoint_selector:
        pools = [Pool(_own_name(), Resources(rng), namespace=namespace, group="")]
    else:
        pools = [
            Pool(name, Resources(rng, pool_name=name, pool_group=group), namespace=namespace, group=group) for name in options.pool_names
        ]
    if named_here or not pools:
        pools = pools[:1] or [Pool("default", Resources(rng), namespace=namespace)]
        pools[0].exists = pools[0].synced = True
    return pools


def needs_cluster(options: ServeOptions, pools: Sequence[Pool]) -> bool:
    return not pools[0].exists or options.ha_enable_leader_election or options.metrics_endpoint_auth is True


def _own_name() -> str:
    """Without an InferencePool the picker's own Deployment gives the name that metrics and the Lease have."""
    found = _POD.fullmatch(os.environ.get("POD_NAME", ""))
    return found[1] if found else "default"


class Cluster:
    """See the module. Raises ConfigError or StartError where there is no way to reach an API server."""

    def __init__(
        self,
        options: ServeOptions,
        pools: Sequence[Pool],
        datastore: Datastore,
        clock: Clock,
        rng: random.Random,
        *,
        leading: Callable[[bool], None],
        limit_hit: Callable[[str], None],
    ) -> None:
        """`leading`: told when this replica begins or ceases to lead, where there is an election."""
        self._api = Api.connect(options.kubeconfig, options.kube_context)
        self.source: KubernetesSource | None = None
        if not pools[0].exists:
            self.source = KubernetesSource(
                self._api,
                pools,
                datastore=datastore,
                clock=clock,
                rng=rng,
                endpoint_selector=options.endpoint_selector,
                target_ports=options.endpoint_target_ports,
                limit_hit=limit_hit,
            )
        self.elector: Elector | None = None
        if options.ha_enable_leader_election:
            self.elector = Elector(
                self._api,
                name=lease_name(pools[0].namespace, pools[0].name),
                namespace=pools[0].namespace,
                identity=replica_identity(os.environ.get("POD_NAME", ""), socket.gethostname()),
                clock=clock,
                rng=rng,
                on_change=leading,
            )
        guarded = self.source is not None if options.metrics_endpoint_auth is None else options.metrics_endpoint_auth
        self.reviewer = Reviewer(self._api, clock, limit_hit=limit_hit) if guarded else None

    def watches(self) -> Iterator[Coroutine[Any, Any, None]]:
        if self.source is not None:
            yield self.source.run()

    async def first_sync(self, timeout_s: float) -> None:
        """Wait for the pools, while they are watched; without them the watch goes on, and health says NOT_SERVING until it has them."""
        if self.source is not None:
            await self.source.first_sync(timeout_s)

    def elections(self) -> Iterator[Coroutine[Any, Any, None]]:
        """To be begun when this replica can serve: a leader that is not ready would be an outage."""
        if self.elector is not None:
            yield self.elector.run()

    async def step_down(self) -> None:
        """Let another replica lead at once."""
        if self.elector is not None:
            await self.elector.release()

    async def close(self) -> None:
        await self.step_down()
        await self._api.close()
