"""The watch against whatever servers there are, the fake and the real one: what changes there changes here."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

import pytest

from epp.clock import MonotonicClock
from epp.datastore import Datastore
from epp.pools import Pool
from epp.resources import POOL_GROUP, Resources
from epp.sources.kubernetes.election import Elector
from epp.sources.kubernetes.source import KubernetesSource
from tests.kubernetes.fake_objects import inference_pool, objective, pod, rewrite
from tests.kubernetes.server import WAIT_S, Server

PODS = 300


@dataclass
class Watch:
    pool: Pool
    datastore: Datastore
    source: KubernetesSource

    @property
    def ready(self) -> set[str]:
        return {endpoint.destination for endpoint in self.datastore.ready.endpoints}

    async def until(self, true: Callable[[], bool], what: str) -> None:
        """Bounded polling of what another party does in its own time."""
        deadline = asyncio.get_running_loop().time() + WAIT_S
        while not true():
            assert asyncio.get_running_loop().time() < deadline, (
                f"not within {WAIT_S:g} s: {what}; {self.source!r}, ready: {len(self.ready)}"
            )
            await asyncio.sleep(0.005)


@contextlib.asynccontextmanager
async def watching(server: Server, name: str = "llama") -> AsyncIterator[Watch]:
    clock, rng = MonotonicClock(), random.Random(3)
    datastore = Datastore(clock)
    pool = Pool(name, Resources(rng, pool_name=name, pool_group=POOL_GROUP), namespace=server.namespace)
    api = server.api()
    source = KubernetesSource(api, [pool], datastore=datastore, clock=clock, rng=rng)
    task = asyncio.create_task(source.run())
    try:
        assert await source.first_sync(WAIT_S)
        yield Watch(pool, datastore, source)
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        await api.close()


async def test_pods_come_change_and_go(server: Server) -> None:
    await server.create(inference_pool("llama"))
    await server.create(pod("a", "10.0.0.1"))
    async with watching(server) as watch:
        assert watch.ready == {"10.0.0.1:8000"}
        await server.create(pod("b", "10.0.0.2"))
        await watch.until(lambda: watch.ready == {"10.0.0.1:8000", "10.0.0.2:8000"}, "a new pod")
        await server.relabel(pod("a"), app="other")
        await watch.until(lambda: watch.ready == {"10.0.0.2:8000"}, "one that is no longer selected")
        await server.patch(inference_pool("llama"), {"spec": {"targetPorts": [{"number": 8000}, {"number": 8001}]}})
        await watch.until(lambda: watch.ready == {"10.0.0.2:8000", "10.0.0.2:8001"}, "another port")
        await server.delete(pod("b"), gracePeriodSeconds=0)
        await watch.until(lambda: not watch.ready, "a deleted pod")
        await server.delete(inference_pool("llama"))
        await watch.until(lambda: not watch.pool.exists, "the deleted pool")


async def test_hundreds_of_pods_are_listed_in_pages_and_followed(server: Server) -> None:
    await server.create(inference_pool("llama"))
    for start in range(0, PODS, 25):
        await asyncio.gather(*(server.create(pod(f"p{n}", f"10.1.{n // 250}.{n % 250 + 1}")) for n in range(start, start + 25)))
    async with watching(server) as watch:
        assert len(watch.ready) == PODS
        gone = [f"p{n}" for n in range(0, PODS, 10)]
        await asyncio.gather(*(server.delete(pod(name), gracePeriodSeconds=0) for name in gone))
        await watch.until(lambda: len(watch.ready) == PODS - len(gone), "a tenth of them gone")
        assert watch.source.relists_total <= 8  # one list a kind, in pages


async def test_objectives_and_rewrites(server: Server) -> None:
    await server.create(inference_pool("llama"))
    async with watching(server) as watch:
        await server.create(objective("high", 7, "llama"))
        await server.create(rewrite("r", "llama", [("chat", {"llama-3": 1})]))
        await watch.until(lambda: watch.pool.resources.priority("high") == 7, "the objective")
        await watch.until(lambda: watch.pool.resources.rewrites_any, "the rewrite")
        await server.delete(objective("high", 7, "llama"))
        await watch.until(lambda: watch.pool.resources.priority("high") == 0, "the objective gone")


async def test_a_history_that_was_compacted_is_no_loss(server: Server) -> None:
    if server.compact_now is None:
        pytest.skip("somebody else's server: its history is not ours to compact")
    await server.create(inference_pool("llama"))
    await server.create(pod("a", "10.0.0.1"))
    async with watching(server) as watch:
        await server.create(pod("b", "10.0.0.2"))
        await server.compact()
        await server.create(pod("c", "10.0.0.3"))
        await watch.until(lambda: watch.ready == {f"10.0.0.{n}:8000" for n in (1, 2, 3)}, "what came before and after")


async def test_of_three_electors_one_leads_and_its_release_hands_over(server: Server) -> None:
    apis = [server.api() for _ in range(3)]
    electors = [
        Elector(api, name="epp-x.llm-d.ai", namespace=server.namespace, identity=f"pod-{n}", clock=MonotonicClock(), rng=random.Random(n))
        for n, api in enumerate(apis)
    ]
    try:
        await asyncio.gather(*(elector.once() for elector in electors))
        assert sum(elector.leading for elector in electors) == 1
        first = next(elector for elector in electors if elector.leading)
        await first.release()
        rest = [elector for elector in electors if elector is not first]
        for elector in rest:
            await elector.once()
        assert [elector.leading for elector in rest].count(True) == 1
        assert not first.leading
    finally:
        for api in apis:
            await api.close()


async def test_without_rights_it_says_which_and_recovers(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    """As `user`, who may do nothing yet."""
    clock = MonotonicClock()
    datastore = Datastore(clock)
    pool = Pool("llama", Resources(random.Random(1)), namespace=server.namespace)
    api = server.api(as_user=True)
    source = KubernetesSource(api, [pool], datastore=datastore, clock=clock, rng=random.Random(1))
    task = asyncio.create_task(source.run())
    try:
        watch = Watch(pool, datastore, source)
        await watch.until(lambda: any("inferencepools" in str(r.__dict__.get("fields")) for r in caplog.records), "the pools' refusal")
        assert not pool.synced
        assert source.poll_errors_total > 0
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        await api.close()
