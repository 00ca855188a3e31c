"""Objects as a cluster holds them, for fake_api and the real server alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Object = dict[str, Any]


def pod(
    name: str, ip: str = "10.0.0.1", *, namespace: str = "default", labels: Mapping[str, str] | None = None, annotations: Mapping[str, str] | None = None,
    ready: bool = True, phase: str = "Running", node: str = "node-1", port: int = 8000, host_network: bool = False, created: str = "", uid: str = "",
    terminating: bool = False,
) -> Object:  # fmt: skip
    """`labels`: {"app": "vllm"} when not given. `ip` "": none yet."""
    metadata: Object = {"name": name, "namespace": namespace, "labels": dict({"app": "vllm"} if labels is None else labels)}
    if annotations:
        metadata["annotations"] = dict(annotations)
    metadata |= ({"creationTimestamp": created} if created else {}) | ({"uid": uid} if uid else {})
    if terminating:
        metadata |= {"deletionTimestamp": "2026-11-21T13:31:09Z", "deletionGracePeriodSeconds": 30}
    container = {"name": "engine", "image": "engine:1", "ports": [{"containerPort": port, "name": "http", "protocol": "TCP"}]}
    spec: Object = {"containers": [container], "nodeName": node, "restartPolicy": "Always", "terminationGracePeriodSeconds": 30}
    if host_network:
        spec["hostNetwork"] = True
    conditions = [
        {"type": "Initialized", "status": "True"},
        {"type": "Ready", "status": "True" if ready else "False"},
        {"type": "PodScheduled", "status": "True"},
    ]
    status: Object = {"phase": phase, "conditions": conditions, "qosClass": "BestEffort"}
    if ip:
        status |= {"podIP": ip, "podIPs": [{"ip": ip}], "hostIP": "192.0.2.1"}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec, "status": status}


def inference_pool(
    name: str, selector: Mapping[str, str] | None = None, ports: Sequence[int] = (8000,), *, namespace: str = "default", app_protocol: str = "",
    service: str = "epp", service_port: int = 9002, failure_mode: str = "",
) -> Object:  # fmt: skip
    """inference.networking.k8s.io/v1; `service` "": no endpointPickerRef."""
    spec: Object = {
        "selector": {"matchLabels": dict({"app": "vllm"} if selector is None else selector)},
        "targetPorts": [{"number": port} for port in ports],
    }
    if app_protocol:
        spec["appProtocol"] = app_protocol
    if service:
        spec["endpointPickerRef"] = {"name": service, "port": {"number": service_port}}
        if failure_mode:
            spec["endpointPickerRef"]["failureMode"] = failure_mode
    return _object("inference.networking.k8s.io/v1", "InferencePool", name, namespace, spec)


def inference_pool_v1alpha2(
    name: str, selector: Mapping[str, str] | None = None, port: int = 8000, *, namespace: str = "default", service: str = "epp", service_port: int = 9002
) -> Object:  # fmt: skip
    spec: Object = {
        "selector": dict({"app": "vllm"} if selector is None else selector),
        "targetPortNumber": port,
        "extensionRef": {"name": service, "portNumber": service_port},
    }
    return _object("inference.networking.x-k8s.io/v1alpha2", "InferencePool", name, namespace, spec)


def objective(name: str, priority: int | None, pool: str, *, namespace: str = "default", old: bool = False, pool_group: str = "") -> Object:
    spec: Object = {"poolRef": {"name": pool} | ({"group": pool_group} if pool_group else {})}
    if priority is not None:
        spec["priority"] = priority
    return _object(_routing(old=old), "InferenceObjective", name, namespace, spec)


def rewrite(
    name: str,
    pool: str,
    rules: Sequence[tuple[str, Mapping[str, int]]],
    *,
    namespace: str = "default",
    old: bool = False,
    created: str = "",
) -> Object:
    """`rules`: the model's name ("": every other one) and the weights of what it becomes."""
    said = [
        ({"matches": [{"model": {"type": "Exact", "value": model}}]} if model else {})
        | {"targets": [{"modelRewrite": target, "weight": weight} for target, weight in targets.items()]}
        for model, targets in rules
    ]
    obj = _object(_routing(old=old), "InferenceModelRewrite", name, namespace, {"poolRef": {"name": pool}, "rules": said})
    if created:
        obj["metadata"]["creationTimestamp"] = created
    return obj


def service(
    name: str, port: int = 9002, *, namespace: str = "default", selector: Mapping[str, str] | None = None, port_name: str = "grpc-ext-proc",
    app_protocol: str = "http2",
) -> Object:  # fmt: skip
    of_port: Object = {"name": port_name, "port": port, "targetPort": port, "protocol": "TCP"}
    if app_protocol:
        of_port["appProtocol"] = app_protocol
    spec = {"selector": dict({"app": "epp"} if selector is None else selector), "ports": [of_port], "type": "ClusterIP"}
    return _object("v1", "Service", name, namespace, spec)


def lease(
    name: str, holder: str, *, namespace: str = "default", duration_s: int = 15, renewed: str = "2026-11-21T13:31:09.000000Z"
) -> Object:
    spec = {
        "holderIdentity": holder,
        "leaseDurationSeconds": duration_s,
        "acquireTime": renewed,
        "renewTime": renewed,
        "leaseTransitions": 0,
    }
    return _object("coordination.k8s.io/v1", "Lease", name, namespace, spec)


def _routing(*, old: bool) -> str:
    return "inference.networking.x-k8s.io/v1alpha2" if old else "llm-d.ai/v1alpha2"


def _object(api_version: str, kind: str, name: str, namespace: str, spec: Object) -> Object:
    return {"apiVersion": api_version, "kind": kind, "metadata": {"name": name, "namespace": namespace}, "spec": spec}
