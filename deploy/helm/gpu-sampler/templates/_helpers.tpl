{{- define "gpu-sampler.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" -}}
{{- end }}

{{- define "gpu-sampler.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 63 | trimSuffix "-" -}}
{{- else -}}
{{- $name := include "gpu-sampler.name" . -}}
{{- if contains $name .Release.Name -}}
{{- .Release.Name | trunc 63 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 63 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}
{{- end }}

{{- define "gpu-sampler.selectorLabels" -}}
app.kubernetes.io/name: {{ include "gpu-sampler.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "gpu-sampler.labels" -}}
{{ include "gpu-sampler.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- with .Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "gpu-sampler.metadata" -}}
name: {{ include "gpu-sampler.fullname" . }}
namespace: {{ .Release.Namespace }}
labels:
  {{- include "gpu-sampler.labels" . | nindent 2 }}
{{- end }}

{{- define "gpu-sampler.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "gpu-sampler.fullname" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- default "default" .Values.serviceAccount.name -}}
{{- end -}}
{{- end }}

{{- define "gpu-sampler.image" -}}
{{- if .Values.image.digest -}}
{{ .Values.image.repository }}@{{ .Values.image.digest }}
{{- else -}}
{{ .Values.image.repository }}:{{ default .Chart.AppVersion .Values.image.tag }}
{{- end -}}
{{- end }}

{{- define "gpu-sampler.capabilities" -}}
[BPF, PERFMON, SYS_PTRACE, DAC_READ_SEARCH, SYS_RESOURCE{{ if .Values.config.engine_access }}, SYS_ADMIN{{ end }}]
{{- end }}

{{/* One probe: over HTTP, or as a command where the server requires a client certificate. */}}
{{- define "gpu-sampler.probe" -}}
{{- $web := .root.Values.web -}}
{{- if $web.clientCertificates -}}
exec:
  command:
    - /usr/local/bin/gpu-sampler
    - health
{{- else -}}
httpGet:
  path: {{ .path }}
  port: metrics
  {{- if $web.tls }}
  scheme: HTTPS
  {{- end }}
{{- end }}
timeoutSeconds: 5
{{- end }}

{{/* The endpoint of both monitors. */}}
{{- define "gpu-sampler.endpoint" -}}
port: metrics
honorLabels: true
interval: {{ .Values.monitoring.interval }}
{{- if .Values.web.tls }}
scheme: https
{{- end }}
{{- with .Values.monitoring.collect }}
params:
  collect[]:
    {{- toYaml . | nindent 4 }}
{{- end }}
# The instance is the node. The agent's own namespace, pod and container are on no series: those labels are the workload's.
relabelings:
  - sourceLabels: [__meta_kubernetes_pod_node_name]
    targetLabel: instance
  # Rules select the agent by its job, which would be the name of the Service or of the PodMonitor.
  - targetLabel: job
    replacement: gpu-sampler
  - action: labeldrop
    regex: namespace|pod|container|endpoint|service
{{- with .Values.monitoring.endpoint }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* Combinations of values that cannot work. */}}
{{- define "gpu-sampler.validate" -}}
{{- $web := .Values.web -}}
{{- if not (or $web.openMetrics $web.tokenSecret $web.configSecret) -}}
{{- fail "web: without openMetrics, set tokenSecret or configSecret: the agent does not start without credentials" -}}
{{- end -}}
{{- if and (or $web.tls $web.clientCertificates) (not $web.configSecret) -}}
{{- fail "web.tls and web.clientCertificates describe the web configuration: set web.configSecret" -}}
{{- end -}}
{{- if and $web.clientCertificates (not $web.tls) -}}
{{- fail "web.clientCertificates needs web.tls: true" -}}
{{- end -}}
{{- if and (eq .Values.gpu.access "host") (not .Values.privileged) -}}
{{- fail "gpu.access: host needs privileged: true; a container that is not privileged may not open the node's devices" -}}
{{- end -}}
{{- if and .Values.monitoring.serviceMonitor .Values.monitoring.podMonitor -}}
{{- fail "monitoring: serviceMonitor and podMonitor select the same pods, which would be scraped twice; set one of them" -}}
{{- end -}}
{{- $monitoring := .Values.monitoring -}}
{{- if or $monitoring.serviceMonitor $monitoring.podMonitor -}}
{{- $endpoint := $monitoring.endpoint -}}
{{- if not (or $web.openMetrics $endpoint.authorization $endpoint.basicAuth $endpoint.tlsConfig) -}}
{{- fail "monitoring.endpoint: without web.openMetrics, scrapes need authorization, basicAuth, or a certificate in tlsConfig" -}}
{{- end -}}
{{- if and $web.tls (not $endpoint.tlsConfig) -}}
{{- fail "monitoring.endpoint: web.tls needs tlsConfig: with the CA and the name in the server's certificate, which is not the pod's address" -}}
{{- end -}}
{{- range list "port" "honorLabels" "interval" "scheme" "params" "relabelings" -}}
{{- if hasKey $endpoint . -}}
{{- fail (printf "monitoring.endpoint.%s is set by the chart" .) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- range list "listen" "path_rootfs" "node_name" "token_file" "web_config_file" "open_metrics" "nvml_lib" -}}
{{- if hasKey $.Values.config . -}}
{{- fail (printf "config.%s has no effect, because the chart sets a variable that takes precedence: see web, gpu.nvmlLibrary" .) -}}
{{- end -}}
{{- end -}}
{{- if and .Values.hostNetwork .Values.networkPolicy.create -}}
{{- fail "networkPolicy has no effect on pods in the node's network: unset hostNetwork or networkPolicy.create" -}}
{{- end -}}
{{- if and .Values.monitoring.serviceMonitor (not .Values.service.create) -}}
{{- fail "monitoring.serviceMonitor needs service.create: true; or set monitoring.podMonitor" -}}
{{- end -}}
{{- end }}
