"""One task per endpoint, for as long as it is in the pool: a slow engine never delays another."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from epp.datastore import Datastore
from epp.types import Endpoint


class Following:
    """`run` it once; endpoints are followed as they come and go from then on. What `follow` raises ends `run`."""

    def __init__(self, datastore: Datastore, follow: Callable[[Endpoint], Coroutine[Any, Any, None]], name: str) -> None:
        self._datastore = datastore
        self._follow = follow
        self._name = name
        self._group: asyncio.TaskGroup | None = None
        self._tasks: dict[Endpoint, asyncio.Task[None]] = {}
        datastore.subscribe(added=self._added, removed=self._removed)

    def __len__(self) -> int:
        """Endpoints with a task of their own."""
        return len(self._tasks)

    async def run(self) -> None:
        """Until cancelled."""
        try:
            async with asyncio.TaskGroup() as group:
                self._group = group
                for endpoint in list(self._datastore.endpoints.values()):
                    self._added(endpoint)
                await asyncio.Event().wait()
        finally:
            self._group = None
            self._tasks.clear()

    def _added(self, endpoint: Endpoint) -> None:
        if self._group is not None and endpoint not in self._tasks:
            self._tasks[endpoint] = self._group.create_task(self._follow(endpoint), name=f"{self._name} {endpoint.destination}")

    def _removed(self, endpoint: Endpoint) -> None:
        task = self._tasks.pop(endpoint, None)
        if task is not None:
            task.cancel()
