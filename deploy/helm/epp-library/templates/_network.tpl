{{- define "epp.networkpolicy" -}}
{{- $router := .Values.router -}}
{{- $policy := $router.networkPolicy -}}
{{- $service := and $router.proxy.enabled (eq $router.proxy.mode "service") -}}
{{- if $policy.enabled }}
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata:
  {{- include "epp.metadata" (dict "root" .) | nindent 2 }}
spec:
  podSelector:
    matchLabels:
      {{- include "epp.selectorLabels" . | nindent 6 }}
  policyTypes: [Ingress, Egress]
  ingress:
    {{- if include "epp.sidecar" . }}
    - ports: # clients; ext_proc stays inside the pod
        - {port: http}
      {{- with $policy.gateway }}
      from:
        {{- toYaml . | nindent 8 }}
      {{- end }}
    {{- else }}
    - ports: # the gateway
        - {port: grpc}
      {{- if $service }}
      from:
        - podSelector:
            matchLabels:
              {{- include "epp.proxyLabels" . | nindent 14 }}
      {{- else }}
      {{- with $policy.gateway }}
      from:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      {{- end }}
    {{- end }}
    - ports: # kubelet, which is no pod and has no fixed address
        - {port: grpc-health}
    - ports: # Prometheus
        - {port: metrics}
      {{- with $policy.monitoring }}
      from:
        {{- toYaml . | nindent 8 }}
      {{- end }}
    {{- with $policy.extraIngress }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  egress:
    - to: # names
        {{- toYaml $policy.dns | nindent 8 }}
      ports:
        - {port: 53, protocol: UDP}
        - {port: 53, protocol: TCP}
    - to: # the API server
        {{- range $policy.apiServer.cidrs }}
        - ipBlock: {cidr: {{ . | quote }}}
        {{- end }}
      ports:
        {{- range $policy.apiServer.ports }}
        - {port: {{ int64 . }}}
        {{- end }}
    {{- include "epp.toModelServers" . | nindent 4 }}
    {{- with $policy.extraEgress }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
{{- if $service }}
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata:
  {{- include "epp.metadata" (dict "root" . "name" (include "epp.proxyName" .)) | nindent 2 }}
spec:
  podSelector:
    matchLabels:
      {{- include "epp.proxyLabels" . | nindent 6 }}
  policyTypes: [Ingress, Egress]
  ingress:
    - ports: # clients
        - {port: http}
      {{- with $policy.gateway }}
      from:
        {{- toYaml . | nindent 8 }}
      {{- end }}
    - ports: # kubelet and Prometheus
        - {port: ready}
  egress:
    - to:
        {{- toYaml $policy.dns | nindent 8 }}
      ports:
        - {port: 53, protocol: UDP}
        - {port: 53, protocol: TCP}
    - to:
        - podSelector:
            matchLabels:
              {{- include "epp.selectorLabels" . | nindent 14 }}
      ports:
        - {port: grpc}
    {{- include "epp.toModelServers" . | nindent 4 }}
{{- end }}
{{- end }}
{{- end -}}

{{- define "epp.toModelServers" -}}
{{- range (include "epp.pools" . | fromYaml).pools }}
{{- if .matchLabels }}
- to: # the model servers of {{ .name }}
    - podSelector:
        matchLabels:
          {{- range $key, $value := .matchLabels }}
          {{ $key }}: {{ $value | toString | quote }}
          {{- end }}
  ports:
    {{- range .ports }}
    - {port: {{ int64 . }}}
    {{- end }}
{{- end }}
{{- end }}
{{- end -}}
