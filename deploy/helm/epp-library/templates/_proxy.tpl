{{/* A proxy of our own in front of the model servers, for epp-standalone. */}}

{{- define "epp.proxyName" -}}{{ include "epp.base" . }}-proxy{{- end -}}
{{- define "epp.modelServersName" -}}{{ include "epp.base" . }}-model-servers{{- end -}}
{{- define "epp.headlessName" -}}{{ include "epp.name" . }}-headless{{- end -}}

{{- define "epp.proxyLabels" -}}
app.kubernetes.io/name: endpoint-picker-proxy
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "epp.proxyConfig" -}}
{{- $proxy := .Values.router.proxy -}}
{{- if $proxy.config }}{{ $proxy.config }}
{{- else if eq $proxy.proxyType "envoy" }}{{ include "epp.envoyConfig" . }}
{{- else }}{{ include "epp.agentgatewayConfig" . }}{{ end -}}
{{- end -}}

{{- define "epp.proxyContainer" -}}
{{- $proxy := .Values.router.proxy -}}
{{- $envoy := eq $proxy.proxyType "envoy" -}}
- name: {{ $proxy.proxyType }}
  image: {{ $proxy.image | default "envoyproxy/envoy:distroless-v1.39.3" }}
  imagePullPolicy: {{ $proxy.imagePullPolicy }}
  args:
    {{- if $envoy }}
    - --config-path
    - /etc/proxy/envoy.yaml
    - --log-level
    - warn
    - --drain-time-s
    - "60"
    {{- else }}
    - -f
    - /etc/proxy/config.yaml
    {{- end }}
  ports:
    - name: http
      containerPort: {{ int64 $proxy.port }}
      protocol: TCP
    - name: ready
      containerPort: {{ ternary 19001 15021 $envoy }}
      protocol: TCP
  readinessProbe:
    httpGet:
      path: {{ ternary "/ready" "/healthz/ready" $envoy }}
      port: ready
    periodSeconds: 5
    failureThreshold: 1
  resources:
    {{- toYaml $proxy.resources | nindent 4 }}
  {{- with .Values.router.epp.securityContext }}
  securityContext:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  volumeMounts:
    - name: proxy
      mountPath: /etc/proxy
      readOnly: true
{{- end -}}

{{- define "epp.proxyVolume" -}}
- name: proxy
  configMap:
    name: {{ include "epp.proxyName" . }}
{{- end -}}

{{- define "epp.proxy" -}}
{{- $router := .Values.router -}}
{{- $proxy := $router.proxy -}}
{{- if $proxy.enabled }}
---
apiVersion: v1
kind: ConfigMap
metadata:
  {{- include "epp.metadata" (dict "root" . "name" (include "epp.proxyName" .)) | nindent 2 }}
data:
  {{ ternary "envoy.yaml" "config.yaml" (eq $proxy.proxyType "envoy") }}: |
    {{- include "epp.proxyConfig" . | trim | nindent 4 }}
{{- if and (eq $proxy.proxyType "envoy") $proxy.failOpen }}
---
# For Envoy to know the model servers where the picker does not answer.
apiVersion: v1
kind: Service
metadata:
  {{- include "epp.metadata" (dict "root" . "name" (include "epp.modelServersName" .)) | nindent 2 }}
spec:
  clusterIP: None
  selector:
    {{- $pool := first (include "epp.pools" . | fromYaml).pools }}
    {{- range $key, $value := $pool.matchLabels }}
    {{ $key }}: {{ $value | toString | quote }}
    {{- end }}
  ports:
    {{- range $pool.ports }}
    - name: http-{{ int64 . }}
      port: {{ int64 . }}
      protocol: TCP
    {{- end }}
{{- end }}
{{- if eq $proxy.mode "service" }}
---
# Every ready picker by its address: each request may go to another one, where a Service's own address would bind a connection to one.
apiVersion: v1
kind: Service
metadata:
  {{- include "epp.metadata" (dict "root" . "name" (include "epp.headlessName" .)) | nindent 2 }}
spec:
  clusterIP: None
  selector:
    {{- include "epp.selectorLabels" . | nindent 4 }}
  ports:
    - name: grpc-ext-proc
      port: {{ include "epp.extProcPort" . }}
      targetPort: grpc
      protocol: TCP
---
apiVersion: v1
kind: Service
metadata:
  {{- include "epp.metadata" (dict "root" . "name" (include "epp.proxyName" .)) | nindent 2 }}
spec:
  selector:
    {{- include "epp.proxyLabels" . | nindent 4 }}
  ports:
    - name: http
      port: {{ int64 $proxy.port }}
      targetPort: http
      protocol: TCP
---
apiVersion: apps/v1
kind: Deployment
metadata:
  {{- include "epp.metadata" (dict "root" . "name" (include "epp.proxyName" .)) | nindent 2 }}
spec:
  replicas: {{ int64 $proxy.replicas }}
  strategy:
    type: RollingUpdate
    rollingUpdate:
      maxSurge: 1
      maxUnavailable: 0
  selector:
    matchLabels:
      {{- include "epp.proxyLabels" . | nindent 6 }}
  template:
    metadata:
      labels:
        {{- include "epp.proxyLabels" . | nindent 8 }}
      annotations:
        checksum/proxy: {{ include "epp.proxyConfig" . | sha256sum }}
    spec:
      automountServiceAccountToken: false
      {{- with $router.imagePullSecrets }}
      imagePullSecrets:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      terminationGracePeriodSeconds: {{ int64 $proxy.terminationGracePeriodSeconds }}
      {{- with $router.epp.podSecurityContext }}
      securityContext:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      containers:
        {{- include "epp.proxyContainer" . | nindent 8 }}
      volumes:
        {{- include "epp.proxyVolume" . | nindent 8 }}
      {{- $several := ternary "true" "" (gt (int64 $proxy.replicas) 1) }}
      {{- include "epp.spread" (dict "root" . "labels" (include "epp.proxyLabels" .) "several" $several) | nindent 6 }}
{{- if gt (int64 $proxy.replicas) 1 }}
---
apiVersion: policy/v1
kind: PodDisruptionBudget
metadata:
  {{- include "epp.metadata" (dict "root" . "name" (include "epp.proxyName" .)) | nindent 2 }}
spec:
  maxUnavailable: 1
  unhealthyPodEvictionPolicy: AlwaysAllow
  selector:
    matchLabels:
      {{- include "epp.proxyLabels" . | nindent 6 }}
{{- end }}
{{- end }}
{{- end }}
{{- end -}}

{{- define "epp.agentgatewayConfig" -}}
{{- $pool := first (include "epp.pools" . | fromYaml).pools -}}
{{- $name := get $pool.matchLabels "app" | default .Release.Name -}}
config:
  statsAddr: 0.0.0.0:15020
  readinessAddr: 0.0.0.0:15021
binds:
- port: {{ int64 .Values.router.proxy.port }}
  listeners:
  - name: default
    protocol: HTTP
    routes:
    - name: model-servers
      matches:
      - path:
          pathPrefix: /
      backends:
      - service:
          name: {{ .Release.Namespace }}/{{ $name }}
          port: {{ first $pool.ports | int64 }}
        policies:
          inferenceRouting:
            endpointPicker:
              host: 127.0.0.1:{{ include "epp.extProcPort" . }}
            destinationMode: passthrough # the picker knows the pods, agentgateway need not
services:
- name: {{ $name }}
  namespace: {{ .Release.Namespace }}
  hostname: {{ $name }}
  vips: []
  ports:
    {{- range $pool.ports }}
    {{ int64 . }}: {{ int64 . }}
    {{- end }}
{{- end -}}
