{{- define "epp.pdb" -}}
{{- $budget := .Values.router.epp.podDisruptionBudget -}}
{{- $sensible := and (include "epp.several" .) (not (include "epp.leaderElection" .)) -}}
{{- if ternary $budget.enabled $sensible (kindIs "bool" $budget.enabled) }}
---
apiVersion: policy/v1
kind: PodDisruptionBudget
metadata:
  {{- include "epp.metadata" (dict "root" .) | nindent 2 }}
spec:
  maxUnavailable: {{ $budget.maxUnavailable }}
  unhealthyPodEvictionPolicy: AlwaysAllow # a replica that is not ready holds nobody up
  selector:
    matchLabels:
      {{- include "epp.selectorLabels" . | nindent 6 }}
{{- end }}
{{- end -}}

{{/* The picker's own replicas: by its CPU, for that is what limits it. */}}
{{- define "epp.autoscaling" -}}
{{- $auto := .Values.router.epp.autoscaling -}}
{{- $memory := get $auto "targetMemoryUtilizationPercentage" -}}
{{- if and $auto.enabled (eq $auto.provider "hpa") }}
---
apiVersion: autoscaling/v2
kind: HorizontalPodAutoscaler
metadata:
  {{- include "epp.metadata" (dict "root" .) | nindent 2 }}
spec:
  scaleTargetRef:
    apiVersion: apps/v1
    kind: Deployment
    name: {{ include "epp.name" . }}
  minReplicas: {{ int64 $auto.minReplicas }}
  maxReplicas: {{ int64 $auto.maxReplicas }}
  metrics:
    {{- if $auto.metrics }}
    {{- toYaml $auto.metrics | nindent 4 }}
    {{- else }}
    - type: ContainerResource
      containerResource:
        name: cpu
        container: epp
        target:
          type: Utilization
          averageUtilization: {{ int64 $auto.targetCPUUtilizationPercentage }}
    {{- if $memory }}
    - type: ContainerResource
      containerResource:
        name: memory
        container: epp
        target:
          type: Utilization
          averageUtilization: {{ int64 $memory }}
    {{- end }}
    {{- end }}
  {{- with $auto.behavior }}
  behavior:
    {{- toYaml . | nindent 4 }}
  {{- end }}
{{- else if $auto.enabled }}
---
apiVersion: keda.sh/v1alpha1
kind: ScaledObject
metadata:
  {{- include "epp.metadata" (dict "root" .) | nindent 2 }}
spec:
  scaleTargetRef:
    name: {{ include "epp.name" . }}
  minReplicaCount: {{ int64 $auto.minReplicas }}
  maxReplicaCount: {{ int64 $auto.maxReplicas }}
  {{- with $auto.behavior }}
  advanced:
    horizontalPodAutoscalerConfig:
      behavior:
        {{- toYaml . | nindent 8 }}
  {{- end }}
  triggers:
    - type: cpu
      metricType: Utilization
      metadata:
        containerName: epp
        value: {{ int64 $auto.targetCPUUtilizationPercentage | quote }}
    {{- if $memory }}
    - type: memory
      metricType: Utilization
      metadata:
        containerName: epp
        value: {{ int64 $memory | quote }}
    {{- end }}
    {{- with $auto.triggers }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
{{- end }}
{{- end -}}

{{/* The model servers' replicas. An average is compared with a target as a Value: replicas x average / target is what HPA then makes of it.
     max: every replica of the picker says the same of the pool; one that has just started may not know it yet. */}}
{{- define "epp.modelServersAutoscaling" -}}
{{- $auto := .Values.router.modelServers.autoscaling -}}
{{- if $auto.enabled }}
{{- $name := printf "%s-model-servers" (include "epp.base" .) }}
{{- $pool := include "epp.poolName" . }}
{{- $targets := dict "llm_d_epp_average_queue_size" $auto.targetQueueSize "llm_d_epp_average_kv_cache_utilization" $auto.targetKvCacheUtilization }}
---
{{- if eq $auto.provider "keda" }}
apiVersion: keda.sh/v1alpha1
kind: ScaledObject
metadata:
  {{- include "epp.metadata" (dict "root" . "name" $name) | nindent 2 }}
spec:
  scaleTargetRef:
    {{- toYaml $auto.scaleTargetRef | nindent 4 }}
  minReplicaCount: {{ int64 $auto.minReplicas }}
  maxReplicaCount: {{ int64 $auto.maxReplicas }}
  pollingInterval: 15
  advanced:
    horizontalPodAutoscalerConfig:
      behavior:
        {{- toYaml $auto.behavior | nindent 8 }}
  triggers:
    {{- range $metric, $target := $targets }}
    {{- if $target }}
    - type: prometheus
      metricType: Value
      metadata:
        serverAddress: {{ $auto.prometheus.serverAddress }}
        query: max({{ $metric }}{namespace="{{ $.Release.Namespace }}",name="{{ $pool }}"})
        threshold: {{ $target | quote }}
    {{- end }}
    {{- end }}
{{- else }}
apiVersion: autoscaling/v2
kind: HorizontalPodAutoscaler
metadata:
  {{- include "epp.metadata" (dict "root" . "name" $name) | nindent 2 }}
spec:
  scaleTargetRef:
    {{- toYaml $auto.scaleTargetRef | nindent 4 }}
  minReplicas: {{ int64 $auto.minReplicas }}
  maxReplicas: {{ int64 $auto.maxReplicas }}
  behavior:
    {{- toYaml $auto.behavior | nindent 4 }}
  metrics:
    {{- range $metric, $target := $targets }}
    {{- if $target }}
    - type: External
      external:
        metric:
          name: {{ $metric }}
          selector:
            matchLabels:
              name: {{ $pool }}
        target:
          type: Value
          value: {{ $target | quote }}
    {{- end }}
    {{- end }}
{{- end }}
{{- end }}
{{- end -}}
