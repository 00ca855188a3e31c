"""An Envoy configuration, from a bootstrap file or from /config_dump, reduced to what carries requests to a picker and on.

A `Way` is one ext_proc filter that calls a picker, with all that is around it: the filters before and after, the listener, the routes, the
pool's clusters and the picker's own. Istio's way is known too: a base filter that does nothing, its configuration in ExtProcPerRoute.
Field names are Envoy's (snake_case); what a file writes in camelCase is read the same. Nothing is validated: that is `envoy --mode validate`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from epp.doctor.documents import Json, enum, items, message, number, snake_case
from epp.doctor.grpc_client import HostPort

EXT_PROC = "envoy.extensions.filters.http.ext_proc.v3.ExternalProcessor"
PER_ROUTE = "envoy.extensions.filters.http.ext_proc.v3.ExtProcPerRoute"
ROUTER = "envoy.extensions.filters.http.router.v3.Router"
MANAGER = "envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager"
PICKER_PORTS = frozenset({9002})
BODY_MODES = ("NONE", "STREAMED", "BUFFERED", "BUFFERED_PARTIAL", "FULL_DUPLEX_STREAMED", "GRPC")
HEADER_MODES = ("DEFAULT", "SEND", "SKIP")
WAYS_MAX = 200
"""Of one configuration: a mesh's dump repeats the same few."""
_PICKER_NAME = re.compile(r"epp|endpoint-?picker|inference|ext-?proc-?router", re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """See the module. Dicts are Envoy's messages; empty where unset."""

    where: str
    """Listener and filter, for the reader."""
    processor: Json
    """ExternalProcessor, with the route's overrides laid over it."""
    before: Sequence[Json] = ()
    """HTTP filters before it, in order."""
    after: Sequence[Json] = ()
    manager: Json = field(default_factory=dict)
    listener: Json = field(default_factory=dict)
    routes: Sequence[Json] = ()
    """Routes whose requests it may see, each with its cluster or clusters; those of RDS where the dump has them."""
    hosts: Sequence[Json] = ()
    """Virtual hosts of these routes."""
    picker: Json | None = None
    """The cluster the picker is in; None: it is not in the configuration."""
    pools: Sequence[Json] = ()
    """The clusters the routes lead to."""
    other_processors: int = 0
    """Further ext_proc filters in the same chain."""

    @property
    def mode(self) -> Json:
        return message(self.processor, "processing_mode")

    @property
    def request_body_mode(self) -> str:
        return enum(self.mode.get("request_body_mode"), BODY_MODES)

    @property
    def response_body_mode(self) -> str:
        return enum(self.mode.get("response_body_mode"), BODY_MODES)

    @property
    def picker_cluster_name(self) -> str:
        return str(message(self.processor, "grpc_service", "envoy_grpc").get("cluster_name", ""))


@dataclass(frozen=True, slots=True, kw_only=True)
class EnvoyFacts:
    source: str
    ways: Sequence[Way]
    text: str
    """All of it as JSON, to look for a word in."""
    version: str = ""


def type_of(item: Mapping[str, Any]) -> str:
    """Of a filter or a transport socket: the type of its `typed_config`, without the address before it."""
    config = message(item, "typed_config")
    name = str(config.get("type_url") if "TypedStruct" in str(config.get("@type", "")) else config.get("@type", ""))
    return name.rpartition("/")[2]


def config_of(item: Mapping[str, Any]) -> Json:
    config = message(item, "typed_config")
    return message(config, "value") if "TypedStruct" in str(config.get("@type", "")) else config


def addresses(cluster: Json | None) -> list[HostPort]:
    """Where a cluster's endpoints are, as far as its own configuration says."""
    found = []
    for locality in items(message(cluster, "load_assignment"), "endpoints"):
        for member in items(locality, "lb_endpoints"):
            address = message(member, "endpoint", "address", "socket_address")
            port = number(address.get("port_value"))
            if address.get("address") and port:
                found.append(HostPort(str(address["address"]), int(port)))
    return found


def understand(document: object, *, source: str, target: HostPort | None = None, cluster: str = "") -> EnvoyFacts:
    """From a parsed bootstrap or config dump. `target`, `cluster`: which ext_proc filters call the picker, where there are several.
    Raises ValueError."""
    config = snake_case(document)
    if not isinstance(config, dict):
        raise ValueError("neither an Envoy bootstrap nor a /config_dump")  # noqa: TRY004 - the file's fault, not the caller's
    listeners, clusters, route_configs, version = _parts(config)
    if not listeners and not clusters:
        raise ValueError("there is neither a listener nor a cluster in it")
    by_name = {str(each.get("name", "")): each for each in clusters}
    ways = [way for listener in listeners for way in _ways(listener, by_name, route_configs)]
    ways = _of_pickers(ways, target, cluster)[:WAYS_MAX]
    return EnvoyFacts(source=source, ways=ways, text=json.dumps(config), version=version)


def _parts(config: Json) -> tuple[list[Json], list[Json], dict[str, Json], str]:
    """Listeners, clusters, route configurations by name, version."""
    if "configs" not in config:
        static = message(config, "static_resources")
        return items(static, "listeners"), items(static, "clusters"), {}, ""
    listeners: list[Json] = []
    clusters: list[Json] = []
    routes: dict[str, Json] = {}
    version = ""
    for dump in items(config, "configs"):
        node = message(dump, "bootstrap", "node", "user_agent_build_version", "version")
        if node:
            version = ".".join(str(int(number(node.get(part)) or 0)) for part in ("major_number", "minor_number", "patch"))
        listeners += [message(each, "listener") for each in items(dump, "static_listeners")]
        listeners += [message(each, "active_state", "listener") for each in items(dump, "dynamic_listeners")]
        clusters += [message(each, "cluster") for name in ("static_clusters", "dynamic_active_clusters") for each in items(dump, name)]
        for name in ("static_route_configs", "dynamic_route_configs"):
            for each in items(dump, name):
                found = message(each, "route_config")
                routes[str(found.get("name", ""))] = found
    return [each for each in listeners if each], [each for each in clusters if each], routes, version


def _ways(listener: Json, clusters: Mapping[str, Json], route_configs: Mapping[str, Json]) -> Iterator[Way]:
    chains = items(listener, "filter_chains")
    if "default_filter_chain" in listener:
        chains.append(message(listener, "default_filter_chain"))
    for chain in chains:
        for network_filter in items(chain, "filters"):
            if type_of(network_filter) == MANAGER:
                yield from _of_manager(listener, config_of(network_filter), clusters, route_configs)


def _of_manager(listener: Json, manager: Json, clusters: Mapping[str, Json], route_configs: Mapping[str, Json]) -> Iterator[Way]:
    route_config = message(manager, "route_config") or route_configs.get(str(message(manager, "rds").get("route_config_name", "")), {})
    hosts = items(route_config, "virtual_hosts")
    filters = items(manager, "http_filters")
    processors = [(at, each) for at, each in enumerate(filters) if type_of(each) == EXT_PROC]
    for at, each in processors:
        name = str(each.get("name", ""))
        base = config_of(each)
        for routes, processor in _overridden(each, base, hosts):
            leads_to = [clusters[cluster] for cluster in dict.fromkeys(_clusters_of(routes)) if cluster in clusters]
            cluster_name = str(message(processor, "grpc_service", "envoy_grpc").get("cluster_name", ""))
            yield Way(
                where=f"{listener.get('name') or 'listener'}/{name or 'ext_proc'}",
                processor=processor,
                before=filters[:at],
                after=filters[at + 1 :],
                manager=manager,
                listener=listener,
                routes=routes,
                hosts=[host for host in hosts if any(route in items(host, "routes") for route in routes)],
                picker=clusters.get(cluster_name),
                pools=leads_to,
                other_processors=len(processors) - 1,
            )


def _overridden(each: Json, base: Json, hosts: Sequence[Json]) -> Iterator[tuple[list[Json], Json]]:
    """The filter's configurations in force, each with its routes: the base one, and what virtual hosts, routes and weighted clusters make of it."""
    name = str(each.get("name", ""))
    start = None if each.get("disabled") else base
    groups: dict[str, tuple[list[Json], Json]] = {}
    for host in hosts:
        for route in items(host, "routes"):
            weighted = items(message(route, "route", "weighted_clusters"), "clusters")
            for lasts in [[each] for each in weighted] or [[]]:
                processor = start
                for scope in [host, route, *lasts]:
                    processor = _laid_over(processor, base, message(scope, "typed_per_filter_config", name))
                if processor is not None:
                    groups.setdefault(json.dumps(processor, sort_keys=True), ([], processor))[0].append(route)
    if not hosts and start is not None:
        groups[""] = ([], start)
    awake = [group for group in groups.values() if not _does_nothing(group[1])]
    yield from awake or list(groups.values())


def _laid_over(processor: Json | None, base: Json, per_route: Json) -> Json | None:
    """None: switched off there. A filter that is off is on again where a route has something to say of it."""
    if not per_route:
        return processor
    if per_route.get("disabled"):
        return None
    wrapped = "FilterConfig" in str(per_route.get("@type", ""))
    overrides = message(message(per_route, "config") if wrapped else per_route, "overrides")
    under = base if processor is None else processor
    options = message(under, "metadata_options") | message(overrides, "metadata_options")
    return under | overrides | ({"metadata_options": options} if options else {})


def _does_nothing(processor: Json) -> bool:
    """Istio's base filter: it skips everything, and each pool's route says otherwise."""
    mode = message(processor, "processing_mode")
    return enum(mode.get("request_header_mode"), HEADER_MODES) == "SKIP" and enum(mode.get("request_body_mode"), BODY_MODES) == "NONE"


def _clusters_of(routes: Sequence[Json]) -> Iterator[str]:
    for route in routes:
        action = message(route, "route")
        if action.get("cluster"):
            yield str(action["cluster"])
        for weighted in items(message(action, "weighted_clusters"), "clusters"):
            yield str(weighted.get("name", ""))


def _of_pickers(ways: list[Way], target: HostPort | None, cluster: str) -> list[Way]:
    """Those that call a picker: by the cluster's name as told, else by its address, else by how it looks; one alone is it."""
    if cluster:
        return [way for way in ways if way.picker_cluster_name == cluster]
    found = [way for way in ways if target in addresses(way.picker)] if target is not None else []
    found = found or [way for way in ways if any(address.port in PICKER_PORTS for address in addresses(way.picker))]
    return found or [way for way in ways if _PICKER_NAME.search(way.picker_cluster_name) or _PICKER_NAME.search(way.where)] or ways
