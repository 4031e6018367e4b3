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
socket = {{ printf "%s/broker.sock" .Values.paths.sockets | toJson }}
state_dir = {{ .Values.paths.state | toJson }}
{{- if .Values.metrics.enabled }}
metrics_listen = "0.0.0.0:{{ .Values.metrics.port }}"
{{- end }}
{{- range $key, $value := .Values.broker.config }}
{{- if kindIs "float64" $value }}
{{ $key }} = {{ int64 $value }}
{{- else }}
{{ $key }} = {{ toJson $value }}
{{- end }}
{{- end }}
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

{{- define "swiftcache.broker" -}}
- name: broker
  image: {{ include "swiftcache.image" . }}
  imagePullPolicy: {{ .Values.image.pullPolicy }}
  command: [swiftcache-broker, --config, /etc/swiftcache/broker.toml]
  {{- if .Values.donor.enabled }}
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
  {{- if .Values.metrics.enabled }}
  ports:
    - name: metrics
      containerPort: {{ .Values.metrics.port }}
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
    {{- with (include "swiftcache.gpuMount" . | trim) }}
    {{- . | nindent 4 }}
    {{- end }}
{{- end }}
