"""The Envoy configuration of the chart epp-standalone, run: a real Envoy, a picker, simulated engines.

Only addresses are changed, and the intervals of health checks. Shown are the two routes of `failOpen`: to exactly the endpoint that was
picked while there is a picker, to any endpoint without one.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from epp.envoy.supervisor import find_envoy, lifeline
from epp.types import Address
from tests.deploy.test_helm import CHARTS, STANDALONE, one, rendered
from tests.e2e.http_clients import Http1, chat
from tests.e2e.programs import LOOPBACK, POLL_S, START_S, Engines, Picker, Program, free_port

pytestmark = pytest.mark.e2e

NAME = "x-gateway-destination-endpoint"


class Envoy(Program):
    """The chart's configuration, in front of these."""

    def __init__(self, values: str, engines: tuple[Address, ...], picker: Picker, folder: Path) -> None:
        self.address, self.admin, self.ready = (Address(LOOPBACK, free_port()) for _ in range(3))
        objects = rendered(CHARTS / STANDALONE / "ci" / f"{values}.yaml")
        config = yaml.safe_load(one(objects, "ConfigMap", "rel-proxy")["data"]["envoy.yaml"])
        config["admin"]["address"] = _at(self.admin)
        for listener in config["static_resources"]["listeners"]:
            listener["address"] = _at(self.address if listener["name"] == "clients" else self.ready)
        clusters = {cluster["name"]: cluster for cluster in config["static_resources"]["clusters"]}
        _points_to(clusters["epp"], (picker.epp,))
        _points_to(clusters["admin"], (self.admin,))
        (check,) = clusters["epp"]["health_checks"]
        check |= {"interval": "0.1s", "no_traffic_interval": "0.1s"}
        if "model-servers" in clusters:
            _points_to(clusters["model-servers"], engines)
        file = folder / "envoy.yaml"
        file.write_text(yaml.safe_dump(config))
        super().__init__(command=tuple(lifeline([str(find_envoy()), "-c", str(file), "--use-dynamic-base-id", "--log-level", "warning"])))

    def await_ready(self) -> None:
        asyncio.run(self._answers())

    async def _answers(self) -> None:
        deadline = time.monotonic() + START_S
        while True:
            try:
                async with Http1(self.ready) as client:
                    if (await client.request("GET", "/ready")).status == 200:
                        return
            except OSError:
                assert time.monotonic() < deadline, repr(self)
                await asyncio.sleep(POLL_S)

    async def stats(self) -> dict[str, int]:
        async with Http1(self.admin) as client:
            text = (await client.request("GET", "/stats")).body.decode()
        pairs = (line.rpartition(": ") for line in text.splitlines())
        return {name: int(value) for name, _, value in pairs if value.isdigit()}

    async def until_the_picker_is(self, *, healthy: int) -> None:
        deadline = time.monotonic() + START_S
        while (await self.stats())["cluster.epp.membership_healthy"] != healthy:
            assert time.monotonic() < deadline, repr(self)
            await asyncio.sleep(POLL_S)


def _at(address: Address) -> dict[str, Any]:
    return {"socket_address": {"address": address.host, "port_value": address.port}}


def _points_to(cluster: dict[str, Any], addresses: tuple[Address, ...]) -> None:
    hosts = [{"endpoint": {"address": _at(address)}} for address in addresses]
    cluster["load_assignment"]["endpoints"] = [{"lb_endpoints": hosts}]


@pytest.fixture(scope="module")
def engines() -> Iterator[Engines]:
    with Engines(count=2) as program:
        yield program


async def ask(envoy: Envoy, headers: dict[str, str] | None = None) -> int:
    async with Http1(envoy.address) as client:
        return (await client.request("POST", "/v1/chat/completions", chat("x" * 2_000), headers or {})).status


def test_who_is_picked_is_who_is_asked_and_without_a_picker_anybody(engines: Engines, tmp_path: Path) -> None:
    with Picker(engines.addresses) as picker, Envoy("sidecar", engines.addresses, picker, tmp_path) as envoy:

        async def with_a_picker() -> None:
            await envoy.until_the_picker_is(healthy=1)
            spoofed = {NAME: f"{LOOPBACK}:{free_port()}"}
            assert [await ask(envoy, headers) for headers in (None, spoofed, None, spoofed)] == [200] * 4
            stats = await envoy.stats()
            assert stats["cluster.picked.upstream_rq_total"] == 4
            assert stats["cluster.model-servers.upstream_rq_total"] == 0

        async def without() -> None:
            await envoy.until_the_picker_is(healthy=0)
            assert [await ask(envoy) for _ in range(4)] == [200] * 4
            stats = await envoy.stats()
            assert stats["cluster.picked.upstream_rq_total"] == 4
            assert stats["cluster.model-servers.upstream_rq_total"] == 4

        asyncio.run(with_a_picker())
        picker.stop()
        asyncio.run(without())


def test_fail_close_answers_with_an_error_without_a_picker(engines: Engines, tmp_path: Path) -> None:
    with Picker(engines.addresses) as picker, Envoy("sidecar-fail-close", engines.addresses, picker, tmp_path) as envoy:

        async def with_a_picker() -> None:
            await envoy.until_the_picker_is(healthy=1)
            assert await ask(envoy) == 200

        async def without() -> None:
            await envoy.until_the_picker_is(healthy=0)
            assert await ask(envoy) == 500

        asyncio.run(with_a_picker())
        picker.stop()
        asyncio.run(without())
