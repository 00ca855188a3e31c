{{/* No more than the picker asks for: it reads pods, and pools with what refers to them; with an election it writes its Lease. */}}

{{- define "epp.rbac" -}}
{{- if .Values.router.epp.rbac.create -}}
{{- $subject := dict "name" (include "epp.serviceAccountName" .) "namespace" .Release.Namespace -}}
apiVersion: rbac.authorization.k8s.io/v1
kind: Role
metadata:
  {{- include "epp.metadata" (dict "root" .) | nindent 2 }}
rules:
  - apiGroups: [""]
    resources: [pods]
    verbs: [get, list, watch]
  {{- if include "epp.watchesPools" . }}
  - apiGroups: [{{ include "epp.poolGroup" . }}]
    resources: [inferencepools]
    verbs: [get, list, watch]
  - apiGroups: [llm-d.ai, inference.networking.x-k8s.io] # the second: where they lived before
    resources: [inferenceobjectives, inferencemodelrewrites]
    verbs: [get, list, watch]
  {{- end }}
  {{- if include "epp.leaderElection" . }}
  - apiGroups: [coordination.k8s.io]
    resources: [leases]
    verbs: [get, create, update]
  {{- end }}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata:
  {{- include "epp.metadata" (dict "root" .) | nindent 2 }}
roleRef:
  apiGroup: rbac.authorization.k8s.io
  kind: Role
  name: {{ include "epp.name" . }}
subjects:
  - kind: ServiceAccount
    {{- toYaml $subject | nindent 4 }}
{{- if include "epp.metricsAuth" . }}
---
# To ask who reads /metrics.
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata:
  name: {{ include "epp.clusterName" . }}
  labels:
    {{- include "epp.labels" . | nindent 4 }}
rules:
  - apiGroups: [authentication.k8s.io]
    resources: [tokenreviews]
    verbs: [create]
  - apiGroups: [authorization.k8s.io]
    resources: [subjectaccessreviews]
    verbs: [create]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata:
  name: {{ include "epp.clusterName" . }}
  labels:
    {{- include "epp.labels" . | nindent 4 }}
roleRef:
  apiGroup: rbac.authorization.k8s.io
  kind: ClusterRole
  name: {{ include "epp.clusterName" . }}
subjects:
  - kind: ServiceAccount
    {{- toYaml $subject | nindent 4 }}
{{- end }}
{{- end -}}
{{- end -}}
