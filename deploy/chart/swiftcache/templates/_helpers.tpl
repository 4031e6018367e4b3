{{- define "swiftcache.selector" -}}
app.kubernetes.io/name: swiftcache
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "swiftcache.labels" -}}
{{ include "swiftcache.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end }}

{{- define "swiftcache.image" -}}
{{- with .Values.image -}}
{{ .repository }}:{{ .tag | default $.Chart.AppVersion }}{{ with .digest }}@{{ . }}{{ end }}
{{- end -}}
{{- end }}

{{- define "swiftcache.securityContext" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
runAsNonRoot: true
runAsUser: {{ .Values.identity.uid }}
runAsGroup: {{ .Values.identity.gid }}
capabilities:
  drop: [ALL]
{{- end }}

{{/* The broker's settings file. Helm gives numbers as floats, but the broker needs 2000, not 2000.0. */}}
{{- define "swiftcache.brokerToml" -}}
{{- $config := .Values.broker.config }}
{{- if .Values.broker.tls.secretName }}
{{- if not $config.listen_tcp }}
{{- fail "broker.tls.secretName is of no use without broker.config.listen_tcp, for example \"0.0.0.0:9478\"" }}
{{- end }}
{{- if $config.tls_cert }}
{{- fail "broker.tls.secretName and broker.config.tls_cert exclude each other" }}
{{- end }}
{{- else if and $config.listen_tcp (not $config.tls_cert) (not (hasPrefix "127." $config.listen_tcp)) (not (hasPrefix "[::1]" $config.listen_tcp)) }}
{{- fail (printf "broker.config.listen_tcp: %s is beyond loopback and needs broker.tls.secretName (mutual TLS)" $config.listen_tcp) }}
{{- end -}}
socket = {{ printf "%s/broker.sock" .Values.paths.sockets | toJson }}
state_dir = {{ .Values.paths.state | toJson }}
{{- if .Values.metrics.enabled }}
metrics_listen = "0.0.0.0:{{ .Values.metrics.port }}"
{{- end }}
{{- if .Values.broker.tls.secretName }}
tls_cert = "/etc/swiftcache-tls/tls.crt"
tls_key = "/etc/swiftcache-tls/tls.key"
tls_client_ca = "/etc/swiftcache-tls/ca.crt"
{{- end }}
{{- range $key, $value := .Values.broker.config }}
{{- if kindIs "float64" $value }}
{{ $key }} = {{ int64 $value }}
{{- else }}
{{ $key }} = {{ toJson $value }}
{{- end }}
{{- end }}
{{- end }}

{{- define "swiftcache.adminPort" -}}
{{ splitList ":" .Values.broker.config.listen_tcp | last }}
{{- end }}

{{/* Gives the device nodes of every GPU without claiming one from the device plugin. */}}
{{- define "swiftcache.gpuEnv" -}}
- name: NVIDIA_VISIBLE_DEVICES
  value: {{ ternary "all" "/var/run/nvidia-container-devices" (eq .Values.gpu.exposure "env") }}
{{- end }}

{{- define "swiftcache.gpuMount" -}}
{{- if eq .Values.gpu.exposure "mounts" }}
- name: all-gpus
  mountPath: /var/run/nvidia-container-devices/all
{{- end }}
{{- end }}

{{/* Not empty: some container of the pod lends, and must end before the broker does. */}}
{{- define "swiftcache.lends" -}}
{{- if or .Values.donor.enabled .Values.hostMemory.nodes .Values.disk.enabled }}yes{{ end }}
{{- end }}

{{/* A size as a flag takes it. Helm gives numbers as floats. */}}
{{- define "swiftcache.size" -}}
{{ kindIs "float64" . | ternary (int64 . | toString) (toString .) }}
{{- end }}

{{/* What the containers have in common that lend no GPU's memory: .root is the chart, .own their values. */}}
{{- define "swiftcache.gpuless" -}}
env:
  - name: SWIFTCACHE_SOCKET
    value: {{ .root.Values.paths.sockets }}/broker.sock
  - name: NVIDIA_VISIBLE_DEVICES
    value: void
  {{- with .own.env }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
resources:
  {{- toYaml .own.resources | nindent 2 }}
{{- end }}

{{- define "swiftcache.hostMemory" -}}
{{- range $node := .Values.hostMemory.nodes }}
- name: host-memory-{{ $node }}
  image: {{ include "swiftcache.image" $ }}
  imagePullPolicy: {{ $.Values.image.pullPolicy }}
  command: [swiftcache, donate]
  args:
    - --device=HOST-{{ $node }}
    - --bytes={{ include "swiftcache.size" $.Values.hostMemory.bytes }}
    - --leave-within=60s
    {{- with $.Values.hostMemory.args }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  {{- include "swiftcache.gpuless" (dict "root" $ "own" $.Values.hostMemory) | nindent 2 }}
  securityContext:
    allowPrivilegeEscalation: false
    readOnlyRootFilesystem: true
    runAsNonRoot: true
    runAsUser: {{ $.Values.identity.uid }}
    runAsGroup: {{ $.Values.identity.gid }}
    capabilities:
      drop: [ALL]
      # With it the runtime's seccomp profile lets mbind through, which puts the memory on its NUMA node.
      add: [SYS_NICE]
  volumeMounts:
    - name: sockets
      mountPath: {{ $.Values.paths.sockets }}
      readOnly: true
{{- end }}
{{- end }}

{{- define "swiftcache.disk" -}}
- name: disk
  image: {{ include "swiftcache.image" . }}
  imagePullPolicy: {{ .Values.image.pullPolicy }}
  command: [swiftcache, donate]
  args:
    - --device=DISK-0
    - --path={{ .Values.disk.path }}
    - --bytes={{ include "swiftcache.size" .Values.disk.bytes }}
    - --memory={{ include "swiftcache.size" .Values.disk.memory }}
    {{- with .Values.disk.args }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  {{- include "swiftcache.gpuless" (dict "root" . "own" .Values.disk) | nindent 2 }}
  securityContext:
    allowPrivilegeEscalation: false
    readOnlyRootFilesystem: true
    runAsNonRoot: true
    runAsUser: {{ include "swiftcache.diskUid" . }}
    runAsGroup: {{ .Values.identity.gid }}
    capabilities:
      drop: [ALL]
  volumeMounts:
    - name: sockets
      mountPath: {{ .Values.paths.sockets }}
      readOnly: true
    - name: disk
      mountPath: {{ .Values.disk.path }}
{{- end }}

{{- define "swiftcache.diskUid" -}}
{{- if not .Values.disk.uid }}
{{- fail "disk.uid: set it to the user that the engines run as (runAsUser): a disk serves one tenant's blocks" }}
{{- end -}}
{{ int64 .Values.disk.uid }}
{{- end }}

{{- define "swiftcache.broker" -}}
- name: broker
  image: {{ include "swiftcache.image" . }}
  imagePullPolicy: {{ .Values.image.pullPolicy }}
  command: [swiftcache-broker, --config, /etc/swiftcache/broker.toml]
  {{- if include "swiftcache.lends" . }}
  # A sidecar: it runs before the donor starts, and still runs while the donor gives its regions back.
  restartPolicy: Always
  {{- end }}
  securityContext:
    {{- include "swiftcache.securityContext" . | nindent 4 }}
  env:
    # The `swiftcache` command finds the broker by this, in the probes and in `kubectl exec`.
    - name: SWIFTCACHE_SOCKET
      value: {{ .Values.paths.sockets }}/broker.sock
    {{- include "swiftcache.gpuEnv" . | nindent 4 }}
    # Only NVML is needed, because the broker never opens a CUDA context.
    - name: NVIDIA_DRIVER_CAPABILITIES
      value: utility
    {{- with .Values.broker.env }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  {{- if or .Values.metrics.enabled .Values.broker.tls.secretName }}
  ports:
    {{- if .Values.metrics.enabled }}
    - name: metrics
      containerPort: {{ .Values.metrics.port }}
    {{- end }}
    {{- if .Values.broker.tls.secretName }}
    - name: admin
      containerPort: {{ include "swiftcache.adminPort" . }}
    {{- end }}
  {{- end }}
  # Probes run a command, because beyond loopback the broker only speaks gRPC with mutual TLS, and the kubelet's gRPC
  # probe cannot do that.
  startupProbe:
    exec:
      command: [swiftcache, status]
    periodSeconds: 1
    timeoutSeconds: 5
    failureThreshold: 60
  readinessProbe:
    exec:
      command: [swiftcache, status]
    periodSeconds: 10
    timeoutSeconds: 5
  livenessProbe:
    exec:
      command: [swiftcache, status]
    periodSeconds: 20
    timeoutSeconds: 10
    failureThreshold: 3
  resources:
    {{- toYaml .Values.broker.resources | nindent 4 }}
  volumeMounts:
    - name: config
      mountPath: /etc/swiftcache
      readOnly: true
    - name: sockets
      mountPath: {{ .Values.paths.sockets }}
    - name: state
      mountPath: {{ .Values.paths.state }}
    {{- if .Values.broker.tls.secretName }}
    - name: tls
      mountPath: /etc/swiftcache-tls
      readOnly: true
    {{- end }}
    {{- with (include "swiftcache.gpuMount" . | trim) }}
    {{- . | nindent 4 }}
    {{- end }}
{{- end }}
