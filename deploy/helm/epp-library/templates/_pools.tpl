{{- define "epp.inferencepools" -}}
{{- $root := . -}}
{{- range (include "epp.pools" . | fromYaml).pools }}
{{- if .create }}
---
apiVersion: inference.networking.k8s.io/v1
kind: InferencePool
metadata:
  {{- include "epp.metadata" (dict "root" $root "name" .name) | nindent 2 }}
spec:
  selector:
    matchLabels:
      {{- range $key, $value := .matchLabels }}
      {{ $key }}: {{ $value | toString | quote }}
      {{- end }}
  targetPorts:
    {{- range .ports }}
    - number: {{ int64 . }}
    {{- end }}
  appProtocol: {{ .appProtocol }}
  endpointPickerRef:
    name: {{ .service }}
    port:
      number: {{ include "epp.extProcPort" $root }}
    failureMode: {{ .failureMode }}
{{- end }}
{{- $pool := .name }}
{{- range .objectives }}
---
apiVersion: llm-d.ai/v1alpha2
kind: InferenceObjective
metadata:
  {{- include "epp.metadata" (dict "root" $root "name" .name) | nindent 2 }}
spec:
  priority: {{ int64 .priority }}
  poolRef:
    group: inference.networking.k8s.io
    name: {{ $pool }}
{{- end }}
{{- end }}
{{- end -}}
