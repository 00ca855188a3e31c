"""`epp doctor` on a cluster: one that is well, then each thing people get wrong, through a real client of an API server."""

from __future__ import annotations

import asyncio
import datetime as dt
import io
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from aiohttp import web

from epp import cli
from epp.doctor import add_doctor_arguments, doctor_options, report
from epp.doctor.findings import Result, Status
from epp.doctor.runner import CLUSTER, checks_for, examine
from tests.kubernetes.fake_access import User
from tests.kubernetes.fake_api import FakeApi
from tests.kubernetes.fake_objects import inference_pool, inference_pool_v1alpha2, lease, objective, pod, rewrite, service

NAMESPACE = "ns"
ACCOUNT = f"system:serviceaccount:{NAMESPACE}:epp"
GATEWAY_API = "gateway.networking.k8s.io"
GOOD_RULES = (
    ("", ("pods",), ("get", "list", "watch")),
    ("inference.networking.k8s.io", ("inferencepools",), ("get", "list", "watch")),
    ("llm-d.ai", ("inferenceobjectives", "inferencemodelrewrites"), ("get", "list", "watch")),
    ("inference.networking.x-k8s.io", ("inferenceobjectives", "inferencemodelrewrites"), ("get", "list", "watch")),
    ("coordination.k8s.io", ("leases",), ("get", "create", "update")),
)
CONFIG = "apiVersion: llm-d.ai/v1alpha1\nkind: EndpointPickerConfig\nplugins: [{type: queue-scorer}, %s]\n%s"
IP = "127.0.0.1"

Json = dict[str, Any]


def grpc_probe(name: str, port: int = 9003) -> Json:
    return {"grpc": {"port": port, "service": name}}


def deployment(*flags: str, replicas: int = 1) -> Json:
    container = {
        "name": "epp", "image": "endpoint-picker:1", "args": ["--pool-name=pool", "--pool-namespace=$(NAMESPACE)", *flags],
        "env": [{"name": "NAMESPACE", "valueFrom": {"fieldRef": {"fieldPath": "metadata.namespace"}}}],
        "readinessProbe": grpc_probe("readiness"), "livenessProbe": grpc_probe("liveness"),
        "volumeMounts": [{"name": "config", "mountPath": "/config"}],
    }  # fmt: skip
    spec = {
        "serviceAccountName": "epp", "terminationGracePeriodSeconds": 130, "containers": [{"name": "proxy"}, container],
        "volumes": [{"name": "config", "configMap": {"name": "epp-config"}}],
    }  # fmt: skip
    return {
        "apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "epp", "namespace": NAMESPACE},
        "spec": {"replicas": replicas, "template": {"metadata": {"labels": {"app": "epp", "tier": "x"}}, "spec": spec}},
    }  # fmt: skip


def route(group: str = "inference.networking.k8s.io", *, name: str = "route", pool: str = "pool") -> Json:
    rules = [{"backendRefs": [{"group": group, "kind": "InferencePool", "name": pool}]}]
    accepted = {
        "parentRef": {"name": "gw"},
        "conditions": [{"type": "Accepted", "status": "True"}, {"type": "ResolvedRefs", "status": "True"}],
    }
    return {
        "apiVersion": f"{GATEWAY_API}/v1", "kind": "HTTPRoute", "metadata": {"name": name, "namespace": NAMESPACE},
        "spec": {"parentRefs": [{"name": "gw"}], "rules": rules}, "status": {"parents": [accepted]},
    }  # fmt: skip


def gateway(class_name: str) -> Json:
    return {
        "apiVersion": f"{GATEWAY_API}/v1", "kind": "Gateway", "metadata": {"name": "gw", "namespace": NAMESPACE}, "spec": {"gatewayClassName": class_name}
    }  # fmt: skip


def destination_rule(**tls: Any) -> Json:
    spec = {"host": f"epp.{NAMESPACE}.svc.cluster.local", "trafficPolicy": {"tls": tls}}
    return {
        "apiVersion": "networking.istio.io/v1",
        "kind": "DestinationRule",
        "metadata": {"name": "epp", "namespace": NAMESPACE},
        "spec": spec,
    }


def condition(of: str, status: str, reason: str, message: str) -> Json:
    return {"type": of, "status": status, "reason": reason, "message": message, "lastTransitionTime": "2026-01-01T00:00:00Z"}


def pool(**changes: Any) -> Json:
    parents = [{"parentRef": {"name": "gw", "kind": "Gateway"}, "conditions": [condition("Accepted", "True", "Accepted", "")]}]
    return inference_pool("pool", namespace=NAMESPACE, **changes) | {"status": {"parents": parents}}


@asynccontextmanager
async def good() -> AsyncIterator[FakeApi]:
    """A cluster where nothing is wrong."""
    async with FakeApi(rbac=True) as api:
        api.add_token("admin", User("admin", ("system:masters", "system:authenticated")))
        for group, resources, verbs in GOOD_RULES:
            api.grant(ACCOUNT, verbs, resources=resources, group=group, namespace=NAMESPACE)
        for group, resource in (("authentication.k8s.io", "tokenreviews"), ("authorization.k8s.io", "subjectaccessreviews")):
            api.grant(ACCOUNT, ("create",), resources=(resource,), group=group)
        for each in (
            pool(), pod("engine-0", IP, namespace=NAMESPACE), pod("engine-1", "127.0.0.2", namespace=NAMESPACE),
            pod("epp-0", "127.0.0.3", namespace=NAMESPACE, labels={"app": "epp", "tier": "x"}, port=9002),
            service("epp", namespace=NAMESPACE), deployment(), route(), gateway("other"),
            objective("urgent", 10, "pool", namespace=NAMESPACE), rewrite("alias", "pool", [("a", {"b": 1})], namespace=NAMESPACE),
            {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "epp-config", "namespace": NAMESPACE}, "data": {"c.yaml": CONFIG % ("", "")}},
        ):  # fmt: skip
            api.create(each)
        yield api


def options(api: FakeApi, directory: Path, *flags: str, token: str = "admin") -> Any:
    kubeconfig = directory / "kubeconfig"
    kubeconfig.write_text(
        yaml.safe_dump(
            {
                "apiVersion": "v1", "kind": "Config", "current-context": "x",
                "clusters": [{"name": "x", "cluster": {"server": api.url}}], "users": [{"name": "x", "user": {"token": token}}],
                "contexts": [{"name": "x", "context": {"cluster": "x", "user": "x", "namespace": NAMESPACE}}],
            }
        )
    )  # fmt: skip
    import argparse

    parser = argparse.ArgumentParser()
    add_doctor_arguments(parser)
    named = () if "--pool-name" in flags else ("--pool-name", "pool")
    return doctor_options(parser.parse_args(["--kubeconfig", str(kubeconfig), "--timeout", "5", *named, *flags]))


async def examined(api: FakeApi, directory: Path, *flags: str, token: str = "admin") -> list[Result]:
    chosen = options(api, directory, *flags, token=token)
    return await examine(chosen, checks_for(chosen), lambda _about: None)


def bad(results: list[Result]) -> list[Result]:
    return [result for result in results if result.finding.status in (Status.WARN, Status.FAIL)]


async def test_a_cluster_where_nothing_is_wrong(tmp_path: Path) -> None:
    async with good() as api:
        results = await examined(api, tmp_path)
        assert not bad(results), bad(results)
        assert {result.check for result in results} == {check.name for check in CLUSTER}
        left_out = {result.check: result.finding.text for result in results if result.finding.status is Status.SKIPPED}
        assert not left_out
        reads = {"GET"} | {"POST"}
        assert {request.method for request in api.requests} == reads
        assert all("review" in request.path for request in api.requests if request.method == "POST")


# --- each fault by itself


def skew(seconds: float) -> Callable[[FakeApi], object]:
    def change(api: FakeApi) -> None:
        api.clock_skew_s = seconds

    return change


def set_args(*flags: str, replicas: int = 1) -> Callable[[FakeApi], object]:
    return lambda api: api.update(deployment(*flags, replicas=replicas))


def patch(kind: str, name: str, **change: Any) -> Callable[[FakeApi], object]:
    return lambda api: api.patch(kind, NAMESPACE, name, change)


def patch_container(**change: Any) -> Callable[[FakeApi], object]:
    def run(api: FakeApi) -> None:
        found = deployment()
        found["spec"]["template"]["spec"]["containers"][1].update(change)
        api.update(found)

    return run


def patch_template(**change: Any) -> Callable[[FakeApi], object]:
    def run(api: FakeApi) -> None:
        found = deployment()
        found["spec"]["template"]["spec"].update(change)
        api.update(found)

    return run


def configured(plugin: str, rest: str = "") -> Callable[[FakeApi], object]:
    def run(api: FakeApi) -> None:
        api.patch("configmaps", NAMESPACE, "epp-config", {"data": {"c.yaml": CONFIG % (plugin, rest)}})
        api.update(deployment("--config-file=/config/c.yaml"))

    return run


def no_pods(*labels: dict[str, str]) -> Callable[[FakeApi], object]:
    def run(api: FakeApi) -> None:
        api.delete("pods", NAMESPACE, "engine-0")
        api.delete("pods", NAMESPACE, "engine-1")
        for number, its in enumerate(labels):
            api.create(pod(f"other-{number}", IP, namespace=NAMESPACE, labels=its))

    return run


def in_other_group(api: FakeApi) -> None:
    api.delete("inferencepools.inference.networking.k8s.io", NAMESPACE, "pool")
    api.create(inference_pool_v1alpha2("pool", namespace=NAMESPACE))


def istio(*rules: Json, flags: tuple[str, ...] = ()) -> Callable[[FakeApi], object]:
    def run(api: FakeApi) -> None:
        api.update(gateway("istio"))
        api.update(deployment(*flags))
        for rule in rules:
            api.create(rule)

    return run


def refused_by(of: str, kind: str, name: str) -> Callable[[FakeApi], object]:
    said = condition(of, "False", "BackendNotFound", "no such thing")
    return patch(kind, name, status={"parents": [{"parentRef": {"name": "gw"}, "conditions": [said]}]})


def now(minus_s: float = 0) -> str:
    return (dt.datetime.now(dt.UTC) - dt.timedelta(seconds=minus_s)).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def led(*held: tuple[str, float]) -> Callable[[FakeApi], object]:
    """Two replicas with leader election; `held`: by whom, and how many seconds ago it was renewed."""

    def run(api: FakeApi) -> None:
        api.update(deployment("--ha-enable-leader-election", replicas=2))
        for holder, ago_s in held:
            api.create(lease(LEASE, holder, namespace=NAMESPACE, renewed=now(ago_s)))

    return run


LEASE = "epp-ns-pool.llm-d.ai"
OLD = "inference.networking.x-k8s.io"
V1 = "inferencepools.inference.networking.k8s.io"
PORT = {"name": "grpc-ext-proc", "port": 9002, "targetPort": 9002, "appProtocol": "http2"}
TLS_OFF = ("--secure-serving=false",)
GRPC_ONLY = "{type: vllmgrpc-parser}"

FAULTS: list[tuple[str, Callable[[FakeApi], object], str, Status, str]] = [
    ("no kind", lambda api: (api.uninstall(V1), api.uninstall(f"inferencepools.{OLD}")), "cluster-kinds", Status.FAIL, "no InferencePool kind"),
    ("old kind alone", lambda api: api.uninstall(V1), "cluster-kinds", Status.WARN, "v1alpha2 alone"),
    ("no objectives", lambda api: [api.uninstall(f"{p}.{g}") for p in ("inferenceobjectives", "inferencemodelrewrites") for g in ("llm-d.ai", OLD)], "cluster-kinds", Status.OK, "priority 0"),
    ("may not watch pods", lambda api: [api.delete("rolebindings", NAMESPACE, each["metadata"]["name"]) for each in api.objects("rolebindings") if each["metadata"]["name"] == "granted-1"], "cluster-rbac", Status.FAIL, 'apiGroups: [""], resources: [pods], verbs: [get, list, watch]'),
    ("election without leases", lambda api: (api.delete("rolebindings", NAMESPACE, "granted-5"), set_args("--ha-enable-leader-election")(api)), "cluster-rbac", Status.FAIL, "no replica becomes the leader"),
    ("leases without election", lambda api: api.delete("rolebindings", NAMESPACE, "granted-5"), "cluster-rbac", Status.OK, "all that the picker needs"),
    ("metrics auth", lambda api: api.delete("clusterrolebindings", "", "granted-6"), "cluster-rbac", Status.FAIL, "tokenreviews.authentication.k8s.io"),
    ("metrics auth off", lambda api: (api.delete("clusterrolebindings", "", "granted-6"), set_args("--metrics-endpoint-auth=false")(api)), "cluster-rbac", Status.OK, "all that the picker needs"),
    ("no pool", lambda api: api.delete(V1, NAMESPACE, "pool"), "pool-exists", Status.FAIL, "there is no InferencePool pool"),
    ("other group", in_other_group, "pool-exists", Status.FAIL, f"--pool-group={OLD}"),
    ("two pools", lambda api: api.create(inference_pool_v1alpha2("pool", namespace=NAMESPACE)), "pool-shadow", Status.WARN, f"exists in {OLD} too"),
    ("no pods", no_pods(), "pool-pods", Status.FAIL, "none in namespace ns has app=vllm"),
    ("another value", no_pods({"app": "sglang"}), "pool-pods", Status.FAIL, "other-0 would fit, but has app=sglang where app=vllm"),
    ("another key", no_pods({"App": "vllm"}), "pool-pods", Status.FAIL, "has App=vllm where app=vllm"),
    ("none ready", lambda api: [api.set_ready(NAMESPACE, name, False) for name in ("engine-0", "engine-1")], "pool-pods", Status.FAIL, "selects 2 pods, none is Ready"),
    ("one ready", lambda api: api.set_ready(NAMESPACE, "engine-1", False), "pool-pods", Status.WARN, "1 of 2 pods are Ready"),
    ("terminating", lambda api: api.terminate("pods", NAMESPACE, "engine-1"), "pool-pods", Status.WARN, "1 terminating"),
    ("wrong port", lambda api: api.update(pool(ports=(9000,))), "pool-ports", Status.WARN, "sends to port 9000"),
    ("annotated", lambda api: api.patch("pods", NAMESPACE, "engine-0", {"metadata": {"annotations": {"llm-d.ai/active-ports": "1"}}}), "pool-ports", Status.FAIL, "none of its ports is an endpoint"),
    ("engine label", lambda api: api.patch("pods", NAMESPACE, "engine-0", {"metadata": {"labels": {"llm-d.ai/engine-type": "vlm"}}}), "pool-engines", Status.WARN, "'vlm'"),
    ("fail open", lambda api: api.update(pool(failure_mode="FailOpen")), "pool-failure-mode", Status.OK, "FailOpen"),
    ("another pool's objective", lambda api: api.create(objective("x", 1, "pol", namespace=NAMESPACE)), "pool-resources", Status.WARN, "refers to pool 'pol'"),
    ("another group's objective", lambda api: api.create(objective("x", 1, "pool", namespace=NAMESPACE, pool_group=OLD)), "pool-resources", Status.WARN, f"refers to group {OLD}"),
    ("hidden objective", lambda api: api.create(objective("urgent", 1, "pool", namespace=NAMESPACE, old=True)), "pool-resources", Status.WARN, "is ignored"),
    ("no ref", lambda api: api.update(pool(service="")), "picker-ref", Status.FAIL, "no endpointPickerRef"),
    ("no service", lambda api: api.delete("services", NAMESPACE, "epp"), "picker-ref", Status.FAIL, "not in namespace ns"),
    ("no such port", lambda api: api.update(pool(service_port=9999)), "picker-ref", Status.FAIL, "has no port 9999, it has 9002"),
    ("selects nothing", patch("services", "epp", spec={"selector": {"app": "eppp"}}), "picker-service", Status.FAIL, "selects no pod"),
    ("picker not ready", lambda api: api.set_ready(NAMESPACE, "epp-0", False), "picker-service", Status.FAIL, "none of the 1 pods"),
    ("selects engines", patch("services", "epp", spec={"selector": {"app": "vllm"}}), "picker-service", Status.FAIL, "select the same pods"),
    ("port name", patch("services", "epp", spec={"ports": [{"name": "tcp-ext", "port": 9002}]}), "picker-port-protocol", Status.FAIL, "(tcp-ext)"),
    ("app protocol", patch("services", "epp", spec={"ports": [PORT | {"appProtocol": "tcp"}]}), "picker-port-protocol", Status.FAIL, "appProtocol tcp"),
    ("h2c and TLS", patch("services", "epp", spec={"ports": [PORT | {"appProtocol": "kubernetes.io/h2c"}]}), "picker-port-protocol", Status.WARN, "connection_termination"),
    ("http2 and plaintext", set_args(*TLS_OFF), "picker-port-protocol", Status.WARN, "WRONG_VERSION_NUMBER"),
    ("target port", patch("services", "epp", spec={"ports": [PORT | {"targetPort": 9003}]}), "picker-port-protocol", Status.FAIL, "leads to port 9003"),
    ("unknown flag", set_args("--pool-nam=x"), "picker-arguments", Status.FAIL, "does not start"),
    ("another pool", lambda api: api.update(pool()) and patch_container(args=["--pool-name=other"])(api), "picker-arguments", Status.FAIL, "serves pool other"),
    ("another namespace", set_args("--pool-namespace=elsewhere"), "picker-arguments", Status.FAIL, "in namespace elsewhere"),
    ("no namespace", patch_container(args=["--pool-name=pool"], env=[]), "picker-arguments", Status.FAIL, "it looks in `default`"),
    ("another group", set_args(f"--pool-group={OLD}"), "picker-arguments", Status.FAIL, f"looks in group {OLD}"),
    ("bad configuration", configured("{type: no-such-plugin}"), "picker-arguments", Status.FAIL, "no-such-plugin"),
    ("reads gRPC alone", lambda api: (configured(GRPC_ONLY, "requestHandler: {parsers: [{pluginRef: vllmgrpc-parser}]}")(api), api.update(pool(app_protocol="http"))), "picker-parsers", Status.FAIL, "vllmgrpc-parser"),
    ("gRPC to gRPC", lambda api: (configured(GRPC_ONLY, "requestHandler: {parsers: [{pluginRef: vllmgrpc-parser}]}")(api), api.update(pool(app_protocol="kubernetes.io/h2c"))), "picker-parsers", Status.OK, "reads what the pool speaks"),
    ("no replicas", set_args(replicas=0), "picker-replicas", Status.FAIL, "0 replicas"),
    ("two apart", set_args(replicas=2), "picker-replicas", Status.WARN, "without leader election"),
    ("two, elected", set_args("--ha-enable-leader-election", replicas=2), "picker-replicas", Status.OK, "fit together"),
    ("no probe", patch_container(readinessProbe={}), "picker-probes", Status.WARN, "no readinessProbe"),
    ("http probe", patch_container(livenessProbe={"httpGet": {"port": 9090}}), "picker-probes", Status.WARN, "no gRPC probe"),
    ("probe's port", patch_container(readinessProbe=grpc_probe("readiness", 9002)), "picker-probes", Status.FAIL, "asks port 9002"),
    ("probe's name", patch_container(args=["--ha-enable-leader-election"], readinessProbe=grpc_probe("inference-extension")), "picker-probes", Status.FAIL, "unknown with leader election"),
    ("followers restarted", patch_container(args=["--ha-enable-leader-election"], livenessProbe=grpc_probe("readiness")), "picker-probes", Status.FAIL, "restarted again and again"),
    ("killed early", patch_template(terminationGracePeriodSeconds=30), "picker-shutdown", Status.WARN, "is given 30 s"),
    ("no route", lambda api: api.delete("httproutes", NAMESPACE, "route"), "pool-route", Status.WARN, "no HTTPRoute"),
    ("route to another group", lambda api: api.update(route(OLD)), "pool-route", Status.FAIL, f"in group '{OLD}'"),
    ("old route", lambda api: api.update(route(OLD)), "pool-old-routes", Status.WARN, "do not resolve"),
    ("route refused", refused_by("ResolvedRefs", "httproutes", "route"), "pool-route", Status.FAIL, "BackendNotFound: no such thing"),
    ("pool refused", refused_by("Accepted", V1, "pool"), "pool-accepted", Status.FAIL, "Accepted is False"),
    ("nobody's pool", patch(V1, "pool", status=None), "pool-accepted", Status.WARN, "no gateway has said anything"),
    ("no istio gateway", lambda api: api.update(gateway("gke")), "istio-tls", Status.OK, "no Gateway of its class"),
    ("no istio", lambda api: api.uninstall("destinationrules.networking.istio.io"), "istio-tls", Status.OK, "no Istio"),
    ("no rule", istio(), "istio-tls", Status.FAIL, "insecureSkipVerify: true"),
    ("rule", istio(destination_rule(mode="SIMPLE", insecureSkipVerify=True)), "istio-tls", Status.OK, "speaks to the picker"),
    ("verifying rule", istio(destination_rule(mode="SIMPLE")), "istio-tls", Status.FAIL, "CERTIFICATE_VERIFY_FAILED"),
    ("TLS to plaintext", istio(destination_rule(mode="SIMPLE", insecureSkipVerify=True), flags=TLS_OFF), "istio-tls", Status.FAIL, "WRONG_VERSION_NUMBER"),
    ("plaintext", istio(flags=TLS_OFF), "istio-tls", Status.OK, "speaks to the picker"),
    ("no lease", led(), "picker-lease", Status.FAIL, "does not exist"),
    ("lease let go", led(("", 0)), "picker-lease", Status.FAIL, "nobody holds"),
    ("lease run out", led(("epp-0", 600)), "picker-lease", Status.FAIL, "was last renewed 60"),
    ("server's clock ahead", skew(600.0), "cluster-clock", Status.WARN, "s ahead"),
    ("lease held", led(("epp-0", -60)), "picker-lease", Status.OK, "epp-0 holds"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "check", "status", "text"), [pytest.param(*each[1:], id=f"{each[2]}-{each[0]}") for each in FAULTS])
async def test_a_fault_is_found(change: Callable[[FakeApi], object], check: str, status: Status, text: str, tmp_path: Path) -> None:
    async with good() as api:
        change(api)
        results = await examined(api, tmp_path, "--only", check)
    assert results
    order = [Status.SKIPPED, Status.OK, Status.WARN, Status.FAIL]
    assert max((result.finding.status for result in results), key=order.index) is status, results
    found = [finding for _, finding in results if finding.status is status]
    assert any(text in f"{finding.text} {finding.effect} {finding.change}" for finding in found), results
    assert all(bool(finding.effect and finding.change) == (status is not Status.OK) for finding in found)


async def test_a_server_that_is_not_there(tmp_path: Path) -> None:
    async with good() as api:
        await api.stop()
        results = await examined(api, tmp_path)
    (server,) = (finding for check, finding in results if check == "cluster-api")
    assert server.status is Status.FAIL
    assert "can't be asked" in server.text
    assert all(finding.status in (Status.FAIL, Status.SKIPPED) for check, finding in results if check != "cluster-clock")


async def test_a_server_that_is_silent_costs_the_time_limit_and_is_told(tmp_path: Path) -> None:
    async with good() as api:
        api.silence()
        results = await examined(api, tmp_path, "--only", "cluster-api", "--timeout", "0.2")
    ((_, finding),) = results
    assert finding.status is Status.FAIL
    assert "no answer within 0.2 s" in finding.text


async def test_credentials_that_are_refused(tmp_path: Path) -> None:
    async with good() as api:
        api.guarded = True
        results = await examined(api, tmp_path, token="stale-secret")
    (server,) = (finding for check, finding in results if check == "cluster-api")
    assert server.status is Status.FAIL
    assert "refuses us" in server.text
    assert "stale-secret" not in repr(results)


async def test_what_may_not_be_read_is_skipped_with_the_right_that_is_lacking(tmp_path: Path) -> None:
    async with good() as api:
        api.refuse("deployments")
        api.refuse("services", namespace=NAMESPACE)
        results = await examined(api, tmp_path)
    left_out = {check: finding.text for check, finding in results if finding.status is Status.SKIPPED}
    assert left_out["picker-ref"] == "you may not list services in namespace ns (403)"
    assert "pool-pods" not in left_out
    assert not [result for result in results if result.finding.status is Status.FAIL]


async def test_the_account_of_the_deployment_is_asked_about_or_the_one_that_is_named(tmp_path: Path) -> None:
    async with good() as api:
        for flags, ok in (
            ((), True),
            (("--service-account", "other"), False),
            (("--service-account", "ns:epp"), True),
            (("--service-account", ""), True),
        ):
            results = await examined(api, tmp_path, "--only", "cluster-rbac", *flags)
            assert (not bad(results)) is ok, (flags, results)
            if not ok:
                assert "service account ns:other may not" in results[0].finding.text


async def test_engines_in_the_cluster_are_asked_and_their_blocks_compared(tmp_path: Path) -> None:
    text = (Path(__file__).parents[1] / "data" / "vllm-0.32-metrics-busy.txt").read_text()

    async def answer(_request: web.Request) -> web.Response:
        return web.Response(text=text)

    app = web.Application()
    app.router.add_get("/metrics", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, IP, 0).start()
    port = runner.addresses[0][1]
    try:
        async with good() as api:
            api.delete("pods", NAMESPACE, "engine-1")
            api.update(pool(ports=(port,)))
            configured("{type: approx-prefix-cache-producer, parameters: {blockSizeTokens: 71}}")(api)
            results = await examined(api, tmp_path, "--only", "pool-metrics,picker-block-size")
    finally:
        await runner.cleanup()
    assert [(check, finding.status) for check, finding in results] == [("pool-metrics", Status.OK), ("picker-block-size", Status.WARN)]
    assert "blocks of 71 tokens" in results[1].finding.text


async def test_several_pools_and_thousands_of_pods(tmp_path: Path) -> None:
    async with good() as api:
        for number in range(1_200):
            api.create(pod(f"many-{number}", f"127.1.{number // 250}.{number % 250}", namespace=NAMESPACE, labels={"app": "many"}))
        api.create(inference_pool("second", {"app": "many"}, namespace=NAMESPACE))
        results = await examined(api, tmp_path, "--pool-name", "pool", "--pool-name", "second", "--only", "pool-pods")
    assert [finding.text for _, finding in results] == ["pool pool: 2 pods, all Ready", "pool second: 1200 pods, all Ready"]


async def test_the_command_says_it_and_its_exit_code_is_1_on_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async with good() as api:
        chosen = options(api, tmp_path)
        argv = ["doctor", "--kubeconfig", chosen.kubeconfig, "--pool-name", "pool", "--timeout", "5", "--json"]
        assert await asyncio.to_thread(cli.main, argv) == 0
        said = json.loads(capsys.readouterr().out)
        assert said["counts"]["fail"] == 0
        assert len({finding["check"] for finding in said["findings"]}) == len(CLUSTER)
        api.delete(V1, NAMESPACE, "pool")
        assert await asyncio.to_thread(cli.main, argv[:-1]) == 1
        text = capsys.readouterr().out
    assert "FAIL     pool-exists" in text
    assert "users see: the picker stays NOT_SERVING" in text
    assert text.splitlines()[-1].split(", ")[2].endswith(" failure")


def test_the_text_has_one_line_a_check_and_no_control_characters() -> None:
    from epp.doctor.findings import fail, skipped

    results = [Result("a", fail("bad\x1b[31m\n", "e", "c")), Result("b", skipped("why")), Result("c", skipped("why"))]
    out = io.StringIO()
    report.write_text(results, out)
    lines = out.getvalue().splitlines()
    assert lines[0].split() == ["FAIL", "a", "bad", "[31m"]
    assert "\x1b" not in out.getvalue()
    assert lines[3] == "skipped  why: b, c"
