{{/* What the schema can't say. Every template file includes it first, through epp.router. */}}

{{- define "epp.validate" -}}
{{- $router := .Values.router -}}
{{- $epp := $router.epp -}}
{{- if hasKey .Values "inferenceExtension" -}}
  {{- fail "inferenceExtension.* is now router.epp.* (image, replicas, flags, env, pluginsCustomConfig, resources, ...), router.monitoring, router.tracing and router.modelServers" -}}
{{- end -}}
{{- if hasKey .Values "inferencePool" -}}
  {{- fail "inferencePool.* is now router.modelServers (matchLabels, targetPorts, type: was modelServerType, protocol: was modelServerProtocol) and router.inferencePool" -}}
{{- end -}}
{{- if hasKey .Values "inferenceObjectives" -}}
  {{- fail "inferenceObjectives is now router.inferenceObjectives" -}}
{{- end -}}
{{- if hasKey .Values "experimentalHttpRoute" -}}
  {{- fail "experimentalHttpRoute.* is now httpRoute.* (enabled is create), in the chart epp-gateway" -}}
{{- end -}}
{{- if and (or $router.inferencePool.create (not (include "epp.watchesPools" .))) (empty $router.modelServers.matchLabels) -}}
  {{- fail "router.modelServers.matchLabels is required: the labels that the model servers' pods have in common" -}}
{{- end -}}
{{- if not (include "epp.watchesPools" .) -}}
  {{- if $router.additionalPools }}{{ fail "router.additionalPools needs InferencePools: router.inferencePool.create: true" }}{{ end -}}
  {{- if $router.inferenceObjectives }}{{ fail "router.inferenceObjectives needs an InferencePool: router.inferencePool.create: true" }}{{ end -}}
{{- end -}}
{{- $names := list -}}
{{- $services := list -}}
{{- range (include "epp.pools" . | fromYaml).pools -}}
  {{- if has .name $names }}{{ fail (printf "router.additionalPools: the name %q is there twice" .name) }}{{ end -}}
  {{- $names = append $names .name -}}
  {{- if has .service $services }}{{ fail (printf "router.additionalPools: %s is too like another one: shortened, both would have the Service %s" .name .service) }}{{ end -}}
  {{- $services = append $services .service -}}
  {{- if and .create (empty .matchLabels) }}{{ fail (printf "router.additionalPools: %s needs modelServers.matchLabels" .name) }}{{ end -}}
{{- end -}}
{{- range $flag := list "pool-name" "endpoint-selector" "endpoint-target-ports" "config-file" "config-text" "pool-namespace" -}}
  {{- if hasKey $epp.flags $flag -}}
    {{- fail (printf "router.epp.flags.%s: the chart sets this one; use router.inferencePool, router.additionalPools, router.modelServers or router.epp.pluginsConfigFile" $flag) -}}
  {{- end -}}
{{- end -}}
{{- if not (dig "requests" "cpu" "" $epp.resources) }}{{ fail "router.epp.resources.requests.cpu is required: every request waits for the picker" }}{{ end -}}
{{- if not (dig "requests" "memory" "" $epp.resources) }}{{ fail "router.epp.resources.requests.memory is required: every request waits for the picker" }}{{ end -}}
{{- if and $epp.autoscaling.enabled (include "epp.leaderElection" .) -}}
  {{- fail "router.epp.autoscaling needs router.epp.leaderElection: false, for a replica that does not lead takes no load" -}}
{{- end -}}
{{- if and $epp.podDisruptionBudget.enabled (include "epp.leaderElection" .) -}}
  {{- fail "router.epp.podDisruptionBudget: with leader election one replica is ready at a time, and a budget would let no node drain" -}}
{{- end -}}
{{- if and $epp.podDisruptionBudget.enabled (not (include "epp.several" .)) -}}
  {{- fail "router.epp.podDisruptionBudget: for one replica it would let no node drain" -}}
{{- end -}}
{{- if regexMatch "^[0-9]+s$" $epp.drainTimeout -}}
  {{- if le (int64 $epp.terminationGracePeriodSeconds) (add 10 (trimSuffix "s" $epp.drainTimeout | int64)) -}}
    {{- fail "router.epp.terminationGracePeriodSeconds must be more than router.epp.drainTimeout and 10 s, else requests are cut off" -}}
  {{- end -}}
{{- end -}}
{{- $files := concat (list "default-plugins.yaml" "payload-agnostic.yaml") (keys $epp.pluginsCustomConfig) -}}
{{- if and (empty $epp.pluginsConfig) (not (has $epp.pluginsConfigFile $files)) -}}
  {{- fail (printf "router.epp.pluginsConfigFile: no %s; there are %s" $epp.pluginsConfigFile (join ", " (sortAlpha $files))) -}}
{{- end -}}
{{- if and (hasKey $epp.flags "cert-path") $epp.tls.secretName }}{{ fail "router.epp: flags.cert-path or tls.secretName, not both" }}{{ end -}}
{{- if and (or $epp.tls.secretName $epp.tls.clientCaSecretName) (not (include "epp.secure" .)) -}}
  {{- fail "router.epp.tls: a certificate is named, but TLS is off" -}}
{{- end -}}
{{- if and $epp.metricsTls.clientCaSecretName (not $epp.metricsTls.secretName) }}{{ fail "router.epp.metricsTls.clientCaSecretName needs secretName" }}{{ end -}}
{{- if and $epp.metricsTls.secretName (not $epp.metricsTls.clientCaSecretName) (not (include "epp.metricsAuth" .)) -}}
  {{- fail "router.epp.metricsTls.secretName needs clientCaSecretName, or router.monitoring.prometheus.auth.enabled" -}}
{{- end -}}
{{- with $router.proxy -}}
  {{- if and .enabled (eq .proxyType "agentgateway") -}}
    {{- if $router.inferencePool.create }}{{ fail "router.proxy.proxyType agentgateway needs router.inferencePool.create: false" }}{{ end -}}
    {{- if not .image }}{{ fail "router.proxy.image is required for proxyType agentgateway" }}{{ end -}}
    {{- if ne .mode "sidecar" }}{{ fail "router.proxy.proxyType agentgateway needs router.proxy.mode: sidecar" }}{{ end -}}
    {{- if include "epp.secure" $ }}{{ fail "router.proxy.proxyType agentgateway speaks plaintext to the picker: leave router.epp.flags.secure-serving out, or false" }}{{ end -}}
  {{- end -}}
  {{- if and .enabled $router.additionalPools }}{{ fail "router.proxy has one upstream: router.additionalPools needs a gateway" }}{{ end -}}
{{- end -}}
{{- with $router.modelServers.autoscaling -}}
  {{- if and .enabled (not .scaleTargetRef.name) }}{{ fail "router.modelServers.autoscaling.scaleTargetRef.name is required" }}{{ end -}}
  {{- if and .enabled (not (include "epp.watchesPools" $)) -}}
    {{- fail "router.modelServers.autoscaling: the metrics it asks for are labelled with the pool's name; it needs router.inferencePool.create: true" -}}
  {{- end -}}
{{- end -}}
{{- end -}}
