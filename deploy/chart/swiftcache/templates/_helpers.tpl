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

{{/* The broker's settings file. Numbers arrive as floats: TOML and the broker tell 2000 from 2000.0. */}}
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

{{/* Shows every GPU without a device plugin's claim. */}}
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
  # A sidecar: up before the donor starts, and still there while the donor gives its regions back.
  restartPolicy: Always
  {{- end }}
  securityContext:
    {{- include "swiftcache.securityContext" . | nindent 4 }}
  env:
    # Where `swiftcache` finds the broker: in the probes, and for `kubectl exec`.
    - name: SWIFTCACHE_SOCKET
      value: {{ .Values.paths.sockets }}/broker.sock
    {{- include "swiftcache.gpuEnv" . | nindent 4 }}
    # NVML only. The broker never opens a CUDA context.
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
  # By exec: beyond loopback the broker speaks gRPC with mutual TLS only, and the kubelet's probe cannot.
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
