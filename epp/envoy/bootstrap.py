"""Envoy's configuration for a pool of model servers behind the picker, in Envoy's own typed messages.

Typed, so that a field Envoy does not have fails here and not in production; `envoy --mode validate` judges the rest. The YAML that
is printed is the YAML Envoy is started with, `Any` fields written out with their `@type`. Not here: running Envoy (supervisor).

What is decided here, and why:
- The first filter removes a client's own destination header: nobody outside chooses a pod.
- Bodies travel FULL_DUPLEX_STREAMED, the mode every gateway uses for endpoint pickers; it needs the trailers sent as well.
- No route timeout: an answer may stream for an hour. A stream silent for an hour is ended.
- Circuit breakers are out of the way: the picker decides who waits, and Envoy's default of 1 024 would answer 503 first.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from datetime import timedelta

import yaml

from epp.envoy import Destination, EnvoyOptions
from epp.errors import StartError
from epp.types import Address

try:
    with warnings.catch_warnings():  # its generated classes use a decorator in a form that pydantic 2.12 deprecates
        warnings.simplefilter("ignore", DeprecationWarning)
        import betterproto2
        from envoy_data_plane.envoy.config.accesslog import v3 as accesslog
        from envoy_data_plane.envoy.config.bootstrap import v3 as bootstrap
        from envoy_data_plane.envoy.config.bootstrap.v3 import Bootstrap
        from envoy_data_plane.envoy.config.cluster import v3 as cluster
        from envoy_data_plane.envoy.config.common.mutation_rules import v3 as mutation_rules
        from envoy_data_plane.envoy.config.core import v3 as core
        from envoy_data_plane.envoy.config.endpoint import v3 as endpoint
        from envoy_data_plane.envoy.config.listener import v3 as listener
        from envoy_data_plane.envoy.config.overload import v3 as overload
        from envoy_data_plane.envoy.config.route import v3 as route
        from envoy_data_plane.envoy.extensions.access_loggers.stream import v3 as stream_log
        from envoy_data_plane.envoy.extensions.filters.http.ext_proc import v3 as ext_proc
        from envoy_data_plane.envoy.extensions.filters.http.header_mutation import v3 as header_mutation
        from envoy_data_plane.envoy.extensions.filters.http.router import v3 as router
        from envoy_data_plane.envoy.extensions.filters.network.http_connection_manager import v3 as hcm
        from envoy_data_plane.envoy.extensions.load_balancing_policies.override_host import v3 as override_host
        from envoy_data_plane.envoy.extensions.load_balancing_policies.round_robin import v3 as round_robin
        from envoy_data_plane.envoy.extensions.resource_monitors.downstream_connections import v3 as connections
        from envoy_data_plane.envoy.extensions.transport_sockets.tls import v3 as tls
        from envoy_data_plane.envoy.extensions.upstreams.http import v3 as upstream_http
        from envoy_data_plane.envoy.type.metadata import v3 as metadata
        from envoy_data_plane.google.protobuf import Any as AnyMessage
except ModuleNotFoundError as error:
    raise StartError(f"{error.name} is not installed: pip install 'envoy-endpoint-picker[envoy]'") from None

POOL_CLUSTER = "pool"
ROUND_ROBIN_CLUSTER = "pool-round-robin"
EPP_CLUSTER = "epp"
LB_NAMESPACE = "envoy.lb"
DESTINATION_KEY = "x-gateway-destination-endpoint"
SERVED_KEY = "x-gateway-destination-endpoint-served"
SUBSET_NAMESPACE = "envoy.lb.subset_hint"
RESPONSE_ATTRIBUTES = ("upstream.address", "response.code_details", "response.flags")
"""What Envoy tells the picker beside the response headers: who served it and, where it failed, why."""

IDLE_STREAM_S = 3600
PROCESSOR_MESSAGE_S = 1000
"""Time-out of one ext_proc message. Envoy never applies it in full-duplex mode; only its default of 0.2 s would mislead a reader."""
CONNECT_S = 2
ENGINE_KEEPALIVE_S = 4
"""Idle connections to engines are closed after this: uvicorn, which serves vLLM and SGLang, closes them after 5 s by itself, and a
request sent at that moment is lost."""
RETRIES = 2
BUFFER_BYTES = 1 << 20
"""Envoy's read-ahead per connection, and so the largest body chunk the picker is sent."""
REPLAY_BYTES = 16 << 20
"""Request bodies up to this are kept for a retry on the next endpoint; a prompt of a million tokens is 4 MiB."""
EPP_STREAM_WINDOW_BYTES = 16 << 20
EPP_CONNECTION_WINDOW_BYTES = 256 << 20
"""One connection a worker carries every request's body back from the picker: one slow engine's body must not hold up the others."""
UNLIMITED = 1_000_000
DOWNSTREAM_CONNECTIONS_MAX = 50_000

ACCESS_LOG_FORMAT = (
    '[%START_TIME%] "%REQ(:METHOD)% %REQ(:PATH)% %PROTOCOL%" %RESPONSE_CODE% %RESPONSE_CODE_DETAILS% %RESPONSE_FLAGS% '
    "%UPSTREAM_HOST% attempts=%UPSTREAM_REQUEST_ATTEMPT_COUNT% %BYTES_RECEIVED%B>%BYTES_SENT%B %DURATION%ms\n"
)


def build_bootstrap(options: EnvoyOptions) -> Bootstrap:
    picked = _route(POOL_CLUSTER, retries=options.destination is Destination.OVERRIDE_HOST)
    listeners = [_listener("gateway", options.listen, picked, [_strip_destination(), _processor(options)], options)]
    clusters = [_pool(options), _epp(options)]
    if options.round_robin_listen is not None:
        listeners.append(_listener("round-robin", options.round_robin_listen, _route(ROUND_ROBIN_CLUSTER, retries=True), [], options))
        clusters.append(_static_cluster(ROUND_ROBIN_CLUSTER, options.endpoints, _round_robin()))
    return Bootstrap(
        admin=bootstrap.Admin(address=_address(options.admin)) if options.admin else None,
        static_resources=bootstrap.BootstrapStaticResources(listeners=listeners, clusters=clusters),
        overload_manager=overload.OverloadManager(resource_monitors=[_connection_limit()]),
    )


def render(options: EnvoyOptions) -> str:
    """The configuration as YAML with Envoy's own field names, ready for `envoy -c`."""
    return to_yaml(build_bootstrap(options))


def to_yaml(config: Bootstrap) -> str:
    return yaml.safe_dump(config.to_dict(casing=betterproto2.Casing.SNAKE), sort_keys=False, default_flow_style=False, width=140)


# --- listeners and filters


def _listener(
    name: str, address: Address, action: route.RouteAction, filters: Sequence[hcm.HttpFilter], options: EnvoyOptions
) -> listener.Listener:
    everything = route.Route(match=route.RouteMatch(prefix="/"), route=action)
    host = route.VirtualHost(name=name, domains=["*"], request_body_buffer_limit=REPLAY_BYTES, routes=[everything])
    manager = hcm.HttpConnectionManager(
        codec_type=hcm.HttpConnectionManagerCodecType.AUTO,  # HTTP/1.1, and HTTP/2 without TLS by prior knowledge
        stat_prefix=name,
        use_remote_address=True,  # the edge: clients do not steer Envoy with x-envoy-* headers
        preserve_external_request_id=True,
        stream_idle_timeout=timedelta(seconds=IDLE_STREAM_S),
        access_log=[_access_log()] if options.access_log else [],
        http_filters=[*filters, _http_filter("router", router.Router(suppress_envoy_headers=True))],
        route_config=route.RouteConfiguration(name=name, virtual_hosts=[host]),
    )
    connection_filter = listener.Filter(name="envoy.filters.network.http_connection_manager", typed_config=AnyMessage.pack(manager))
    return listener.Listener(
        name=name,
        address=_address(address),
        per_connection_buffer_limit_bytes=BUFFER_BYTES,
        filter_chains=[listener.FilterChain(filters=[connection_filter])],
    )


def _route(cluster_name: str, *, retries: bool) -> route.RouteAction:
    """Retries walk down the picker's list of endpoints, and only where no engine can have begun to work on the request."""
    policy = route.RetryPolicy(retry_on="connect-failure,refused-stream,reset-before-request", num_retries=RETRIES) if retries else None
    return route.RouteAction(cluster=cluster_name, timeout=timedelta(0), retry_policy=policy)


def _strip_destination() -> hcm.HttpFilter:
    removal = mutation_rules.HeaderMutation(remove=DESTINATION_KEY)
    return _http_filter("header_mutation", header_mutation.HeaderMutation(mutations=header_mutation.Mutations(request_mutations=[removal])))


def _processor(options: EnvoyOptions) -> hcm.HttpFilter:
    send, full_duplex = ext_proc.ProcessingModeHeaderSendMode.SEND, ext_proc.ProcessingModeBodySendMode.FULL_DUPLEX_STREAMED
    mode = ext_proc.ProcessingMode(
        request_header_mode=send,
        request_body_mode=full_duplex,
        request_trailer_mode=send,
        response_header_mode=send,
        response_body_mode=full_duplex if options.response_body else ext_proc.ProcessingModeBodySendMode.NONE,
        response_trailer_mode=send if options.response_body else ext_proc.ProcessingModeHeaderSendMode.SKIP,
    )
    processor = ext_proc.ExternalProcessor(
        grpc_service=core.GrpcService(envoy_grpc=core.GrpcServiceEnvoyGrpc(cluster_name=EPP_CLUSTER, authority=str(options.epp))),
        failure_mode_allow=False,
        processing_mode=mode,
        message_timeout=timedelta(seconds=PROCESSOR_MESSAGE_S),
        metadata_options=ext_proc.MetadataOptions(
            forwarding_namespaces=ext_proc.MetadataOptionsMetadataNamespaces(untyped=[LB_NAMESPACE, SUBSET_NAMESPACE]),
            receiving_namespaces=ext_proc.MetadataOptionsMetadataNamespaces(untyped=[LB_NAMESPACE]),
        ),
        response_attributes=list(RESPONSE_ATTRIBUTES),
    )
    return _http_filter("ext_proc", processor)


def _http_filter(name: str, config: betterproto2.Message) -> hcm.HttpFilter:
    return hcm.HttpFilter(name=f"envoy.filters.http.{name}", typed_config=AnyMessage.pack(config))


def _access_log() -> accesslog.AccessLog:
    text = core.SubstitutionFormatString(text_format_source=core.DataSource(inline_string=ACCESS_LOG_FORMAT))
    return accesslog.AccessLog(
        name="envoy.access_loggers.stdout", typed_config=AnyMessage.pack(stream_log.StdoutAccessLog(log_format=text))
    )


def _connection_limit() -> overload.ResourceMonitor:
    limit = connections.DownstreamConnectionsConfig(max_active_downstream_connections=DOWNSTREAM_CONNECTIONS_MAX)
    return overload.ResourceMonitor(name="envoy.resource_monitors.global_downstream_max_connections", typed_config=AnyMessage.pack(limit))


# --- clusters


def _pool(options: EnvoyOptions) -> cluster.Cluster:
    if options.destination is Destination.OVERRIDE_HOST:
        return _static_cluster(POOL_CLUSTER, options.endpoints, _override_host(reports_served=options.reports_served))
    return cluster.Cluster(
        name=POOL_CLUSTER,
        type=cluster.ClusterDiscoveryType.ORIGINAL_DST,
        lb_policy=cluster.ClusterLbPolicy.CLUSTER_PROVIDED,
        connect_timeout=timedelta(seconds=CONNECT_S),
        original_dst_lb_config=cluster.ClusterOriginalDstLbConfig(use_http_header=True, http_header_name=DESTINATION_KEY),
        typed_extension_protocol_options=_engine_protocol(),
        circuit_breakers=_open_circuit(),
    )


def _epp(options: EnvoyOptions) -> cluster.Cluster:
    http2 = core.Http2ProtocolOptions(
        initial_stream_window_size=EPP_STREAM_WINDOW_BYTES, initial_connection_window_size=EPP_CONNECTION_WINDOW_BYTES
    )
    unverified = tls.UpstreamTlsContext(
        common_tls_context=tls.CommonTlsContext(validation_context=tls.CertificateValidationContext(), alpn_protocols=["h2"])
    )
    socket = core.TransportSocket(name="envoy.transport_sockets.tls", typed_config=AnyMessage.pack(unverified))
    return cluster.Cluster(
        name=EPP_CLUSTER,
        type=cluster.ClusterDiscoveryType.STATIC,
        connect_timeout=timedelta(seconds=CONNECT_S),
        load_assignment=_assignment(EPP_CLUSTER, [options.epp]),
        typed_extension_protocol_options=_protocol(upstream_http.HttpProtocolOptionsExplicitHttpConfig(http2_protocol_options=http2)),
        transport_socket=socket if options.epp_tls else None,
        circuit_breakers=_open_circuit(),
    )


def _static_cluster(name: str, endpoints: Sequence[Address], policy: cluster.LoadBalancingPolicy) -> cluster.Cluster:
    return cluster.Cluster(
        name=name,
        type=cluster.ClusterDiscoveryType.STATIC,
        connect_timeout=timedelta(seconds=CONNECT_S),
        load_balancing_policy=policy,
        load_assignment=_assignment(name, endpoints),
        typed_extension_protocol_options=_engine_protocol(),
        circuit_breakers=_open_circuit(),
    )


def _engine_protocol() -> dict[str, AnyMessage]:
    http1 = upstream_http.HttpProtocolOptionsExplicitHttpConfig(http_protocol_options=core.Http1ProtocolOptions())
    return _protocol(http1, core.HttpProtocolOptions(idle_timeout=timedelta(seconds=ENGINE_KEEPALIVE_S)))


def _protocol(
    explicit: upstream_http.HttpProtocolOptionsExplicitHttpConfig, timeouts: core.HttpProtocolOptions | None = None
) -> dict[str, AnyMessage]:
    options = upstream_http.HttpProtocolOptions(explicit_http_config=explicit, common_http_protocol_options=timeouts)
    return {"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": AnyMessage.pack(options)}


def _open_circuit() -> cluster.CircuitBreakers:
    return cluster.CircuitBreakers(
        thresholds=[
            cluster.CircuitBreakersThresholds(
                max_connections=UNLIMITED, max_pending_requests=UNLIMITED, max_requests=UNLIMITED, max_retries=UNLIMITED
            )
        ]
    )


def _override_host(*, reports_served: bool) -> cluster.LoadBalancingPolicy:
    return _policy(
        "override_host",
        override_host.OverrideHost(
            override_host_sources=[override_host.OverrideHostOverrideHostSource(metadata=_lb_metadata(DESTINATION_KEY))],
            selected_host_key=_lb_metadata(SERVED_KEY) if reports_served else None,
            fallback_policy=_round_robin(),
        ),
    )


def _round_robin() -> cluster.LoadBalancingPolicy:
    return _policy("round_robin", round_robin.RoundRobin())


def _policy(name: str, config: betterproto2.Message) -> cluster.LoadBalancingPolicy:
    extension = core.TypedExtensionConfig(name=f"envoy.load_balancing_policies.{name}", typed_config=AnyMessage.pack(config))
    return cluster.LoadBalancingPolicy(policies=[cluster.LoadBalancingPolicyPolicy(typed_extension_config=extension)])


def _lb_metadata(key: str) -> metadata.MetadataKey:
    return metadata.MetadataKey(key=LB_NAMESPACE, path=[metadata.MetadataKeyPathSegment(key=key)])


def _assignment(name: str, addresses: Sequence[Address]) -> endpoint.ClusterLoadAssignment:
    members = [endpoint.LbEndpoint(endpoint=endpoint.Endpoint(address=_address(address))) for address in addresses]
    return endpoint.ClusterLoadAssignment(cluster_name=name, endpoints=[endpoint.LocalityLbEndpoints(lb_endpoints=members)])


def _address(address: Address) -> core.Address:
    return core.Address(socket_address=core.SocketAddress(address=address.host, port_value=address.port))
