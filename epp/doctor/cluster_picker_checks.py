"""The way from the pool to its picker: the Service, its port, the pods behind it, and how the Deployment starts them. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from epp.doctor.cluster_model import EXT_PROC_PORT, PickerFacts, labels_of, name_of, namespace_of, not_ready_because, ready
from epp.doctor.documents import Json, items, message
from epp.doctor.engine_checks import block_size as engine_block_size
from epp.doctor.engine_facts import EngineFacts
from epp.doctor.findings import Check, Finding, fail, ok, warn
from epp.extproc.health import SERVICES
from epp.plugins.base import HTTP_PROTOCOLS
from epp.plugins.registry import Registry

TLS_PROTOCOL, PLAIN_PROTOCOL = "http2", "kubernetes.io/h2c"
HTTP2_PREFIXES = ("http2", "grpc", "h2c")
"""Of a port's name, from which Istio tells the protocol where there is no appProtocol."""
GRACE_S = 10
"""For the picker's last streams, beyond its drain time."""
ELECTED_SERVICES = frozenset(SERVICES) - {"inference-extension"}
"""Names a picker with leader election answers to; any other is SERVICE_UNKNOWN."""


def referenced(pickers: Sequence[PickerFacts]) -> Iterator[Finding]:
    for picker in pickers:
        pool, reference = picker.pool, picker.pool.reference
        if not reference:
            yield fail(
                f"pool {pool.name} has no endpointPickerRef",
                "gateways have nobody to ask: the pool is not Accepted, or balanced at random",
                "spec: {endpointPickerRef: {name: SERVICE, port: {number: 9002}}}",
            )
            continue
        name = reference.get("name")
        if reference.get("kind", "Service") != "Service" or reference.get("group"):
            yield fail(
                f"pool {pool.name}'s endpointPickerRef is a {reference.get('kind')}",
                "gateways resolve Services alone",
                'endpointPickerRef: {kind: Service, group: ""}',
            )
        elif picker.service is None:
            yield fail(
                f"pool {pool.name}'s endpointPickerRef names Service {name}, which is not in namespace {pool.namespace}",
                "ResolvedRefs is False: 500 or 503 for every request",
                f"kubectl -n {pool.namespace} get services; name one of them",
            )
        elif not picker.port:
            declared = [str(each.get("port")) for each in items(message(picker.service, "spec"), "ports")]
            yield fail(
                f"Service {name} has no port {pool.reference_port or EXT_PROC_PORT}, it has {', '.join(declared) or 'none'}",
                "the gateway can't connect: 500 `no healthy upstream`",
                f"endpointPickerRef: {{port: {{number: {next(iter(declared), EXT_PROC_PORT)}}}}} (the Service's port, not the container's)",
            )
        if picker.service is not None and message(picker.service, "spec").get("type") == "ExternalName":
            yield fail(f"Service {name} is an ExternalName", "the Inference Extension forbids it", "a Service with a selector")


def service(pickers: Sequence[PickerFacts]) -> Iterator[Finding]:
    for picker in pickers:
        if picker.service is None:
            continue
        name = name_of(picker.service)
        if not picker.pods:
            yield fail(
                f"Service {name} selects no pod"
                + (f"; {picker.where} does not have its labels, or no replica" if picker.deployment else ""),
                "500 for every request, or requests pass unpicked (FailOpen)",
                f"make the Service's selector ({_selector(picker.service)}) and the picker's pod labels the same, and replicas at least 1",
            )
        elif not any(ready(pod) for pod in picker.pods):
            yield fail(
                f"none of the {len(picker.pods)} pods behind Service {name} is Ready: {not_ready_because(picker.pods[0])}",
                "500 for every request, or requests pass unpicked (FailOpen)",
                f"kubectl -n {picker.pool.namespace} logs {name_of(picker.pods[0])}; readiness is NOT_SERVING until the pool is synced (and on followers)",
            )
        foreign = [
            pod for pod in picker.pods if picker.pool.selector and all(labels_of(pod).get(k) == v for k, v in picker.pool.selector.items())
        ]
        if foreign:
            yield fail(
                f"Service {name} and pool {picker.pool.name} select the same pods ({name_of(foreign[0])})",
                "the gateway asks model servers for a decision, or sends prompts to the picker",
                "give picker and model servers different labels",
            )


def _selector(of: Json) -> str:
    return ", ".join(f"{key}={value}" for key, value in message(of, "spec", "selector").items()) or "empty"


def port_protocol(pickers: Sequence[PickerFacts]) -> Iterator[Finding]:
    for picker in pickers:
        if not picker.port:
            continue
        said = str(picker.port.get("appProtocol") or "")
        port_name = str(picker.port.get("name") or "")
        where = f"Service {name_of(picker.service)}, port {picker.port.get('port')}"
        if not said and not port_name.startswith(HTTP2_PREFIXES):
            yield fail(
                f"{where} says neither by appProtocol nor by name ({port_name or 'none'}) that it is HTTP/2",
                "Istio and others speak HTTP/1.1 or TCP to it: 500 `protocol error`",
                "ports: [{name: grpc-ext-proc, port: 9002, appProtocol: http2}]",
            )
        elif said and said not in (TLS_PROTOCOL, PLAIN_PROTOCOL, "grpc", "grpcs", "kubernetes.io/grpc"):
            yield fail(
                f"{where} has appProtocol {said}",
                "gateways do not speak HTTP/2 to it: 500",
                "appProtocol: http2 (TLS) or kubernetes.io/h2c (plaintext)",
            )
        secure = picker.options.secure_serving if picker.options is not None else None
        if said == PLAIN_PROTOCOL and secure:
            yield warn(
                f"{where} has appProtocol {PLAIN_PROTOCOL} (plaintext), {picker.where} serves TLS",
                "gateways that go by appProtocol (GKE) speak plaintext: 500 `connection_termination`. Istio, kgateway and Envoy AI Gateway do not go by it",
                "appProtocol: http2, or --secure-serving=false",
            )
        elif said == TLS_PROTOCOL and secure is False:
            yield warn(
                f"{where} has appProtocol {TLS_PROTOCOL}, {picker.where} serves plaintext (--secure-serving=false)",
                "gateways that always speak TLS to a picker (Envoy AI Gateway, kgateway, agentgateway, GKE with http2): 500 `WRONG_VERSION_NUMBER`",
                f"remove --secure-serving=false, or appProtocol: {PLAIN_PROTOCOL} where the gateway goes by it (GKE); plaintext is right behind Istio without a DestinationRule",
            )
        target = picker.port.get("targetPort", picker.port.get("port"))
        wanted = picker.options.grpc_port if picker.options is not None else None
        if wanted and isinstance(target, int) and target != wanted:
            yield fail(
                f"{where} leads to port {target}, {picker.where} serves ext_proc on {wanted}",
                "connections are refused: 500",
                f"targetPort: {wanted}, or --grpc-port={target}",
            )


def arguments(pickers: Sequence[PickerFacts]) -> Iterator[Finding]:
    for picker in pickers:
        if picker.deployment is None:
            continue
        if picker.fault:
            yield fail(
                f"{picker.where}: {picker.fault}", "the picker does not start (CrashLoopBackOff)", "`epp serve --help` lists the flags"
            )
        if picker.config_fault:
            yield fail(
                f"{picker.where}: its configuration has faults: {picker.config_fault}",
                "the picker does not start",
                "`epp check FILE` lists them all, each with its path",
            )
        options = picker.options
        if options is None:
            continue
        pool = picker.pool
        if options.pool_names and pool.name not in options.pool_names:
            yield fail(
                f"{picker.where} serves pool {', '.join(options.pool_names)}, pool {pool.name} refers to it",
                "it picks among another pool's model servers",
                f"--pool-name={pool.name} (may be repeated), or another endpointPickerRef",
            )
        namespace = options.pool_namespace or _namespace_variable(picker)
        if options.pool_names and namespace not in ("", pool.namespace) and "$(" not in namespace:
            yield fail(
                f"{picker.where} looks for its pool in namespace {namespace}, it is in {pool.namespace}",
                "the picker stays NOT_SERVING",
                f"--pool-namespace={pool.namespace}",
            )
        elif options.pool_names and not namespace and pool.namespace != "default":
            yield fail(
                f"{picker.where} has neither --pool-namespace nor $NAMESPACE: it looks in `default`",
                "the picker stays NOT_SERVING",
                f"--pool-namespace={pool.namespace}, or env: [{{name: NAMESPACE, valueFrom: {{fieldRef: {{fieldPath: metadata.namespace}}}}}}]",
            )
        if options.pool_names and options.pool_group != pool.group:
            yield fail(
                f"{picker.where} looks in group {options.pool_group}, the pool is in {pool.group}",
                "the picker stays NOT_SERVING",
                f"--pool-group={pool.group}",
            )


def _namespace_variable(picker: PickerFacts) -> str:
    for each in items(picker.container, "env"):
        if each.get("name") == "NAMESPACE":
            from_field = message(each, "valueFrom", "fieldRef").get("fieldPath") == "metadata.namespace"
            return namespace_of(picker.deployment) or picker.pool.namespace if from_field else str(each.get("value") or "")
    return ""


def parsers(pickers: Sequence[PickerFacts]) -> Iterator[Finding]:
    """As the picker's own readiness has it: the pool's appProtocol is one that a parser reads."""
    for picker in pickers:
        said = str(picker.pool.spec.get("appProtocol") or "")
        names = picker.config.request_handler.parsers if picker.config is not None else ()
        if not said or not names or picker.config is None:
            continue
        types = [plugin.type for plugin in picker.config.plugins if plugin.name in names]
        read = frozenset[str]().union(*(getattr(Registry().load(type_), "protocols", HTTP_PROTOCOLS) for type_ in types))
        if types and said not in read:
            yield fail(
                f"pool {picker.pool.name} has appProtocol {said}, the picker's parsers ({', '.join(types)}) read {', '.join(sorted(read))}",
                "the picker is NOT_SERVING",
                f"spec: {{appProtocol: {min(read)}}} in the pool, or another parser in requestHandler.parsers",
            )


def replicas(pickers: Sequence[PickerFacts]) -> Iterator[Finding]:
    for picker in pickers:
        if picker.deployment is None or picker.options is None:
            continue
        count = message(picker.deployment, "spec").get("replicas", 1)
        elected = picker.options.ha_enable_leader_election
        if count == 0:
            yield fail(f"{picker.where} has 0 replicas", "nobody picks", "replicas: 1 or more")
        elif count > 1 and not elected:
            yield warn(
                f"{picker.where} has {count} replicas without leader election",
                "each knows only the prompts it was asked about: fewer cache hits, and queues are counted apart",
                "--ha-enable-leader-election (one is active, the others are warm), or replicas: 1",
            )
        elif count == 1 and elected:
            yield ok(f"{picker.where}: leader election with one replica; a second one would be a warm standby")


def probes(pickers: Sequence[PickerFacts]) -> Iterator[Finding]:
    for picker in pickers:
        if picker.deployment is None or picker.options is None:
            continue
        health_port, elected = picker.options.grpc_health_port, picker.options.ha_enable_leader_election
        for kind in ("readinessProbe", "livenessProbe"):
            probe = message(picker.container, kind)
            grpc = message(probe, "grpc")
            if not probe:
                effect = (
                    "a picker that is not synced, draining, or no leader gets requests"
                    if kind == "readinessProbe"
                    else "one that hangs is not restarted"
                )
                yield warn(
                    f"{picker.where} has no {kind}",
                    effect,
                    f"{kind}: {{grpc: {{port: {health_port}, service: {'readiness' if kind == 'readinessProbe' else 'liveness'}}}}}",
                )
                continue
            if not grpc:
                yield warn(
                    f"{picker.where}'s {kind} is no gRPC probe",
                    "an open port is taken for a ready picker",
                    f"{kind}: {{grpc: {{port: {health_port}}}}}",
                )
                continue
            service_name = str(grpc.get("service") or "")
            if grpc.get("port") != health_port:
                yield fail(
                    f"{picker.where}'s {kind} asks port {grpc.get('port')}, health is on {health_port}"
                    + (" in plaintext" if grpc.get("port") == picker.options.grpc_port else ""),
                    "the probe fails: the pod is never Ready, or restarted again and again",
                    f"grpc: {{port: {health_port}}}",
                )
            if elected and service_name not in ELECTED_SERVICES:
                yield fail(
                    f"{picker.where}'s {kind} asks for service {service_name!r}, unknown with leader election",
                    "the probe fails on every replica",
                    f"grpc: {{port: {health_port}, service: {'readiness' if kind == 'readinessProbe' else 'liveness'}}}",
                )
            elif elected and kind == "livenessProbe" and service_name != "liveness":
                yield fail(
                    f"{picker.where}'s livenessProbe asks for service {service_name!r}",
                    "followers are not SERVING by that name: they are restarted again and again",
                    f"grpc: {{port: {health_port}, service: liveness}}",
                )


def shutdown(pickers: Sequence[PickerFacts]) -> Iterator[Finding]:
    for picker in pickers:
        if picker.deployment is None or picker.options is None:
            continue
        grace_s = message(picker.deployment, "spec", "template", "spec").get("terminationGracePeriodSeconds", 30)
        wanted_s = int(picker.options.drain_timeout_s) + GRACE_S
        if grace_s < wanted_s:
            yield warn(
                f"{picker.where} is given {grace_s} s to end, it drains for {picker.options.drain_timeout_s:g} s",
                "it is killed with requests under way: 500s and cut answers with every rollout",
                f"terminationGracePeriodSeconds: {max(wanted_s, 130)}, or a shorter --drain-timeout",
            )


def block_size(pickers: Sequence[PickerFacts], engines: Sequence[EngineFacts]) -> Iterator[Finding]:
    for picker in pickers:
        if picker.config is not None and any(engine.reading for engine in engines):
            yield from engine_block_size(engines, picker.config)


CHECKS = (
    Check("picker-ref", "the pool's endpointPickerRef names a Service and a port it has", ("pickers",), referenced),
    Check("picker-service", "there are Ready pickers behind that Service", ("pickers",), service),
    Check("picker-port-protocol", "its port says HTTP/2, and TLS or plaintext as the picker serves it", ("pickers",), port_protocol),
    Check("picker-arguments", "the picker starts with these arguments, and for this pool", ("pickers",), arguments),
    Check("picker-parsers", "the picker reads what the pool speaks", ("pickers",), parsers),
    Check("picker-replicas", "replicas and leader election fit together", ("pickers",), replicas),
    Check("picker-probes", "probes ask the health port by a name it knows", ("pickers",), probes),
    Check("picker-shutdown", "a picker may drain before it is killed", ("pickers",), shutdown),
    Check("picker-block-size", "the prefix index and the engines cut prompts alike", ("pickers", "pod_engines"), block_size),
)
