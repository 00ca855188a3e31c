{{/* Everything but what only one of the charts has. */}}
{{- define "epp.router" -}}
{{- include "epp.validate" . }}
{{ include "epp.config" . }}
---
{{ include "epp.serviceaccount" . }}
---
{{ include "epp.rbac" . }}
---
{{ include "epp.deployment" . }}
{{ include "epp.services" . }}
{{ include "epp.inferencepools" . }}
{{ include "epp.pdb" . }}
{{ include "epp.autoscaling" . }}
{{ include "epp.modelServersAutoscaling" . }}
{{ include "epp.monitoring" . }}
{{ include "epp.networkpolicy" . }}
{{- end -}}

{{- define "epp.notes" -}}
{{- $router := .Values.router -}}
Endpoint picker {{ include "epp.name" . }} in {{ .Release.Namespace }}.

  kubectl -n {{ .Release.Namespace }} rollout status deployment/{{ include "epp.name" . }}
{{- if include "epp.watchesPools" . }}
  kubectl -n {{ .Release.Namespace }} exec deploy/{{ include "epp.name" . }} -- epp doctor{{ range (include "epp.pools" . | fromYaml).pools }} --pool-name {{ .name }}{{ end }} --pool-namespace {{ .Release.Namespace }}
{{- end }}
{{- if include "epp.leaderElection" . }}

One replica leads and is ready; the others stand by, with the pool in view. `helm install --wait` waits for all of them, in vain.
{{- end }}
{{- if $router.tokenizer.enabled }}

router.tokenizer is ignored: the picker needs no tokenizer beside it.
{{- end }}
{{- if $router.latencyPredictor.enabled }}

router.latencyPredictor is ignored: the profile cost-aware predicts latency in the picker itself.
{{- end }}
{{- if $router.tracing.enabled }}

router.tracing: this version emits no traces.
{{- end }}
{{- end -}}
