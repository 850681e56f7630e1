{{/* Reaction of a Job to the end of a pod, by exit code: 0 success, 1 failure, 2 wrong configuration, 130 interrupted. */}}
{{- define "unveil.failurePolicy" -}}
rules:
  # Preemption, eviction or drain: a new pod, not counted as a failure.
  - action: Ignore
    onPodConditions:
      - type: DisruptionTarget
        status: "True"
  # A wrong configuration cannot be fixed by a retry.
  - action: FailJob
    onExitCodes:
      operator: In
      values: [2]
  # The pod, or another pod of the Job, was asked to stop and has saved.
  - action: Ignore
    onExitCodes:
      operator: In
      values: [130]
{{- end -}}

{{- define "unveil.learner.spec" -}}
{{- $learner := .Values.learner -}}
{{- $own := dict "root" . "role" "learner" "prepare" "learner" "store" true "gpu" true -}}
{{- $full := include "unveil.fullname" . -}}
{{- $perPod := int $learner.ranksPerPod -}}
{{- $pods := div (int $learner.ranks) $perPod -}}
completionMode: Indexed
completions: {{ $pods }}
parallelism: {{ $pods }}
backoffLimitPerIndex: {{ $learner.backoffLimitPerIndex }}
maxFailedIndexes: 0
podReplacementPolicy: Failed
podFailurePolicy:
  {{- include "unveil.failurePolicy" . | nindent 2 }}
template:
  metadata:
    {{- include "unveil.podMeta" $own | nindent 4 }}
  spec:
    restartPolicy: Never
    subdomain: {{ $full }}-ranks
    {{- include "unveil.podHead" $own | nindent 4 }}
    initContainers:
      {{- include "unveil.init" $own | trim | nindent 6 }}
    containers:
      {{- range $local := until $perPod }}
      - name: rank-{{ $local }}
        image: {{ include "unveil.image" $own }}
        imagePullPolicy: {{ $.Values.image.pullPolicy }}
        command:
          - /bin/sh
          - -ec
          - |
            rank=$((JOB_COMPLETION_INDEX * {{ $perPod }} + {{ $local }}))
            if [ "$rank" -eq 0 ]; then meet=$POD_IP; else meet=$JOB_NAME-0.{{ $full }}-ranks.{{ $.Release.Namespace }}.svc; fi
            case $meet in *:*) meet="[$meet]";; esac
            exec unveil learner --config /etc/unveil/config.toml \
              --set "learner.parallel.rank=$rank" --set "learner.parallel.rendezvous=$meet:29500"
        envFrom:
          {{- include "unveil.envFrom" $own | nindent 10 }}
        env:
          - name: JOB_NAME
            valueFrom:
              fieldRef:
                fieldPath: metadata.labels['batch.kubernetes.io/job-name']
          - name: POD_IP
            valueFrom:
              fieldRef:
                fieldPath: status.podIP
          - name: UNVEIL__HEALTH__LISTEN
            value: 0.0.0.0:{{ add 8086 $local }}
          {{- include "unveil.env" $own | trim | nindent 10 }}
        ports:
          - name: health-{{ $local }}
            containerPort: {{ add 8086 $local }}
          {{- if eq $local 0 }}
          - name: experience
            containerPort: 7070
          - name: metrics
            containerPort: 9464
          - name: rendezvous
            containerPort: 29500
          {{- end }}
        {{- include "unveil.probes" (dict "port" (add 8086 $local)) | nindent 8 }}
        securityContext:
          {{- include "unveil.containerSecurity" $own | nindent 10 }}
        resources:
          {{- include "unveil.resources" $own | nindent 10 }}
        volumeMounts:
          {{- include "unveil.mounts" $own | nindent 10 }}
      {{- end }}
    volumes:
      {{- include "unveil.volumes" $own | nindent 6 }}
{{- end -}}
