"""What a cluster says becomes endpoints, objectives and rewrites: by events, by lists, and not at all while the API server is away."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any

import pytest

from epp.clock import VirtualClock
from epp.datastore import Datastore, Ticket
from epp.errors import ConfigError
from epp.pools import Pool, Pools
from epp.resources import POOL_GROUP, Choice, Limits, Objective, Resources, Rewrite, Rule
from epp.sources.kubernetes.api import Api
from epp.sources.kubernetes.objects import POOL_GROUP_OLD
from epp.sources.kubernetes.source import COALESCE_S, KubernetesSource
from epp.types import EndpointSpec
from tests.kubernetes.fake_api import FakeApi, inference_pool, inference_pool_v1alpha2, objective, pod, rewrite

PODS = "/api/v1/namespaces/default/pods"
POOLS_V1 = f"inferencepools.{POOL_GROUP}"
OBJECTIVES, REWRITES = "inferenceobjectives.llm-d.ai", "inferencemodelrewrites.llm-d.ai"
OBJECTIVES_OLD, REWRITES_OLD = f"inferenceobjectives.{POOL_GROUP_OLD}", f"inferencemodelrewrites.{POOL_GROUP_OLD}"
NO_RESOURCES = (OBJECTIVES, REWRITES, OBJECTIVES_OLD, REWRITES_OLD)
WAIT_S = 30.0
SHORT_S = 60.0


class Time(VirtualClock):
    """Short waits are over at once; long ones when a test says that time passes."""

    def __init__(self) -> None:
        super().__init__(1_000.0)
        self.held: list[tuple[float, asyncio.Event]] = []

    async def sleep(self, seconds: float) -> None:
        if seconds < SHORT_S:
            self.advance(seconds)
            await asyncio.sleep(0)
            return
        event = asyncio.Event()
        self.held.append((self.now_s() + seconds, event))
        await event.wait()

    def passes(self, seconds: float) -> None:
        self.advance(seconds)
        for deadline_s, event in self.held:
            if deadline_s <= self.now_s():
                event.set()


class CountingDatastore(Datastore):
    applies = 0

    def apply(self, specs: Iterable[EndpointSpec]) -> None:
        self.applies += 1
        super().apply(specs)


class World:
    """A source at a fake API server."""

    def __init__(
        self,
        server: FakeApi,
        names: tuple[str, ...],
        *,
        token: str = "",
        group: str = POOL_GROUP,
        endpoints_max: int = 10_000,
        limits: Limits | None = None,
        **options: Any,
    ) -> None:
        self.server = server
        self.time = Time()
        rng = random.Random(7)
        several = names if len(names) > 1 else ()
        self.datastore = CountingDatastore(self.time, pools=several, endpoints_max=endpoints_max)
        self.pools = [Pool(name, Resources(rng, pool_name=name, pool_group=group, limits=limits), group=group) for name in names]
        self.api = Api.at(server.url, token=token)
        self.limits: list[str] = []
        self.source = KubernetesSource(
            self.api,
            self.pools,
            datastore=self.datastore,
            clock=self.time,
            rng=rng,
            sleep=self.time.sleep,
            limit_hit=self.limits.append,
            **options,
        )

    @property
    def pool(self) -> Pool:
        return self.pools[0]

    @property
    def endpoints(self) -> dict[str, str]:
        """name -> address, with `-` before one that drains."""
        found = self.datastore.endpoints.values()
        return {endpoint.name: ("-" if endpoint.draining else "") + endpoint.destination for endpoint in found}

    @property
    def ready(self) -> list[str]:
        return sorted(endpoint.name for endpoint in self.datastore.ready.endpoints)

    @property
    def selectors(self) -> list[str]:
        """Of the watches of pods, in order."""
        asked = [request for request in self.server.requests if request.path == PODS and request.params.get("watch")]
        return [request.params.get("labelSelector", "") for request in asked]

    async def until(self, condition: Callable[[], object]) -> None:
        async with asyncio.timeout(WAIT_S):
            while not condition():  # noqa: ASYNC110 - sockets need turns of the loop, and nothing tells of them
                await asyncio.sleep(0)

    async def settled(self) -> None:
        """Everything the server has is here."""
        sentinel = f"settled-{self.server.rv}"
        self.server.create(pod(sentinel, "10.99.0.1", labels=SENTINEL_LABELS))
        await self.until(lambda: ("default", sentinel) in self.source._pods.objects)
        self.server.delete("pods", "default", sentinel)
        await self.until(lambda: ("default", sentinel) not in self.source._pods.objects)
        await self.until(lambda: not self.source._dirty.is_set())


SENTINEL_LABELS = {"app": "vllm", "settled": "yes"}


@contextlib.asynccontextmanager
async def world(server: FakeApi, *names: str, **options: Any) -> AsyncIterator[World]:
    made = World(server, names or ("pool",), **options)
    task = asyncio.ensure_future(made.source.run())
    try:
        yield made
        assert not task.done()
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        await made.api.close()


@pytest.fixture
async def server() -> AsyncIterator[FakeApi]:
    async with FakeApi() as made:
        yield made


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    records = [record for record in caplog.records if record.name.startswith("epp") and record.levelno >= logging.WARNING]
    return [record.getMessage() + ": " + str(record.__dict__.get("fields", {}).get("reason", "")) for record in records]


class TestOnePool:
    async def test_all_there_is(self, server: FakeApi) -> None:
        server.create(inference_pool("pool", ports=[8000, 8001], app_protocol="kubernetes.io/h2c", service="picker", service_port=9002))
        server.create(pod("a", "10.0.0.1", labels={"app": "vllm", "llm-d.ai/engine-type": "sglang"}))
        server.create(pod("b", "2001:db8::2"))
        server.create(pod("c", "10.0.0.3", ready=False))
        server.create(pod("other", "10.0.0.4", labels={"app": "other"}))
        server.create(pod("far", "10.0.0.5", namespace="far"))
        server.create(objective("high", 7, "pool"))
        server.create(objective("others", 9, "another"))
        server.create(rewrite("canary", "pool", [("chat", {"chat-v1": 1})]))
        async with world(server) as w:
            assert await w.source.first_sync(WAIT_S)
            assert w.endpoints == {
                "a-rank-0": "10.0.0.1:8000",
                "a-rank-1": "10.0.0.1:8001",
                "b-rank-0": "[2001:db8::2]:8000",
                "b-rank-1": "[2001:db8::2]:8001",
            }
            assert w.datastore.by_destination["10.0.0.1:8000"].labels["llm-d.ai/engine-type"] == "sglang"
            await w.until(lambda: w.pool.resources.counts == (1, 1, 1, 1))
            assert w.pool.resources.priority("high") == 7
            target = w.pool.resources.target("chat")
            assert target is not None
            assert target.model == "chat-v1"
            assert (w.pool.exists, w.pool.synced, w.pool.app_protocol) == (True, True, "kubernetes.io/h2c")
            assert (w.pool.service, w.pool.service_port) == ("picker", 9002)
            assert Pools(w.pools).live
            await w.until(lambda: w.selectors == ["app=vllm"])
            assert repr(w.source) == "<KubernetesSource default pools=1 pods=3>"

    async def test_the_pool_is_asked_for_by_name(self, server: FakeApi) -> None:
        server.create(inference_pool("pool"))
        server.create(inference_pool("another", {"app": "other"}))
        async with world(server) as w:
            assert await w.source.first_sync(WAIT_S)
            asked = [request for request in server.requests if request.path.endswith("/inferencepools")]
            assert {request.params["fieldSelector"] for request in asked} == {"metadata.name=pool"}

    async def test_pods_come_and_go(self, server: FakeApi) -> None:
        server.create(inference_pool("pool"))
        async with world(server) as w:
            assert await w.source.first_sync(WAIT_S)
            assert w.ready == []
            server.create(pod("a", "", ready=False, phase="Pending"))
            await w.settled()
            assert w.ready == []
            server.update(pod("a", "10.0.0.1"))
            await w.until(lambda: w.ready == ["a-rank-0"])
            server.set_ready("default", "a", False)
            await w.until(lambda: w.endpoints == {})
            server.set_ready("default", "a", True)
            await w.until(lambda: w.ready == ["a-rank-0"])
            server.patch("pods", "default", "a", {"metadata": {"labels": {"app": "taken-out"}}})
            await w.until(lambda: w.endpoints == {})
            server.patch("pods", "default", "a", {"metadata": {"labels": {"app": "vllm"}}})
            await w.until(lambda: w.ready == ["a-rank-0"])
            server.delete("pods", "default", "a")
            await w.until(lambda: w.endpoints == {})
            assert w.source.events_total >= 7
            assert w.source.poll_errors_total == 0

    async def test_a_pod_that_is_deleted_gets_nothing_new_and_keeps_count_of_what_it_has(self, server: FakeApi) -> None:
        server.create(inference_pool("pool"))
        server.create(pod("a", "10.0.0.1"))
        server.create(pod("b", "10.0.0.2"))
        async with world(server) as w:
            assert await w.source.first_sync(WAIT_S)
            endpoint = w.datastore.by_destination["10.0.0.1:8000"]
            ticket = Ticket(endpoint, 100)
            server.terminate("pods", "default", "a")
            await w.until(lambda: w.ready == ["b-rank-0"])
            server.set_ready("default", "a", False)  # as its containers stop
            await w.settled()
            assert w.endpoints["a-rank-0"] == "-10.0.0.1:8000"
            assert w.datastore.by_destination["10.0.0.1:8000"] is endpoint
            assert endpoint.inflight_requests == 1
            ticket.release()
            assert endpoint.inflight_requests == 0
            server.delete("pods", "default", "a")
            await w.until(lambda: w.endpoints == {"b-rank-0": "10.0.0.2:8000"})

    async def test_a_pod_with_fewer_ports(self, server: FakeApi) -> None:
        server.create(inference_pool("pool", ports=[8000, 8001]))
        server.create(pod("a", "10.0.0.1", annotations={"llm-d.ai/active-ports": "8001"}))
        async with world(server) as w:
            assert await w.source.first_sync(WAIT_S)
            assert w.endpoints == {"a-rank-1": "10.0.0.1:8001"}
            server.patch("pods", "default", "a", {"metadata": {"annotations": {"llm-d.ai/active-ports": "8000,8001"}}})
            await w.until(lambda: w.ready == ["a-rank-0", "a-rank-1"])

    async def test_an_update_that_matters_to_nobody_costs_nothing(self, server: FakeApi) -> None:
        server.create(inference_pool("pool"))
        server.create(pod("a", "10.0.0.1"))
        async with world(server) as w:
            assert await w.source.first_sync(WAIT_S)
            applies, events = w.datastore.applies, w.source.events_total
            for n in range(5):
                server.patch("pods", "default", "a", {"metadata": {"annotations": {"seen": str(n)}}})
            await w.until(lambda: w.source.events_total == events + 5 and not w.source._dirty.is_set())
            assert w.datastore.applies == applies

    async def test_another_selector_and_other_ports(self, server: FakeApi) -> None:
        server.create(inference_pool("pool"))
        server.create(pod("a", "10.0.0.1"))
        server.create(pod("both", "10.0.0.3", labels={"app": "vllm", "tier": "new"}))
        server.create(pod("b", "10.0.0.2", labels={"tier": "new"}))
        async with world(server) as w:
            assert await w.source.first_sync(WAIT_S)
            assert w.ready == ["a-rank-0", "both-rank-0"]
            kept = w.datastore.by_destination["10.0.0.3:8000"]
            server.patch(POOLS_V1, "default", "pool", {"spec": {"selector": {"matchLabels": {"app": None, "tier": "new"}}}})
            await w.until(lambda: w.ready == ["b-rank-0", "both-rank-0"])
            assert w.datastore.by_destination["10.0.0.3:8000"] is kept
            await w.until(lambda: w.selectors == ["app=vllm", "tier=new"])
            server.patch(POOLS_V1, "default", "pool", {"spec": {"targetPorts": [{"number": 9000}]}})
            await w.until(lambda: w.endpoints == {"b-rank-0": "10.0.0.2:9000", "both-rank-0": "10.0.0.3:9000"})
            server.create(pod("c", "10.0.0.4", labels={"tier": "new"}))
            await w.until(lambda: "c-rank-0" in w.endpoints)
            assert w.selectors == ["app=vllm", "tier=new"]

    async def test_until_the_pods_of_another_selector_are_listed_those_there_stay(self, server: FakeApi) -> None:
        server.create(inference_pool("pool", {"app": "blue"}))
        server.create(pod("blue", "10.0.0.1", labels={"app": "blue"}))
        server.create(pod("green", "10.0.0.2", labels={"app": "green"}))
        async with world(server) as w:
            assert await w.source.first_sync(WAIT_S)
            assert w.ready == ["blue-rank-0"]
            server.hold_lists()
            server.update(inference_pool("pool", {"app": "green"}, [9000]))
            await w.until(lambda: server.asked(PODS, watch=False) == 2 and not w.source._dirty.is_set())
            assert w.endpoints == {"blue-rank-0": "10.0.0.1:8000"}
            assert Pools(w.pools).live
            applies = w.datastore.applies
            server.release_lists()
            await w.until(lambda: w.endpoints == {"green-rank-0": "10.0.0.2:9000"})
            assert w.datastore.applies == applies + 1  # at no time was there none

    async def test_a_selector_that_finds_the_same_pods(self, server: FakeApi) -> None:
        server.create(inference_pool("pool"))
        server.create(pod("a", "10.0.0.1", labels={"app": "vllm", "tier": "prod"}))
        async with world(server) as w:
            assert await w.source.first_sync(WAIT_S)
            server.update(inference_pool("pool", {"app": "vllm", "tier": "prod"}, [9000]))
            await w.until(lambda: w.endpoints == {"a-rank-0": "10.0.0.1:9000"})

    async def test_a_pool_that_is_deleted_goes_at_once_whatever_is_being_listed(self, server: FakeApi) -> None:
        server.create(inference_pool("pool", {"app": "blue"}))
        server.create(pod("blue", "10.0.0.1", labels={"app": "blue"}))
        async with world(server) as w:
            assert await w.source.first_sync(WAIT_S)
            server.hold_lists()
            server.update(inference_pool("pool", {"app": "green"}))
            await w.until(lambda: server.asked(PODS, watch=False) == 2)
            server.delete(POOLS_V1, "default", "pool")
            await w.until(lambda: not w.pool.exists)
            assert w.endpoints == {}
            server.release_lists()

    async def test_a_pool_that_is_deleted_and_made_again(self, server: FakeApi) -> None:
        server.create(inference_pool("pool"))
        server.create(pod("a", "10.0.0.1"))
        async with world(server) as w:
            assert await w.source.first_sync(WAIT_S)
            server.delete(POOLS_V1, "default", "pool")
            await w.until(lambda: not w.pool.exists)
            assert w.endpoints == {}
            assert w.pool.synced
            assert not Pools(w.pools).live
            server.create(inference_pool("pool", {"app": "vllm"}))
            await w.until(lambda: w.ready == ["a-rank-0"])
            assert Pools(w.pools).live

    async def test_a_pool_on_its_way_out_is_gone(self, server: FakeApi) -> None:
        server.create(inference_pool("pool"))
        server.create(pod("a", "10.0.0.1"))
        async with world(server) as w:
            assert await w.source.first_sync(WAIT_S)
            server.patch(POOLS_V1, "default", "pool", {"metadata": {"finalizers": ["x.io/y"], "deletionTimestamp": "2026-11-21T13:31:09Z"}})
            await w.until(lambda: not w.pool.exists)
            assert w.endpoints == {}

    async def test_no_pool_yet(self, server: FakeApi) -> None:
        server.create(pod("a", "10.0.0.1"))
        async with world(server) as w:
            assert await w.source.first_sync(WAIT_S)
            assert (w.pool.exists, w.pool.synced) == (False, True)
            assert not Pools(w.pools).live
            assert w.selectors == []
            server.create(inference_pool("pool"))
            await w.until(lambda: w.ready == ["a-rank-0"])
            assert w.pool.exists

    async def test_waiting_for_a_first_view_has_an_end(self, server: FakeApi) -> None:
        server.silence()
        async with world(server) as w:
            assert not await w.source.first_sync(0)
            assert not w.pool.synced
            assert w.source.age_s(w.pool) == float("inf")
            server.silence(False)

    async def test_nobody_is_ready_before_the_rewrites_are_known(self, server: FakeApi) -> None:
        server.create(inference_pool("pool"))
        server.create(pod("a", "10.0.0.1"))
        server.create(rewrite("canary", "pool", [("chat", {"chat-v1": 1})]))
        server.create(objective("high", 7, "pool"))
        for plural in ("inferencemodelrewrites", "inferenceobjectives"):
            server.fail(3, 429, path=f"/apis/llm-d.ai/v1alpha2/namespaces/default/{plural}", retry_after_s=1)
        async with world(server) as w:
            assert await w.source.first_sync(WAIT_S)
            target = w.pool.resources.target("chat")
            assert target is not None
            assert target.model == "chat-v1"
            assert w.pool.resources.priority("high") == 7

    async def test_rewrites_that_may_not_be_read_keep_no_pool_from_serving(self, server: FakeApi) -> None:
        server.create(inference_pool("pool"))
        server.create(pod("a", "10.0.0.1"))
        server.refuse(REWRITES)
        server.refuse(REWRITES_OLD)
        async with world(server) as w:
            await w.until(lambda: w.ready == ["a-rank-0"])
            assert not await w.source.first_sync(0)
            assert Pools(w.pools).live

    async def test_objectives_and_rewrites_come_and_go(self, server: FakeApi) -> None:
        server.create(inference_pool("pool"))
        async with world(server) as w:
            assert await w.source.first_sync(WAIT_S)
            resources = w.pool.resources
            server.create(objective("high", 7, "pool"))
            await w.until(lambda: resources.priority("high") == 7)
            server.update(objective("high", -1, "pool"))
            await w.until(lambda: resources.priority("high") == -1)
            server.create(rewrite("canary", "pool", [("chat", {"v1": 1})]))
            await w.until(lambda: resources.target("chat"))
            server.delete(OBJECTIVES, "default", "high")
            server.delete(REWRITES, "default", "canary")
            await w.until(lambda: resources.counts == (0, 0, 0, 0))

    async def test_one_with_a_fault_blocks_no_other(self, server: FakeApi, caplog: pytest.LogCaptureFixture) -> None:
        server.create(inference_pool("pool"))
        wrong = rewrite("wrong", "pool", [("chat", {"v1": 1})])
        del wrong["spec"]["rules"][0]["targets"]  # as the schema lets through
        server.create(wrong)
        server.create(rewrite("right", "pool", [("chat", {"v2": 1})]))
        async with world(server) as w:
            await w.until(lambda: w.pool.resources.counts.rewrites == 1)
            target = w.pool.resources.target("chat")
            assert target is not None
            assert target.rewrite == "right"
            (record,) = [record for record in caplog.records if record.name.startswith("epp") and record.levelno == logging.WARNING]
            assert record.__dict__["fields"]["object"] == "default/wrong"
            assert "spec.rules[0].targets: is missing" in record.__dict__["fields"]["problems"]
            server.update(rewrite("wrong", "pool", [("other", {"v1": 1})]))
            await w.until(lambda: w.pool.resources.counts.rewrites == 2)

    async def test_more_than_the_tables_hold(self, server: FakeApi, caplog: pytest.LogCaptureFixture) -> None:
        server.create(inference_pool("pool"))
        server.create(objective("a", 1, "pool"))
        async with world(server, limits=Limits(objects=1)) as w:
            await w.until(lambda: w.pool.resources.priority("a") == 1)
            server.create(objective("b", 2, "pool"))
            await w.until(lambda: told(caplog))
            assert told(caplog) == [
                "what Kubernetes says can't be used: objectives and rewrites: 2 objects, the limit is 1; those there were stay"
            ]
            server.delete(OBJECTIVES, "default", "a")
            await w.until(lambda: w.pool.resources.priority("b") == 2)

    async def test_more_endpoints_than_the_limit(self, server: FakeApi, caplog: pytest.LogCaptureFixture) -> None:
        server.create(inference_pool("pool"))
        server.create(pod("a", "10.0.0.1"))
        async with world(server, endpoints_max=2) as w:
            assert await w.source.first_sync(WAIT_S)
            for n in (2, 3):
                server.create(pod(f"a{n}", f"10.0.0.{n}"))
            await w.until(lambda: told(caplog))
            assert "3 endpoints, the limit is 2" in told(caplog)[0]
            server.delete("pods", "default", "a")
            await w.until(lambda: w.ready == ["a2-rank-0", "a3-rank-0"])


class TestGroupsAndKinds:
    async def test_an_old_cluster(self, server: FakeApi) -> None:
        server.uninstall(POOLS_V1)
        server.create(inference_pool_v1alpha2("pool", {"app": "vllm"}, 8000, service="picker", service_port=9002))
        server.create(pod("a", "10.0.0.1"))
        async with world(server) as w:
            assert await w.source.first_sync(WAIT_S)
            assert w.ready == ["a-rank-0"]
            assert (w.pool.service, w.pool.service_port, w.pool.app_protocol) == ("picker", 9002, "")
            server.install(POOLS_V1)  # it is brought up to date
            server.create(inference_pool("pool", ports=[9000]))
            server.cut_watches(kind=f"inferencepools.{POOL_GROUP_OLD}")
            await w.until(lambda: w.endpoints == {"a-rank-0": "10.0.0.1:9000"})

    async def test_a_newer_kind_installed_before_the_pool_is_moved(self, server: FakeApi) -> None:
        server.uninstall(POOLS_V1)
        server.create(inference_pool_v1alpha2("pool", {"app": "vllm"}, 8000))
        server.create(pod("a", "10.0.0.1"))
        async with world(server) as w:
            assert await w.source.first_sync(WAIT_S)
            server.install(POOLS_V1)
            relists = w.source.relists_total
            for _ in range(3):
                await w.until(lambda: server.watching(f"inferencepools.{POOL_GROUP_OLD}"))
                server.cut_watches(kind=f"inferencepools.{POOL_GROUP_OLD}")
                relists += 1
                await w.until(lambda: w.source.relists_total >= relists)  # noqa: B023 - called before it changes
                assert w.pool.exists
                assert w.endpoints == {"a-rank-0": "10.0.0.1:8000"}
            server.create(inference_pool("pool", ports=[9000]))
            await w.until(lambda: server.watching(f"inferencepools.{POOL_GROUP_OLD}"))
            server.cut_watches(kind=f"inferencepools.{POOL_GROUP_OLD}")
            await w.until(lambda: w.endpoints == {"a-rank-0": "10.0.0.1:9000"})

    async def test_the_old_group_asked_for(self, server: FakeApi) -> None:
        server.create(inference_pool("pool", ports=[9000]))
        server.create(inference_pool_v1alpha2("pool", {"app": "vllm"}, 8000))
        server.create(pod("a", "10.0.0.1"))
        async with world(server, group=POOL_GROUP_OLD) as w:
            assert await w.source.first_sync(WAIT_S)
            assert w.endpoints == {"a-rank-0": "10.0.0.1:8000"}

    async def test_no_pools_at_all_is_looked_for_again(self, caplog: pytest.LogCaptureFixture) -> None:
        both = {POOLS_V1, f"inferencepools.{POOL_GROUP_OLD}"}
        async with FakeApi(without={*both, *NO_RESOURCES}) as server:
            server.create(pod("a", "10.0.0.1"))
            async with world(server) as w:
                assert await w.source.first_sync(WAIT_S)
                await w.until(lambda: len(w.time.held) == 3)
                assert not Pools(w.pools).live
                assert len(told(caplog)) == 3
                server.install(POOLS_V1)
                server.install(OBJECTIVES)
                server.create(inference_pool("pool"))
                server.create(objective("high", 7, "pool"))
                w.time.passes(600)
                await w.until(lambda: w.ready == ["a-rank-0"] and w.pool.resources.priority("high") == 7)
                assert w.source.poll_errors_total == 0

    async def test_without_objectives_and_rewrites(self, caplog: pytest.LogCaptureFixture) -> None:
        async with FakeApi(without=NO_RESOURCES) as server:
            server.create(inference_pool("pool"))
            server.create(pod("a", "10.0.0.1"))
            async with world(server) as w:
                assert await w.source.first_sync(WAIT_S)
                assert w.ready == ["a-rank-0"]
                await w.until(lambda: len(w.time.held) == 2)
                assert [line.partition(";")[0] for line in sorted(told(caplog))] == [
                    f"the API server has no {REWRITES} nor {REWRITES_OLD}",
                    f"the API server has no {OBJECTIVES} nor {OBJECTIVES_OLD}",
                ]

    async def test_the_old_group_counts_where_the_new_one_is_not(self) -> None:
        async with FakeApi(without={OBJECTIVES}) as server:
            server.create(inference_pool("pool"))
            server.create(objective("high", 3, "pool", old=True))
            async with world(server) as w:
                await w.until(lambda: w.pool.resources.priority("high") == 3)

    async def test_and_not_where_it_is(self, server: FakeApi) -> None:
        server.create(inference_pool("pool"))
        server.create(objective("old", 3, "pool", old=True))
        server.create(objective("new", 4, "pool"))
        async with world(server) as w:
            await w.until(lambda: w.pool.resources.priority("new") == 4)
            assert w.pool.resources.priority("old") == 0


class TestSeveralPools:
    async def test_one_watch_for_all_of_them(self, server: FakeApi) -> None:
        server.create(inference_pool("chat", {"app": "chat"}, service="chat-epp"))
        server.create(inference_pool("code", {"app": "code"}, [8000, 8001], service="code-epp"))
        server.create(inference_pool("stranger", {"app": "other"}))
        for n, labels in enumerate(({"app": "chat"}, {"app": "code"}, {"app": "other"})):
            server.create(pod(f"p{n}", f"10.0.0.{n}", labels=labels))
        server.create(objective("high", 1, "chat"))
        server.create(objective("high", 2, "code", namespace="default") | {"metadata": {"name": "low", "namespace": "default"}})
        async with world(server, "chat", "code", "missing") as w:
            assert await w.source.first_sync(WAIT_S)
            chat, code, missing = w.pools
            assert {spec.name: spec.pools for spec in (e.spec for e in w.datastore.endpoints.values())} == {
                "p0-rank-0": ("chat",),
                "p1-rank-0": ("code",),
                "p1-rank-1": ("code",),
            }
            assert [len(w.datastore.ready_in[each.name].endpoints) for each in w.pools] == [1, 2, 0]
            assert [each.exists for each in w.pools] == [True, True, False]
            assert [each.service for each in w.pools] == ["chat-epp", "code-epp", ""]
            assert all(each.synced for each in w.pools)
            await w.until(lambda: chat.resources.priority("high") == 1 and code.resources.priority("low") == 2)
            await w.until(lambda: w.selectors == [""])
            server.create(inference_pool("missing", {"app": "other"}))
            await w.until(lambda: missing.exists)
            assert [e.name for e in w.datastore.ready_in["missing"].endpoints] == ["p2-rank-0"]
            assert missing.synced
            server.update(inference_pool("chat", {"app": "code"}))
            await w.until(lambda: w.datastore.ready_in["chat"].endpoints[:1] == w.datastore.ready_in["code"].endpoints[:1])
            server.delete(POOLS_V1, "default", "code")
            await w.until(lambda: not code.exists)
            assert sorted(w.endpoints) == ["p1-rank-0", "p2-rank-0"]
            assert w.selectors == [""]  # none of it needed another list of pods
            assert server.asked(PODS, watch=False) == 1


class TestWithoutPools:
    async def test_pods_alone(self) -> None:
        async with FakeApi(without={POOLS_V1, *NO_RESOURCES}) as server:
            server.create(pod("a", "10.0.0.1", labels={"app": "vllm", "tier": "prod"}))
            server.create(pod("b", "10.0.0.2", labels={"app": "vllm", "tier": "test"}))
            server.create(pod("c", "10.0.0.3", labels={"app": "sglang"}))
            async with world(server, endpoint_selector="app in (vllm, sglang), tier!=test", target_ports=(8000, 8002)) as w:
                assert await w.source.first_sync(WAIT_S)
                assert w.ready == ["a-rank-0", "a-rank-1", "c-rank-0", "c-rank-1"]
                assert Pools(w.pools).live
                await w.until(lambda: w.selectors == ["app in (sglang,vllm),tier!=test"])
                assert {request.path for request in server.requests} == {PODS}
                server.patch("pods", "default", "b", {"metadata": {"labels": {"tier": "prod"}}})
                await w.until(lambda: "b-rank-1" in w.ready)
                assert w.pool.view_as_of_s == w.source._pods.as_of_s

    async def test_what_a_file_said_of_objectives_and_rewrites_stays(self, server: FakeApi) -> None:
        server.create(pod("a", "10.0.0.1"))
        async with world(server, endpoint_selector="app=vllm", target_ports=(8000,)) as w:
            rule = Rule(("chat",), (Choice("chat-v1"),))
            w.pool.resources.apply([Objective("high", priority=7, pool_name="pool")], [Rewrite("r", rules=(rule,), pool_name="pool")])
            before = w.pool.resources.counts
            assert await w.source.first_sync(WAIT_S)
            server.create(pod("b", "10.0.0.2"))
            await w.until(lambda: w.ready == ["a-rank-0", "b-rank-0"])
            assert w.pool.resources.counts == before
            assert w.pool.resources.priority("high") == 7

    async def test_a_selector_that_is_none(self, server: FakeApi) -> None:
        with pytest.raises(ConfigError, match="--endpoint-selector: expected"):
            World(server, ("pool",), endpoint_selector="app=vllm tier=prod", target_ports=(8000,))


class TestTrouble:
    async def test_a_server_that_is_away_takes_nothing_with_it(self, server: FakeApi) -> None:
        server.create(inference_pool("pool"))
        for n in range(5):
            server.create(pod(f"p{n}", f"10.0.0.{n}"))
        server.create(objective("high", 7, "pool"))
        async with world(server) as w:
            assert await w.source.first_sync(WAIT_S)
            await w.until(lambda: w.pool.resources.priority("high") == 7 and w.source.relists_total == 4)
            before, as_of_s = w.datastore.ready, w.pool.view_as_of_s
            await server.stop()
            await w.until(lambda: w.source.poll_errors_total > 20)
            assert w.datastore.ready is before
            assert w.pool.resources.priority("high") == 7
            assert Pools(w.pools).live
            assert w.pool.view_as_of_s < as_of_s + 1
            w.time.passes(300)
            assert w.source.age_s(w.pool) > 300
            server.delete("pods", "default", "p0")
            server.create(pod("new", "10.0.0.9"))
            server.delete(OBJECTIVES, "default", "high")
            await server.start()
            await w.until(lambda: w.ready == ["new-rank-0", "p1-rank-0", "p2-rank-0", "p3-rank-0", "p4-rank-0"])
            await w.until(lambda: w.pool.resources.priority("high") == 0 and w.source.age_s(w.pool) < 300)
            assert w.source.relists_total == 4  # the watches went on where they were

    async def test_what_was_missed_for_too_long_is_listed(self, server: FakeApi) -> None:
        server.create(inference_pool("pool"))
        for n in range(3):
            server.create(pod(f"p{n}", f"10.0.0.{n}"))
        async with world(server) as w:
            assert await w.source.first_sync(WAIT_S)
            await w.until(lambda: w.source.relists_total == 4)
            kept = w.datastore.by_destination["10.0.0.1:8000"]
            await server.stop()
            server.delete("pods", "default", "p0")
            server.create(pod("p3", "10.0.0.3"))
            server.compact()
            await server.start()
            await w.until(lambda: w.ready == ["p1-rank-0", "p2-rank-0", "p3-rank-0"])
            assert w.source.relists_total > 4
            assert w.datastore.by_destination["10.0.0.1:8000"] is kept

    async def test_something_that_answers_404_to_all_takes_nothing_with_it(self, server: FakeApi) -> None:
        """A load balancer whose backends are gone; a server that does not know its kinds yet."""
        server.create(inference_pool("pool"))
        server.create(pod("a", "10.0.0.1"))
        server.create(objective("high", 7, "pool"))
        async with world(server) as w:
            assert await w.source.first_sync(WAIT_S)
            server.fail(1_000_000, 404, path="/")
            server.cut_watches()
            started_s = w.time.now_s()
            applies = w.datastore.applies
            await w.until(lambda: w.time.now_s() > started_s + 1_000)
            assert w.datastore.applies == applies
            assert w.ready == ["a-rank-0"]
            assert w.pool.resources.priority("high") == 7
            assert Pools(w.pools).live
            server._faults.clear()
            server.create(pod("b", "10.0.0.2"))
            await w.until(lambda: w.ready == ["a-rank-0", "b-rank-0"])

    @pytest.mark.parametrize(
        "line",
        [
            b'{"type":"MODIFIED","object":{"metadata":{"name":"\xff"}}}\n',
            b'{"type":"MODIFIED","object":{"metadata":{"name":"a"},"x":' + b"[" * 30_000 + b"\n",
        ],
        ids=["byte", "deep"],
    )
    async def test_a_line_that_can_not_be_read(self, server: FakeApi, line: bytes) -> None:
        server.create(inference_pool("pool"))
        server.create(pod("a", "10.0.0.1"))
        async with world(server) as w:
            assert await w.source.first_sync(WAIT_S)
            await w.until(lambda: server.watching() == 4)
            server.send_raw(line)
            await w.until(lambda: w.source.poll_errors_total == 4)
            server.create(pod("b", "10.0.0.2"))
            await w.until(lambda: w.ready == ["a-rank-0", "b-rank-0"])

    @pytest.mark.parametrize("how", ["in the stream", "as an answer"])
    async def test_a_version_too_old(self, server: FakeApi, how: str) -> None:
        server.create(inference_pool("pool"))
        server.create(pod("a", "10.0.0.1"))
        async with world(server) as w:
            assert await w.source.first_sync(WAIT_S)
            await w.until(lambda: server.watching() == 4)
            if how == "in the stream":
                server.send_error(410, kind="pods")
            else:
                server.fail(times=1, status=410, path=PODS, watch=True, reason="Expired")
                server.cut_watches(kind="pods")
            await w.until(lambda: server.asked(PODS, watch=False) == 2)
            server.create(pod("b", "10.0.0.2"))
            await w.until(lambda: w.ready == ["a-rank-0", "b-rank-0"])
            assert w.source.poll_errors_total == 0

    async def test_a_pod_made_anew_under_its_name_and_address_while_nobody_watched(self, server: FakeApi) -> None:
        server.create(inference_pool("pool"))
        server.create(pod("vllm-0", "10.0.0.1"))
        server.create(pod("vllm-1", "10.0.0.2"))
        async with world(server) as w:
            assert await w.source.first_sync(WAIT_S)
            await w.until(lambda: server.watching("pods") == 1)
            old, stays = (w.datastore.by_destination[f"10.0.0.{n}:8000"] for n in (1, 2))
            for endpoint in (old, stays):
                Ticket(endpoint, 100)
            await server.stop()
            server.delete("pods", "default", "vllm-0")
            server.create(pod("vllm-0", "10.0.0.1"))
            server.compact()
            await server.start()
            await w.until(lambda: w.datastore.by_destination["10.0.0.1:8000"] is not old)
            assert w.datastore.by_destination["10.0.0.1:8000"].inflight_requests == 0
            assert w.datastore.by_destination["10.0.0.2:8000"] is stays

    async def test_lists_that_take_their_time(self, server: FakeApi) -> None:
        server.create(inference_pool("pool"))
        server.create(pod("a", "10.0.0.1"))
        server.hold_lists()
        async with world(server) as w:
            await w.until(lambda: server.asked() >= 3)
            assert not w.pool.synced
            server.create(pod("b", "10.0.0.2"))
            server.release_lists()
            assert await w.source.first_sync(WAIT_S)
            await w.until(lambda: server.watching("pods"))
            server.hold_lists()
            server.send_error(410, kind="pods")
            await w.until(lambda: server.asked(PODS, watch=False) == 2)
            server.delete("pods", "default", "a")  # after the list was asked for: the watch from its version tells
            assert w.ready == ["a-rank-0", "b-rank-0"]
            server.release_lists()
            await w.until(lambda: w.ready == ["b-rank-0"])

    async def test_not_allowed(self, server: FakeApi, caplog: pytest.LogCaptureFixture) -> None:
        server.create(inference_pool("pool"))
        server.create(pod("a", "10.0.0.1"))
        server.refuse("pods", {"list"})
        async with world(server) as w:
            await w.until(lambda: w.source.poll_errors_total > 5)
            (line,) = told(caplog)
            assert "not allowed to list pods in the namespace default: a Role must allow get, list and watch on it" in line
            assert not w.pool.synced
            server.refuse("pods", ())
            assert await w.source.first_sync(WAIT_S)
            server.refuse("pods")
            server.cut_watches(kind="pods")
            errors = w.source.poll_errors_total
            await w.until(lambda: w.source.poll_errors_total > errors + 5)
            assert w.ready == ["a-rank-0"]
            assert "not allowed to watch pods" in told(caplog)[1]

    async def test_a_token_that_is_none(self, caplog: pytest.LogCaptureFixture) -> None:
        async with FakeApi(tokens={"right": "system:serviceaccount:default:epp"}) as server:
            server.create(inference_pool("pool"))
            async with world(server, token="wrong") as w:
                await w.until(lambda: w.source.poll_errors_total > 5)
                assert all("401 Unauthorized" in line and "wrong" not in line for line in told(caplog))
                server.add_token("wrong", "system:serviceaccount:default:epp")
                assert await w.source.first_sync(WAIT_S)

    async def test_nothing_is_left_running(self, server: FakeApi) -> None:
        server.create(inference_pool("pool"))
        before = asyncio.all_tasks()
        async with world(server) as w:
            assert await w.source.first_sync(WAIT_S)
            await w.until(lambda: server.watching() == 4)
        names = {task.get_name() for task in asyncio.all_tasks() - before}
        assert not any(name.startswith("watch ") for name in names)

    @pytest.mark.parametrize("seed", range(6))
    async def test_in_any_weather_it_ends_up_right(self, server: FakeApi, seed: int) -> None:
        """Pods come, change and go while streams are cut, versions grow too old, requests fail: in the end the view is the server's."""
        rng = random.Random(seed)
        server.create(inference_pool("pool"))
        there: set[int] = set()

        def change() -> None:
            number = rng.randrange(60)
            if number not in there:
                server.create(pod(f"p{number}", f"10.0.0.{number + 1}", ready=rng.random() < 0.7))
                there.add(number)
            elif rng.random() < 0.5:
                server.delete("pods", "default", f"p{number}")
                there.discard(number)
            else:
                server.set_ready("default", f"p{number}", rng.random() < 0.7)

        weather: list[Callable[[], object]] = [
            server.cut_watches,
            lambda: server.cut_watches(abort=True),
            lambda: server.cut_watches(half_line=True),
            server.compact,
            lambda: server.send_error(410),
            lambda: server.send_error(500, reason="InternalError"),
            lambda: server.send_raw(b"no event\n"),
            lambda: server.send_raw(b'{"type":"DELETED","object":{"metadata":{"name":"\xff"}}}\n'),
            lambda: server.fail(times=3, status=404),
            lambda: server.fail(times=3, status=rng.choice([0, 429, 500, 503])),
            lambda: server.fail(times=1, status=410, reason="Expired"),
            server.bookmark_now,
        ]
        async with world(server) as w:
            assert await w.source.first_sync(WAIT_S)
            for _ in range(150):
                for _ in range(rng.randrange(4)):
                    change()
                if rng.random() < 0.3:
                    rng.choice(weather)()
                for _ in range(rng.randrange(30)):
                    await asyncio.sleep(0)
            expected = sorted(
                f"{each['metadata']['name']}-rank-0"
                for each in server.objects("pods")
                if any(c["type"] == "Ready" and c["status"] == "True" for c in each["status"]["conditions"])
            )
            assert len(expected) > 3
            await w.until(lambda: w.ready == expected)
            assert w.pool.exists


class TestThousands:
    async def test_five_thousand_pods(self, server: FakeApi) -> None:
        count = 5_000
        server.create(inference_pool("pool"))
        for n in range(count):
            server.create(pod(f"p{n}", f"10.1.{n >> 8}.{n & 255}"))
        async with world(server) as w:
            assert await w.source.first_sync(WAIT_S)
            assert len(w.datastore.ready.endpoints) == count
            assert w.datastore.applies == 1
            assert server.asked(PODS, watch=False) == count // 500
            server.set_ready("default", "p77", False)
            await w.until(lambda: len(w.datastore.ready.endpoints) == count - 1)
            assert w.datastore.applies == 2
            for n in range(1_000):
                server.set_ready("default", f"p{n}", n % 2 == 0)
            await w.until(lambda: len(w.datastore.ready.endpoints) == count - 500)
            assert w.datastore.applies < 102  # ten events or more each

    async def test_what_comes_together_is_applied_together(self, server: FakeApi) -> None:
        server.create(inference_pool("pool"))
        async with world(server) as w:
            assert await w.source.first_sync(WAIT_S)
            await w.until(lambda: not w.source._dirty.is_set() and server.watching("pods"))
            waits: list[float] = []
            gate = asyncio.Event()

            async def sleep(seconds: float) -> None:
                waits.append(seconds)
                await gate.wait()

            w.source._sleep = sleep
            applies = w.datastore.applies
            for n in range(50):
                server.create(pod(f"p{n}", f"10.0.0.{n}"))
            await w.until(lambda: len(w.source._pods.objects) == 50)
            assert waits == [COALESCE_S]
            assert w.datastore.applies == applies
            gate.set()
            await w.until(lambda: len(w.ready) == 50)
            assert w.datastore.applies == applies + 1
