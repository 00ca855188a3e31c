"""`epp serve` as a process of its own in front of an API server: pools, readiness, leaders, the guarded port, and no API server at all."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import httpx
import pytest
import yaml

from epp._pb import epp_ext_proc_pb2 as pb
from epp._pb import epp_health_pb2 as health_pb
from tests.builders import DESTINATION, chat, request_body, request_headers
from tests.e2e.programs import LOOPBACK, Program, free_port
from tests.kubernetes.fake_access import User
from tests.kubernetes.fake_api import FakeApi
from tests.kubernetes.fake_objects import inference_pool, objective, pod, rewrite

PROCESS = "/envoy.service.ext_proc.v3.ExternalProcessor/Process"
CHECK = "/grpc.health.v1.Health/Check"
WAIT_S = 30.0
SERVING, NOT_SERVING, UNKNOWN = 1, 2, 3
OPERATOR, PROMETHEUS, STRANGER, PICKER = "operator-token", "prometheus-token", "stranger-token", "picker-token"


class Picker(Program):
    """`epp serve` on free ports."""

    def __init__(self, kubeconfig: Path, *flags: str, pod_name: str = "epp-5d8f7-abcde") -> None:
        self.ports = {name: free_port() for name in ("grpc", "grpc-health", "metrics")}
        ports = [f"--{name}-port={port}" for name, port in self.ports.items()]
        given = [
            f"--kubeconfig={kubeconfig}",
            "--bind-address=127.0.0.1",
            "--secure-serving=false",
            "--check-models=false",
            "--drain-timeout=0s",
        ]
        super().__init__("serve", *given, *ports, *flags, command=("env", f"POD_NAME={pod_name}", sys.executable, "-m", "epp"))

    def await_ready(self) -> None:
        self.await_output(r'"serving"')

    async def health(self, service: str = "readiness") -> int:
        async with grpc.aio.insecure_channel(f"{LOOPBACK}:{self.ports['grpc-health']}") as channel:
            check = channel.unary_unary(CHECK, health_pb.HealthCheckRequest.SerializeToString, health_pb.HealthCheckResponse.FromString)
            return int((await check(health_pb.HealthCheckRequest(service=service), timeout=WAIT_S)).status)

    async def pick(self, *, authority: str = "", model: str = "m", headers: dict[str, str] | None = None) -> str:
        """The destination of one request, or its error's status and text."""
        options = [("grpc.default_authority", authority)] if authority else []
        async with grpc.aio.insecure_channel(f"{LOOPBACK}:{self.ports['grpc']}", options=options) as channel:
            call = channel.stream_stream(PROCESS, pb.ProcessingRequest.SerializeToString, pb.ProcessingResponse.FromString)()
            await call.write(request_headers(headers=headers))
            await call.write(request_body(chat(model=model), end_of_stream=True))
            async with asyncio.timeout(WAIT_S):
                answer = await call.read()
            call.cancel()
        assert isinstance(answer, pb.ProcessingResponse)
        if answer.WhichOneof("response") == "immediate_response":
            refusal = answer.immediate_response
            return f"{refusal.status.code} {json.loads(refusal.body)['error']['message']}"
        return next(
            option.header.raw_value.decode()
            for option in answer.request_headers.response.header_mutation.set_headers
            if option.header.key == DESTINATION
        )

    async def picks(self, count: int = 16, **how: Any) -> set[str]:
        return {await self.pick(**how) for _ in range(count)}

    async def metrics(self, token: str = "") -> httpx.Response:
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        async with httpx.AsyncClient() as client:
            return await client.get(f"http://{LOOPBACK}:{self.ports['metrics']}/metrics", headers=headers)


@contextlib.asynccontextmanager
async def running(kubeconfig: Path, *flags: str, **how: str) -> AsyncIterator[Picker]:
    """Started and stopped off the event loop, which the API server's fake needs."""
    picker = Picker(kubeconfig, *flags, **how)
    await asyncio.to_thread(picker.start)
    try:
        yield picker
    finally:
        await asyncio.to_thread(picker.__exit__)


async def until(true: Callable[[], Any], what: str) -> None:
    """Bounded polling of another process."""
    deadline = asyncio.get_running_loop().time() + WAIT_S
    while True:
        found = true()
        if await found if asyncio.iscoroutine(found) else found:
            return
        assert asyncio.get_running_loop().time() < deadline, f"not within {WAIT_S:g} s: {what}"
        await asyncio.sleep(0.02)


@pytest.fixture
async def api() -> AsyncIterator[FakeApi]:
    tokens = {OPERATOR: User("admin", ("system:masters",)), PICKER: User.service_account("default", "epp")}
    tokens |= {PROMETHEUS: User.service_account("monitoring", "prometheus"), STRANGER: User.service_account("default", "stranger")}
    async with FakeApi(tokens=tokens, rbac=True) as fake:
        yield fake


@pytest.fixture
def kubeconfig(api: FakeApi, tmp_path: Path) -> Path:
    document = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "test",
        "clusters": [{"name": "test", "cluster": {"server": api.url}}],
        "users": [{"name": "epp", "user": {"token": OPERATOR}}],
        "contexts": [{"name": "test", "context": {"cluster": "test", "user": "epp"}}],
    }
    path = tmp_path / "kubeconfig"
    path.write_text(yaml.safe_dump(document))
    return path


OPEN = "--metrics-endpoint-auth=false"


async def test_a_pool_s_pods_are_routed_to_as_they_come_and_go(api: FakeApi, kubeconfig: Path) -> None:
    api.create(inference_pool("llama"))
    api.create(pod("a", "10.1.0.1"))
    async with running(kubeconfig, "--pool-name=llama", OPEN) as picker:
        assert await picker.health() == SERVING
        assert await picker.picks(4) == {"10.1.0.1:8000"}
        api.create(pod("b", "10.1.0.2"))
        await until(lambda: _sees(picker, {"10.1.0.1:8000", "10.1.0.2:8000"}), "the new pod is used")
        api.delete("Pod", "default", "a")
        await until(lambda: _sees(picker, {"10.1.0.2:8000"}), "the deleted one is not")
        api.set_ready("default", "b", False)
        await until(lambda: _refused(picker, "503"), "nobody is ready")
        assert await picker.health() == SERVING  # an empty pool is a pool


async def test_without_its_pool_it_is_not_ready(api: FakeApi, kubeconfig: Path) -> None:
    api.create(pod("a", "10.1.0.1"))
    async with running(kubeconfig, "--pool-name=llama", OPEN) as picker:
        assert await picker.health() == NOT_SERVING
        assert await picker.health("inference-extension") == NOT_SERVING
        assert (await picker.pick()).startswith("503")
        api.create(inference_pool("llama"))
        await until(lambda: _is(picker.health(), SERVING), "the pool is there")
        await until(lambda: _sees(picker, {"10.1.0.1:8000"}), "its pod is used")
        api.delete("InferencePool", "default", "llama")
        await until(lambda: _is(picker.health(), NOT_SERVING), "the pool is gone")
        assert (await picker.pick()).startswith("503")


async def test_a_protocol_that_no_parser_speaks_is_not_served(api: FakeApi, kubeconfig: Path) -> None:
    api.create(inference_pool("llama", app_protocol="http"))
    grpc_only = "{apiVersion: llm-d.ai/v1alpha1, kind: EndpointPickerConfig, plugins: [{type: vllmgrpc-parser}], requestHandler: {parsers: [{pluginRef: vllmgrpc-parser}]}}"
    async with running(kubeconfig, "--pool-name=llama", OPEN, f"--config-text={grpc_only}") as picker:
        assert await picker.health() == NOT_SERVING
        api.update(inference_pool("llama", app_protocol="kubernetes.io/h2c"))
        await until(lambda: _is(picker.health(), SERVING), "the parser speaks it")


async def test_the_api_server_s_loss_does_not_stop_routing(api: FakeApi, kubeconfig: Path) -> None:
    api.create(inference_pool("llama"))
    api.create(pod("a", "10.1.0.1"))
    async with running(kubeconfig, "--pool-name=llama", OPEN) as picker:
        assert await picker.picks(2) == {"10.1.0.1:8000"}
        await api.stop()
        assert await picker.picks(4) == {"10.1.0.1:8000"}
        assert await picker.health() == SERVING
        text = (await picker.metrics()).text
        assert 'epp_kubernetes_view_age_seconds{name="llama"}' in text
        assert 'epp_kubernetes_pool_exists{name="llama"} 1' in text


async def test_objectives_and_rewrites_of_the_pool_take_effect(api: FakeApi, kubeconfig: Path) -> None:
    api.create(inference_pool("llama"))
    api.create(pod("a", "10.1.0.1"))
    api.create(rewrite("r", "llama", [("chat", {"llama-3": 1})]))
    api.create(objective("batch", -3, "llama"))
    async with running(kubeconfig, "--pool-name=llama", OPEN) as picker:
        await until(lambda: _counts(picker, 'model_rewrite_decisions_total{model_rewrite_name="r"', model="chat"), "the model is rewritten")
        headers = {"x-llm-d-inference-objective": "batch"}
        await until(lambda: _counts(picker, 'priority="-3"', model="chat", headers=headers), "the priority is the objective's")


async def test_several_pools_are_told_apart_by_the_service_a_gateway_calls(api: FakeApi, kubeconfig: Path) -> None:
    for name, number in (("llama", 1), ("qwen", 2)):
        api.create(inference_pool(name, {"app": name}, service=f"{name}-epp"))
        api.create(pod(name, f"10.1.0.{number}", labels={"app": name}))
    async with running(kubeconfig, "--pool-name=llama", "--pool-name=qwen", OPEN) as picker:
        assert await picker.health() == SERVING
        assert await picker.picks(8, authority="llama-epp.default.svc:9002") == {"10.1.0.1:8000"}
        assert await picker.picks(8, authority="qwen-epp.default.svc:9002") == {"10.1.0.2:8000"}
        text = (await picker.metrics()).text
        assert 'llm_d_epp_ready_endpoints{name="llama"}' in text
        assert 'llm_d_epp_ready_endpoints{name="qwen"}' in text


async def test_pods_by_selector_need_no_pool(api: FakeApi, kubeconfig: Path) -> None:
    api.create(pod("a", "10.1.0.1", labels={"app": "x", "tier": "gold"}))
    api.create(pod("b", "10.1.0.2", labels={"app": "x", "tier": "free"}))
    flags = ("--endpoint-selector=app=x,tier in (gold,silver)", "--endpoint-target-ports=8000,8001", OPEN)
    async with running(kubeconfig, *flags) as picker:
        assert await picker.health() == SERVING
        assert await picker.picks(24) == {"10.1.0.1:8000", "10.1.0.1:8001"}
        assert 'llm_d_epp_ready_endpoints{name="epp"}' in (await picker.metrics()).text


async def test_of_two_replicas_one_leads_and_the_other_takes_over(api: FakeApi, kubeconfig: Path) -> None:
    api.create(inference_pool("llama"))
    api.create(pod("a", "10.1.0.1"))
    flags = ("--pool-name=llama", "--ha-enable-leader-election", OPEN)
    async with running(kubeconfig, *flags, pod_name="epp-1") as first:
        await until(lambda: _is(first.health(), SERVING), "the first leads")
        async with running(kubeconfig, *flags, pod_name="epp-2") as second:
            assert await second.health("liveness") == SERVING
            assert await second.health("inference-extension") == UNKNOWN
            assert await second.health() == NOT_SERVING
            assert await second.picks(2) == {"10.1.0.1:8000"}  # a stray request is answered all the same
            assert "epp_leader 0" in (await second.metrics()).text
            lease = api.get("Lease", "default", "epp-default-llama.llm-d.ai")
            assert lease["spec"]["holderIdentity"] == "epp-1"
            await asyncio.to_thread(first.stop)
            await until(lambda: _is(second.health(), SERVING), "the second leads")
            assert "epp_leader 1" in (await second.metrics()).text


async def test_the_metrics_port_asks_who_reads(api: FakeApi, kubeconfig: Path) -> None:
    api.create(inference_pool("llama"))
    api.grant(User.service_account("monitoring", "prometheus").name, {"get"}, paths={"/metrics"})
    async with running(kubeconfig, "--pool-name=llama") as picker:
        assert (await picker.metrics()).status_code == 401
        assert (await picker.metrics("no-such-token")).status_code == 401
        assert (await picker.metrics(STRANGER)).status_code == 403
        answer = await picker.metrics(PROMETHEUS)
        assert answer.status_code == 200
        assert "llm_d_epp_ready_endpoints" in answer.text
        async with httpx.AsyncClient() as client:
            refused = await client.get(
                f"http://{LOOPBACK}:{picker.ports['metrics']}/debug/endpoints", headers={"Authorization": f"Bearer {PROMETHEUS}"}
            )
        assert refused.status_code == 403
        assert PROMETHEUS not in picker.stderr


def test_a_kubeconfig_that_is_not_there_is_said(tmp_path: Path) -> None:
    picker = Picker(tmp_path / "none", "--pool-name=llama")
    try:
        with pytest.raises(AssertionError, match="exit code 2"):
            picker.start()
        assert "none" in picker.stderr
    finally:
        picker.__exit__()


async def _is(found: Any, wanted: int) -> bool:
    return await found == wanted


async def _sees(picker: Picker, wanted: set[str]) -> bool:
    return await picker.picks(12) == wanted


async def _refused(picker: Picker, status: str) -> bool:
    return (await picker.pick()).startswith(status)


async def _counts(picker: Picker, series: str, **how: Any) -> bool:
    await picker.pick(**how)
    return series in (await picker.metrics()).text
