"""What there is to know of a cluster, and the probes that read it through the API server. What follows from it: the cluster_*_checks.

Read-only: lists, gets, discovery and access reviews (which create nothing). What may not be read is Missing, with the verb and resource that
are refused; a kind the cluster does not have is an empty list.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any, NamedTuple

import msgspec

from epp.doctor.cluster_model import GROUP, LLM_D, OLD_GROUP, PickerFacts, PoolFacts, name_of, pickers, ready, selected
from epp.doctor.documents import Json, items, message
from epp.doctor.engine_facts import EndpointFacts, EngineFacts, ask_engines
from epp.doctor.grpc_client import HostPort
from epp.doctor.http_fetch import Http
from epp.doctor.probing import Missing, Probe, ProbeError
from epp.sources.kubernetes.api import UNREADABLE, Api, ApiError, ApiUnreachableError

PAGE = 500
OBJECTS_MAX = 20_000
"""Of one kind; a longer list is not read to its end."""
GATEWAY_GROUP = "gateway.networking.k8s.io"
ISTIO_GROUP = "networking.istio.io"
GROUPS = (GROUP, OLD_GROUP, LLM_D, GATEWAY_GROUP, ISTIO_GROUP, "coordination.k8s.io", "authentication.k8s.io", "authorization.k8s.io")
REQUEST_S = 5.0


@dataclass(slots=True, kw_only=True)
class ServerFacts:
    error: str = ""
    """Why the API server can't be asked; empty: it answers."""
    status: int = 0
    version: str = ""
    skew_s: float | None = None


class Needed(NamedTuple):
    """Something the picker has to be allowed."""

    verb: str
    group: str
    resource: str
    namespaced: bool = True
    why: str = "to know the model servers"
    when: str = ""
    """The flag that makes it necessary; empty: always."""


class Access(NamedTuple):
    needed: Needed
    subject: str
    """Who was asked about."""
    allowed: bool


_WATCH = ("get", "list", "watch")
ELECTION, METRICS_AUTH = "--ha-enable-leader-election", "--metrics-endpoint-auth"


def needed(pool_groups: Iterable[str], resource_groups: Mapping[str, frozenset[str]]) -> list[Needed]:
    """Exactly what the picker uses; objectives and rewrites only where the cluster has them."""
    wanted = [Needed(verb, "", "pods") for verb in _WATCH]
    wanted += [Needed(verb, group, "inferencepools", why="to know its pool") for group in dict.fromkeys(pool_groups) for verb in _WATCH]
    for group in (LLM_D, OLD_GROUP):
        for resource, why in (("inferenceobjectives", "for priorities"), ("inferencemodelrewrites", "for model names")):
            if resource in resource_groups.get(group, ()):
                wanted += [Needed(verb, group, resource, why=why) for verb in ("list", "watch")]
    wanted += [
        Needed(verb, "coordination.k8s.io", "leases", why="to elect a leader", when=ELECTION) for verb in ("get", "create", "update")
    ]
    for group, resource in (("authentication.k8s.io", "tokenreviews"), ("authorization.k8s.io", "subjectaccessreviews")):
        wanted.append(Needed("create", group, resource, namespaced=False, why="to know who reads /metrics", when=METRICS_AUTH))
    return wanted


class ClusterProbes:
    """See the module."""

    def __init__(
        self,
        api: Api,
        http: Http,
        *,
        pool_names: Sequence[str],
        namespace: str,
        group: str,
        service_account: str,
        now_s: Callable[[], float] = time.time,
    ) -> None:
        """`service_account`: `NAMESPACE:NAME` or `NAME`; empty: the picker's own; `-`: whoever asks."""
        self._api = api
        self._http = http
        self._names = pool_names
        self._namespace = namespace
        self._group = group
        self._service_account = service_account
        self._now_s = now_s

    def probes(self) -> list[Probe]:
        return [
            Probe("server", "the API server", self._server),
            Probe("kinds", "which kinds it has", self._kinds),
            Probe("pools", "the InferencePools", self._pools),
            Probe("pods", "the pods", lambda: self._list("", "v1", "pods")),
            Probe("services", "the Services", lambda: self._list("", "v1", "services")),
            Probe("deployments", "the Deployments", lambda: self._list("apps", "v1", "deployments")),
            Probe("config_maps", "the ConfigMaps", lambda: self._list("", "v1", "configmaps")),
            Probe(
                "pickers", "the pools' pickers", self._pickers, needs=("pools", "services", "pods", "deployments"), hopes=("config_maps",)
            ),
            Probe("access", "what the picker may do", self._access, needs=("kinds",), hopes=("pickers",)),
            Probe("routes", "the HTTPRoutes", lambda: self._everywhere(GATEWAY_GROUP, "v1", "httproutes")),
            Probe("gateways", "the Gateways", lambda: self._everywhere(GATEWAY_GROUP, "v1", "gateways")),
            Probe("destination_rules", "Istio's DestinationRules", lambda: self._everywhere(ISTIO_GROUP, "v1", "destinationrules")),
            Probe("leases", "the Leases", lambda: self._list("coordination.k8s.io", "v1", "leases")),
            Probe("objectives", "objectives and rewrites", self._resources),
            Probe("pod_engines", "the pods' metrics", self._engines, needs=("pools", "pods")),
        ]

    async def _server(self) -> ServerFacts:
        try:
            version = await self._json("/version")
        except ApiUnreachableError as error:
            return ServerFacts(error=str(error))
        except ApiError as error:
            return ServerFacts(error=str(error), status=error.status)
        date = self._api.server_date
        try:
            skew_s = parsedate_to_datetime(date).timestamp() - self._now_s() if date else None
        except ValueError:
            skew_s = None
        return ServerFacts(version=str(version.get("gitVersion", "")), skew_s=skew_s)

    async def _kinds(self) -> dict[str, frozenset[str]]:
        """group/version -> plural names, and group -> those of all its versions."""
        found: dict[str, frozenset[str]] = {}
        try:
            groups = items(await self._json("/apis"), "groups")
            for group in groups:
                if group.get("name") not in GROUPS:
                    continue
                for version in items(group, "versions"):
                    group_version = str(version.get("groupVersion", ""))
                    listed = await self._json(f"/apis/{group_version}")
                    names = frozenset(str(each.get("name", "")) for each in items(listed, "resources"))
                    found[group_version] = names
                    found[str(group["name"])] = found.get(str(group["name"]), frozenset()) | names
        except (ApiError, ApiUnreachableError) as error:
            raise ProbeError(f"the API server's kinds can't be read: {error}") from None
        return found

    async def _pools(self) -> list[PoolFacts]:
        pools = []
        for name in self._names:
            current = await self._get(GROUP, "v1", "inferencepools", name)
            old = await self._get(OLD_GROUP, "v1alpha2", "inferencepools", name)
            mine, other = (old, current) if self._group == OLD_GROUP else (current, old)
            pools.append(PoolFacts(name=name, namespace=self._namespace, group=self._group, pool=mine, other=other))
        return pools

    async def _pickers(
        self,
        pools: Sequence[PoolFacts],
        services: Sequence[Json],
        pods: Sequence[Json],
        deployments: Sequence[Json],
        config_maps: Sequence[Json] | Missing,
    ) -> list[PickerFacts]:
        return pickers(pools, services, pods, deployments, () if isinstance(config_maps, Missing) else config_maps)

    async def _access(self, kinds: Mapping[str, frozenset[str]], found: Sequence[PickerFacts] | Missing) -> list[Access]:
        account = _account(found) if not self._service_account else self._service_account.removeprefix("-")
        if account and ":" not in account:
            account = f"{self._namespace}:{account}"
        return [Access(each, account, await self._may(each, account)) for each in needed([self._group], kinds)]

    async def _may(self, needed_: Needed, account: str) -> bool:
        attributes = {"verb": needed_.verb, "group": needed_.group, "resource": needed_.resource}
        if needed_.namespaced:
            attributes["namespace"] = self._namespace
        kind = "SelfSubjectAccessReview"
        spec: Json = {"resourceAttributes": attributes}
        if account:
            namespace, _, _ = account.partition(":")
            groups = ["system:serviceaccounts", f"system:serviceaccounts:{namespace}", "system:authenticated"]
            kind, spec = "SubjectAccessReview", {**spec, "user": f"system:serviceaccount:{account}", "groups": groups}
        review = {"apiVersion": "authorization.k8s.io/v1", "kind": kind, "spec": spec}
        path = f"/apis/authorization.k8s.io/v1/{kind.lower()}s"
        try:
            answer = _decoded(await self._api.post(path, json.dumps(review).encode(), timeout_s=REQUEST_S))
        except ApiError as error:
            if error.status == 403:
                raise ProbeError(
                    f"you may not ask what system:serviceaccount:{account} may do: run this as an admin, or in the picker's pod with --service-account="
                ) from None
            raise ProbeError(f"{kind}: {error}") from None
        except ApiUnreachableError as error:
            raise ProbeError(f"{kind}: {error}") from None
        return message(answer, "status").get("allowed") is True

    async def _resources(self) -> list[Json]:
        """Objectives and rewrites of both groups, each with its group in `apiVersion`."""
        found = []
        for group in (LLM_D, OLD_GROUP):
            for plural, kind in (("inferenceobjectives", "InferenceObjective"), ("inferencemodelrewrites", "InferenceModelRewrite")):
                listed = await self._list(group, "v1alpha2", plural)
                found += [{"apiVersion": f"{group}/v1alpha2", "kind": kind, **each} for each in listed]
        return found

    async def _engines(self, pools: Sequence[PoolFacts], pods: Sequence[Json]) -> list[EngineFacts]:
        endpoints = [
            EndpointFacts(name=name_of(pod), address=str(HostPort(str(message(pod, "status")["podIP"]), port)))
            for pool in pools
            for pod in selected(pods, pool.selector)
            if ready(pod)
            for port in pool.ports
        ]
        return await ask_engines(self._http, endpoints)

    async def _everywhere(self, group: str, version: str, plural: str) -> list[Json]:
        """Of all namespaces; where that is refused, of the pool's."""
        try:
            return await self._all(f"/apis/{group}/{version}/{plural}", plural)
        except ProbeError:
            return await self._list(group, version, plural)

    async def _list(self, group: str, version: str, plural: str) -> list[Json]:
        base = f"/apis/{group}/{version}" if group else f"/api/{version}"
        return await self._all(f"{base}/namespaces/{self._namespace}/{plural}", plural)

    async def _all(self, path: str, plural: str) -> list[Json]:
        found: list[Json] = []
        token = ""
        while True:
            try:
                page = await self._json(path, {"limit": str(PAGE), **({"continue": token} if token else {})})
            except ApiError as error:
                if error.status == 404:
                    return found
                raise ProbeError(_refused(error, "list", plural, self._namespace)) from None
            except ApiUnreachableError as error:
                raise ProbeError(f"the API server does not answer: {error}") from None
            found += items(page, "items")
            token = str(message(page, "metadata").get("continue") or "")
            if not token or len(found) >= OBJECTS_MAX:
                return found[:OBJECTS_MAX]

    async def _get(self, group: str, version: str, plural: str, name: str) -> Json | None:
        try:
            return await self._json(f"/apis/{group}/{version}/namespaces/{self._namespace}/{plural}/{name}")
        except ApiError as error:
            if error.status == 404:
                return None
            raise ProbeError(_refused(error, "get", plural, self._namespace)) from None
        except ApiUnreachableError as error:
            raise ProbeError(f"the API server does not answer: {error}") from None

    async def _json(self, path: str, params: Mapping[str, str] = {}) -> Json:
        return _decoded(await self._api.get(path, params, timeout_s=REQUEST_S))


def _decoded(body: bytes) -> dict[str, Any]:
    try:
        found = msgspec.json.decode(body)
    except UNREADABLE:
        found = None
    if not isinstance(found, dict):
        raise ApiError(200, "NotJSON", "the answer is no JSON object: is this an API server?")
    return found


def _refused(error: ApiError, verb: str, plural: str, namespace: str) -> str:
    if error.status in (401, 403):
        return f"you may not {verb} {plural} in namespace {namespace} ({error.status})"
    return f"{plural} in namespace {namespace} can't be read: {error}"


def _account(found: Sequence[PickerFacts] | Missing) -> str:
    """The service account of the picker's Deployment."""
    if isinstance(found, Missing):
        return ""
    for picker in found:
        if picker.deployment is not None:
            spec = message(picker.deployment, "spec", "template", "spec")
            return str(spec.get("serviceAccountName") or "default")
    return ""
