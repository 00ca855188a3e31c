"""What gateways make of the pool: routes that lead to it, what they said about it, Istio's TLS to the picker, who holds the Lease. Pure."""

from __future__ import annotations

import datetime as dt
import re
from collections.abc import Iterator, Mapping, Sequence

from epp.doctor.cluster_facts import ISTIO_GROUP
from epp.doctor.cluster_model import GROUP, OLD_GROUP, PickerFacts, PoolFacts, name_of, namespace_of
from epp.doctor.documents import Json, items, message
from epp.doctor.findings import Check, Finding, fail, ok, warn
from epp.doctor.probing import Missing
from epp.sources.kubernetes.election import lease_name

REASONS_SHOWN_MAX = 200
_ISTIO_CLASS = re.compile(r"istio", re.IGNORECASE)
_RFC3339 = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(?:\.(\d{1,6})\d*)?Z")


def routed(pools: Sequence[PoolFacts], routes: Sequence[Json]) -> Iterator[Finding]:
    for pool in pools:
        if pool.pool is None:
            continue
        leading = [(route, reference) for route in routes for reference in _backends(route) if _means(reference, route, pool)]
        right = [(route, reference) for route, reference in leading if reference.get("group") == pool.group]
        for route, reference in leading:
            if reference.get("group") != pool.group:
                yield fail(
                    f"HTTPRoute {namespace_of(route)}/{name_of(route)} leads to pool {pool.name} in group {reference.get('group')!r}, it is in {pool.group}",
                    "ResolvedRefs is False: 500 for every request",
                    f"backendRefs: [{{group: {pool.group}, kind: InferencePool, name: {pool.name}}}]",
                )
        if not leading:
            yield warn(
                f"no HTTPRoute leads to pool {pool.name}",
                "no gateway uses it: 404, or the picker is asked by something else than Gateway API",
                f"backendRefs: [{{group: {pool.group}, kind: InferencePool, name: {pool.name}}}] in an HTTPRoute",
            )
        for route, _ in right:
            yield from _route_status(route)


def _backends(route: Json) -> list[Json]:
    return [reference for rule in items(message(route, "spec"), "rules") for reference in items(rule, "backendRefs")]


def _means(reference: Json, route: Json, pool: PoolFacts) -> bool:
    """Whatever its group: a wrong one is a finding."""
    namespace = str(reference.get("namespace") or namespace_of(route))
    return reference.get("kind") == "InferencePool" and reference.get("name") == pool.name and namespace == pool.namespace


def _route_status(route: Json) -> Iterator[Finding]:
    for parent in items(message(route, "status"), "parents"):
        gateway = message(parent, "parentRef").get("name")
        for condition in items(parent, "conditions"):
            if condition.get("type") in ("Accepted", "ResolvedRefs") and condition.get("status") == "False":
                yield fail(
                    f"HTTPRoute {namespace_of(route)}/{name_of(route)}: Gateway {gateway} says {condition.get('type')} is False: {_why(condition)}",
                    "the route does not work: 404 or 500",
                    f"kubectl -n {namespace_of(route)} describe httproute {name_of(route)}",
                )


def accepted(pools: Sequence[PoolFacts]) -> Iterator[Finding]:
    """What gateways wrote into the pool's status."""
    for pool in pools:
        parents = [
            parent for parent in items(message(pool.pool, "status"), "parents") if message(parent, "parentRef").get("kind") != "Status"
        ]
        for parent in parents:
            gateway = message(parent, "parentRef").get("name")
            for condition in items(parent, "conditions"):
                if condition.get("type") in ("Accepted", "ResolvedRefs") and condition.get("status") == "False":
                    yield fail(
                        f"pool {pool.name}: Gateway {gateway} says {condition.get('type')} is False: {_why(condition)}",
                        "the gateway does not use the pool",
                        f"kubectl -n {pool.namespace} describe inferencepool {pool.name}",
                    )
        if pool.pool is not None and not parents:
            yield warn(
                f"no gateway has said anything about pool {pool.name}",
                "either no HTTPRoute leads to it, or the gateway does not know InferencePools (Envoy Gateway alone does not)",
                "see `pool-route`; is the gateway's inference extension switched on (Istio: ENABLE_GATEWAY_API_INFERENCE_EXTENSION, kgateway: inferenceExtension.enabled)?",
            )


def _why(condition: Json) -> str:
    return " ".join(f"{condition.get('reason', '')}: {condition.get('message', '')}".split())[:REASONS_SHOWN_MAX]


def istio(
    pickers: Sequence[PickerFacts], kinds: Mapping[str, frozenset[str]], found: Sequence[Json], gateways: Sequence[Json] | Missing
) -> Iterator[Finding]:
    if "destinationrules" not in kinds.get(ISTIO_GROUP, ()):
        yield ok("there is no Istio here")
        return
    if not isinstance(gateways, Missing) and not any(
        _ISTIO_CLASS.search(str(message(each, "spec").get("gatewayClassName", ""))) for each in gateways
    ):
        yield ok("Istio is here, but no Gateway of its class")
        return
    for picker in pickers:
        if picker.service is None or picker.options is None:
            continue
        name, namespace = name_of(picker.service), picker.pool.namespace
        hosts = {name: namespace, f"{name}.{namespace}": "", f"{name}.{namespace}.svc": "", f"{name}.{namespace}.svc.cluster.local": ""}
        rules = [
            rule
            for rule in found
            if (host := str(message(rule, "spec").get("host", ""))) in hosts and hosts[host] in ("", namespace_of(rule))
        ]
        modes = {str(_tls_of(rule, picker).get("mode", "")) for rule in rules} - {""}
        if picker.options.secure_serving and not modes & {"SIMPLE", "MUTUAL"}:
            yield fail(
                f"{picker.where} serves TLS, and no DestinationRule tells Istio so" + (f" (mode {', '.join(modes)})" if modes else ""),
                "Istio speaks plaintext (or mesh mTLS) to it: 500 `connection_termination`",
                f"DestinationRule: {{host: {name}.{namespace}.svc.cluster.local, trafficPolicy: {{tls: {{mode: SIMPLE, insecureSkipVerify: true}}}}}}, or --secure-serving=false",
            )
        elif not picker.options.secure_serving and modes & {"SIMPLE", "MUTUAL"}:
            yield fail(
                f"{picker.where} serves plaintext, a DestinationRule tells Istio to speak TLS",
                "500 `WRONG_VERSION_NUMBER`",
                "remove --secure-serving=false, or the DestinationRule",
            )
        for rule in rules:
            tls = _tls_of(rule, picker)
            if tls.get("mode") == "SIMPLE" and not tls.get("insecureSkipVerify") and not picker.options.cert_path:
                yield fail(
                    f"DestinationRule {name_of(rule)} verifies the picker's certificate, which is self-signed",
                    "500 `CERTIFICATE_VERIFY_FAILED`",
                    "tls: {mode: SIMPLE, insecureSkipVerify: true}, or give the picker a certificate (--cert-path)",
                )


def _tls_of(rule: Json, picker: PickerFacts) -> Json:
    """Of the picker's port; else of the host."""
    policy = message(rule, "spec", "trafficPolicy")
    of_port = [each for each in items(policy, "portLevelSettings") if message(each, "port").get("number") == picker.port.get("port")]
    return message(of_port[0], "tls") if of_port else message(policy, "tls")


def leases(pickers: Sequence[PickerFacts], found: Sequence[Json], now: dt.datetime) -> Iterator[Finding]:
    for picker in pickers:
        if picker.options is None or not picker.options.ha_enable_leader_election:
            continue
        names = {lease_name(picker.pool.namespace, pool) for pool in (picker.options.pool_names or (picker.pool.name,))}
        lease = next((each for each in found if name_of(each) in names), None)
        spec = message(lease, "spec")
        holder = str(spec.get("holderIdentity") or "")
        renewed = _time(spec.get("renewTime"))
        if lease is None or not holder:
            yield fail(
                f"nobody holds the Lease {min(names)}" + ("" if lease else ": it does not exist"),
                "no replica is the leader, so none is Ready: 500 for every request",
                f"kubectl -n {picker.pool.namespace} logs deploy/{name_of(picker.deployment)}; may it create and update leases (`cluster-rbac`)?",
            )
        elif renewed is not None and (now - renewed).total_seconds() > float(spec.get("leaseDurationSeconds") or 15) + 5:
            yield fail(
                f"the Lease {name_of(lease)} was last renewed {(now - renewed).total_seconds():.0f} s ago by {holder}",
                "the leader is gone and nobody took over; or clocks differ",
                f"kubectl -n {picker.pool.namespace} get pods; then `cluster-clock` and `cluster-rbac`",
            )
        else:
            yield ok(f"{holder} holds the Lease {name_of(lease)}")


def _time(text: object) -> dt.datetime | None:
    match = _RFC3339.fullmatch(str(text or ""))
    return dt.datetime.fromisoformat(f"{match[1]}.{(match[2] or '0').ljust(6, '0')}+00:00") if match else None


def old_routes(routes: Sequence[Json]) -> Iterator[Finding]:
    for route in routes:
        if any(reference.get("kind") == "InferencePool" and reference.get("group") == OLD_GROUP for reference in _backends(route)):
            yield warn(
                f"HTTPRoute {namespace_of(route)}/{name_of(route)} leads to an InferencePool in {OLD_GROUP}",
                "gateways of today do not resolve it",
                f"group: {GROUP}",
            )


CHECKS = (
    Check("pool-route", "an HTTPRoute leads to the pool, and its gateway takes it", ("pools", "routes"), routed),
    Check("pool-accepted", "gateways accepted the pool", ("pools",), accepted),
    Check("pool-old-routes", "no HTTPRoute leads to the old API group", ("routes",), old_routes),
    Check("istio-tls", "Istio speaks to the picker as the picker serves", ("pickers", "kinds", "destination_rules", "gateways?"), istio),
    Check("picker-lease", "with leader election, somebody holds the Lease", ("pickers", "leases", "now"), leases),
)
