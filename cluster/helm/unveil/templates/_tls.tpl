{{/* Where TLS enters the configuration; the only place in the chart that knows those keys. */}}

{{- define "unveil.scheme" -}}
{{- ternary "http" "https" (eq .Values.tls.mode "none") -}}
{{- end -}}

{{- define "unveil.tlsEnv" -}}
{{- if include "unveil.tlsSecret" . }}
{{- if eq .role "reward" }}
- name: UNVEIL__REWARD__SERVICE__TLS_CERT
  value: /etc/unveil/tls/tls.crt
- name: UNVEIL__REWARD__SERVICE__TLS_KEY
  value: /etc/unveil/tls/tls.key
- name: UNVEIL__REWARD__SERVICE__CLIENT_CA
  value: /etc/unveil/tls/ca.crt
{{- else if eq .role "rollout" }}
- name: UNVEIL__REWARD__SERVICE__CA
  value: /etc/unveil/tls/ca.crt
- name: UNVEIL__REWARD__SERVICE__CLIENT_CERT
  value: /etc/unveil/tls/tls.crt
- name: UNVEIL__REWARD__SERVICE__CLIENT_KEY
  value: /etc/unveil/tls/tls.key
{{- end }}
{{- end }}
{{- end -}}
