"""The InferencePool and its model servers: does it select pods, do its ports exist, does anybody look at another object? Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from epp.doctor.cluster_model import (
    GROUP,
    LLM_D,
    OLD_GROUP,
    PickerFacts,
    PoolFacts,
    labels_of,
    name_of,
    namespace_of,
    near_misses,
    not_ready_because,
    pod_containers,
    ready,
    selected,
)
from epp.doctor.documents import Json, items, message
from epp.doctor.engine_facts import EngineFacts
from epp.doctor.findings import Check, Finding, fail, ok, warn
from epp.engines.detect import BUILT_IN, engine_label

NAMES_SHOWN = 3
H2C = "kubernetes.io/h2c"
PROTOCOLS = ("", "http", H2C)
ACTIVE_PORTS = ("llm-d.ai/active-ports", "inference.networking.k8s.io/active-ports")


def exists(pools: Sequence[PoolFacts]) -> Iterator[Finding]:
    for pool in pools:
        if pool.pool is not None:
            if not pool.selector:
                yield fail(
                    f"pool {pool.name} selects nothing: its selector is empty",
                    "no endpoint: 503 for every request",
                    "spec: {selector: {matchLabels: {app: ...}}}",
                )
            if not pool.ports:
                yield fail(
                    f"pool {pool.name} has no target port", "no endpoint: 503 for every request", "spec: {targetPorts: [{number: 8000}]}"
                )
        elif pool.other is not None:
            other = OLD_GROUP if pool.group == GROUP else GROUP
            yield fail(
                f"pool {pool.name} exists in group {other}, the picker looks in {pool.group}",
                "the picker stays NOT_SERVING: there is no such pool",
                f"start it with --pool-group={other}, or create the pool in {pool.group}",
            )
        else:
            yield fail(
                f"there is no InferencePool {pool.name} in namespace {pool.namespace}",
                "the picker stays NOT_SERVING",
                f"kubectl get inferencepools -A; then --pool-name and --pool-namespace (kubectl -n {pool.namespace} get inferencepools shows none of that name)",
            )


def shadowed(pools: Sequence[PoolFacts]) -> Iterator[Finding]:
    for pool in pools:
        if pool.pool is not None and pool.other is not None:
            other = OLD_GROUP if pool.group == GROUP else GROUP
            yield warn(
                f"pool {pool.name} exists in {other} too; the picker reads the one in {pool.group}",
                "a change made to the other one does nothing, and a gateway may read that one",
                f"kubectl -n {pool.namespace} delete inferencepools.{OLD_GROUP} {pool.name}, once no HTTPRoute names it",
            )


def pods(pools: Sequence[PoolFacts], all_pods: Sequence[Json]) -> Iterator[Finding]:
    for pool in pools:
        if pool.pool is None or not pool.selector:
            continue
        found = selected(all_pods, pool.selector)
        up = [pod for pod in found if ready(pod)]
        if not found:
            yield _nothing_selected(pool, all_pods)
        elif not up:
            reasons = Counter(not_ready_because(pod) for pod in found)
            yield fail(
                f"pool {pool.name} selects {len(found)} pods, none is Ready: "
                + ", ".join(f"{count} {reason}" for reason, count in reasons.most_common()),
                "503 for every request",
                f"kubectl -n {pool.namespace} describe pod {name_of(found[0])}",
            )
        elif len(up) < len(found):
            reasons = Counter(not_ready_because(pod) for pod in found if not ready(pod))
            yield warn(
                f"pool {pool.name}: {len(up)} of {len(found)} pods are Ready; "
                + ", ".join(f"{count} {reason}" for reason, count in reasons.most_common()),
                "the others carry their load",
                f"kubectl -n {pool.namespace} get pods -l {','.join(f'{key}={value}' for key, value in pool.selector.items())}",
            )
        else:
            yield ok(f"pool {pool.name}: {len(up)} pods, all Ready")


def _nothing_selected(pool: PoolFacts, all_pods: Sequence[Json]) -> Finding:
    wanted = ", ".join(f"{key}={value}" for key, value in pool.selector.items())
    misses = near_misses(all_pods, pool.selector, pool.ports)
    if not misses:
        return fail(
            f"pool {pool.name} selects no pod: none in namespace {pool.namespace} has {wanted}",
            "503 for every request",
            f"kubectl -n {pool.namespace} get pods --show-labels; pool and pods must be in one namespace",
        )
    pod, key, has = misses[0]
    others = f" and {len(misses) - 1} more pods" if len(misses) > 1 else ""
    return fail(
        f"pool {pool.name} selects no pod; {name_of(pod)}{others} would fit, but "
        + (f"has {has} where {key}={pool.selector[key]} is asked for" if has else f"has no label {key}"),
        "503 for every request",
        f"label the pods' template {key}: {pool.selector[key]}"
        + (f", or change the pool's selector to {has.replace('=', ': ', 1)}" if has else ", or take it out of the pool's selector"),
    )


def ports(pools: Sequence[PoolFacts], all_pods: Sequence[Json]) -> Iterator[Finding]:
    """A container need not declare its ports, but where it declares others, the pool's are wrong."""
    for pool in pools:
        for pod in selected(all_pods, pool.selector)[:1]:
            declared = {
                int(port["containerPort"]) for each in pod_containers(pod) for port in items(each, "ports") if port.get("containerPort")
            }
            absent = [port for port in pool.ports if port not in declared]
            if declared and absent:
                yield warn(
                    f"pool {pool.name} sends to port {', '.join(map(str, absent))}; {name_of(pod)}'s containers declare {', '.join(map(str, sorted(declared)))}",
                    "connections are refused: 503 for every request, unless something listens there undeclared",
                    f"spec: {{targetPorts: [{', '.join(f'{{number: {port}}}' for port in sorted(declared)[:8])}]}} in the pool, or start the server on {absent[0]}",
                )
            for annotation in ACTIVE_PORTS:
                text = message(pod, "metadata", "annotations").get(annotation)
                active = {part.strip() for part in str(text).split(",")} if text else set()
                if active and not active & {str(port) for port in pool.ports}:
                    yield fail(
                        f"{name_of(pod)} is annotated {annotation}: {text}, none of which is among the pool's ports",
                        "none of its ports is an endpoint",
                        f"annotate it with some of {', '.join(map(str, pool.ports))}, or with nothing",
                    )


def protocol(pickers: Sequence[PickerFacts]) -> Iterator[Finding]:
    for picker in pickers:
        said = str(picker.pool.spec.get("appProtocol") or "")
        if said not in PROTOCOLS:
            yield fail(
                f"pool {picker.pool.name} has appProtocol {said!r}",
                "the CRD and the picker know `http` and `kubernetes.io/h2c`",
                "spec: {appProtocol: http}",
            )


def failure_mode(pickers: Sequence[PickerFacts]) -> Iterator[Finding]:
    for picker in pickers:
        mode = str(picker.pool.reference.get("failureMode") or "FailClose")
        if picker.pool.reference and mode not in ("FailClose", "FailOpen"):
            yield fail(
                f"pool {picker.pool.name} has failureMode {mode!r}",
                "the API server rejects it, or the gateway ignores it",
                "failureMode: FailClose or FailOpen (not FailClosed)",
            )
        elif mode == "FailOpen":
            yield ok(
                f"pool {picker.pool.name}: FailOpen; without the picker most requests with a body are a 500 all the same (full-duplex mode), and Envoy AI Gateway ignores it"
            )
        elif picker.pool.reference:
            yield ok(f"pool {picker.pool.name}: FailClose; without the picker every request is a 500 or 503")


def resources(found: Sequence[Json], pools: Sequence[PoolFacts]) -> Iterator[Finding]:
    """Objectives and rewrites that mean no pool, or are hidden by one of the same name in the newer group."""
    names = {pool.name for pool in pools}
    current = {
        (each.get("kind"), namespace_of(each), name_of(each)) for each in found if str(each.get("apiVersion", "")).startswith(f"{LLM_D}/")
    }
    for each in found:
        what = f"{each.get('kind')} {name_of(each)}"
        reference = message(each, "spec", "poolRef")
        group = str(reference.get("group") or GROUP)
        pool = next((pool for pool in pools if pool.name == reference.get("name")), None)
        if not str(each.get("apiVersion", "")).startswith(f"{LLM_D}/") and (each.get("kind"), namespace_of(each), name_of(each)) in current:
            yield warn(
                f"{what} exists in {OLD_GROUP} too",
                "that one is ignored",
                f"kubectl delete {str(each.get('kind')).lower()}s.{OLD_GROUP} {name_of(each)}",
            )
        elif pool is None:
            yield warn(
                f"{what} refers to pool {reference.get('name')!r}, not to {' or '.join(sorted(names))}",
                "this picker ignores it: priority 0, no rewrite",
                f"spec: {{poolRef: {{name: {min(names)}}}}}, if it is meant for this pool",
            )
        elif group != pool.group:
            yield warn(
                f"{what} refers to group {group}, the pool is in {pool.group}",
                "it is ignored",
                f"spec: {{poolRef: {{group: {pool.group}, name: {pool.name}}}}}",
            )


def pod_metrics(engines: Sequence[EngineFacts]) -> Iterator[Finding]:
    """Best effort: from outside the cluster pods usually can't be reached."""
    silent = [engine for engine in engines if engine.error]
    if silent and len(silent) == len(engines):
        yield ok(f"no pod's metrics can be read from here ({silent[0].error}); in the cluster it may be otherwise")
    for engine in silent[:NAMES_SHOWN] if len(silent) < len(engines) else ():
        yield warn(
            f"{engine.name} ({engine.address}): {engine.error}",
            "the picker routes to it by its own count of requests alone",
            "are metrics on there (SGLang: --enable-metrics)? another port or path: `metrics-data-source` in the configuration",
        )


def engine_labels(pools: Sequence[PoolFacts], all_pods: Sequence[Json]) -> Iterator[Finding]:
    for pool in pools:
        wrong = Counter(
            label for pod in selected(all_pods, pool.selector) if (label := engine_label(labels_of(pod))) and label not in BUILT_IN
        )
        for label, count in wrong.items():
            yield warn(
                f"pool {pool.name}: {count} pods say they are {label!r}, an engine nobody knows",
                "the engine is told by its metrics instead; with a path of its own it is not read",
                f"llm-d.ai/engine-type: one of {', '.join(BUILT_IN)}, or name it in core-metrics-extractor's engineConfigs",
            )


CHECKS = (
    Check("pool-exists", "the InferencePool is there, in the group the picker reads", ("pools",), exists),
    Check("pool-shadow", "there is no second pool of that name in the other API group", ("pools",), shadowed),
    Check("pool-pods", "its selector finds Ready pods", ("pools", "pods"), pods),
    Check("pool-ports", "its target ports are those of the containers", ("pools", "pods"), ports),
    Check("pool-engines", "engine labels name engines that are known", ("pools", "pods"), engine_labels),
    Check("pool-protocol", "its appProtocol is one there is", ("pickers",), protocol),
    Check("pool-failure-mode", "what happens without the picker", ("pickers",), failure_mode),
    Check("pool-resources", "objectives and rewrites refer to this pool", ("objectives", "pools"), resources),
    Check("pool-metrics", "the pods' metrics can be read from here", ("pod_engines",), pod_metrics),
)
