{{/* Envoy's configuration: the essentials of `epp envoy-config`, with the cluster's names in the place of addresses.

With failOpen there are two routes. ext_proc runs with the second one, the header x-gateway-destination-endpoint that it adds makes Envoy
look again (route_cache_action), and the first one sends the request to exactly that pod. Without an answer of the picker nothing is
added, and the second one stays: any model server, in turn. */}}

{{- define "epp.envoyConfig" -}}
{{- $proxy := .Values.router.proxy -}}
{{- $pool := first (include "epp.pools" . | fromYaml).pools -}}
{{- $sidecar := eq $proxy.mode "sidecar" -}}
{{- $secure := eq (include "epp.secure" .) "true" -}}
{{- $upstream := ternary "http2_protocol_options" "http_protocol_options" (eq $pool.appProtocol "kubernetes.io/h2c") -}}
admin:
  address: {socket_address: {address: 127.0.0.1, port_value: 19000}}
static_resources:
  listeners:
  - name: clients
    address: {socket_address: {address: "::", port_value: {{ int64 $proxy.port }}, ipv4_compat: true}}
    per_connection_buffer_limit_bytes: 1048576 # and so the largest piece of a body the picker is sent
    filter_chains:
    - filters:
      - name: envoy.filters.network.http_connection_manager
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: clients
          codec_type: AUTO
          use_remote_address: true
          normalize_path: true
          merge_slashes: true
          path_with_escaped_slashes_action: UNESCAPE_AND_REDIRECT
          common_http_protocol_options: {headers_with_underscores_action: REJECT_REQUEST}
          stream_idle_timeout: 3600s
          upgrade_configs: [{upgrade_type: websocket}]
          route_config:
            name: clients
            virtual_hosts:
            - name: all
              domains: ["*"]
              routes:
              - match:
                  prefix: /
                  {{- if $proxy.failOpen }}
                  headers: [{name: x-gateway-destination-endpoint, present_match: true}]
                  {{- end }}
                route: {cluster: picked, timeout: {{ $proxy.timeoutSeconds }}s}
              {{- if $proxy.failOpen }}
              - match: {prefix: /}
                route:
                  cluster: model-servers
                  timeout: {{ $proxy.timeoutSeconds }}s
                  retry_policy: {retry_on: "connect-failure,refused-stream,reset-before-request", num_retries: 2}
              {{- end }}
          http_filters:
          - name: envoy.filters.http.header_mutation # nobody outside chooses a pod
            typed_config:
              "@type": type.googleapis.com/envoy.extensions.filters.http.header_mutation.v3.HeaderMutation
              mutations: {request_mutations: [{remove: x-gateway-destination-endpoint}]}
          - name: envoy.filters.http.ext_proc
            typed_config:
              "@type": type.googleapis.com/envoy.extensions.filters.http.ext_proc.v3.ExternalProcessor
              grpc_service: {envoy_grpc: {cluster_name: epp, authority: epp}}
              failure_mode_allow: {{ $proxy.failOpen }}
              {{- if $proxy.failOpen }}
              route_cache_action: CLEAR
              {{- end }}
              message_timeout: 1000s # not applied to bodies sent in full duplex; the default of 0.2 s would mislead a reader
              processing_mode:
                request_header_mode: SEND
                request_body_mode: FULL_DUPLEX_STREAMED
                request_trailer_mode: SEND
                response_header_mode: SEND
                {{- if $proxy.responseBody }}
                response_body_mode: FULL_DUPLEX_STREAMED
                response_trailer_mode: SEND
                {{- else }}
                response_body_mode: NONE
                response_trailer_mode: SKIP
                {{- end }}
              metadata_options:
                forwarding_namespaces: {untyped: [envoy.lb, envoy.lb.subset_hint]}
                receiving_namespaces: {untyped: [envoy.lb]}
              response_attributes: [upstream.address, response.code_details, response.flags]
          - name: envoy.filters.http.router
            typed_config:
              "@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router
              suppress_envoy_headers: true
  - name: ready
    address: {socket_address: {address: "::", port_value: 19001, ipv4_compat: true}}
    filter_chains:
    - filters:
      - name: envoy.filters.network.http_connection_manager
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
          stat_prefix: ready
          route_config:
            name: ready
            virtual_hosts:
            - name: all
              domains: ["*"]
              routes:
              - match: {prefix: /stats/prometheus}
                route: {cluster: admin}
          http_filters:
          - name: envoy.filters.http.health_check
            typed_config:
              "@type": type.googleapis.com/envoy.extensions.filters.http.health_check.v3.HealthCheck
              pass_through_mode: false
              headers: [{name: ":path", string_match: {exact: /ready}}]
          - name: envoy.filters.http.router
            typed_config:
              "@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router
  clusters:
  - name: admin
    type: STATIC
    load_assignment:
      cluster_name: admin
      endpoints: [{lb_endpoints: [{endpoint: {address: {socket_address: {address: 127.0.0.1, port_value: 19000}}}}]}]
  - name: picked # the pod that the picker named
    type: ORIGINAL_DST
    lb_policy: CLUSTER_PROVIDED
    connect_timeout: 2s
    original_dst_lb_config: {use_http_header: true, http_header_name: x-gateway-destination-endpoint}
    {{- include "epp.envoyUpstream" $upstream | nindent 4 }}
  {{- if $proxy.failOpen }}
  - name: model-servers # any of them
    type: STRICT_DNS
    dns_lookup_family: ALL
    lb_policy: ROUND_ROBIN
    connect_timeout: 2s
    load_assignment:
      cluster_name: model-servers
      endpoints:
      - lb_endpoints:
        {{- range $pool.ports }}
        - endpoint: {address: {socket_address: {address: {{ include "epp.modelServersName" $ }}.{{ $.Release.Namespace }}.svc.{{ $.Values.router.clusterDomain }}, port_value: {{ int64 . }}}}}
        {{- end }}
    {{- include "epp.envoyUpstream" $upstream | nindent 4 }}
  {{- end }}
  - name: epp
    type: {{ ternary "STATIC" "STRICT_DNS" $sidecar }}
    {{- if not $sidecar }}
    dns_lookup_family: ALL
    {{- end }}
    lb_policy: LEAST_REQUEST
    connect_timeout: 2s
    # NOT_SERVING takes a picker out; without a panic threshold, else Envoy goes on asking it.
    common_lb_config: {healthy_panic_threshold: {value: 0}}
    health_checks:
    - timeout: 2s
      interval: 2s
      no_traffic_interval: 2s
      unhealthy_threshold: 2
      healthy_threshold: 1
      grpc_health_check: {service_name: envoy.service.ext_proc.v3.ExternalProcessor}
    typed_extension_protocol_options:
      envoy.extensions.upstreams.http.v3.HttpProtocolOptions:
        "@type": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions
        explicit_http_config:
          # One connection of a worker carries every request's body: a slow one must not hold up the others.
          http2_protocol_options: {initial_stream_window_size: 16777216, initial_connection_window_size: 268435456}
    circuit_breakers: # the picker decides who waits; the default of 1024 would answer 503 first
      thresholds: [{max_connections: 1000000, max_pending_requests: 1000000, max_requests: 1000000, max_retries: 1000000}]
    {{- if $secure }}
    transport_socket:
      name: envoy.transport_sockets.tls
      typed_config:
        "@type": type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext
        common_tls_context: {alpn_protocols: [h2], validation_context: {}} # self-signed: encrypted, not verified
    {{- end }}
    load_assignment:
      cluster_name: epp
      endpoints:
      - lb_endpoints:
        - endpoint: {address: {socket_address: {address: {{ if $sidecar }}127.0.0.1{{ else }}{{ include "epp.headlessName" . }}.{{ .Release.Namespace }}.svc.{{ .Values.router.clusterDomain }}{{ end }}, port_value: {{ include "epp.extProcPort" . }}}}}
{{- end -}}

{{- define "epp.envoyUpstream" -}}
circuit_breakers:
  thresholds: [{max_connections: 1000000, max_pending_requests: 1000000, max_requests: 1000000, max_retries: 1000000}]
typed_extension_protocol_options:
  envoy.extensions.upstreams.http.v3.HttpProtocolOptions:
    "@type": type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions
    common_http_protocol_options: {idle_timeout: 4s} # uvicorn closes idle connections after 5
    explicit_http_config: { {{- . }}: {} }
{{- end -}}
