"""What the conformance tests ask a server with, the fake or a real one: plain HTTP, so that no client of ours decides what is seen."""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

import httpx

from epp.sources.kubernetes.api import Api
from tests.kubernetes.fake_objects import Object

WAIT_S = 30.0
"""For what a server says by itself; nothing is asserted about how long it takes."""
PLURALS = {
    "Pod": "pods", "Service": "services", "InferencePool": "inferencepools", "InferenceObjective": "inferenceobjectives", "Lease": "leases",
    "InferenceModelRewrite": "inferencemodelrewrites", "Role": "roles", "RoleBinding": "rolebindings",
}  # fmt: skip
STATUS = {"Content-Type": "application/merge-patch+json"}


class Events:
    """Of one watch, in order."""

    def __init__(self, response: httpx.Response) -> None:
        self.response = response
        self._lines = response.aiter_lines()

    async def next(self) -> Object:
        """Also what is left of a stream that has ended: then it raises StopAsyncIteration."""
        async with asyncio.timeout(WAIT_S):
            async for line in self._lines:
                return json.loads(line)
        raise StopAsyncIteration

    async def take(self, count: int) -> list[Object]:
        return [await self.next() for _ in range(count)]

    async def rest(self) -> list[Object]:
        """Until the server ends the stream."""
        found = []
        with contextlib.suppress(StopAsyncIteration):
            while True:
                found.append(await self.next())
        return found


@dataclass
class Server:
    admin: httpx.AsyncClient
    client: httpx.AsyncClient
    """Asks as `user`."""
    user: str
    user_token: str
    namespace: str
    compact_now: Callable[[], Any] | None
    url: str = ""
    tokens: tuple[str, str] = ("", "")
    tls: ssl.SSLContext | bool = True

    @classmethod
    @contextlib.asynccontextmanager
    async def at(
        cls, url: str, tls: ssl.SSLContext | bool, *, tokens: tuple[str, str], user: str, namespace: str, compact: Callable[[], Any] | None
    ) -> AsyncIterator[Server]:
        """`tokens`: an administrator's and the user's."""

        def asking(token: str) -> httpx.AsyncClient:
            headers = {"Authorization": f"Bearer {token}"} if token else {}
            return httpx.AsyncClient(base_url=url, verify=tls, headers=headers, trust_env=False, timeout=WAIT_S)

        async with asking(tokens[0]) as admin, asking(tokens[1]) as client:
            server = cls(admin, client, user, tokens[1], namespace, compact, url, tokens, tls)
            body = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace}}
            (await admin.post("/api/v1/namespaces", json=body)).raise_for_status()
            try:
                yield server
            finally:
                await admin.delete(f"/api/v1/namespaces/{namespace}")

    def api(self, *, as_user: bool = False) -> Api:
        """The product's own client, of the administrator or of `user`."""
        return Api.at(self.url, token=self.tokens[as_user], verify=self.tls)

    def path(self, of: Object | str, name: str = "") -> str:
        """Of an object, or of a collection by its plural."""
        if isinstance(of, str):
            api = {"pods": "v1", "leases": "coordination.k8s.io/v1", "inferencepools": "inference.networking.k8s.io/v1"}[of]
            plural = of
        else:
            api, plural, name = of["apiVersion"], PLURALS[of["kind"]], of["metadata"]["name"]
        root = f"/apis/{api}" if "/" in api else f"/api/{api}"
        return f"{root}/namespaces/{self.namespace}/{plural}" + (f"/{name}" if name else "")

    async def post(self, obj: Object) -> httpx.Response:
        return await self.admin.post(self.path(obj).rpartition("/")[0], json=self.here(obj))

    def here(self, obj: Object) -> Object:
        """The object in this test's namespace."""
        return {**obj, "metadata": {**obj["metadata"], "namespace": self.namespace}}

    async def create(self, obj: Object) -> Object:
        """A pod with its status: what a kubelet would report."""
        answer = await self.post(obj)
        assert answer.status_code == 201, answer.text
        if obj["kind"] == "Pod":
            answer = await self.patch(obj, {"status": obj["status"]}, sub="/status")
            assert answer.status_code == 200, answer.text
        return answer.json()

    async def patch(self, obj: Object, change: Object, *, sub: str = "") -> httpx.Response:
        return await self.admin.patch(self.path(obj) + sub, content=json.dumps(change), headers=STATUS)

    async def relabel(self, obj: Object, **labels: str | None) -> Object:
        answer = await self.patch(obj, {"metadata": {"labels": labels}})
        assert answer.status_code == 200, answer.text
        return answer.json()

    async def delete(self, obj: Object, **params: Any) -> httpx.Response:
        return await self.admin.delete(self.path(obj), params=params)

    async def list(self, of: str, **params: Any) -> Object:
        answer = await self.admin.get(self.path(of), params=params)
        assert answer.status_code == 200, answer.text
        return answer.json()

    async def rv(self, of: str) -> str:
        return (await self.list(of))["metadata"]["resourceVersion"]

    @contextlib.asynccontextmanager
    async def watch(self, of: str, **params: Any) -> AsyncIterator[Events]:
        path = of if of.startswith("/") else self.path(of)
        async with self.admin.stream("GET", path, params={"watch": "true", **params}) as response:
            assert response.status_code == 200
            yield Events(response)

    async def compact(self) -> None:
        """The history up to now is gone."""
        assert self.compact_now is not None
        await asyncio.to_thread(self.compact_now)
