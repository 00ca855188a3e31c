{{- define "epp.strategy" -}}
{{- with .Values.router.epp.deploymentStrategy -}}
{{ toYaml . }}
{{- else -}}
type: RollingUpdate
rollingUpdate:
  {{- if include "epp.leaderElection" . }}
  # A standby is not ready and does not become so while the old leader leads: a rollout that waits for it would wait for ever. So all
  # successors start at once, and the old leader drains meanwhile.
  maxSurge: 100%
  maxUnavailable: 100%
  {{- else }}
  # A new replica knows its pool before it is ready, so the old one goes only then.
  maxSurge: 1
  maxUnavailable: 0
  {{- end }}
{{- end -}}
{{- end -}}

{{- define "epp.probe" -}}
grpc:
  port: {{ include "epp.healthPort" .root }}
  service: {{ .service }}
{{- end -}}

{{- define "epp.env" -}}
- name: NAMESPACE
  valueFrom:
    fieldRef:
      fieldPath: metadata.namespace
- name: POD_NAME
  valueFrom:
    fieldRef:
      fieldPath: metadata.name
{{- with .Values.router.tracing }}
{{- if .enabled }}
- name: OTEL_SERVICE_NAME
  value: endpoint-picker
- name: OTEL_EXPORTER_OTLP_ENDPOINT
  value: {{ .otelExporterEndpoint | quote }}
- name: OTEL_TRACES_SAMPLER
  value: {{ .sampling.sampler | quote }}
- name: OTEL_TRACES_SAMPLER_ARG
  value: {{ .sampling.samplerArg | quote }}
{{- end }}
{{- end }}
{{- with .Values.router.epp.env }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "epp.mounts" -}}
{{- $epp := .Values.router.epp -}}
- name: config
  mountPath: /config
  readOnly: true
{{- range $name, $secret := include "epp.secrets" . | fromYaml }}
- name: {{ $name }}
  mountPath: /etc/epp/{{ $name }}
  readOnly: true
{{- end }}
{{- with $epp.volumeMounts }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* Volume: name of its Secret. Mounted as directories, so that a renewed certificate arrives. */}}
{{- define "epp.secrets" -}}
{{- $epp := .Values.router.epp -}}
{{- $secrets := dict "tls" $epp.tls.secretName "client-ca" $epp.tls.clientCaSecretName
    "metrics-tls" $epp.metricsTls.secretName "metrics-client-ca" $epp.metricsTls.clientCaSecretName -}}
{{- range $name, $secret := $secrets }}{{ if not $secret }}{{ $_ := unset $secrets $name }}{{ end }}{{ end -}}
{{- toYaml $secrets -}}
{{- end -}}

{{- define "epp.deployment" -}}
{{- $router := .Values.router -}}
{{- $epp := $router.epp -}}
{{- $elects := include "epp.leaderElection" . -}}
apiVersion: apps/v1
kind: Deployment
metadata:
  {{- include "epp.metadata" (dict "root" .) | nindent 2 }}
spec:
  {{- if not $epp.autoscaling.enabled }}
  replicas: {{ int $epp.replicas }}
  {{- end }}
  strategy:
    {{- include "epp.strategy" . | nindent 4 }}
  selector:
    matchLabels:
      {{- include "epp.selectorLabels" . | nindent 6 }}
  template:
    metadata:
      labels:
        {{- include "epp.labels" . | nindent 8 }}
        {{- with $epp.podLabels }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
      {{- if or $epp.podAnnotations (include "epp.sidecar" .) }}
      annotations:
        {{- if include "epp.sidecar" . }}
        checksum/proxy: {{ include "epp.proxyConfig" . | sha256sum }} # the proxy reads its configuration once
        {{- end }}
        {{- with $epp.podAnnotations }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
      {{- end }}
    spec:
      serviceAccountName: {{ include "epp.serviceAccountName" . }}
      {{- with $router.imagePullSecrets }}
      imagePullSecrets:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      {{- with $epp.priorityClassName }}
      priorityClassName: {{ . }}
      {{- end }}
      terminationGracePeriodSeconds: {{ int64 $epp.terminationGracePeriodSeconds }}
      {{- with $epp.podSecurityContext }}
      securityContext:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      containers:
        - name: epp
          image: {{ include "epp.image" . }}
          imagePullPolicy: {{ $epp.image.pullPolicy }}
          args:
            {{- include "epp.args" . | trim | nindent 12 }}
          env:
            {{- include "epp.env" . | nindent 12 }}
          ports:
            - name: grpc
              containerPort: {{ include "epp.extProcPort" . }}
              protocol: TCP
            - name: grpc-health
              containerPort: {{ include "epp.healthPort" . }}
              protocol: TCP
            - name: metrics
              containerPort: {{ include "epp.metricsPort" . }}
              protocol: TCP
            {{- with $epp.extraContainerPorts }}
            {{- toYaml . | nindent 12 }}
            {{- end }}
          {{- if $elects }}
          livenessProbe:
            {{- include "epp.probe" (dict "root" . "service" "liveness") | nindent 12 }}
            initialDelaySeconds: 5
            periodSeconds: 10
          readinessProbe:
            {{- include "epp.probe" (dict "root" . "service" "readiness") | nindent 12 }}
            periodSeconds: 2
          {{- else }}
          # Up means: it has seen its pool. Five minutes for that, before liveness counts: a chart installed before its CRDs, or an API
          # server away, is no reason to start over with ever longer pauses.
          startupProbe:
            {{- include "epp.probe" (dict "root" . "service" "inference-extension") | nindent 12 }}
            periodSeconds: 2
            failureThreshold: 150
          livenessProbe:
            {{- include "epp.probe" (dict "root" . "service" "inference-extension") | nindent 12 }}
            periodSeconds: 10
          readinessProbe:
            {{- include "epp.probe" (dict "root" . "service" "inference-extension") | nindent 12 }}
            periodSeconds: 2
          {{- end }}
          resources:
            {{- toYaml $epp.resources | nindent 12 }}
          {{- with $epp.securityContext }}
          securityContext:
            {{- toYaml . | nindent 12 }}
          {{- end }}
          volumeMounts:
            {{- include "epp.mounts" . | nindent 12 }}
        {{- if include "epp.sidecar" . }}
        {{- include "epp.proxyContainer" . | nindent 8 }}
        {{- end }}
      volumes:
        - name: config
          configMap:
            name: {{ include "epp.name" . }}
        {{- range $name, $secret := include "epp.secrets" . | fromYaml }}
        - name: {{ $name }}
          secret:
            secretName: {{ $secret }}
        {{- end }}
        {{- if include "epp.sidecar" . }}
        {{- include "epp.proxyVolume" . | nindent 8 }}
        {{- end }}
        {{- with $epp.volumes }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
      {{- with $epp.nodeSelector }}
      nodeSelector:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      {{- with $epp.affinity }}
      affinity:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      {{- with $epp.tolerations }}
      tolerations:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      {{- include "epp.spread" (dict "root" . "constraints" $epp.topologySpreadConstraints "several" (include "epp.several" .)) | nindent 6 }}
{{- end -}}

{{/* Not to lose all replicas with a node or a zone; never at the price of a pod that can't be placed. */}}
{{- define "epp.spread" -}}
{{- if kindIs "slice" .constraints -}}
  {{- with .constraints -}}
topologySpreadConstraints:
  {{- toYaml . | nindent 2 }}
  {{- end -}}
{{- else if .several -}}
topologySpreadConstraints:
  {{- range list "kubernetes.io/hostname" "topology.kubernetes.io/zone" }}
  - topologyKey: {{ . }}
    maxSkew: 1
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels:
        {{- $.labels | default (include "epp.selectorLabels" $.root) | nindent 8 }}
  {{- end }}
{{- end -}}
{{- end -}}

{{- define "epp.serviceaccount" -}}
{{- with .Values.router.epp.serviceAccount -}}
{{- if .create -}}
apiVersion: v1
kind: ServiceAccount
metadata:
  {{- include "epp.metadata" (dict "root" $ "name" (include "epp.serviceAccountName" $)) | nindent 2 }}
  {{- with .annotations }}
  annotations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* One for each pool; the first one's is the picker's, with its other ports. */}}
{{- define "epp.services" -}}
{{- $epp := .Values.router.epp -}}
{{- range $index, $pool := (include "epp.pools" . | fromYaml).pools }}
{{- if or (eq $index 0) $pool.create }}
---
apiVersion: v1
kind: Service
metadata:
  {{- include "epp.metadata" (dict "root" $ "name" $pool.service) | nindent 2 }}
  {{- with $epp.serviceAnnotations }}
  annotations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
spec:
  selector:
    {{- include "epp.selectorLabels" $ | nindent 4 }}
  ports:
    - name: grpc-ext-proc
      port: {{ include "epp.extProcPort" $ }}
      targetPort: grpc
      protocol: TCP
      appProtocol: {{ $epp.serviceAppProtocol | default (ternary "http2" "kubernetes.io/h2c" (eq (include "epp.secure" $) "true")) }}
    {{- if eq $index 0 }}
    - name: http-metrics
      port: {{ include "epp.metricsPort" $ }}
      targetPort: metrics
      protocol: TCP
    {{- if include "epp.sidecar" $ }}
    - name: http
      port: {{ int64 $.Values.router.proxy.port }}
      targetPort: http
      protocol: TCP
    {{- end }}
    {{- with $.Values.router.extraServicePorts }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
    {{- end }}
{{- end }}
{{- end }}
{{- end -}}
