"""What routing needs of Kubernetes objects, and nothing else of them: msgspec skips the rest without building it.

Each `read_*` takes one object as the API server wrote it and gives its key, its version and a value that compares equal as long as
nothing changed that matters here: the many updates of a pod's status that do not are dropped by that comparison.

Not here: which endpoints follow from pods and pools (endpoints), how objects arrive (reflector). Cost: 6 µs a pod.
"""

from __future__ import annotations

import ipaddress
from datetime import datetime
from typing import Any, NamedTuple

import msgspec

from epp.errors import ConfigError, Problem
from epp.resources import Objective, Rewrite
from epp.sources.kubernetes.selector import Selector
from epp.sources.resources import object_of

PORTS_MAX = 8
"""Ports of a pool, as in an InferencePool."""
POOL_GROUP_OLD = "inference.networking.x-k8s.io"

Key = tuple[str, str]
"""Namespace and name."""


class Pod(NamedTuple):
    """A pod as routing sees it."""

    namespace: str
    name: str
    uid: str
    host: str
    """Its IP address; empty: none yet, or none that can be read."""
    labels: dict[str, str]
    ready: bool
    """Takes requests: Ready, not terminating, not finished."""
    terminating: bool
    """Being deleted and not finished: the requests it has go on."""
    created_s: float
    ports_active: str | None
    """The annotation that narrows the pool's ports, as written."""
    ports_declared: frozenset[int] = frozenset()
    """By its containers; only of a pod on its node's network, which may share its address with others."""


class PoolObject(NamedTuple):
    """An InferencePool of either version."""

    namespace: str
    name: str
    selector: Selector
    ports: tuple[int, ...]
    app_protocol: str = ""
    service: str = ""
    service_port: int | None = None
    terminating: bool = False


class Seen(NamedTuple):
    """One object as the API server has it."""

    key: Key
    version: str
    value: Any


class _HeadMeta(msgspec.Struct):
    name: str = ""
    namespace: str = ""
    version: str = msgspec.field(name="resourceVersion", default="")


class Head(msgspec.Struct):
    """Enough to know which object it is."""

    meta: _HeadMeta = msgspec.field(name="metadata", default_factory=_HeadMeta)


class _Annotations(msgspec.Struct):
    ports: str | None = msgspec.field(name="llm-d.ai/active-ports", default=None)
    ports_old: str | None = msgspec.field(name="inference.networking.k8s.io/active-ports", default=None)


class _PodMeta(msgspec.Struct):
    name: str
    namespace: str = ""
    version: str = msgspec.field(name="resourceVersion", default="")
    uid: str = ""
    labels: dict[str, str] | None = None
    annotations: _Annotations | None = None
    created: str | None = msgspec.field(name="creationTimestamp", default=None)
    deleted: str | None = msgspec.field(name="deletionTimestamp", default=None)


class _ContainerPort(msgspec.Struct):
    number: int = msgspec.field(name="containerPort", default=0)


class _Container(msgspec.Struct):
    ports: list[_ContainerPort] | None = None


class _PodSpec(msgspec.Struct):
    host_network: bool = msgspec.field(name="hostNetwork", default=False)
    containers: list[_Container] | None = None


class _Condition(msgspec.Struct):
    type: str = ""
    status: str = ""


class _PodStatus(msgspec.Struct):
    phase: str = ""
    pod_ip: str = msgspec.field(name="podIP", default="")
    conditions: list[_Condition] | None = None


class _Pod(msgspec.Struct):
    meta: _PodMeta = msgspec.field(name="metadata")
    spec: _PodSpec = msgspec.field(default_factory=_PodSpec)
    status: _PodStatus = msgspec.field(default_factory=_PodStatus)


class _PoolMeta(_HeadMeta):
    deleted: str | None = msgspec.field(name="deletionTimestamp", default=None)


class _Number(msgspec.Struct):
    number: int = 0


class _PickerRef(msgspec.Struct):
    name: str = ""
    kind: str = "Service"
    port: _Number | None = None
    port_number: int | None = msgspec.field(name="portNumber", default=None)
    """Of v1alpha2."""


class _MatchLabels(msgspec.Struct):
    labels: dict[str, str] = msgspec.field(name="matchLabels", default_factory=dict)


class _PoolSpec(msgspec.Struct):
    selector: _MatchLabels
    ports: list[_Number] = msgspec.field(name="targetPorts")
    app_protocol: str | None = msgspec.field(name="appProtocol", default=None)
    picker: _PickerRef | None = msgspec.field(name="endpointPickerRef", default=None)


class _Pool(msgspec.Struct):
    meta: _PoolMeta = msgspec.field(name="metadata")
    spec: _PoolSpec


class _PoolSpecOld(msgspec.Struct):
    selector: dict[str, str]
    port: int = msgspec.field(name="targetPortNumber")
    picker: _PickerRef | None = msgspec.field(name="extensionRef", default=None)


class _PoolOld(msgspec.Struct):
    meta: _PoolMeta = msgspec.field(name="metadata")
    spec: _PoolSpecOld


_head = msgspec.json.Decoder(Head)
_pod = msgspec.json.Decoder(_Pod)
_pool = msgspec.json.Decoder(_Pool)
_pool_old = msgspec.json.Decoder(_PoolOld)


def read_head(raw: bytes | msgspec.Raw) -> Seen:
    """Which object it is, whatever else is wrong with it. Raises one of UNREADABLE."""
    meta = _head.decode(raw).meta
    return Seen((meta.namespace, meta.name), meta.version, None)


def read_pod(raw: bytes | msgspec.Raw) -> Seen:
    """Raises one of UNREADABLE."""
    pod = _pod.decode(raw)
    meta, spec, status = pod.meta, pod.spec, pod.status
    host = _host(status.pod_ip)
    going_on = bool(host) and status.phase not in ("Succeeded", "Failed")
    ready = any(each.type == "Ready" and each.status == "True" for each in status.conditions or ())
    annotations = meta.annotations or _Annotations()
    declared = frozenset[int]()
    if spec.host_network:
        declared = frozenset(port.number for container in spec.containers or () for port in container.ports or ())
    value = Pod(
        meta.namespace,
        meta.name,
        meta.uid,
        host,
        meta.labels or {},
        ready=going_on and ready and not meta.deleted,
        terminating=going_on and bool(meta.deleted),
        created_s=_seconds(meta.created),
        ports_active=annotations.ports if annotations.ports is not None else annotations.ports_old,
        ports_declared=declared,
    )
    return Seen((meta.namespace, meta.name), meta.version, value)


def read_pool(raw: bytes | msgspec.Raw) -> Seen:
    """`inference.networking.k8s.io/v1`. Raises one of UNREADABLE, or ConfigError."""
    pool = _pool.decode(raw)
    ports = [port.number for port in pool.spec.ports]
    return _pool_object(pool.meta, pool.spec.selector.labels, ports, pool.spec.app_protocol or "", pool.spec.picker)


def read_pool_old(raw: bytes | msgspec.Raw) -> Seen:
    """`inference.networking.x-k8s.io/v1alpha2`. Raises one of UNREADABLE, or ConfigError."""
    pool = _pool_old.decode(raw)
    return _pool_object(pool.meta, pool.spec.selector, [pool.spec.port], "", pool.spec.picker)


def read_resource(raw: bytes | msgspec.Raw) -> Seen:
    """An InferenceObjective or InferenceModelRewrite of either group. Raises one of UNREADABLE, or ConfigError."""
    head = read_head(raw)
    item: Objective | Rewrite = object_of(msgspec.json.decode(raw), source="/".join(head.key))
    return Seen(head.key, head.version, item)


def _pool_object(meta: _PoolMeta, labels: dict[str, str], ports: list[int], app_protocol: str, picker: _PickerRef | None) -> Seen:
    problems = []
    selector = Selector(())
    try:
        selector = Selector.of_labels(labels)
    except ValueError as error:
        problems.append(Problem("spec.selector", str(error)))
    if not labels:
        problems.append(Problem("spec.selector", "names no label: it would select every pod of the namespace"))
    if not 1 <= len(ports) <= PORTS_MAX or not all(1 <= port <= 65535 for port in ports):
        problems.append(Problem("spec.targetPorts", f"must be 1 to {PORTS_MAX} ports from 1 to 65535"))
    if problems:
        raise ConfigError(f"InferencePool {meta.namespace}/{meta.name}", problems)
    service, service_port = "", None
    if picker is not None and picker.kind in ("", "Service"):
        service = picker.name
        service_port = picker.port.number if picker.port else picker.port_number
    value = PoolObject(
        meta.namespace,
        meta.name,
        selector,
        tuple(dict.fromkeys(ports)),
        app_protocol,
        service,
        service_port,
        terminating=bool(meta.deleted),
    )
    return Seen((meta.namespace, meta.name), meta.version, value)


def _host(text: str) -> str:
    """As gateways and the datastore write it: a canonical IPv6 address, without brackets."""
    try:
        return str(ipaddress.ip_address(text)) if text else ""
    except ValueError:
        return ""


def _seconds(text: str | None) -> float:
    try:
        return datetime.fromisoformat(text).timestamp() if text else 0.0
    except ValueError:
        return 0.0
