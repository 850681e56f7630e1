{{/* Variables of all roles: keys that the chart sets instead of the run's configuration. */}}
{{- define "unveil.commonEnv" -}}
{{- $full := include "unveil.fullname" . -}}
{{- $scheme := include "unveil.scheme" . -}}
{{- with .Values.objectStore -}}
UNVEIL__CHECKPOINT__URL: {{ .url | quote }}
{{- with .endpoint }}
AWS_ENDPOINT_URL: {{ . | quote }}
{{- end }}
{{- with .region }}
AWS_REGION: {{ . | quote }}
{{- end }}
{{- if .allowHttp }}
AWS_ALLOW_HTTP: "true"
{{- end }}
{{- end }}
UNVEIL__RUN__DIR: /run/unveil
UNVEIL__HEALTH__LISTEN: 0.0.0.0:8086
UNVEIL__LEARNER__LISTEN: 0.0.0.0:7070
UNVEIL__LEARNER__ADDRESS: {{ $scheme }}://{{ $full }}-learner.{{ .Release.Namespace }}.svc:7070
UNVEIL__LEARNER__METRICS_LISTEN: 0.0.0.0:9464
UNVEIL__LEARNER__PARALLEL__RANKS: {{ .Values.learner.ranks | quote }}
UNVEIL__ROLLOUT__METRICS_LISTEN: 0.0.0.0:9464
UNVEIL__REWARD__LISTEN: 0.0.0.0:7071
UNVEIL__REWARD__SERVICE__METRICS_LISTEN: 0.0.0.0:9464
{{- if .Values.reward.enabled }}
UNVEIL__REWARD__ADDRESS: {{ $scheme }}://{{ $full }}-reward.{{ .Release.Namespace }}.svc:7071
{{- end }}
{{- include "unveil.accessEnv" . }}
{{- range $key, $value := .Values.set }}
UNVEIL__{{ $key | upper | replace "." "__" }}: {{ $value | quote }}
{{- end }}
HOME: /tmp
OMP_WAIT_POLICY: PASSIVE
{{- end -}}

{{/* Data whose change restarts a pod. */}}
{{- define "unveil.configData" -}}
{{ .Values.config }}
{{ include "unveil.commonEnv" . }}
{{- end -}}
