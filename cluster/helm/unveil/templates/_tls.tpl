{{/* Where TLS and the token enter the configuration; the only place in the chart that knows those keys. */}}

{{- define "unveil.scheme" -}}
{{- ternary "http" "https" (eq .Values.tls.mode "none") -}}
{{- end -}}

{{/* Of all roles. Without TLS their services listen beyond loopback all the same: the values say so, and so does the program's log. */}}
{{- define "unveil.accessEnv" -}}
{{- if eq .Values.tls.mode "none" }}
UNVEIL__TLS__INSECURE: "true"
{{- end }}
{{- if .Values.auth.existingSecret }}
UNVEIL__AUTH__TOKEN_ENV: UNVEIL_TOKEN
{{- end }}
{{- end -}}

{{/* Of a role that has a certificate. */}}
{{- define "unveil.tlsEnv" -}}
{{- if include "unveil.tlsSecret" . }}
- name: UNVEIL__TLS__DIR
  value: /etc/unveil/tls
{{- end }}
{{- end -}}
