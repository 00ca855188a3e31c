"""Precise prefix routing put together: for every precise index in service a hub that gets its events, and the stage where prompts get tokens.

Follows the configuration: `use` takes the plugins in service at any time. A hub lives as long as its producer; one that can't take its port
after a change of the configuration is left out, and its index goes by what was sent. Not here: sockets (events), tokenizers (tokenize),
what is made of both (prefix.kv_view, the producer).
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from epp.arrival import Stage
from epp.clock import Clock
from epp.config.units import duration_s
from epp.datastore import Datastore
from epp.errors import StartError
from epp.events.hub import EventHub
from epp.events.settings import BackendSettings, EventSettings
from epp.observe.families import Family
from epp.observe.kv_index import index_families
from epp.plugins.base import Plugin
from epp.plugins.producers.precise_prefix_cache import PodDiscoveryConfig, PrecisePrefixCacheProducer
from epp.tokenize.stage import TokenStage
from epp.types import Endpoint

_log = logging.getLogger("epp.kv_routing")
_GUESSED = "KV-cache events can't be got: what is cached where is guessed"


def event_settings(producer: PrecisePrefixCacheProducer) -> EventSettings:
    """What the reference picker's parameters mean here. Raises ValueError.

    Endpoints are the pool's: a selector of pods is accepted and not needed. Where engines connect to us they are connected to only if the
    configuration says at which port.
    """
    config, kept = producer.kv_events_config, producer.indexer_config.kv_block_index_config
    discovery = config.pod_discovery_config or PodDiscoveryConfig()
    shared = kept.valkey_config or kept.redis_config
    return EventSettings(
        subscribe=config.discover_pods and (not config.zmq_endpoint or config.pod_discovery_config is not None),
        socket_port=discovery.socket_port,
        replay_port=discovery.replay_socket_port,
        ranks=config.data_parallel_ranks,
        bind=config.zmq_endpoint,
        topic_filter=config.topic_filter,
        trtllm_poll_s=duration_s(config.trtllm_poll_interval) if config.trtllm_poll_interval else 0.0,
        backend=BackendSettings(url=shared.address) if shared is not None else None,
    )


def _check(producer: PrecisePrefixCacheProducer) -> None:
    try:
        event_settings(producer)
    except ValueError as error:
        raise ValueError(f"{producer.name}: {error}") from None


class _Served:
    """A producer, its hub, and the task that runs it."""

    def __init__(self, producer: PrecisePrefixCacheProducer, hub: EventHub) -> None:
        self.producer = producer
        self.hub = hub
        self.task: asyncio.Task[None] | None = None


class KvRouting:
    """See the module. `use`, `start`, then `run`; `use` again whenever the plugins change."""

    def __init__(
        self,
        datastore: Datastore,
        clock: Clock,
        rng: random.Random,
        plugins: Iterable[Plugin] = (),
        *,
        engine: Callable[[Endpoint], str] = lambda _endpoint: "",
        limit_hit: Callable[[str], None] = lambda _name: None,
    ) -> None:
        """`plugins`: see `use`, with what it raises. `engine`: the family an endpoint was read as."""
        self.tokens = TokenStage(clock, self._ready, limit_hit=limit_hit)
        self._datastore = datastore
        self._clock = clock
        self._rng = rng
        self._engine = engine
        self._wanted: list[PrecisePrefixCacheProducer] = []
        self._served: dict[int, _Served] = {}
        """By the producer's identity."""
        self._refused: dict[int, PrecisePrefixCacheProducer] = {}
        """Those that have none: it could not be made or started; kept, for an identity is somebody else's once its object is gone."""
        self._changed = asyncio.Event()
        self.use(plugins)

    @property
    def stages(self) -> Sequence[Stage]:
        """What a request passes."""
        return self.tokens.stages

    def use(self, plugins: Iterable[Plugin]) -> None:
        """The plugins in service from now on. Raises ValueError or StartError for what can't be used; then nothing has changed."""
        plugins = list(plugins)
        wanted = [each for each in plugins if isinstance(each, PrecisePrefixCacheProducer)]
        for producer in wanted:
            _check(producer)
        self.tokens.use(plugins)
        self._wanted = wanted
        self._changed.set()

    def follow(self, plugins: Iterable[Plugin]) -> Sequence[Stage]:
        """As `use`, while it runs: what can't be used is said and left out, and nothing else. Returns the stages there are from now on."""
        plugins = list(plugins)
        wanted = [each for each in plugins if isinstance(each, PrecisePrefixCacheProducer)]
        for producer in wanted:
            try:
                _check(producer)
            except ValueError as error:
                self._refuse(producer, error)
        try:
            self.tokens.use(plugins)
        except (ValueError, StartError) as error:
            _log.warning("new tokenizers can't be used; the old ones stay", extra={"fields": {"reason": str(error)}})
        self._wanted = wanted
        self._changed.set()
        return self.stages

    async def start(self) -> None:
        """Take the ports there are to take. Raises StartError."""
        self._changed.clear()
        try:
            for producer in self._wanted:
                await self._serve(producer)
        except StartError:
            for served in self._served.values():
                await served.hub.stop()
            self._served.clear()
            raise

    async def run(self) -> None:
        """Until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.tokens.run(), name="tokens")
            while True:
                self._begin(tasks)
                await self._changed.wait()
                self._changed.clear()
                await self._follow()

    def _begin(self, tasks: asyncio.TaskGroup) -> None:
        """Run the hubs that are new."""
        for served in self._served.values():
            if served.task is None:
                served.task = tasks.create_task(served.hub.run(), name=f"kv events for {served.producer.name}")

    async def _follow(self) -> None:
        """Hubs of producers that are gone end first: a new one may want the same port."""
        staying = {id(producer) for producer in self._wanted}
        self._refused = {key: producer for key, producer in self._refused.items() if key in staying}
        for key in [key for key in self._served if key not in staying]:
            served = self._served.pop(key)
            if served.task is not None:
                served.task.cancel()
                await asyncio.wait((served.task,))
            await served.hub.stop()  # a task that was cancelled before its first step gave nothing back
        for producer in self._wanted:
            if id(producer) in self._served or id(producer) in self._refused:
                continue
            try:
                await self._serve(producer)
            except StartError as error:
                self._refuse(producer, error)

    def _refuse(self, producer: PrecisePrefixCacheProducer, error: Exception) -> None:
        if id(producer) not in self._refused:  # said once, not with every change
            self._refused[id(producer)] = producer
            _log.warning(_GUESSED, extra={"fields": {"plugin": producer.name, "reason": str(error)}})

    async def _serve(self, producer: PrecisePrefixCacheProducer) -> None:
        settings = event_settings(producer)
        hub = EventHub(self._datastore, producer.index.precise, settings, clock=self._clock, rng=self._rng, engine=self._engine)
        await hub.start()
        self._served[id(producer)] = _Served(producer, hub)

    def families(self) -> Iterator[Family]:
        """For the metrics page. Of several producers the first one's: the names have no label for more."""
        for served in list(self._served.values())[:1]:
            yield from served.hub.families()
            yield from index_families(served.producer.index)

    def state(self) -> dict[str, Any]:
        """For people."""
        return {"tokens": self.tokens.state(), "events": {served.producer.name: served.hub.state() for served in self._served.values()}}

    def _ready(self, pool: str) -> Sequence[Endpoint]:
        return self._datastore.ready_in.get(pool, self._datastore.ready).endpoints
