"""Who is listened to: a subscriber for every publisher of every endpoint, as endpoints come and go; and what came of it, in numbers.

The only part of this package that others need: make one `EventHub` for an index, `run` it for as long as that index is in service.
Not here: what a subscriber does (subscriber), engines that connect to us (central) or are asked (trtllm), what replicas share (valkey).

Cost: a socket and some 3 KB for each publisher; 20 µs of CPU a frame and 2 µs a block of 16 tokens. Nothing per request: it reads the index.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Iterator
from typing import Any

import aiohttp

from epp.aio import Sleep
from epp.clock import Clock
from epp.datastore import Datastore
from epp.events.central import Central
from epp.events.counts import Counts
from epp.events.feed import Feed
from epp.events.settings import EVENTS_PORT_LABEL, EventSettings
from epp.events.stream import Told
from epp.events.subscriber import Common, Subscriber
from epp.events.trtllm import TrtLlmPoller
from epp.events.valkey import Backend
from epp.observe.families import Family
from epp.prefix.precise import PreciseIndex
from epp.types import Endpoint

_log = logging.getLogger("epp.events")

TRTLLM = "trtllm-serve"
"""The family, as the scraper names it."""
LOOK_AGAIN_S = 1.0
"""How often an endpoint is looked at whose family is not known yet, where TensorRT-LLM servers are to be asked."""


class EventHub:
    """See the module."""

    def __init__(
        self,
        datastore: Datastore,
        index: PreciseIndex,
        settings: EventSettings,
        *,
        clock: Clock,
        rng: random.Random,
        wanted: Callable[[Endpoint], bool] = lambda _endpoint: True,
        engine: Callable[[Endpoint], str] = lambda _endpoint: "",
        sleep: Sleep = asyncio.sleep,
    ) -> None:
        """`wanted`: whose events to get; `engine`: the family an endpoint was read as, empty while unknown."""
        self.counts = Counts()
        self._datastore = datastore
        self._index = index
        self._settings = settings
        self._wanted = wanted
        self._engine = engine
        self._sleep = sleep
        self._feed = Feed(clock)
        self._backend = Backend(settings.backend, sleep=sleep, rng=rng) if settings.backend is not None else None
        replays = asyncio.Semaphore(settings.replays_max)
        self._common = Common(index, settings, self.counts, self._feed, clock, rng, sleep, replays, self._backend)
        self._central = Central(self._common, datastore) if settings.bind else None
        self._group: asyncio.TaskGroup | None = None
        self._client: aiohttp.ClientSession | None = None
        self._tasks: dict[Endpoint, list[asyncio.Task[None]]] = {}
        self._followers: dict[Endpoint, list[Subscriber | TrtLlmPoller]] = {}

    @property
    def port(self) -> int:
        """Where engines connect to, while it runs in the centralised mode."""
        return self._central.port if self._central is not None else 0

    async def start(self) -> None:
        """Take the port, where there is one to take. Raises StartError. A shared backend may come later."""
        if self._backend is not None:
            self._backend.start()
        if self._central is not None:
            await self._central.start()

    async def stop(self) -> None:
        """Give the port back; `run` does when it ends."""
        if self._central is not None:
            await self._central.stop()

    async def run(self) -> None:
        """Until cancelled; `start` it before."""
        timeout = aiohttp.ClientTimeout(total=None)  # each question has its own
        try:
            async with (
                aiohttp.ClientSession(timeout=timeout, trust_env=False, auto_decompress=False) as client,
                asyncio.TaskGroup() as group,
            ):
                group.create_task(self._feed.run(), name="kv events")
                if self._backend is not None:
                    group.create_task(self._backend.run(), name="the shared backend of kv events")
                await self._follow(group, client)
        finally:
            for endpoint in list(self._followers):
                self._removed(endpoint)
            await self.stop()

    async def _follow(self, group: asyncio.TaskGroup, client: aiohttp.ClientSession) -> None:
        """The pool, until cancelled; then at once no more, for a group that is ending takes no task of an endpoint that comes."""
        self._client, self._group = client, group
        unsubscribe = self._datastore.subscribe(added=self._added, removed=self._removed)
        try:
            await asyncio.Event().wait()
        finally:
            unsubscribe()
            self._group = self._client = None

    def families(self) -> Iterator[Family]:
        """For the metrics page."""
        publishers = sum(map(len, self._followers.values())) + (self._central.publishers if self._central is not None else 0)
        untrusted = sum(not self._index.trusted(endpoint.slot) for endpoint in self._datastore.endpoints.values())
        yield from self.counts.families(pending=len(self._feed), capacity=publishers, untrusted=untrusted, index=self._index.counts)
        if self._backend is not None:
            yield from self._backend.families()

    def state(self) -> dict[str, Any]:
        """For people: by endpoint, whether its publisher is connected and what is known of it can be relied upon."""
        return {
            endpoint.name: {
                "connected": sum(isinstance(each, Subscriber) and each.connected for each in self._followers.get(endpoint, ())),
                "trusted": self._index.trusted(endpoint.slot),
                "blocks": self._index.held_blocks(endpoint.slot),
            }
            for endpoint in self._datastore.endpoints.values()
        }

    def _added(self, endpoint: Endpoint) -> None:
        if self._group is None or endpoint in self._tasks or not self._wanted(endpoint):
            return
        settings, told = self._settings, Told()
        address = settings.address(endpoint, 0) if settings.subscribe else None
        if address is not None and any(settings.address(other, 0) == address for other in self._followers):
            fields = {"endpoint": endpoint.name, "publisher": str(address)}
            _log.warning(
                "two endpoints have one publisher of KV-cache events: give each the label %s", EVENTS_PORT_LABEL, extra={"fields": fields}
            )
        tasks = self._tasks[endpoint] = []
        self._followers[endpoint] = []
        if settings.trtllm_poll_s:
            tasks.append(self._group.create_task(self._poll(endpoint, told), name=f"kv events of {endpoint.destination}, if TensorRT-LLM"))
        if settings.subscribe:
            for rank in range(settings.ranks):
                subscriber = Subscriber(self._common, endpoint, rank, told)
                self._followers[endpoint].append(subscriber)
                tasks.append(self._group.create_task(self._subscribe(endpoint, subscriber), name=f"kv events of {endpoint.destination}"))

    def _removed(self, endpoint: Endpoint) -> None:
        for follower in self._followers.pop(endpoint, ()):
            follower.stop()
        for task in self._tasks.pop(endpoint, ()):
            task.cancel()

    async def _subscribe(self, endpoint: Endpoint, subscriber: Subscriber) -> None:
        while self._settings.trtllm_poll_s and not self._engine(endpoint):
            await self._sleep(LOOK_AGAIN_S)
        if not self._settings.trtllm_poll_s or self._engine(endpoint) != TRTLLM:
            await subscriber.follow()

    async def _poll(self, endpoint: Endpoint, told: Told) -> None:
        while not self._engine(endpoint):
            await self._sleep(LOOK_AGAIN_S)
        if self._engine(endpoint) == TRTLLM and self._client is not None:
            poller = TrtLlmPoller(self._common, endpoint, told, self._client)
            self._followers[endpoint].append(poller)
            await poller.follow()
