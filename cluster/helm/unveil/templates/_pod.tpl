{{/* Parts shared by all pods. Each takes a dict of root, role and further keys as named. */}}

{{- define "unveil.podSecurity" -}}
runAsNonRoot: true
{{- if not .root.Values.openshift }}
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
{{- end }}
fsGroupChangePolicy: OnRootMismatch
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{- define "unveil.containerSecurity" -}}
allowPrivilegeEscalation: false
privileged: false
readOnlyRootFilesystem: true
runAsNonRoot: true
capabilities:
  drop: [ALL]
{{- end -}}

{{- define "unveil.podMeta" -}}
labels:
  {{- include "unveil.labels" . | nindent 2 }}
  {{- with .root.Values.podLabels }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
annotations:
  checksum/config: {{ include "unveil.configData" .root | sha256sum | trunc 16 }}
  {{- with .root.Values.podAnnotations }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end -}}

{{/* Pod fields other than its containers. */}}
{{- define "unveil.podHead" -}}
{{- $own := index .root.Values .role -}}
serviceAccountName: {{ include "unveil.serviceAccount" .root }}
automountServiceAccountToken: false
enableServiceLinks: false
terminationGracePeriodSeconds: {{ $own.terminationGracePeriodSeconds }}
securityContext:
  {{- include "unveil.podSecurity" . | nindent 2 }}
{{- with .root.Values.imagePullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $own.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with $own.runtimeClassName }}
runtimeClassName: {{ . }}
{{- end }}
{{- with $own.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $own.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $own.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- if $own.topologySpreadConstraints }}
topologySpreadConstraints:
  {{- range $own.topologySpreadConstraints }}
  - {{- toYaml . | nindent 4 }}
    labelSelector:
      matchLabels:
        {{- include "unveil.selector" $ | nindent 8 }}
  {{- end }}
{{- end }}
{{- end -}}

{{- define "unveil.volumes" -}}
{{- $own := index .root.Values .role -}}
- name: config
  configMap:
    name: {{ include "unveil.fullname" .root }}-config
- name: tmp
  emptyDir:
    sizeLimit: 1Gi
{{- if ne .role "reward" }}
- name: run
  emptyDir:
    sizeLimit: {{ .root.Values.scratch.sizeLimit }}
- name: shm
  emptyDir:
    medium: Memory
    sizeLimit: {{ $own.sharedMemory }}
{{- end }}
{{- with include "unveil.tlsSecret" . }}
- name: tls
  secret:
    secretName: {{ . }}
    defaultMode: 0440
{{- end }}
{{- range .root.Values.inputs }}
{{- if has $.role .roles }}
- name: {{ .name }}
  {{- if .fetch }}
  emptyDir:
    sizeLimit: {{ default "100Gi" .fetch.sizeLimit }}
  {{- else }}
  {{- toYaml .volume | nindent 2 }}
  {{- end }}
{{- end }}
{{- end }}
{{- with $own.extraVolumes }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "unveil.mounts" -}}
{{- $own := index .root.Values .role -}}
- name: config
  mountPath: /etc/unveil/config.toml
  subPath: config.toml
  readOnly: true
- name: tmp
  mountPath: /tmp
{{- if ne .role "reward" }}
- name: run
  mountPath: /run/unveil
- name: shm
  mountPath: /dev/shm
{{- end }}
{{- if include "unveil.tlsSecret" . }}
- name: tls
  mountPath: /etc/unveil/tls
  readOnly: true
{{- end }}
{{- range .root.Values.inputs }}
{{- if has $.role .roles }}
- name: {{ .name }}
  mountPath: {{ .mountPath }}
  readOnly: true
{{- end }}
{{- end }}
{{- with $own.extraVolumeMounts }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* Variables of a single role: device, certificates, token, extraEnv. */}}
{{- define "unveil.env" -}}
{{- $own := index .root.Values .role -}}
{{- if hasKey $own "gpus" }}
- name: UNVEIL__RUN__DEVICE
  value: {{ ternary "cuda" "cpu" (gt (int $own.gpus) 0) }}
{{- end }}
{{- include "unveil.tlsEnv" . }}
{{- with .root.Values.auth.existingSecret }}
- name: UNVEIL_TOKEN
  valueFrom:
    secretKeyRef:
      name: {{ . }}
      key: {{ $.root.Values.auth.key }}
{{- end }}
{{- with $own.extraEnv }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* Common variables from the ConfigMap and, for roles that access the object store, its credentials from a secret. */}}
{{- define "unveil.envFrom" -}}
- configMapRef:
    name: {{ include "unveil.fullname" .root }}-env
{{- if .store }}
{{- with .root.Values.objectStore.existingSecret }}
- secretRef:
    name: {{ . }}
{{- end }}
{{- end }}
{{- end -}}

{{- define "unveil.resources" -}}
{{- $own := index .root.Values .role -}}
{{- $limits := deepCopy $own.resources.limits -}}
{{- if .gpu -}}
{{- if gt (int (default 0 $own.gpus)) 0 -}}
{{- $_ := set $limits .root.Values.gpuResource (toString $own.gpus) -}}
{{- end -}}
{{- if and (hasKey $own "rdma") (dig "rdma" "enabled" false $own) -}}
{{- $_ := set $limits $own.rdma.resource "1" -}}
{{- end -}}
{{- end -}}
requests:
  {{- toYaml $own.resources.requests | nindent 2 }}
limits:
  {{- toYaml $limits | nindent 2 }}
{{- end -}}

{{/* gRPC probes on `port`: alive from the start, ready once the role can work. */}}
{{- define "unveil.probes" -}}
startupProbe:
  grpc:
    port: {{ .port }}
  periodSeconds: 2
  failureThreshold: 60
livenessProbe:
  grpc:
    port: {{ .port }}
  periodSeconds: 20
  timeoutSeconds: 5
  failureThreshold: 3
readinessProbe:
  grpc:
    port: {{ .port }}
    service: ready
  periodSeconds: 5
  timeoutSeconds: 3
  failureThreshold: 2
{{- end -}}

{{/* Init containers that fetch inputs. */}}
{{- define "unveil.fetches" -}}
{{- range .root.Values.inputs }}
{{- if and .fetch (has $.role .roles) }}
- name: fetch-{{ .name }}
  image: {{ .fetch.image }}
  command:
    {{- toYaml .fetch.command | nindent 4 }}
  envFrom:
    {{- include "unveil.envFrom" (dict "root" $.root "store" true) | nindent 4 }}
  env:
    - name: HOME
      value: /tmp
  securityContext:
    {{- include "unveil.containerSecurity" $ | nindent 4 }}
  resources:
    {{- include "unveil.resources" (dict "root" $.root "role" $.role) | nindent 4 }}
  volumeMounts:
    - name: {{ .name }}
      mountPath: {{ .mountPath }}
    - name: tmp
      mountPath: /tmp
{{- end }}
{{- end }}
{{- end -}}

{{/* Init containers that fetch inputs, then run `unveil prepare` for the role `prepare`. */}}
{{- define "unveil.init" -}}
{{- include "unveil.fetches" . }}
- name: prepare
  image: {{ include "unveil.image" . }}
  imagePullPolicy: {{ .root.Values.image.pullPolicy }}
  command: [unveil, prepare, {{ .prepare }}, --config, /etc/unveil/config.toml, --wait, {{ .root.Values.stage1.waitSeconds | quote }}]
  envFrom:
    {{- include "unveil.envFrom" (dict "root" .root "store" true) | nindent 4 }}
  env:
    {{- include "unveil.env" . | trim | nindent 4 }}
  securityContext:
    {{- include "unveil.containerSecurity" . | nindent 4 }}
  resources:
    {{- include "unveil.resources" (dict "root" .root "role" .role) | nindent 4 }}
  volumeMounts:
    {{- include "unveil.mounts" . | nindent 4 }}
{{- end -}}
