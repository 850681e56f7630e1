{{/* Checks that the schema cannot express: contradicting values. Rendered once, by config.yaml. */}}
{{- define "unveil.checks" -}}
{{- $learner := .Values.learner -}}
{{- if mod $learner.ranks $learner.ranksPerPod -}}
{{- fail (printf "learner.ranks is %v, which is not a multiple of %v ranks per pod (learner.ranksPerPod)" $learner.ranks $learner.ranksPerPod) -}}
{{- end -}}
{{- $own := list "run.dir" "run.device" "checkpoint.url" "health.listen" "learner.listen" "learner.address" "learner.metrics_listen" "learner.parallel.ranks" "learner.parallel.rank" "learner.parallel.rendezvous" "reward.listen" "reward.service.metrics_listen" -}}
{{- range $key, $_ := .Values.set -}}
{{- if or (has $key $own) (hasPrefix "tls." $key) (hasPrefix "auth." $key) (and (eq $key "reward.address") $.Values.reward.enabled) -}}
{{- fail (printf "set contains %s, which the chart sets itself: remove it" $key) -}}
{{- end -}}
{{- end -}}
{{- if not .Values.auth.existingSecret -}}
{{- fail "auth.existingSecret is empty: the token identifies the run of a caller, also with certificates, which only identify its role (an issuer may sign for other runs too). Create a secret (kubectl create secret generic unveil-token --from-literal=token=$(openssl rand -hex 32)) and set its name" -}}
{{- end -}}
{{- $paths := list "/run/unveil" "/tmp" "/dev/shm" "/etc/unveil" -}}
{{- $names := list "run" "tmp" "shm" "config" "tls" -}}
{{- range .Values.inputs -}}
{{- if eq (hasKey . "volume") (hasKey . "fetch") -}}
{{- fail (printf "inputs: `%s` needs either `volume` or `fetch`" .name) -}}
{{- end -}}
{{- if or (has .name $names) (has .mountPath $paths) -}}
{{- fail (printf "inputs: the name `%s` or the path %s is already used" .name .mountPath) -}}
{{- end -}}
{{- $names = append $names .name -}}
{{- $paths = append $paths .mountPath -}}
{{- end -}}
{{- range $role := list "rollout" "reward" -}}
{{- $scale := (index $.Values $role).autoscaling -}}
{{- if and $scale.enabled (gt (int $scale.minReplicas) (int $scale.maxReplicas)) -}}
{{- fail (printf "%s.autoscaling: minReplicas (%v) is above maxReplicas (%v)" $role $scale.minReplicas $scale.maxReplicas) -}}
{{- end -}}
{{- end -}}
{{- if and (not .Values.serviceAccount.create) .Values.serviceAccount.annotations -}}
{{- fail "serviceAccount.annotations have no effect if serviceAccount.create is false: annotate the account itself" -}}
{{- end -}}
{{- end -}}
