{{/* Names, labels and images. Each takes the root context, or a dict of root and role. */}}

{{- define "unveil.fullname" -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- $full := ternary .Release.Name (printf "%s-%s" .Release.Name $name) (contains $name .Release.Name) -}}
{{- $full | trunc 36 | trimSuffix "-" -}}
{{- end -}}

{{- define "unveil.selector" -}}
app.kubernetes.io/name: {{ default .root.Chart.Name .root.Values.nameOverride | trunc 63 | trimSuffix "-" }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .role }}
{{- end -}}

{{- define "unveil.labels" -}}
{{ include "unveil.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version | replace "+" "_" }}
{{- end -}}

{{- define "unveil.serviceAccount" -}}
{{- default (ternary (include "unveil.fullname" .) "default" .Values.serviceAccount.create) .Values.serviceAccount.name -}}
{{- end -}}

{{- define "unveil.image" -}}
{{- $image := ternary .root.Values.rewardImage .root.Values.image (has .role (list "reward" "test")) -}}
{{- if $image.digest -}}
{{ $image.repository }}@{{ $image.digest }}
{{- else -}}
{{ $image.repository }}:{{ default .root.Chart.AppVersion $image.tag }}
{{- end -}}
{{- end -}}

{{/* Secret with a role's certificate; empty without TLS, and for stage 1, which does not call other roles. */}}
{{- define "unveil.tlsSecret" -}}
{{- $tls := .root.Values.tls -}}
{{- if eq .role "stage1" -}}
{{- else if eq $tls.mode "certManager" -}}
{{ include "unveil.fullname" .root }}-{{ .role }}-tls
{{- else if eq $tls.mode "secret" -}}
{{ index $tls.existingSecrets .role }}
{{- end -}}
{{- end -}}
