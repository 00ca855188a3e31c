{{- define "epp.monitoringProvider" -}}
{{- $own := .Values.router.monitoring.provider.name -}}
{{- $gateway := dig "provider" "name" "" (.Values | merge (dict)) -}}
{{- $own | default (ternary "gmp" "prometheusoperator" (eq $gateway "gke")) -}}
{{- end -}}

{{- define "epp.readerName" -}}{{ include "epp.name" . }}-metrics-reader{{- end -}}
{{- define "epp.readerSecret" -}}
{{ .Values.router.monitoring.prometheus.auth.secretName | default (include "epp.readerName" .) }}
{{- end -}}

{{- define "epp.monitoring" -}}
{{- $monitoring := .Values.router.monitoring -}}
{{- $provider := include "epp.monitoringProvider" . -}}
{{- $scheme := ternary "https" "http" (ne .Values.router.epp.metricsTls.secretName "") -}}
{{- if $monitoring.prometheus.enabled }}
{{- if eq $provider "gmp" }}
---
apiVersion: monitoring.googleapis.com/v1
kind: PodMonitoring
metadata:
  {{- include "epp.metadata" (dict "root" .) | nindent 2 }}
spec:
  selector:
    matchLabels:
      {{- include "epp.selectorLabels" . | nindent 6 }}
  endpoints:
    - port: metrics
      scheme: {{ $scheme }}
      path: /metrics
      interval: {{ $monitoring.interval }}
      {{- if eq $scheme "https" }}
      tls:
        insecureSkipVerify: true
      {{- end }}
      {{- if include "epp.metricsAuth" . }}
      authorization:
        type: Bearer
        credentials:
          secret:
            name: {{ include "epp.readerSecret" . }}
            key: token
      {{- end }}
{{- else }}
---
apiVersion: monitoring.coreos.com/v1
kind: ServiceMonitor
metadata:
  {{- include "epp.metadata" (dict "root" .) | nindent 2 }}
    {{- with $monitoring.prometheus.extraLabels }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
spec:
  selector:
    matchLabels:
      {{- include "epp.selectorLabels" . | nindent 6 }}
  namespaceSelector:
    matchNames: [{{ .Release.Namespace }}]
  endpoints:
    - port: http-metrics
      scheme: {{ $scheme }}
      path: /metrics
      interval: {{ $monitoring.interval }}
      {{- if eq $scheme "https" }}
      tlsConfig:
        insecureSkipVerify: true
      {{- end }}
      {{- if include "epp.metricsAuth" . }}
      authorization:
        type: Bearer
        credentials:
          name: {{ include "epp.readerSecret" . }}
          key: token
      {{- end }}
{{- end }}
{{- if include "epp.metricsAuth" . }}
{{- include "epp.metricsReader" . }}
{{- end }}
{{- end }}
{{- if $monitoring.rules.enabled }}
---
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  {{- include "epp.metadata" (dict "root" .) | nindent 2 }}
    {{- with $monitoring.rules.extraLabels }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
spec:
  groups:
    {{- toYaml ($monitoring.rules.groups | default (.Files.Get "files/rules.yaml" | fromYaml).groups) | nindent 4 }}
{{- end }}
{{- end -}}

{{/* Somebody who may read /metrics and nothing else, and a token of his for Prometheus. */}}
{{- define "epp.metricsReader" }}
---
apiVersion: v1
kind: ServiceAccount
metadata:
  {{- include "epp.metadata" (dict "root" . "name" (include "epp.readerName" .)) | nindent 2 }}
automountServiceAccountToken: false
---
apiVersion: v1
kind: Secret
metadata:
  {{- include "epp.metadata" (dict "root" . "name" (include "epp.readerSecret" .)) | nindent 2 }}
  annotations:
    kubernetes.io/service-account.name: {{ include "epp.readerName" . }}
type: kubernetes.io/service-account-token
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata:
  name: {{ include "epp.clusterName" . }}-metrics-reader
  labels:
    {{- include "epp.labels" . | nindent 4 }}
rules:
  - nonResourceURLs: [/metrics]
    verbs: [get]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata:
  name: {{ include "epp.clusterName" . }}-metrics-reader
  labels:
    {{- include "epp.labels" . | nindent 4 }}
roleRef:
  apiGroup: rbac.authorization.k8s.io
  kind: ClusterRole
  name: {{ include "epp.clusterName" . }}-metrics-reader
subjects:
  - kind: ServiceAccount
    name: {{ include "epp.readerName" . }}
    namespace: {{ .Release.Namespace }}
{{- if eq (include "epp.monitoringProvider" .) "gmp" }}
---
# Google's collector reads the token itself.
apiVersion: rbac.authorization.k8s.io/v1
kind: Role
metadata:
  {{- include "epp.metadata" (dict "root" . "name" (include "epp.readerName" .)) | nindent 2 }}
rules:
  - apiGroups: [""]
    resources: [secrets]
    resourceNames: [{{ include "epp.readerSecret" . }}]
    verbs: [get, list, watch]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata:
  {{- include "epp.metadata" (dict "root" . "name" (include "epp.readerName" .)) | nindent 2 }}
roleRef:
  apiGroup: rbac.authorization.k8s.io
  kind: Role
  name: {{ include "epp.readerName" . }}
subjects:
  - kind: ServiceAccount
    name: collector
    namespace: {{ ternary "gke-gmp-system" "gmp-system" .Values.router.monitoring.provider.gmp.autopilot }}
{{- end }}
{{- end -}}
