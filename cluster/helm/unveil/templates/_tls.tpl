{{/* Configuration keys of TLS and of the token; the only place in the chart that uses them. */}}

{{- define "unveil.scheme" -}}
{{- ternary "http" "https" (eq .Values.tls.mode "none") -}}
{{- end -}}

{{/* Variables of all roles. Without TLS, services listen on all addresses in plaintext, as chosen in the values; the program logs a warning. */}}
{{- define "unveil.accessEnv" -}}
{{- if eq .Values.tls.mode "none" }}
UNVEIL__TLS__INSECURE: "true"
{{- end }}
{{- if .Values.auth.existingSecret }}
UNVEIL__AUTH__TOKEN_ENV: UNVEIL_TOKEN
{{- end }}
{{- end -}}

{{/* Variables of a role with a certificate. */}}
{{- define "unveil.tlsEnv" -}}
{{- if include "unveil.tlsSecret" . }}
- name: UNVEIL__TLS__DIR
  value: /etc/unveil/tls
{{- end }}
{{- end -}}
