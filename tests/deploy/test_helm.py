"""The charts, with every values file of their ci/ folders: linted, rendered, held to the schemas, and started as far as a command line goes."""

from __future__ import annotations

import functools
import json
import random
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from epp.clock import VirtualClock
from epp.config.options import ServeOptions
from epp.datastore import Datastore
from epp.envoy.supervisor import find_envoy
from epp.observe.pool import pool_families
from epp.pools import Pool, Pools
from epp.resources import Resources
from tests.deploy import tools
from tests.deploy.references import dangling, images, of_kind, options_of, picker_faults, pickers, pod_of, registry_of

CHARTS = tools.ROOT / "deploy/helm"
LIBRARY = CHARTS / "epp-library"
GATEWAY, STANDALONE = "epp-gateway", "epp-standalone"
VALUES = sorted(path for chart in (GATEWAY, STANDALONE) for path in (CHARTS / chart / "ci").glob("*.yaml"))
MINIMAL = "router: {modelServers: {matchLabels: {app: vllm}}}"
HELMS = (3, 4)
SCALERS = ("ScaledObject", "HorizontalPodAutoscaler")


def name_of(path: Path) -> str:
    return f"{path.parents[1].name}/{path.stem}"


each_values_file = pytest.mark.parametrize("path", VALUES, ids=name_of)


@functools.cache
def rendered(path: Path, version: int = 4) -> list[dict[str, Any]]:
    chart = path.parents[1]
    return tools.documents(tools.helm("template", "rel", chart, "--namespace", "inference", "--values", path, version=version))


def of_chart(chart: str, values: str, tmp_path: Path) -> list[dict[str, Any]]:
    file = tmp_path / "values.yaml"
    file.write_text(values)
    return tools.documents(tools.helm("template", "rel", CHARTS / chart, "--namespace", "inference", "--values", file))


def refused(chart: str, values: str, tmp_path: Path) -> str:
    """What Helm says of values that it must not take."""
    file = tmp_path / "values.yaml"
    file.write_text(values)
    ran = tools.helm_run("template", "rel", CHARTS / chart, "--values", file)
    assert ran.returncode != 0, ran.stdout
    return ran.stderr


def the_picker(objects: Sequence[Mapping[str, Any]]) -> tuple[Mapping[str, Any], Mapping[str, Any], ServeOptions]:
    """Its workload, its container and what that is told."""
    ((workload, container),) = pickers(objects)
    return workload, container, options_of(container)[1]


def one(objects: Sequence[Mapping[str, Any]], kind: str, name: str = "rel-epp") -> Mapping[str, Any]:
    (found,) = (item for item in of_kind(objects, kind) if item["metadata"]["name"] == name)
    return found


# --- every values file


def test_there_are_values_files_to_look_at() -> None:
    assert len(VALUES) >= 24


@pytest.mark.parametrize("version", HELMS)
@each_values_file
def test_lint(path: Path, version: int) -> None:
    tools.helm("lint", "--strict", path.parents[1], "--values", path, version=version)


@each_values_file
def test_both_versions_of_helm_render_the_same(path: Path) -> None:
    assert sorted(map(json.dumps, rendered(path, 3))) == sorted(map(json.dumps, rendered(path, 4)))


@each_values_file
def test_objects_are_of_their_schemas(path: Path) -> None:
    assert tools.faults(rendered(path)) == []


@each_values_file
def test_references_lead_somewhere(path: Path) -> None:
    assert dangling(rendered(path)) == []


@each_values_file
def test_the_picker_starts_with_what_it_is_given(path: Path) -> None:
    assert len(pickers(rendered(path))) == 1
    assert picker_faults(rendered(path)) == []


@each_values_file
def test_containers_may_do_no_more_than_they_must(path: Path) -> None:
    for workload in of_kind(rendered(path), "Deployment"):
        spec = pod_of(workload)["spec"]
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in spec["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert container["resources"]["requests"].keys() >= {"cpu", "memory"}


@each_values_file
def test_every_port_names_its_protocol(path: Path) -> None:
    """Helm 4 applies on the server's side, where API servers of old know no default for what is a part of a list's key."""
    objects = rendered(path)
    ports = [port for service in of_kind(objects, "Service") for port in service["spec"]["ports"]]
    ports += [port for w in of_kind(objects, "Deployment") for c in pod_of(w)["spec"]["containers"] for port in c["ports"]]
    assert {port.get("protocol") for port in ports} == {"TCP"}


@each_values_file
def test_no_image_is_of_a_registry_that_nobody_named(path: Path) -> None:
    assert {registry_of(image) for image in images(rendered(path))} <= {"", "registry.example.com"}


@each_values_file
def test_the_service_says_what_the_picker_speaks(path: Path) -> None:
    _, _, options = the_picker(rendered(path))
    (port,) = (port for port in one(rendered(path), "Service")["spec"]["ports"] if port["name"] == "grpc-ext-proc")
    assert port["port"] == options.grpc_port
    assert port["appProtocol"] == ("http2" if options.secure_serving else "kubernetes.io/h2c")


@each_values_file
def test_the_picker_watches_the_pools_that_name_it(path: Path) -> None:
    objects = rendered(path)
    _, _, options = the_picker(objects)
    assert {pool["metadata"]["name"] for pool in of_kind(objects, "InferencePool")} <= set(options.pool_names)
    assert bool(options.pool_names) != bool(options.endpoint_selector)
    assert options.pool_namespace == "inference"


def proxy_configs() -> list[Any]:
    found = []
    for path in VALUES:
        for config in of_kind(rendered(path), "ConfigMap") if path.parents[1].name == STANDALONE else ():
            text = config["data"].get("envoy.yaml", "")
            if "listeners" in text:
                found.append(pytest.param(path, text, id=path.stem))
    return found


def test_a_real_envoy_takes_the_proxys_configurations(tmp_path: Path) -> None:
    configs = proxy_configs()
    assert len(configs) >= 5
    for config in configs:
        path, text = config.values
        assert isinstance(text, str)
        file = tmp_path / "envoy.yaml"
        file.write_text(text)
        command = [str(find_envoy()), "--mode", "validate", "-c", str(file), "--use-dynamic-base-id", "--log-level", "warning"]
        ran = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        assert (ran.returncode, ran.stderr) == (0, ""), path


def test_the_proxy_asks_the_picker_as_it_serves() -> None:
    for config in proxy_configs():
        path, text = config.values
        assert isinstance(path, Path)
        assert isinstance(text, str)
        _, _, options = the_picker(rendered(path))
        clusters = {cluster["name"]: cluster for cluster in yaml.safe_load(text)["static_resources"]["clusters"]}
        assert ("transport_socket" in clusters["epp"]) == options.secure_serving
        (hosts,) = clusters["epp"]["load_assignment"]["endpoints"]
        (host,) = hosts["lb_endpoints"]
        address = host["endpoint"]["address"]["socket_address"]
        assert address["port_value"] == options.grpc_port
        names = {service["metadata"]["name"] for service in of_kind(rendered(path), "Service")}
        assert address["address"] == "127.0.0.1" or address["address"].split(".")[0] in names
        if "model-servers" in clusters:
            (hosts,) = clusters["model-servers"]["load_assignment"]["endpoints"]
            named = [host["endpoint"]["address"]["socket_address"]["address"] for host in hosts["lb_endpoints"]]
            assert {name.split(".")[0] for name in named} <= names


# --- what single values mean


def of_file(chart: str, name: str) -> list[dict[str, Any]]:
    return rendered(CHARTS / chart / "ci" / f"{name}.yaml")


def test_without_more_than_labels_there_is_a_picker_for_one_pool() -> None:
    objects = of_file(GATEWAY, "minimal")
    workload, container, options = the_picker(objects)
    assert options.pool_names == ("rel",)
    assert not options.ha_enable_leader_election
    assert options.metrics_endpoint_auth is None  # so on, in a cluster
    assert workload["spec"]["replicas"] == 1
    assert workload["spec"]["strategy"]["rollingUpdate"] == {"maxSurge": 1, "maxUnavailable": 0}
    assert container["image"] == f"endpoint-picker:{yaml.safe_load((LIBRARY / 'Chart.yaml').read_text())['appVersion']}"
    pool = one(objects, "InferencePool", "rel")
    assert pool["spec"]["selector"] == {"matchLabels": {"app": "vllm-qwen3-32b"}}
    assert pool["spec"]["endpointPickerRef"]["failureMode"] == "FailOpen"
    assert not of_kind(objects, "PodDisruptionBudget", "HorizontalPodAutoscaler", "NetworkPolicy", "ServiceMonitor", "HTTPRoute")


def test_several_replicas_elect_a_leader() -> None:
    objects = of_file(GATEWAY, "ha")
    workload, container, options = the_picker(objects)
    assert options.ha_enable_leader_election
    assert (container["livenessProbe"]["grpc"]["service"], container["readinessProbe"]["grpc"]["service"]) == ("liveness", "readiness")
    # A standby is never ready: a rollout must not wait for one, and a budget must not count on one.
    assert workload["spec"]["strategy"]["rollingUpdate"]["maxUnavailable"] == "100%"
    assert not of_kind(objects, "PodDisruptionBudget")
    assert len(pod_of(workload)["spec"]["topologySpreadConstraints"]) == 2


def test_replicas_that_all_serve_have_a_budget_and_may_be_scaled() -> None:
    objects = of_file(GATEWAY, "active-active")
    workload, _, options = the_picker(objects)
    assert not options.ha_enable_leader_election
    assert "replicas" not in workload["spec"]  # the autoscaler's
    assert one(objects, "PodDisruptionBudget")["spec"]["maxUnavailable"] == 1
    assert one(objects, "HorizontalPodAutoscaler")["spec"]["maxReplicas"] == 6


def test_several_pools_share_a_picker() -> None:
    objects = of_file(GATEWAY, "multi-pool")
    _, _, options = the_picker(objects)
    assert options.pool_names == ("rel", "small-models", "embeddings")
    pools = {pool["metadata"]["name"]: pool["spec"] for pool in of_kind(objects, "InferencePool")}
    # By the Service that a gateway calls, the picker knows the pool: one for each, all in front of the same pods.
    services = {name: pool["endpointPickerRef"]["name"] for name, pool in pools.items()}
    assert services == {"rel": "rel-epp", "small-models": "rel-small-models-epp", "embeddings": "rel-embeddings-epp"}
    assert len({json.dumps(one(objects, "Service", name)["spec"]["selector"]) for name in services.values()}) == 1
    assert pools["rel"]["targetPorts"] == [{"number": 8000}, {"number": 8001}]
    assert pools["small-models"]["endpointPickerRef"]["failureMode"] == "FailClose"
    assert (pools["embeddings"]["appProtocol"], pools["embeddings"]["targetPorts"]) == ("kubernetes.io/h2c", [{"number": 8080}])
    objectives = {item["metadata"]["name"]: item["spec"] for item in of_kind(objects, "InferenceObjective")}
    assert objectives["small-batch"]["priority"] == -5
    assert objectives["small-batch"]["poolRef"]["name"] == "small-models"
    egress = one(objects, "NetworkPolicy")["spec"]["egress"]
    assert {port["port"] for rule in egress for port in rule["ports"]} >= {8000, 8001, 8080, 53, 443, 6443}


def test_routes_tell_pools_apart_by_headers() -> None:
    routes = {r["metadata"]["name"]: r["spec"]["rules"][0]["matches"][0] for r in of_kind(of_file(GATEWAY, "multi-pool"), "HTTPRoute")}
    assert "headers" not in routes["rel"]
    assert routes["small-models"]["headers"] == [{"type": "Exact", "name": "X-Gateway-Base-Model-Name", "value": "small"}]
    assert routes["embeddings"]["headers"] == [{"type": "Exact", "name": "x-task", "value": "embed"}]


def test_istio_is_told_of_tls() -> None:
    rule = one(of_file(GATEWAY, "istio"), "DestinationRule")["spec"]
    assert rule["host"] == "rel-epp.inference.svc.cluster.local"
    assert rule["trafficPolicy"]["tls"] == {"mode": "SIMPLE", "insecureSkipVerify": True}
    assert rule["trafficPolicy"]["connectionPool"]["http"]["maxRequestsPerConnection"] == 256_000
    verified = one(of_file(GATEWAY, "istio-verified-tls"), "DestinationRule")["spec"]["trafficPolicy"]["tls"]
    assert verified == {"mode": "SIMPLE", "insecureSkipVerify": False, "credentialName": "epp-ca"}
    assert not of_kind(of_file(GATEWAY, "plaintext"), "DestinationRule")
    hosts = {rule["spec"]["host"] for rule in of_kind(of_file(GATEWAY, "istio"), "DestinationRule")}
    assert hosts == {"rel-epp.inference.svc.cluster.local", "rel-small-epp.inference.svc.cluster.local"}


def test_the_picker_tells_the_pools_apart_by_their_services() -> None:
    objects = of_file(GATEWAY, "multi-pool")
    pools = Pools(
        [Pool(pool["metadata"]["name"], Resources(random.Random(0)), namespace="inference") for pool in of_kind(objects, "InferencePool")]
    )
    for pool, item in zip(pools.all, of_kind(objects, "InferencePool"), strict=True):
        pool.service = item["spec"]["endpointPickerRef"]["name"]
    for pool in pools.all:
        assert pools.of(f"{pool.service}.inference.svc.cluster.local:9002") == pool.name
        assert pools.of(f"outbound|9002||{pool.service}.inference.svc.cluster.local") == pool.name


def test_flags_are_written_as_they_were_meant() -> None:
    _, container, options = the_picker(of_file(GATEWAY, "plaintext"))
    assert "--max-body-bytes=134217728" in container["args"]  # a float, to Helm
    assert not options.secure_serving
    assert options.verbosity == 4
    assert options.metrics_endpoint_auth is False
    assert not of_kind(of_file(GATEWAY, "plaintext"), "ClusterRole")


def test_gke_gets_its_policies_and_no_route_timeout() -> None:
    objects = of_file(GATEWAY, "gke")
    assert one(objects, "HealthCheckPolicy", "rel")["spec"]["default"]["config"]["httpHealthCheck"] == {
        "requestPath": "/health",
        "port": 8000,
    }
    assert one(objects, "GCPBackendPolicy", "rel")["spec"]["default"]["timeoutSec"] == 300
    assert "timeouts" not in one(objects, "HTTPRoute", "rel")["spec"]["rules"][0]
    assert (
        one(objects, "PodMonitoring")["spec"]["endpoints"][0]["authorization"]["credentials"]["secret"]["name"] == "rel-epp-metrics-reader"
    )
    (collector,) = one(objects, "RoleBinding", "rel-epp-metrics-reader")["subjects"]
    assert (collector["name"], collector["namespace"]) == ("collector", "gke-gmp-system")


def test_prometheus_has_a_token_that_may_read_metrics_and_no_more() -> None:
    objects = of_file(GATEWAY, "monitoring")
    (endpoint,) = one(objects, "ServiceMonitor")["spec"]["endpoints"]
    secret = one(objects, "Secret", endpoint["authorization"]["credentials"]["name"])
    account = secret["metadata"]["annotations"]["kubernetes.io/service-account.name"]
    bindings = [b for b in of_kind(objects, "RoleBinding", "ClusterRoleBinding") if account in {s["name"] for s in b["subjects"]}]
    (binding,) = bindings
    assert one(objects, "ClusterRole", binding["roleRef"]["name"])["rules"] == [{"nonResourceURLs": ["/metrics"], "verbs": ["get"]}]
    assert endpoint["interval"] == "15s"


def test_rules_are_those_that_come_with_the_picker_or_ones_own() -> None:
    rule = one(of_file(GATEWAY, "monitoring"), "PrometheusRule")
    assert rule["metadata"]["labels"]["release"] == "kube-prometheus-stack"
    assert rule["spec"] == yaml.safe_load((tools.ROOT / "deploy/monitoring/rules.yaml").read_text())
    assert [group["name"] for group in one(of_file(GATEWAY, "own-rules"), "PrometheusRule")["spec"]["groups"]] == ["mine"]


def test_certificates_are_mounted_where_the_flags_say() -> None:
    workload, container, options = the_picker(of_file(GATEWAY, "tls-secret"))
    assert (options.cert_path, options.metrics_cert_dir) == ("/etc/epp/tls", "/etc/epp/metrics-tls")
    secrets = {v["name"]: v["secret"]["secretName"] for v in pod_of(workload)["spec"]["volumes"] if "secret" in v}
    mounts = {mount["mountPath"]: secrets.get(mount["name"]) for mount in container["volumeMounts"]}
    assert mounts[options.cert_path] == "epp-tls"
    assert mounts["/etc/epp/metrics-client-ca"] == "prometheus-ca"
    (endpoint,) = one(of_file(GATEWAY, "tls-secret"), "ServiceMonitor")["spec"]["endpoints"]
    assert endpoint["scheme"] == "https"


@pytest.mark.parametrize(("name", "kind"), [("autoscaling", "ScaledObject"), ("autoscaling-hpa", "HorizontalPodAutoscaler")])
def test_model_servers_scale_by_what_waits_for_them(name: str, kind: str) -> None:
    spec = one(of_file(GATEWAY, name), kind, "rel-model-servers")["spec"]
    text = json.dumps(spec)
    assert "llm_d_epp_average_queue_size" in text
    assert ("llm_d_epp_average_kv_cache_utilization" in text) == (name == "autoscaling")  # null in the other one
    if kind == "ScaledObject":
        query = 'max(llm_d_epp_average_queue_size{namespace="inference",name="rel"})'
        assert {"query": query, "threshold": "5", "serverAddress": "http://prometheus-operated.monitoring:9090"} in [
            trigger["metadata"] for trigger in spec["triggers"]
        ]
        assert (spec["minReplicaCount"], spec["maxReplicaCount"]) == (0, 32)
    else:
        assert spec["scaleTargetRef"]["kind"] == "LeaderWorkerSet"
        assert spec["metrics"][0]["external"]["target"] == {"type": "Value", "value": "2.5"}


def test_model_servers_scale_by_series_that_the_picker_has() -> None:
    asked = {name for path in VALUES for name in re.findall(r"llm_d_epp_\w+", json.dumps(of_kind(rendered(path), *SCALERS)))}
    assert len(asked) >= 2
    assert asked <= {family.name for family in pool_families(Datastore(VirtualClock()), 0.0)} | {"llm_d_epp_request_total"}


def test_who_may_talk_to_the_picker() -> None:
    ingress = one(of_file(GATEWAY, "network-policy"), "NetworkPolicy")["spec"]["ingress"]
    by_port = {rule["ports"][0]["port"]: rule.get("from") for rule in ingress}
    assert by_port["grpc"] == [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "envoy-gateway-system"}}}]
    assert by_port["metrics"] == [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}]
    assert by_port["grpc-health"] is None


@pytest.mark.parametrize(
    ("name", "parser", "engine"),
    [("triton", "passthrough-parser", "triton"), ("vllm-grpc", "vllmgrpc-parser", None), ("minimal", None, None)],
)
def test_the_kind_of_model_server_chooses_parser_and_metric_names(name: str, parser: str | None, engine: str | None) -> None:
    config = yaml.safe_load(one(of_file(GATEWAY, name), "ConfigMap")["data"]["default-plugins.yaml"])
    assert config.get("requestHandler") == ({"parsers": [{"pluginRef": parser}]} if parser else None)
    (extractor,) = (plugin for plugin in config["plugins"] if plugin["type"] == "core-metrics-extractor")
    assert extractor.get("parameters") == ({"defaultEngine": engine} if engine else None)


def test_a_configuration_of_ones_own() -> None:
    objects = of_file(GATEWAY, "custom-config")
    _, container, options = the_picker(objects)
    assert options.config_file == "/config/mine.yaml"
    assert (options.grpc_port, options.grpc_health_port, options.metrics_port) == (19_002, 19_003, 19_090)
    assert container["image"].startswith("registry.example.com/inference/endpoint-picker@sha256:")
    assert {port["name"] for port in one(objects, "Service")["spec"]["ports"]} == {"grpc-ext-proc", "http-metrics", "zmq"}
    structured = yaml.safe_load(one(of_file(GATEWAY, "structured-config"), "ConfigMap")["data"]["default-plugins.yaml"])
    assert structured["featureGates"] == ["flowControl"]


def test_without_crds_pods_are_found_by_their_labels() -> None:
    objects = of_file(STANDALONE, "no-crds")
    _, _, options = the_picker(objects)
    assert options.endpoint_selector == "app=vllm-qwen3-32b,tier=gpu"
    assert options.endpoint_target_ports == (8000, 8001)
    assert not of_kind(objects, "InferencePool")


def test_agentgateway_speaks_plaintext_to_the_picker_in_its_pod() -> None:
    objects = of_file(STANDALONE, "agentgateway")
    _, _, options = the_picker(objects)
    assert not options.secure_serving
    config = yaml.safe_load(one(objects, "ConfigMap", "rel-proxy")["data"]["config.yaml"])
    (backend,) = config["binds"][0]["listeners"][0]["routes"][0]["backends"]
    assert backend["policies"]["inferenceRouting"]["endpointPicker"]["host"] == "127.0.0.1:9002"
    assert backend["service"]["name"] == "inference/" + config["services"][0]["name"]


def test_a_proxy_of_its_own_or_beside_the_picker() -> None:
    sidecar, service = of_file(STANDALONE, "sidecar"), of_file(STANDALONE, "service")
    assert [c["name"] for c in pod_of(one(sidecar, "Deployment"))["spec"]["containers"]] == ["epp", "envoy"]
    assert {"name": "http", "port": 8081, "targetPort": "http", "protocol": "TCP"} in one(sidecar, "Service")["spec"]["ports"]
    assert [c["name"] for c in pod_of(one(service, "Deployment"))["spec"]["containers"]] == ["epp"]
    assert one(service, "Deployment", "rel-proxy")["spec"]["replicas"] == 4
    assert one(service, "Service", "rel-epp-headless")["spec"]["clusterIP"] == "None"
    assert one(service, "NetworkPolicy")["spec"]["ingress"][0]["from"] == [
        {"podSelector": {"matchLabels": pod_of(one(service, "Deployment", "rel-proxy"))["metadata"]["labels"]}}
    ]


def test_a_changed_proxy_configuration_starts_new_proxies_and_a_changed_picker_configuration_does_not(tmp_path: Path) -> None:
    values = "router: {modelServers: {matchLabels: {app: a}}, proxy: {port: %d}, epp: {profile: %s}}"
    pods = [
        pod_of(one(of_chart(STANDALONE, values % each, tmp_path), "Deployment"))
        for each in ((8081, "cost-aware"), (8081, "llm-d"), (8082, "llm-d"))
    ]
    assert pods[0] == pods[1]
    assert pods[1]["metadata"]["annotations"] != pods[2]["metadata"]["annotations"]


def test_sidecars_of_the_reference_are_accepted_and_said_to_be_left_out(tmp_path: Path) -> None:
    """Helm shows notes to who installs into a cluster only; so they are put into an object here."""
    chart = tmp_path / GATEWAY
    shutil.copytree(CHARTS / GATEWAY, chart)
    (chart / "templates/shown.yaml").write_text('kind: Notes\nmetadata: {name: n}\ntext: {{ include "epp.notes" . | quote }}\n')
    shown = tools.documents(tools.helm("template", "rel", chart, "--namespace", "inference", "--values", chart / "ci/custom-config.yaml"))
    notes = one(shown, "Notes", "n")["text"]
    assert "router.tokenizer is ignored" in notes
    assert "router.latencyPredictor is ignored" in notes
    assert "epp doctor --pool-name rel --pool-namespace inference" in notes


def test_names_fit_however_long_the_releases_is() -> None:
    name = "a-release-name-that-is-as-long-as-helm-lets-it-be-53c"
    assert len(name) == 53
    values = CHARTS / STANDALONE / "ci/service.yaml"
    objects = tools.documents(tools.helm("template", name, CHARTS / STANDALONE, "--namespace", "n" * 63, "--values", values))
    assert tools.faults(objects) == []
    assert dangling(objects) == []
    names = [item["metadata"]["name"] for item in of_kind(objects, "Service", "Deployment")]
    assert max(map(len, names)) <= 63
    assert all(len(value) <= 63 for item in objects for value in item["metadata"]["labels"].values())


# --- what is refused


@pytest.mark.parametrize(
    ("chart", "values", "says"),
    [
        (GATEWAY, "{}", "router.modelServers.matchLabels is required"),
        (GATEWAY, "inferenceExtension: {replicas: 2}", "is now router.epp.*"),
        (GATEWAY, "inferencePool: {modelServers: {matchLabels: {app: a}}}", "is now router.modelServers"),
        (GATEWAY, "experimentalHttpRoute: {enabled: true}", "is now httpRoute.*"),
        (STANDALONE, "inferenceObjectives: [{name: a, priority: 1}]", "is now router.inferenceObjectives"),
        (GATEWAY, "router: {epp: {replica: 2}}", "replica"),
        (GATEWAY, "router: {epp: {flags: {poolName: a}}}", "poolName"),
        (GATEWAY, "router: {modelServers: {type: vllmm}}", "modelServers"),
        (GATEWAY, "router: {modelServers: {targetPorts: [{number: 70000}]}}", "targetPorts"),
        (GATEWAY, "provider: {name: kong}", "provider"),
        (GATEWAY, "gateway: {}", "gateway"),
        (GATEWAY, "router: {modelServers: {matchLabels: {a: b}}, proxy: {enabled: true}}", "use the chart epp-standalone"),
        (GATEWAY, "router: {modelServers: {matchLabels: {a: b}}, epp: {resources: {limits: {memory: 1Gi}, requests: null}}}", "requests.cpu is required"),
        (GATEWAY, "router: {modelServers: {matchLabels: {a: b}}, epp: {flags: {pool-name: x}}}", "the chart sets this one"),
        (GATEWAY, "router: {modelServers: {matchLabels: {a: b}}, epp: {pluginsConfigFile: x.yaml}}", "no x.yaml"),
        (GATEWAY, "router: {modelServers: {matchLabels: {a: b}}, epp: {replicas: 2, autoscaling: {enabled: true}}}", "leaderElection: false"),
        (GATEWAY, "router: {modelServers: {matchLabels: {a: b}}, epp: {replicas: 2, podDisruptionBudget: {enabled: true}}}", "let no node drain"),
        (GATEWAY, "router: {modelServers: {matchLabels: {a: b}}, epp: {drainTimeout: 120s}}", "terminationGracePeriodSeconds"),
        (GATEWAY, "router: {modelServers: {matchLabels: {a: b}}, epp: {tls: {enabled: false, secretName: x}}}", "TLS is off"),
        (GATEWAY, "router: {modelServers: {matchLabels: {a: b}}, epp: {metricsTls: {clientCaSecretName: x}}}", "needs secretName"),
        (GATEWAY, "router: {modelServers: {matchLabels: {a: b}, autoscaling: {enabled: true}}}", "scaleTargetRef.name is required"),
        (GATEWAY, "router: {modelServers: {matchLabels: {a: b}}, additionalPools: [{name: rel, modelServers: {matchLabels: {a: c}}}]}", "twice"),
        (GATEWAY, "router: {modelServers: {matchLabels: {a: b}}, additionalPools: [{name: x, modelServers: {}}]}", "needs modelServers.matchLabels"),
        (
            GATEWAY,
            "{router: {modelServers: {matchLabels: {a: b}}, additionalPools: [{name: x, modelServers: {matchLabels: {a: c}}}]}, httpRoute: {create: true}}",
            "no request finds it",
        ),
        (STANDALONE, "router: {modelServers: {matchLabels: {a: b}}, proxy: {proxyType: agentgateway}}", "inferencePool.create: false"),
        (
            STANDALONE,
            "router: {inferencePool: {create: false}, modelServers: {matchLabels: {a: b}}, inferenceObjectives: [{name: a, priority: 1}]}",
            "needs an InferencePool",
        ),
        (STANDALONE, "router: {inferencePool: {create: false}, modelServers: {matchLabels: {a: b}}, proxy: {proxyType: agentgateway}}", "proxy.image"),
        (
            STANDALONE,
            "router: {inferencePool: {create: false}, modelServers: {matchLabels: {a: b}}, proxy: {proxyType: agentgateway, image: x}, epp: {flags: {secure-serving: true}}}",
            "speaks plaintext",
        ),
    ],
)  # fmt: skip
def test_values_that_make_no_sense_are_refused_with_the_reason(chart: str, values: str, says: str, tmp_path: Path) -> None:
    assert says in refused(chart, values, tmp_path)


def keys_of(value: object, path: str = "") -> set[str]:
    """Of nested mappings, `a.b.c`; an empty mapping is a leaf."""
    if isinstance(value, dict) and value:
        return {key for name, below in value.items() for key in keys_of(below, f"{path}.{name}".removeprefix("."))}
    return {path}


@pytest.mark.parametrize("chart", [LIBRARY, CHARTS / GATEWAY, CHARTS / STANDALONE], ids=lambda path: path.name)
def test_values_and_their_schema_know_the_same_keys(chart: Path) -> None:
    values, schema = yaml.safe_load((chart / "values.yaml").read_text()), json.loads((chart / "values.schema.json").read_text())

    def walk(value: object, part: dict[str, Any], path: str) -> list[str]:
        if part.get("additionalProperties") is not False or not isinstance(value, dict):
            return []
        optional = {"global", "targetMemoryUtilizationPercentage", *([] if path else LEGACY)}
        wrong = [f"{path}.{key}" for key in set(value) ^ set(part["properties"]) if key not in optional]
        return wrong + [found for key, below in value.items() for found in walk(below, part["properties"].get(key, {}), f"{path}.{key}")]

    assert walk({"router": {}, **values} if chart != LIBRARY else values, schema, "") == []


LEGACY = {"inferenceExtension", "inferencePool", "inferenceObjectives", "experimentalHttpRoute"}


# --- what the reference picker's charts and manifests give


@pytest.mark.parametrize(
    "args",
    [
        [
            "--pool-name", "vllm", "--pool-namespace", "inference", "--pool-group", "inference.networking.k8s.io", "--zap-encoder", "json",
            "--config-file", "/config/default-plugins.yaml", "--grpc-health-port", "9003", "--tracing=false",
        ],
        [
            "--pool-name", "vllm", "--pool-namespace", "inference", "--pool-group", "inference.networking.k8s.io", "--zap-encoder", "json",
            "--config-file", "/config/custom.yaml", "--ha-enable-leader-election", "--grpc-health-port", "9003", "--v=4", "--tracing=true",
            "--metrics-endpoint-auth=false",
        ],
        [
            "--endpoint-selector", "app=vllm,tier=gpu", "--endpoint-target-ports", "8000,8001", "--zap-encoder", "json", "--config-file",
            "/config/default-plugins.yaml", "--grpc-health-port", "9003", "--secure-serving=false", "--tracing=false",
        ],
        [
            "--pool-name=vllm", "--pool-namespace=inference", "--pool-group=inference.networking.k8s.io", "--zap-encoder=json",
            "--config-file=/config/default-plugins.yaml", "--grpc-port=9002", "--grpc-health-port=9003", "--metrics-port=9090",
            "--health-checking=true", "--enable-pprof=true", "--cert-path=/certs", "--refresh-metrics-interval=50ms", "--tracing=false",
        ],
        ["-pool-name", "vllm", "-pool-namespace", "inference", "-v", "4", "-grpc-port", "9002", "-grpc-health-port", "9003"],
        ["--pool-name", "vllm", "--pool-namespace", "inference", "--grpc-port", "9002", "--grpc-health-port", "9003"],
    ],
    ids=["gateway", "ha", "standalone", "equals-signs", "single-dashes", "conformance"],
)  # fmt: skip
def test_arguments_of_the_references_charts_start_the_picker(args: list[str]) -> None:
    _, options = options_of({"args": args})
    assert options.pool_names == (("vllm",) if "selector" not in " ".join(args) else ())
    assert options.grpc_health_port == 9003
    assert options.ha_enable_leader_election == ("--ha-enable-leader-election" in args)
