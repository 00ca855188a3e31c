"""What a schema can't see in a set of Kubernetes objects: names that name nothing, selectors that select nothing, and a picker that would not start.

`dangling(objects)` for the references between them, `picker_faults(objects)` for the picker's own arguments and configuration.
"""

from __future__ import annotations

import argparse
import io
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from typing import Any

from epp import offline
from epp.app import GRACE_S
from epp.cli import parser
from epp.config.options import ServeOptions, ignored_flags, serve_options
from epp.errors import ConfigError

Object = Mapping[str, Any]
HOLDERS = ("Deployment", "StatefulSet")
POOL_READER = {
    ("inference.networking.k8s.io", "inferencepools"),
    ("llm-d.ai", "inferenceobjectives"),
    ("llm-d.ai", "inferencemodelrewrites"),
    ("inference.networking.x-k8s.io", "inferenceobjectives"),
    ("inference.networking.x-k8s.io", "inferencemodelrewrites"),
}


def of_kind(objects: Sequence[Object], *kinds: str) -> list[Object]:
    return [item for item in objects if item["kind"] in kinds]


def pod_of(workload: Object) -> Mapping[str, Any]:
    template: Mapping[str, Any] = workload["spec"]["template"]
    return template


def pickers(objects: Sequence[Object]) -> list[tuple[Object, Mapping[str, Any]]]:
    """Each workload with a picker in it, and that container."""
    workloads = of_kind(objects, *HOLDERS)
    return [(w, c) for w in workloads for c in pod_of(w)["spec"]["containers"] if c["name"] == "epp"]


def options_of(container: Mapping[str, Any]) -> tuple[argparse.Namespace, ServeOptions]:
    """What the container's arguments say to the picker. Raises AssertionError with what argparse says where they are wrong."""
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            args = parser().parse_args(["serve", *container["args"]])
            return args, serve_options(args)
    except (SystemExit, ConfigError) as error:
        raise AssertionError(f"{container['args']}: {said.getvalue()}{error}") from None


def dangling(objects: Sequence[Object]) -> list[str]:
    """References that lead nowhere, a line each. An object's neighbours must all be among `objects`, but Gateways and model servers."""
    return [*_names(objects), *_selectors(objects), *_ports(objects), *_volumes(objects), *_targets(objects)]


def picker_faults(objects: Sequence[Object]) -> list[str]:
    """What keeps the pickers in there from starting, or would cut their requests off."""
    found: list[str] = []
    for workload, container in pickers(objects):
        args, options = options_of(container)
        found += [warning for warning in ignored_flags(args) if not warning.startswith("--tracing ")]
        found += _config_faults(objects, workload, container, options)
        found += _probe_faults(container, options)
        found += _rights_missing(objects, workload, options)
        if pod_of(workload)["spec"]["terminationGracePeriodSeconds"] <= options.drain_timeout_s + GRACE_S:
            found.append("killed before it has drained")
    return found


def config_said(text: str) -> str:
    """What `epp check` has against an EndpointPickerConfig; empty: nothing."""
    said = io.StringIO()
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file, redirect_stderr(said), redirect_stdout(io.StringIO()):
        file.write(text)
        file.flush()
        code = offline.check(argparse.Namespace(file=[file.name], allow_experimental_plugins=False))
    return said.getvalue() or f"exit code {code}" if code else ""


def _duplicates(items: Sequence[Any]) -> set[Any]:
    return {item for item in items if items.count(item) > 1}


def _names(objects: Sequence[Object]) -> Iterator[str]:
    keys = [(o["kind"], o["metadata"].get("namespace", ""), o["metadata"]["name"]) for o in objects]
    for twice in _duplicates(keys):
        yield f"{twice} is there twice"
    for binding in of_kind(objects, "RoleBinding", "ClusterRoleBinding"):
        role = binding["roleRef"]
        if role["name"] not in {o["metadata"]["name"] for o in of_kind(objects, role["kind"])}:
            yield f"{binding['metadata']['name']}: no {role['kind']} {role['name']}"
    for account, whose in _accounts(objects):
        if account not in {o["metadata"]["name"] for o in of_kind(objects, "ServiceAccount")}:
            yield f"{whose}: no ServiceAccount {account}"


def _accounts(objects: Sequence[Object]) -> Iterator[tuple[str, str]]:
    for binding in of_kind(objects, "RoleBinding", "ClusterRoleBinding"):
        for subject in binding["subjects"]:
            if subject["name"] != "collector":  # Google's
                yield subject["name"], binding["metadata"]["name"]
    for workload in of_kind(objects, *HOLDERS):
        name = pod_of(workload)["spec"].get("serviceAccountName")
        if name:
            yield name, workload["metadata"]["name"]


def _selects(selector: Mapping[str, str], labels: Mapping[str, str]) -> bool:
    return selector.items() <= labels.items()


def _pods(objects: Sequence[Object], selector: Mapping[str, str]) -> list[Object]:
    return [w for w in of_kind(objects, *HOLDERS) if _selects(selector, pod_of(w)["metadata"]["labels"])]


def _selectors(objects: Sequence[Object]) -> Iterator[str]:
    for workload in of_kind(objects, *HOLDERS):
        if workload not in _pods(objects, workload["spec"]["selector"]["matchLabels"]):
            yield f"{workload['metadata']['name']} does not select its own pods"
    for item in of_kind(objects, "PodDisruptionBudget", "PodMonitoring"):
        if not _pods(objects, item["spec"]["selector"]["matchLabels"]):
            yield f"{item['kind']} {item['metadata']['name']} selects nothing"
    for item in of_kind(objects, "NetworkPolicy"):
        if not _pods(objects, item["spec"]["podSelector"]["matchLabels"]):
            yield f"NetworkPolicy {item['metadata']['name']} selects nothing"
    for monitor in of_kind(objects, "ServiceMonitor"):
        wanted = monitor["spec"]["selector"]["matchLabels"]
        ports = {endpoint["port"] for endpoint in monitor["spec"]["endpoints"]}
        services = [s for s in of_kind(objects, "Service") if _selects(wanted, s["metadata"]["labels"])]
        if not any(ports <= {port["name"] for port in service["spec"]["ports"]} for service in services):
            yield f"ServiceMonitor {monitor['metadata']['name']} finds no Service with {ports}"


def _container_ports(workloads: Sequence[Object]) -> dict[str, int]:
    return {p["name"]: p["containerPort"] for w in workloads for c in pod_of(w)["spec"]["containers"] for p in c.get("ports", ())}


def _ports(objects: Sequence[Object]) -> Iterator[str]:
    for service in of_kind(objects, "Service"):
        there = _pods(objects, service["spec"]["selector"])
        if not there:
            continue  # of model servers
        for port in service["spec"]["ports"]:
            target = port.get("targetPort", port["port"])
            if isinstance(target, str) and target not in _container_ports(there):
                yield f"Service {service['metadata']['name']}: no container port {target}"
    for policy in of_kind(objects, "NetworkPolicy"):
        there = _pods(objects, policy["spec"]["podSelector"]["matchLabels"])
        for rule in policy["spec"]["ingress"]:
            for port in rule.get("ports", ()):
                if port["port"] not in _container_ports(there):
                    yield f"NetworkPolicy {policy['metadata']['name']}: no container port {port['port']}"


def _volumes(objects: Sequence[Object]) -> Iterator[str]:
    maps = {o["metadata"]["name"] for o in of_kind(objects, "ConfigMap")}
    for workload in of_kind(objects, *HOLDERS):
        spec = pod_of(workload)["spec"]
        volumes = {volume["name"]: volume for volume in spec.get("volumes", ())}
        mounted = [mount["name"] for container in spec["containers"] for mount in container.get("volumeMounts", ())]
        yield from (f"{workload['metadata']['name']}: no volume {name}" for name in mounted if name not in volumes)
        yield from (f"{workload['metadata']['name']}: volume {name} is mounted nowhere" for name in volumes if name not in mounted)
        for volume in volumes.values():
            if "configMap" in volume and volume["configMap"]["name"] not in maps:
                yield f"{workload['metadata']['name']}: no ConfigMap {volume['configMap']['name']}"


def _targets(objects: Sequence[Object]) -> Iterator[str]:
    services = {o["metadata"]["name"]: {p["port"] for p in o["spec"]["ports"]} for o in of_kind(objects, "Service")}
    pools = {o["metadata"]["name"] for o in of_kind(objects, "InferencePool")}
    for pool in of_kind(objects, "InferencePool"):
        picker = pool["spec"]["endpointPickerRef"]
        if picker["port"]["number"] not in services.get(picker["name"], ()):
            yield f"InferencePool {pool['metadata']['name']}: no Service {picker['name']} with port {picker['port']['number']}"
        for service in of_kind(objects, "Service"):
            if service["metadata"]["name"] == picker["name"] and not pickers(_pods(objects, service["spec"]["selector"])):
                yield f"Service {picker['name']} selects no picker"
    for item in of_kind(objects, "InferenceObjective"):
        if item["spec"]["poolRef"]["name"] not in pools:
            yield f"InferenceObjective {item['metadata']['name']}: no pool"
    for route in of_kind(objects, "HTTPRoute"):
        for backend in (backend for rule in route["spec"]["rules"] for backend in rule["backendRefs"]):
            if backend["kind"] != "InferencePool" or backend["name"] not in pools:
                yield f"HTTPRoute {route['metadata']['name']}: no pool {backend['name']}"
    for policy in of_kind(objects, "HealthCheckPolicy", "GCPBackendPolicy"):
        if policy["spec"]["targetRef"]["name"] not in pools:
            yield f"{policy['kind']} {policy['metadata']['name']}: no pool"


def _config_faults(objects: Sequence[Object], workload: Object, container: Mapping[str, Any], options: ServeOptions) -> Iterator[str]:
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    for file in (options.config_file, options.cert_path, options.client_ca_file, options.metrics_cert_dir, options.metrics_client_ca_file):
        if file and not any(file == path or file.startswith(f"{path}/") for path in mounts):
            yield f"{file} is not mounted"
    if options.config_file:
        folder, _, name = options.config_file.rpartition("/")
        volumes = {volume["name"]: volume for volume in pod_of(workload)["spec"]["volumes"]}
        holder = volumes.get(mounts.get(folder, ""), {}).get("configMap", {}).get("name")
        if not any(name in item["data"] for item in of_kind(objects, "ConfigMap") if item["metadata"]["name"] == holder):
            yield f"{options.config_file} is not in the ConfigMap"
    for item in of_kind(objects, "ConfigMap"):
        for name, text in item["data"].items():
            if "EndpointPickerConfig" in text and (said := config_said(text)):
                yield f"{name}: {said}"


def _probe_faults(container: Mapping[str, Any], options: ServeOptions) -> Iterator[str]:
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    serves = {"grpc": options.grpc_port, "grpc-health": options.grpc_health_port, "metrics": options.metrics_port}
    if {name: ports[name] for name in serves} != serves:
        yield f"ports {ports}, but it listens on {serves}"
    known = {"liveness", "readiness"} if options.ha_enable_leader_election else {"inference-extension"}
    for name in ("startupProbe", "livenessProbe", "readinessProbe"):
        probe = container.get(name)
        if probe and (probe["grpc"]["port"] != options.grpc_health_port or probe["grpc"]["service"] not in known):
            yield f"{name} asks for {probe['grpc']}"


def _rights_missing(objects: Sequence[Object], workload: Object, options: ServeOptions) -> Iterator[str]:
    account = pod_of(workload)["spec"]["serviceAccountName"]
    rights = set(_rights(objects, account))
    needed = {("", "pods", verb) for verb in ("get", "list", "watch")}
    if options.pool_names:
        needed |= {(group, resource, verb) for group, resource in POOL_READER for verb in ("get", "list", "watch")}
    if options.ha_enable_leader_election:
        needed |= {("coordination.k8s.io", "leases", verb) for verb in ("get", "create", "update")}
    if options.metrics_endpoint_auth is not False:
        needed |= {("authentication.k8s.io", "tokenreviews", "create"), ("authorization.k8s.io", "subjectaccessreviews", "create")}
    yield from (f"may not {verb} {resource} of {group}" for group, resource, verb in sorted(needed - rights))
    yield from (f"may {verb} {resource} of {group} for nothing" for group, resource, verb in sorted(rights - needed))


def _rights(objects: Sequence[Object], account: str) -> Iterator[tuple[str, str, str]]:
    for binding in of_kind(objects, "RoleBinding", "ClusterRoleBinding"):
        if account in {subject["name"] for subject in binding["subjects"]}:
            kind, name = binding["roleRef"]["kind"], binding["roleRef"]["name"]
            for role in (o for o in of_kind(objects, kind) if o["metadata"]["name"] == name):
                for rule in role["rules"]:
                    yield from ((g, r, v) for g in rule.get("apiGroups", ()) for r in rule.get("resources", ()) for v in rule["verbs"])


def images(objects: Sequence[Object]) -> Iterator[str]:
    yield from (c["image"] for w in of_kind(objects, *HOLDERS) for c in pod_of(w)["spec"]["containers"])


def registry_of(image: str) -> str:
    """Of an image's name; empty where it has none."""
    first, slash, _ = image.partition("/")
    return first if slash and re.search(r"[.:]", first) else ""
