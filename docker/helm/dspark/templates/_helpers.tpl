{{- define "dspark.fullname" -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 50 | trimSuffix "-" -}}
{{- else if contains $name .Release.Name -}}
{{- .Release.Name | trunc 50 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 50 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "dspark.selector" -}}
app.kubernetes.io/name: {{ default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: server
{{- end -}}

{{- define "dspark.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-" }}
{{ include "dspark.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end -}}

{{- define "dspark.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "dspark.fullname" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- default "default" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{- define "dspark.image" -}}
{{- $tag := .Values.image.tag -}}
{{- if not $tag -}}
{{- $tag = printf "%s%s" .Chart.AppVersion (ternary "-cuda" "" .Values.gpu.enabled) -}}
{{- end -}}
{{- if .Values.image.digest -}}
{{- printf "%s@%s" .Values.image.repository .Values.image.digest -}}
{{- else -}}
{{- printf "%s:%s" .Values.image.repository $tag -}}
{{- end -}}
{{- end -}}

{{- define "dspark.claim" -}}
{{- default (printf "%s-models" (include "dspark.fullname" .)) .Values.model.cache.existingClaim -}}
{{- end -}}

{{/* "true" where the claim that the chart makes can be mounted on one node only. */}}
{{- define "dspark.oneNode" -}}
{{- with .Values.model.cache -}}
{{- if and .enabled (not .existingClaim) (not (has "ReadWriteMany" .accessModes)) (not (has "ReadOnlyMany" .accessModes)) -}}
true
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "dspark.graceSeconds" -}}
{{- $least := add .Values.drain.endpointSeconds .Values.drain.seconds 15 -}}
{{- with .Values.drain.terminationGracePeriodSeconds -}}
{{- if lt (int64 .) $least -}}
{{- fail (printf "drain.terminationGracePeriodSeconds: %d cuts draining short; give at least %d (endpointSeconds + seconds + 15), or null" (int64 .) $least) -}}
{{- end -}}
{{- end -}}
{{- default $least .Values.drain.terminationGracePeriodSeconds | int64 -}}
{{- end -}}

{{/* What the schema cannot say, because it is about two values at once. */}}
{{- define "dspark.check" -}}
{{- $many := or (gt (int64 .Values.replicas) 1) (ne .Values.autoscaling.kind "none") -}}
{{- if and $many (include "dspark.oneNode" .) -}}
{{- fail "model.cache.accessModes: several replicas cannot share a claim of one node; use ReadWriteMany, an existing claim, or one replica" -}}
{{- end -}}
{{- with .Values.autoscaling -}}
{{- if and (ne .kind "none") (lt (int64 .maxReplicas) (int64 .minReplicas)) -}}
{{- fail "autoscaling.maxReplicas: less than minReplicas" -}}
{{- end -}}
{{- end -}}
{{- if and .Values.tls.clientCa.secretName (not .Values.tls.secretName) -}}
{{- fail "tls.clientCa.secretName: mutual TLS needs tls.secretName too" -}}
{{- end -}}
{{- if and .Values.tls.clientCa.secretName (not .Values.tls.probeSecretName) -}}
{{- fail "tls.probeSecretName: with mutual TLS probes need a certificate of their own; name its secret" -}}
{{- end -}}
{{- if and .Values.telemetry.metrics.podMonitor.enabled (not .Values.telemetry.metrics.enabled) -}}
{{- fail "telemetry.metrics.podMonitor: there is nothing to scrape; set telemetry.metrics.enabled" -}}
{{- end -}}
{{- if and (ne .Values.autoscaling.kind "none") (not .Values.telemetry.metrics.enabled) -}}
{{- fail "autoscaling.kind: scaling on the queue needs telemetry.metrics.enabled" -}}
{{- end -}}
{{- $ports := list (int64 .Values.ports.grpc) (int64 .Values.ports.metrics) (int64 .Values.ports.admin) -}}
{{- if ne (len (uniq $ports)) 3 -}}
{{- fail "ports: each needs a number of its own" -}}
{{- end -}}
{{- end -}}

{{/* A value as a flag takes it. Numbers reach templates as floats, which would print as 1e+06. */}}
{{- define "dspark.scalar" -}}
{{- if and (kindIs "float64" .) (eq (floor .) .) -}}
{{- printf "%d" (int64 .) -}}
{{- else -}}
{{- printf "%v" . -}}
{{- end -}}
{{- end -}}

{{- define "dspark.serverName" -}}
{{- default (printf "%s.%s.svc" (include "dspark.fullname" .) .Release.Namespace) .Values.tls.serverName -}}
{{- end -}}

{{- define "dspark.podSecurityContext" -}}
runAsNonRoot: true
runAsUser: {{ .Values.podSecurity.user }}
runAsGroup: {{ .Values.podSecurity.group }}
fsGroup: {{ .Values.podSecurity.group }}
fsGroupChangePolicy: OnRootMismatch
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{- define "dspark.securityContext" -}}
allowPrivilegeEscalation: false
privileged: false
readOnlyRootFilesystem: true
runAsNonRoot: true
capabilities:
  drop: [ALL]
{{- end -}}

{{/* Flags of clients and of the health program, for a server with TLS. The certificate vouches for itself. */}}
{{- define "dspark.clientTls" -}}
- --tls-ca=/etc/dspark/tls/tls.crt
- {{ printf "--server-name=%s" (include "dspark.serverName" .) | quote }}
{{- if .Values.tls.probeSecretName }}
- --tls-cert=/etc/dspark/probe/tls.crt
- --tls-key=/etc/dspark/probe/tls.key
{{- end }}
{{- end -}}

{{/* A probe for a service name. The kubelet's own gRPC probes speak no TLS. */}}
{{- define "dspark.probe" -}}
{{- $port := int64 .root.Values.ports.grpc -}}
{{- if not .root.Values.tls.secretName -}}
grpc:
  port: {{ $port }}
  service: {{ .service | quote }}
{{- else if .service -}}
exec:
  command:
    - python
    - -m
    - docker.health
    - --server=127.0.0.1:{{ $port }}
    - --service={{ .service }}
    - --timeout={{ .times.timeoutSeconds }}
    {{- include "dspark.clientTls" .root | nindent 4 }}
{{- else -}}
tcpSocket:
  port: {{ $port }}
{{- end }}
periodSeconds: {{ .times.periodSeconds }}
timeoutSeconds: {{ .times.timeoutSeconds }}
failureThreshold: {{ .times.failureThreshold }}
{{- end -}}
