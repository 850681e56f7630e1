{{/* What the schema cannot say: values that contradict one another. Rendered once, by config.yaml. */}}
{{- define "unveil.checks" -}}
{{- $learner := .Values.learner -}}
{{- if mod $learner.ranks $learner.ranksPerPod -}}
{{- fail (printf "learner.ranks is %v, which %v ranks a pod (learner.ranksPerPod) do not divide" $learner.ranks $learner.ranksPerPod) -}}
{{- end -}}
{{- $own := list "run.dir" "run.device" "checkpoint.url" "health.listen" "learner.listen" "learner.address" "learner.metrics_listen" "learner.parallel.ranks" "learner.parallel.rank" "learner.parallel.rendezvous" "reward.listen" "reward.service.metrics_listen" -}}
{{- range $key, $_ := .Values.set -}}
{{- if or (has $key $own) (hasPrefix "tls." $key) (hasPrefix "auth." $key) (and (eq $key "reward.address") $.Values.reward.enabled) -}}
{{- fail (printf "set names %s, which the chart itself sets: leave it out" $key) -}}
{{- end -}}
{{- end -}}
{{- if not .Values.auth.existingSecret -}}
{{- fail "auth.existingSecret is empty: a token says which run a caller belongs to, also where certificates say which role it is (an issuer may sign for others too). Make one (kubectl create secret generic unveil-token --from-literal=token=$(openssl rand -hex 32)) and name it" -}}
{{- end -}}
{{- $paths := list "/run/unveil" "/tmp" "/dev/shm" "/etc/unveil" -}}
{{- $names := list "run" "tmp" "shm" "config" "tls" -}}
{{- range .Values.inputs -}}
{{- if eq (hasKey . "volume") (hasKey . "fetch") -}}
{{- fail (printf "inputs: `%s` needs either `volume` or `fetch`" .name) -}}
{{- end -}}
{{- if or (has .name $names) (has .mountPath $paths) -}}
{{- fail (printf "inputs: the name `%s` or the path %s is taken" .name .mountPath) -}}
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
{{- fail "serviceAccount.annotations have no effect where serviceAccount.create is false: annotate the account itself" -}}
{{- end -}}
{{- end -}}
