{{/* The ConfigMap with EndpointPickerConfigs. The picker looks at its file and puts a change in service: no checksum on the pod is needed. */}}

{{- define "epp.parsers" -}}
{{- $servers := .Values.router.modelServers -}}
{{- $parsers := .Values.router.epp.parsers -}}
{{- if not $parsers -}}
  {{- if and (eq $servers.type "vllm") (eq $servers.protocol "grpc") -}}
    {{- $parsers = list "vllmgrpc-parser" -}}
  {{- else if eq $servers.type "triton" -}}
    {{- $parsers = list "passthrough-parser" -}}
  {{- end -}}
{{- end -}}
{{- toYaml (dict "parsers" $parsers) -}}
{{- end -}}

{{- define "epp.defaultConfig" -}}
{{- $epp := .Values.router.epp -}}
{{- $type := .Values.router.modelServers.type -}}
{{- $parsers := (include "epp.parsers" . | fromYaml).parsers -}}
apiVersion: llm-d.ai/v1alpha1
kind: EndpointPickerConfig
profile: {{ $epp.profile }}
plugins:
- type: metrics-data-source
  parameters:
    {{- toYaml $epp.metricsDataSource | nindent 4 }}
- type: core-metrics-extractor
  {{- if ne $type "vllm" }}
  parameters:
    defaultEngine: {{ $type }}
  {{- end }}
{{- range $parsers }}
- type: {{ . }}
{{- end }}
{{- if $parsers }}
requestHandler:
  parsers:
  {{- range $parsers }}
  - pluginRef: {{ . }}
  {{- end }}
{{- end }}
{{- end -}}

{{- define "epp.payloadAgnosticConfig" -}}
# For bodies that are in no format the picker reads: by what is in flight, and a client with a session stays where it was.
apiVersion: llm-d.ai/v1alpha1
kind: EndpointPickerConfig
plugins:
- type: passthrough-parser
- type: active-request-scorer
- type: session-affinity-scorer
requestHandler:
  parsers:
  - pluginRef: passthrough-parser
schedulingProfiles:
- name: default
  plugins:
  - pluginRef: active-request-scorer
    weight: 1
  - pluginRef: session-affinity-scorer
    weight: 1
{{- end -}}

{{- define "epp.config" -}}
{{- $epp := .Values.router.epp -}}
{{- $data := dict "default-plugins.yaml" (include "epp.defaultConfig" .) "payload-agnostic.yaml" (include "epp.payloadAgnosticConfig" .) -}}
{{- range $name, $text := $epp.pluginsCustomConfig -}}
  {{- $_ := set $data $name (kindIs "string" $text | ternary $text (toYaml $text)) -}}
{{- end -}}
{{- with $epp.pluginsConfig }}{{ $_ := set $data $epp.pluginsConfigFile (toYaml .) }}{{ end -}}
apiVersion: v1
kind: ConfigMap
metadata:
  {{- include "epp.metadata" (dict "root" .) | nindent 2 }}
data:
  {{- range $name, $text := $data }}
  {{ $name }}: |
    {{- $text | trim | nindent 4 }}
  {{- end }}
{{- end -}}
