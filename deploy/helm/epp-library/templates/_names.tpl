{{/* Names, labels, and the small questions that several templates ask. */}}

{{- define "epp.base" -}}
{{ .Release.Name | lower | trunc 40 | trimSuffix "-" }}
{{- end -}}

{{- define "epp.name" -}}
{{ include "epp.base" . }}-epp
{{- end -}}

{{/* Of what is the cluster's, not a namespace's. */}}
{{- define "epp.clusterName" -}}
{{ printf "%s-%s-epp" (include "epp.base" .) (.Release.Namespace | trunc 40 | trimSuffix "-") }}
{{- end -}}

{{- define "epp.selectorLabels" -}}
app.kubernetes.io/name: endpoint-picker
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "epp.labels" -}}
{{ include "epp.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- with .Values.router.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* metadata of an object; `name` empty is the picker's. */}}
{{- define "epp.metadata" -}}
name: {{ .name | default (include "epp.name" .root) }}
namespace: {{ .root.Release.Namespace }}
labels:
  {{- include "epp.labels" .root | nindent 2 }}
{{- end -}}

{{- define "epp.serviceAccountName" -}}
{{- $account := .Values.router.epp.serviceAccount -}}
{{- if $account.name }}{{ $account.name }}{{ else if $account.create }}{{ include "epp.name" . }}{{ else }}default{{ end -}}
{{- end -}}

{{- define "epp.image" -}}
{{- $image := .Values.router.epp.image -}}
{{- with $image.registry }}{{ . }}/{{ end }}{{ $image.repository }}
{{- if $image.digest }}@{{ $image.digest }}{{ else }}:{{ $image.tag | default .Chart.AppVersion }}{{ end -}}
{{- end -}}

{{/* "true" where several replicas share the work, or could. */}}
{{- define "epp.several" -}}
{{- if or (gt (int .Values.router.epp.replicas) 1) .Values.router.epp.autoscaling.enabled }}true{{ end -}}
{{- end -}}

{{/* "true" with leader election: as flags say, else as leaderElection says, else with more than one replica. */}}
{{- define "epp.leaderElection" -}}
{{- $epp := .Values.router.epp -}}
{{- if hasKey $epp.flags "ha-enable-leader-election" -}}
  {{- if eq (toString (index $epp.flags "ha-enable-leader-election")) "true" }}true{{ end -}}
{{- else if kindIs "bool" $epp.leaderElection -}}
  {{- if $epp.leaderElection }}true{{ end -}}
{{- else if gt (int $epp.replicas) 1 }}true{{ end -}}
{{- end -}}

{{/* "true" where the API server is asked who reads /metrics. */}}
{{- define "epp.metricsAuth" -}}
{{- $epp := .Values.router.epp -}}
{{- if hasKey $epp.flags "metrics-endpoint-auth" -}}
  {{- if ne (toString (index $epp.flags "metrics-endpoint-auth")) "false" }}true{{ end -}}
{{- else if .Values.router.monitoring.prometheus.auth.enabled }}true{{ end -}}
{{- end -}}

{{/* "true" with TLS on the ext_proc port. */}}
{{- define "epp.secure" -}}
{{- $epp := .Values.router.epp -}}
{{- if hasKey $epp.flags "secure-serving" -}}
  {{- if ne (toString (index $epp.flags "secure-serving")) "false" }}true{{ end -}}
{{- else if and $epp.tls.enabled (not (eq (include "epp.proxyType" .) "agentgateway")) }}true{{ end -}}
{{- end -}}

{{/* The proxy that runs: envoy, agentgateway, or nothing. */}}
{{- define "epp.proxyType" -}}
{{- with .Values.router.proxy }}{{ if .enabled }}{{ .proxyType }}{{ end }}{{ end -}}
{{- end -}}

{{- define "epp.sidecar" -}}
{{- if and .Values.router.proxy.enabled (eq .Values.router.proxy.mode "sidecar") }}true{{ end -}}
{{- end -}}

{{- define "epp.port" -}}
{{- $flag := get .root.Values.router.epp.flags .flag -}}
{{- if $flag }}{{ int64 $flag }}{{ else }}{{ int64 (get .root.Values.router.epp .value) }}{{ end -}}
{{- end -}}
{{- define "epp.extProcPort" -}}{{ include "epp.port" (dict "root" . "flag" "grpc-port" "value" "extProcPort") }}{{- end -}}
{{- define "epp.healthPort" -}}{{ include "epp.port" (dict "root" . "flag" "grpc-health-port" "value" "grpcHealthPort") }}{{- end -}}
{{- define "epp.metricsPort" -}}{{ include "epp.port" (dict "root" . "flag" "metrics-port" "value" "metricsPort") }}{{- end -}}
{{- define "epp.poolGroup" -}}{{ get .Values.router.epp.flags "pool-group" | default "inference.networking.k8s.io" }}{{- end -}}

{{/* "true" where the picker watches InferencePools: the chart's, or one that is there. */}}
{{- define "epp.watchesPools" -}}
{{- with .Values.router.inferencePool }}{{ if or .create .name }}true{{ end }}{{ end -}}
{{- end -}}

{{- define "epp.poolName" -}}
{{ .Values.router.inferencePool.name | default .Release.Name }}
{{- end -}}

{{/* All pools, the first one's included: {pools: [{name, service, create, matchLabels, ports, appProtocol, failureMode, objectives, httpRoute}]}.
     Each has a Service of its own in front of the same pods: by the name that a gateway calls, the picker knows which pool is meant. */}}
{{- define "epp.pools" -}}
{{- $router := .Values.router -}}
{{- $first := dict "name" (include "epp.poolName" .) "modelServers" $router.modelServers "failureMode" $router.inferencePool.failureMode
    "inferenceObjectives" $router.inferenceObjectives "create" $router.inferencePool.create -}}
{{- $pools := list -}}
{{- range $index, $pool := concat (list $first) $router.additionalPools -}}
{{- with $pool -}}
  {{- $servers := .modelServers -}}
  {{- $ports := list -}}
  {{- if $servers.targetPortNumber -}}
    {{- $ports = list (int64 $servers.targetPortNumber) -}}
  {{- else -}}
    {{- range ($servers.targetPorts | default (list (dict "number" 8000))) }}{{ $ports = append $ports (int64 .number) }}{{ end -}}
  {{- end -}}
  {{- $protocol := ternary "kubernetes.io/h2c" "http" (eq ($servers.protocol | default "http") "grpc") -}}
  {{- $service := printf "%s-epp" (printf "%s-%s" (include "epp.base" $) .name | trunc 59 | trimSuffix "-") -}}
  {{- if eq $index 0 }}{{ $service = include "epp.name" $ }}{{ end -}}
  {{- $pools = append $pools (dict "name" .name "service" $service "create" (ne .create false) "matchLabels" $servers.matchLabels "ports" $ports "appProtocol" $protocol
      "failureMode" (.failureMode | default $router.inferencePool.failureMode) "objectives" (.inferenceObjectives | default list)
      "httpRoute" (.httpRoute | default dict)) -}}
{{- end -}}
{{- end -}}
{{- toYaml (dict "pools" $pools) -}}
{{- end -}}

{{/* app=vllm,role=decode */}}
{{- define "epp.selector" -}}
{{- $terms := list -}}
{{- range $key, $value := . }}{{ $terms = append $terms (printf "%s=%s" $key (toString $value)) }}{{ end -}}
{{- join "," $terms -}}
{{- end -}}

{{/* A number of a values file is a float to Helm: 67108864 must not become 6.7108864e+07. */}}
{{- define "epp.text" -}}
{{- if and (kindIs "float64" .) (eq (floor .) .) }}{{ int64 . }}{{ else }}{{ . }}{{ end -}}
{{- end -}}
