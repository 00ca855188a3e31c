{{/* The picker's arguments, as YAML list items: what the chart decides, with router.epp.flags over it, sorted, each as --flag=value. */}}

{{- define "epp.args" -}}
{{- $router := .Values.router -}}
{{- $epp := $router.epp -}}
{{- $flags := dict
    "zap-encoder" "json"
    "config-file" (printf "/config/%s" $epp.pluginsConfigFile)
    "grpc-port" $epp.extProcPort
    "grpc-health-port" $epp.grpcHealthPort
    "metrics-port" $epp.metricsPort
    "drain-timeout" $epp.drainTimeout
    "tracing" $router.tracing.enabled
-}}
{{- if include "epp.leaderElection" . }}{{ $_ := set $flags "ha-enable-leader-election" true }}{{ end -}}
{{- if not (include "epp.secure" .) }}{{ $_ := set $flags "secure-serving" false }}{{ end -}}
{{- if not (include "epp.metricsAuth" .) }}{{ $_ := set $flags "metrics-endpoint-auth" false }}{{ end -}}
{{- if $epp.tls.secretName }}{{ $_ := set $flags "cert-path" "/etc/epp/tls" }}{{ end -}}
{{- if $epp.tls.clientCaSecretName }}{{ $_ := set $flags "client-ca-file" "/etc/epp/client-ca/ca.crt" }}{{ end -}}
{{- if $epp.metricsTls.secretName }}{{ $_ := set $flags "metrics-cert-dir" "/etc/epp/metrics-tls" }}{{ end -}}
{{- if $epp.metricsTls.clientCaSecretName }}{{ $_ := set $flags "metrics-client-ca-file" "/etc/epp/metrics-client-ca/ca.crt" }}{{ end -}}
{{- $pools := (include "epp.pools" . | fromYaml).pools -}}
{{- if include "epp.watchesPools" . -}}
  {{- $_ := set $flags "pool-namespace" .Release.Namespace -}}
  {{- $_ := set $flags "pool-group" "inference.networking.k8s.io" -}}
  {{- range $pools }}
- --pool-name={{ .name }}
  {{- end -}}
{{- else -}}
  {{- $only := first $pools -}}
  {{- $_ := set $flags "pool-namespace" .Release.Namespace -}}
  {{- $_ := set $flags "endpoint-selector" (include "epp.selector" $only.matchLabels) -}}
  {{- $ports := list }}{{ range $only.ports }}{{ $ports = append $ports (int64 . | toString) }}{{ end -}}
  {{- $_ := set $flags "endpoint-target-ports" (join "," $ports) -}}
{{- end -}}
{{- range $flag, $value := merge (deepCopy $epp.flags) $flags }}
- {{ printf "--%s=%s" $flag (include "epp.text" $value) | quote }}
{{- end -}}
{{- end -}}
