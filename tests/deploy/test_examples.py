"""The examples of deploy/gateways, deploy/platforms and deploy/autoscaling, as a reader would use them.

A set-up is what a folder's README says to apply, in its order: from it come the objects that are then held to the schemas, to the picker's
own command line and configuration loader, to a real Envoy, and to each other. What is not checked: that a controller of these projects
accepts them, for none runs here.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from epp import offline
from epp.cli import parser
from epp.clock import VirtualClock
from epp.config.options import ServeOptions, ignored_flags, serve_options
from epp.datastore import Datastore
from epp.envoy.supervisor import find_envoy
from epp.observe import families
from epp.observe.families import Name
from epp.observe.pool import pool_families
from tests.deploy import tools

DEPLOY = tools.ROOT / "deploy"
FILES = sorted(path for folder in ("gateways", "platforms", "autoscaling") for path in (DEPLOY / folder).rglob("*.yaml"))
READMES = sorted(path for folder in ("gateways", "platforms", "autoscaling") for path in (DEPLOY / folder).rglob("README.md"))
GUIDE = tools.ROOT / "docs/kubernetes.md"
IMAGE = "registry.example.com/endpoint-picker:0.1.0"
VALUES = frozenset(
    {
        "gateways/envoy-ai-gateway/envoy-gateway-values.yaml",
        "gateways/nginx-gateway-fabric/values.yaml",
        "autoscaling/prometheus-adapter-values.yaml",
    }
)
"""Helm values of other projects' charts."""
PATCHES = frozenset(
    {
        "gateways/several-pools/picker-args.yaml",
        "gateways/gke-multi-cluster/metrics-auth.yaml",
        "platforms/leaderworkerset/picker-args.yaml",
        "platforms/ray-serve/picker-args.yaml",
    }
)
"""For `kubectl patch`."""
NO_SCHEMA: Mapping[tuple[str, str], str] = {
    ("aigateway.envoyproxy.io", "AIGatewayRoute"): "Envoy AI Gateway publishes its CRDs in a chart only",
    ("autoscaling.gke.io", "AutoscalingMetric"): "GKE's, not published",
    ("cert-manager.io", "Certificate"): "not among the packages that tools.py fetches",
    ("cert-manager.io", "Issuer"): "not among the packages that tools.py fetches",
    ("leaderworkerset.x-k8s.io", "LeaderWorkerSet"): "its CRD is in no package; its pod templates are checked",
    ("ray.io", "RayService"): "its CRD is in no package; its pod templates are checked",
    ("serving.kserve.io", "LLMInferenceService"): "its CRD is in no package; what it says of containers is checked",
}
"""(group, kind): why there is no schema."""
NEWER_THAN_SCHEMA = {
    ("gateways/gke-multi-cluster/config-cluster.yaml", "GCPBackendPolicy"): {"balancingMode", "trafficDuration", "customMetrics"},
}
"""Fields that GKE documents and the newest published schema does not know yet."""
OPERATOR_LABELS = frozenset({"ray.io/serve"})
"""Put on pods by a controller, so not in a template."""
FLAGS_OF_OTHERS = frozenset({"--gateway-api", "--data-parallel-hybrid-lb"})
"""In the READMEs: gcloud's and vLLM's."""
_APPLY = re.compile(r"^kubectl apply -f (\S+)", re.MULTILINE)
_COMMAND = re.compile(
    r"^kubectl apply -f (?P<apply>\S+)|^kubectl -n llm patch deployment (?P<deployment>\S+) --patch-file (?P<patch>\S+)"
    r"|^kubectl -n llm delete (?P<kind>\S+) (?P<name>\S+)",
    re.MULTILINE,
)
_PATH = re.compile(r"\bdeploy/(?:gateways|platforms|autoscaling)/\S+")
_METRIC = re.compile(r"\b(?:llm_d_epp|inference_pool|epp)_\w+")

Object = dict[str, Any]


def _short(path: Path) -> str:
    return path.relative_to(DEPLOY).as_posix()


@cache
def _documents(path: Path) -> tuple[Object, ...]:
    return tuple(tools.documents(path.read_text(encoding="utf-8")))


def _all_objects() -> list[Object]:
    return [item for path in FILES if _short(path) not in VALUES | PATCHES for item in _documents(path)]


def _commands(readme: Path) -> str:
    return "\n".join(re.findall(r"```bash\n(.*?)```", readme.read_text(encoding="utf-8"), re.DOTALL))


class Setup:
    """The objects in a cluster after the commands of one README."""

    def __init__(self, readme: Path) -> None:
        self.objects: dict[tuple[str, str], Object] = {}
        for match in _COMMAND.finditer(_commands(readme)):
            if match["apply"]:
                place = tools.ROOT / match["apply"]
                for path in sorted(place.glob("*.yaml")) if place.is_dir() else [place]:
                    for item in _documents(path):
                        self.objects[item["kind"], item["metadata"]["name"]] = item
            elif match["patch"]:
                (patch,) = _documents(tools.ROOT / match["patch"])
                key = "Deployment", match["deployment"]
                self.objects[key] = _patched(self.objects[key], patch)
            else:
                (key,) = (key for key in self.objects if (key[0].lower(), key[1]) == (match["kind"], match["name"]))
                del self.objects[key]

    def of(self, kind: str) -> list[Object]:
        return [item for (its, _), item in self.objects.items() if its == kind]

    def get(self, kind: str, name: str) -> Object:
        assert (kind, name) in self.objects, f"no {kind} {name}, only {sorted(self.objects)}"
        return self.objects[kind, name]

    def pods(self) -> list[Object]:
        """The pod templates of everything that makes pods."""
        return [template for item in self.objects.values() for template in _templates(item)]

    def pickers(self) -> list[Picker]:
        return [
            Picker(item, template, container)
            for item in self.objects.values()
            for template in _templates(item)
            for container in template["spec"]["containers"]
            if container.get("image") == IMAGE and _command(container)[:2] == ["epp", "serve"]
        ]


@dataclasses.dataclass
class Picker:
    owner: Object
    template: Object
    container: Object

    @property
    def options(self) -> ServeOptions:
        return _options(self.container)

    @property
    def account(self) -> str:
        return str(self.template["spec"].get("serviceAccountName", "default"))


def _patched(item: Object, patch: Object) -> Object:
    """A strategic merge, as far as these patches go: containers by name, their arguments replaced."""
    said = {each["name"]: each for each in patch["spec"]["template"]["spec"]["containers"]}
    assert all(set(each) == {"name", "args"} for each in said.values())
    template = item["spec"]["template"]
    there = template["spec"]["containers"]
    assert set(said) <= {each["name"] for each in there}
    containers = [{**each, **said.get(each["name"], {})} for each in there]
    return {**item, "spec": {**item["spec"], "template": {**template, "spec": {**template["spec"], "containers": containers}}}}


def _templates(item: Object) -> list[Object]:
    spec = item.get("spec", {})
    match item["kind"]:
        case "Deployment":
            return [spec["template"]]
        case "LeaderWorkerSet":
            return [spec["leaderWorkerTemplate"]["leaderTemplate"], spec["leaderWorkerTemplate"]["workerTemplate"]]
        case "RayService":
            cluster = spec["rayClusterConfig"]
            return [cluster["headGroupSpec"]["template"], *(group["template"] for group in cluster["workerGroupSpecs"])]
        case "LLMInferenceService":
            return [{"spec": spec["router"]["scheduler"]["template"]}, {"spec": spec["template"]}]
        case _:
            return []


def _command(container: Object) -> list[str]:
    return [*container.get("command", ()), *map(str, container.get("args", ()))]


def _arguments(container: Object) -> argparse.Namespace:
    program, *argv = _command(container)
    assert program == "epp"
    return parser().parse_args(argv)


def _options(container: Object) -> ServeOptions:
    return serve_options(_arguments(container))


def _labels(template: Object) -> Mapping[str, str]:
    labels: Mapping[str, str] = template.get("metadata", {}).get("labels", {})
    return labels


def _matches(selector: Mapping[str, str], template: Object) -> bool:
    labels = _labels(template)
    return all(labels.get(key) == value for key, value in selector.items() if key not in OPERATOR_LABELS)


def _container_ports(template: Object) -> dict[str, int]:
    return {port["name"]: port["containerPort"] for each in template["spec"]["containers"] for port in each.get("ports", ())}


def _config_maps(path: Path) -> Iterator[tuple[str, str, str]]:
    for item in _documents(path):
        if item["kind"] == "ConfigMap":
            for key, text in item["data"].items():
                yield item["metadata"]["name"], key, text


def _texts(of: str) -> list[Any]:
    found = []
    for path in FILES:
        if _short(path) in VALUES | PATCHES:
            continue
        for name, key, text in _config_maps(path):
            if key.endswith(".yaml") and of == ("envoy" if key == "envoy.yaml" else "picker" if "EndpointPickerConfig" in text else ""):
                found.append(pytest.param(text, id=f"{_short(path)}:{name}"))
        for item in _documents(path):
            if of == "picker" and item["kind"] == "LLMInferenceService":
                inline = item["spec"]["router"]["scheduler"]["config"]["inline"]
                found.append(pytest.param(yaml.safe_dump(inline), id=_short(path)))
    return found


SETUPS = [pytest.param(Setup(readme), id=_short(readme.parent)) for readme in READMES if _APPLY.search(_commands(readme))]
OBJECTS = [pytest.param(path, id=_short(path)) for path in FILES if _short(path) not in VALUES | PATCHES]


def test_there_is_an_example_for_every_gateway_and_platform() -> None:
    wanted = {
        "gateways": "istio envoy-gateway envoy-ai-gateway kgateway agentgateway agentgateway-standalone gke gke-multi-cluster"
        " nginx-gateway-fabric envoy-standalone several-pools",
        "platforms": "kserve leaderworkerset ray-serve",
    }
    for folder, names in wanted.items():
        assert {path.parent.name for path in (DEPLOY / folder).glob("*/README.md")} == set(names.split())


def test_every_file_is_of_some_use_and_every_path_in_a_readme_is_there() -> None:
    texts = {readme: readme.read_text(encoding="utf-8") for readme in READMES}
    named: set[Path] = set()
    for readme, text in texts.items():
        linked = [(readme.parent / link).resolve() for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
        commanded = [tools.ROOT / path.rstrip("`).,;:") for path in _PATH.findall(text)]
        for path in [*linked, *commanded]:
            assert path.exists(), f"{_short(readme)}: {path}"
            named.update(path.glob("*.yaml") if path.is_dir() and path not in {each.parent for each in texts} else [path])
    assert not [_short(path) for path in FILES if path not in named and path.parent.name != "base"]
    assert {_short(path) for path in FILES} >= VALUES | PATCHES


@pytest.mark.parametrize("path", OBJECTS)
def test_objects_are_what_their_schemas_say(path: Path) -> None:
    objects = _documents(path)
    assert objects
    checked, known = [], set()
    for item in objects:
        group = item["apiVersion"].rpartition("/")[0]
        if (group, item["kind"]) in NO_SCHEMA:
            checked += [
                {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "t"}, "template": template}
                for template in _templates(item)
                if item["kind"] != "LLMInferenceService"  # pieces that KServe completes
            ]
            continue
        newer = NEWER_THAN_SCHEMA.get((_short(path), item["kind"]), set())
        if newer:
            there = item["spec"]["default"]
            assert newer <= set(there), "no longer used: take it out of NEWER_THAN_SCHEMA"
            item = {**item, "spec": {**item["spec"], "default": {key: there[key] for key in there if key not in newer}}}  # noqa: PLW2901
        known.add(item["kind"])
        checked.append(item)
    assert tools.faults(checked) == []


def test_no_exception_from_the_schemas_is_left_over() -> None:
    used = {(item["apiVersion"].rpartition("/")[0], item["kind"]) for item in _all_objects()}
    assert set(NO_SCHEMA) <= used


@pytest.mark.parametrize("path", OBJECTS)
def test_objects_are_named_and_in_the_namespace_of_the_examples(path: Path) -> None:
    cluster_wide = {"Namespace", "GatewayClass", "ClusterRole", "ClusterRoleBinding", "ComputeClass"}
    for item in _documents(path):
        assert item["metadata"].get("namespace") == (None if item["kind"] in cluster_wide else "llm"), item["metadata"]


@pytest.mark.parametrize("setup", SETUPS)
def test_containers_of_this_project_start(setup: Setup) -> None:
    for template in setup.pods():
        for container in template["spec"]["containers"]:
            if container.get("image") == IMAGE:
                args = _arguments(container)
                written = {word.partition("=")[0] for word in _command(container)[2:] if word.startswith("-")}
                assert written <= _flags(args.command), "argparse takes beginnings of flags too"
                if args.command == "serve":
                    assert ignored_flags(args) == []
                    assert serve_options(args)


@pytest.mark.parametrize("setup", SETUPS)
def test_configurations_are_where_the_arguments_say(setup: Setup) -> None:
    for picker in setup.pickers():
        options = picker.options
        mounts = {mount["mountPath"]: mount for mount in picker.container.get("volumeMounts", ())}
        volumes = {volume["name"]: volume for volume in picker.template["spec"].get("volumes", ())}
        if options.config_file:
            folder, _, key = options.config_file.rpartition("/")
            assert "subPath" not in mounts[folder]
            config_map = volumes[mounts[folder]["name"]]["configMap"]["name"]
            assert "EndpointPickerConfig" in setup.get("ConfigMap", config_map)["data"][key]
        if options.cert_path and picker.owner["kind"] == "Deployment":
            secret = volumes[mounts[options.cert_path]["name"]]["secret"]["secretName"]
            assert secret in {each["spec"]["secretName"] for each in setup.of("Certificate")}
        probes = [picker.container[name] for name in ("startupProbe", "livenessProbe", "readinessProbe") if name in picker.container]
        probed = {probe["grpc"]["port"] for probe in probes}
        assert probed <= {options.grpc_health_port}
        stop_s = picker.template["spec"].get("terminationGracePeriodSeconds")
        assert stop_s is None or stop_s > options.drain_timeout_s


@pytest.mark.parametrize("text", _texts("picker"))
def test_picker_configurations_are_valid(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "epp.yaml"
    file.write_text(text, encoding="utf-8")
    code = offline.check(argparse.Namespace(file=[str(file)], allow_experimental_plugins=False))
    assert (code, capsys.readouterr().err) == (0, "")


@pytest.mark.parametrize("text", _texts("envoy"))
def test_envoy_takes_its_configuration(text: str, tmp_path: Path) -> None:
    file = tmp_path / "envoy.yaml"
    file.write_text(text, encoding="utf-8")
    command = [str(find_envoy()), "--mode", "validate", "-c", str(file), "--use-dynamic-base-id", "--log-level", "warning"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (ran.returncode, ran.stderr) == (0, "")


@pytest.mark.parametrize("text", _texts("envoy"))
def test_envoy_asks_the_picker_in_its_pod_as_it_serves(text: str) -> None:
    (setup,) = (param.values[0] for param in SETUPS if param.id == "gateways/envoy-standalone")
    assert isinstance(setup, Setup)
    (picker,) = setup.pickers()
    clusters = {each["name"]: each for each in yaml.safe_load(text)["static_resources"]["clusters"]}
    (endpoint,) = clusters["epp"]["load_assignment"]["endpoints"][0]["lb_endpoints"]
    assert endpoint["endpoint"]["address"]["socket_address"]["port_value"] == picker.options.grpc_port
    assert ("transport_socket" in clusters["epp"]) == picker.options.secure_serving
    assert clusters["models"]["original_dst_lb_config"]["http_header_name"] == "x-gateway-destination-endpoint"
    listener = yaml.safe_load(text)["static_resources"]["listeners"][0]
    assert listener["address"]["socket_address"]["port_value"] == _container_ports(picker.template)["http"]


def test_agentgateway_asks_the_picker_in_its_pod_as_it_serves() -> None:
    (setup,) = (param.values[0] for param in SETUPS if param.id == "gateways/agentgateway-standalone")
    assert isinstance(setup, Setup)
    (picker,) = setup.pickers()
    config = yaml.safe_load(setup.get("ConfigMap", "agentgateway")["data"]["config.yaml"])
    (bind,) = config["binds"]
    (backend,) = bind["listeners"][0]["routes"][0]["backends"]
    routing = backend["policies"]["inferenceRouting"]
    assert routing == {"endpointPicker": {"host": f"127.0.0.1:{picker.options.grpc_port}"}, "destinationMode": "passthrough"}
    assert not picker.options.secure_serving, "this client speaks no TLS"
    assert bind["port"] == _container_ports(picker.template)["http"]
    (service,) = config["services"]
    assert backend["service"] == {"name": f"{service['namespace']}/{service['name']}", "port": next(iter(service["ports"]))}
    assert next(iter(service["ports"])) in picker.options.endpoint_target_ports


@pytest.mark.parametrize("setup", SETUPS)
def test_pools_select_model_servers_and_name_their_picker(setup: Setup) -> None:
    for pool in setup.of("InferencePool"):
        name, spec = pool["metadata"]["name"], pool["spec"]
        served = [picker.options for picker in setup.pickers() if name in picker.options.pool_names]
        if not served:
            # the pool of ../base, whose picker was told to serve the example's own
            assert {"LeaderWorkerSet", "RayService"} & {kind for kind, _ in setup.objects}
            continue
        selected = [template for template in setup.pods() if _matches(spec["selector"]["matchLabels"], template)]
        assert selected, f"{name} selects nothing"
        for template in selected:
            assert {port["number"] for port in spec["targetPorts"]} <= set(_container_ports(template).values())
        reference = spec["endpointPickerRef"]
        service = setup.get(reference["kind"], reference["name"])
        (port,) = (port for port in service["spec"]["ports"] if port["port"] == reference["port"]["number"])
        behind = [picker for picker in setup.pickers() if _matches(service["spec"]["selector"], picker.template)]
        assert behind
        for picker in behind:
            assert name in picker.options.pool_names
            assert _container_ports(picker.template)[port["targetPort"]] == picker.options.grpc_port
            assert port["appProtocol"] == ("http2" if picker.options.secure_serving else "kubernetes.io/h2c")
            assert not port["name"].startswith("tcp")


@pytest.mark.parametrize("setup", SETUPS)
def test_every_service_has_pods_and_their_ports(setup: Setup) -> None:
    for service in setup.of("Service"):
        behind = [template for template in setup.pods() if _matches(service["spec"]["selector"], template)]
        assert behind, service["metadata"]["name"]
        for port in service["spec"]["ports"]:
            for template in behind:
                ports = _container_ports(template)
                assert port["targetPort"] in ports or port["targetPort"] in ports.values()


@pytest.mark.parametrize("setup", SETUPS)
def test_pickers_without_a_pool_select_model_servers(setup: Setup) -> None:
    for picker in setup.pickers():
        if picker.options.endpoint_selector:
            labels = dict(pair.split("=") for pair in picker.options.endpoint_selector.split(","))
            selected = [template for template in setup.pods() if _matches(labels, template)]
            assert selected
            for template in selected:
                assert set(picker.options.endpoint_target_ports) <= set(_container_ports(template).values())
        else:
            assert picker.options.pool_names


def test_of_a_leader_worker_set_only_the_leaders_are_in_the_pool() -> None:
    documents = _documents(DEPLOY / "platforms/leaderworkerset/lws.yaml")
    (lws,) = (item for item in documents if item["kind"] == "LeaderWorkerSet")
    (pool,) = (item for item in documents if item["kind"] == "InferencePool")
    assert [_matches(pool["spec"]["selector"]["matchLabels"], template) for template in _templates(lws)] == [True, False]


def test_of_a_ray_service_only_the_workers_are_in_the_pool() -> None:
    documents = _documents(DEPLOY / "platforms/ray-serve/ray-service.yaml")
    (service,) = (item for item in documents if item["kind"] == "RayService")
    (pool,) = (item for item in documents if item["kind"] == "InferencePool")
    assert [_matches(pool["spec"]["selector"]["matchLabels"], template) for template in _templates(service)] == [False, True]
    serve = yaml.safe_load(service["spec"]["serveConfigV2"])
    assert serve["http_options"]["port"] == pool["spec"]["targetPorts"][0]["number"]
    assert all(each["log_engine_metrics"] for each in serve["applications"][0]["args"]["llm_configs"])


@pytest.mark.parametrize("setup", SETUPS)
def test_routes_and_policies_refer_to_what_is_there(setup: Setup) -> None:
    imported = {("GCPInferencePoolImport", pool["metadata"]["name"]) for pool in setup.of("InferencePool")}
    for route in [*setup.of("HTTPRoute"), *setup.of("AIGatewayRoute")]:
        for parent in route["spec"]["parentRefs"]:
            setup.get("Gateway", parent["name"])
        for rule in route["spec"]["rules"]:
            for backend in rule["backendRefs"]:
                kind, name = backend.get("kind", "Service"), backend["name"]
                if (kind, name) not in imported:
                    target = setup.get(kind, name)
                    assert target["apiVersion"].rpartition("/")[0] == backend.get("group", "")
                    if kind == "Service":
                        assert backend["port"] in {port["port"] for port in target["spec"]["ports"]}
    for item in setup.objects.values():
        spec = item.get("spec", {})
        for target in [*spec.get("targetRefs", ()), *([spec["targetRef"]] if "targetRef" in spec else [])]:
            if (target["kind"], target["name"]) not in imported:
                assert setup.get(target["kind"], target["name"])["apiVersion"].rpartition("/")[0] == target["group"]
        for processor in spec.get("extProc", ()):
            for backend in processor["backendRefs"]:
                assert backend["port"] in {port["port"] for port in setup.get("Service", backend["name"])["spec"]["ports"]}
    own_class = {item["metadata"]["name"] for item in setup.of("GatewayClass")}
    given = {"istio", "kgateway", "agentgateway", "nginx", "gke-l7-regional-external-managed", "gke-l7-cross-regional-internal-managed-mc"}
    assert {gateway["spec"]["gatewayClassName"] for gateway in setup.of("Gateway")} <= own_class | given


@pytest.mark.parametrize("setup", SETUPS)
def test_health_checks_ask_where_the_pool_serves(setup: Setup) -> None:
    for policy in setup.of("HealthCheckPolicy"):
        pool = setup.get("InferencePool", policy["spec"]["targetRef"]["name"])
        assert policy["spec"]["default"]["config"]["httpHealthCheck"]["port"] == pool["spec"]["targetPorts"][0]["number"]


@pytest.mark.parametrize("setup", SETUPS)
def test_tls_to_the_picker_is_as_it_serves(setup: Setup) -> None:
    hosts = {f"{service['metadata']['name']}.llm.svc.cluster.local": service for service in setup.of("Service")}
    for rule in setup.of("DestinationRule"):
        service = hosts[rule["spec"]["host"]]
        (picker,) = (each for each in setup.pickers() if _matches(service["spec"]["selector"], each.template))
        assert picker.options.secure_serving == (rule["spec"]["trafficPolicy"]["tls"] == {"mode": "SIMPLE", "insecureSkipVerify": True})
    for policy in setup.of("BackendTLSPolicy"):
        (target,) = policy["spec"]["targetRefs"]
        assert target["sectionName"] in {port["name"] for port in setup.get("Service", target["name"])["spec"]["ports"]}
        certificates = {each["spec"]["secretName"]: each["spec"].get("dnsNames", ()) for each in setup.of("Certificate")}
        (authority,) = policy["spec"]["validation"]["caCertificateRefs"]
        assert policy["spec"]["validation"]["hostname"] in certificates[authority["name"]]
        (picker,) = setup.pickers()
        assert picker.options.secure_serving
        assert picker.options.cert_path
    if "istio" in {gateway["spec"]["gatewayClassName"] for gateway in setup.of("Gateway")}:
        for pool in setup.of("InferencePool"):
            service = pool["spec"]["endpointPickerRef"]["name"]
            assert f"{service}.llm.svc.cluster.local" in {rule["spec"]["host"] for rule in setup.of("DestinationRule")}


@pytest.mark.parametrize("setup", SETUPS)
def test_roles_allow_what_the_arguments_need(setup: Setup) -> None:
    for picker in setup.pickers():
        if picker.owner["kind"] == "LLMInferenceService":
            continue  # KServe makes the role
        setup.get("ServiceAccount", picker.account)
        options = picker.options
        needed = [("", "pods")]
        if options.pool_names:
            needed.append((options.pool_group, "inferencepools"))
            needed += [
                (group, resource)
                for group in ("llm-d.ai", "inference.networking.x-k8s.io")
                for resource in ("inferenceobjectives", "inferencemodelrewrites")
            ]
        rules = [rule for role in _roles(setup, "RoleBinding", picker.account) for rule in setup.get("Role", role)["rules"]]
        for group, resource in needed:
            verbs = {verb for rule in rules if group in rule["apiGroups"] and resource in rule["resources"] for verb in rule["verbs"]}
            assert verbs == {"get", "list", "watch"}, (group, resource)
        assert len({(group, resource) for rule in rules for group in rule["apiGroups"] for resource in rule["resources"]}) == len(needed)
        assert not options.ha_enable_leader_election, "leases would be needed"
        if options.metrics_endpoint_auth is not False:
            assert "system:auth-delegator" in _roles(setup, "ClusterRoleBinding", picker.account)


def _roles(setup: Setup, kind: str, account: str) -> list[str]:
    subject = {"kind": "ServiceAccount", "name": account, "namespace": "llm"}
    return [binding["roleRef"]["name"] for binding in setup.of(kind) if subject in binding["subjects"]]


@pytest.mark.parametrize("setup", SETUPS)
def test_pods_of_this_project_may_do_little(setup: Setup) -> None:
    for template in setup.pods():
        for container in template["spec"]["containers"]:
            if container.get("image") == IMAGE and "securityContext" in template["spec"]:
                assert template["spec"]["securityContext"]["runAsNonRoot"] is True
                allowed = {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}
                assert container["securityContext"] == allowed
                assert container["resources"]["requests"].keys() >= {"cpu", "memory"}


def _metric_names() -> set[str]:
    """What the picker exposes of requests and of its pool."""
    named = {value for value in vars(families).values() if isinstance(value, Name)}
    named |= set(families.HISTOGRAMS.values())
    return {name.full for name in named} | {family.name for family in pool_families(Datastore(VirtualClock()), 0.0)}


def _autoscaling_queries() -> Sequence[str]:
    found = []
    for path in sorted((DEPLOY / "autoscaling").glob("*.yaml")):
        for item in _documents(path) if _short(path) not in VALUES else ():
            found += [trigger["metadata"]["query"] for trigger in item["spec"].get("triggers", ()) if trigger["type"] == "prometheus"]
    (values,) = _documents(DEPLOY / "autoscaling/prometheus-adapter-values.yaml")
    for rule in values["rules"]["external"]:
        found += [rule["seriesQuery"], rule["metricsQuery"]]
    return found


def test_autoscalers_ask_for_metrics_that_there_are() -> None:
    queries = _autoscaling_queries()
    assert len(queries) >= 6
    asked = {name for query in queries for name in _METRIC.findall(query)}
    assert len(asked) >= 4
    assert asked <= _metric_names()


def test_autoscalers_scale_what_there_is() -> None:
    deployments = {item["metadata"]["name"] for item in _all_objects() if item["kind"] == "Deployment"}
    (values,) = _documents(DEPLOY / "autoscaling/prometheus-adapter-values.yaml")
    external = {rule["name"]["as"] for rule in values["rules"]["external"]}
    for path in sorted((DEPLOY / "autoscaling").glob("*.yaml")):
        for item in _documents(path) if _short(path) not in VALUES else ():
            assert item["spec"]["scaleTargetRef"]["name"] in deployments
            for metric in item["spec"].get("metrics", ()):
                assert metric["type"] == "Resource" or metric["external"]["metric"]["name"] in external


def test_pool_names_in_queries_are_pools() -> None:
    pools = {item["metadata"]["name"] for item in _all_objects() if item["kind"] == "InferencePool"}
    named = [name for query in _autoscaling_queries() for name in re.findall(r'[{,]name="([^"]+)"', query)]
    assert named
    assert set(named) <= pools


@pytest.mark.parametrize("page", [pytest.param(path, id=path.relative_to(tools.ROOT).as_posix()) for path in (GUIDE, *READMES)])
def test_flags_that_are_written_of_exist(page: Path) -> None:
    for flag in re.findall(r"`(--[a-z-]+)(?:[=` ])", page.read_text(encoding="utf-8")):
        assert flag in _flags() | FLAGS_OF_OTHERS


def test_the_guide_leads_to_what_is_there() -> None:
    text = GUIDE.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert (GUIDE.parent / link).exists(), link
    applied = _APPLY.findall(_commands(GUIDE))
    assert applied
    assert all((tools.ROOT / path).exists() for path in applied)


@cache
def _flags(command: str = "serve") -> frozenset[str]:
    (commands,) = (action for action in parser()._actions if isinstance(action, argparse._SubParsersAction))
    return frozenset(commands.choices[command]._option_string_actions)
