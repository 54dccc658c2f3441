{{/* Names have fewer than 40 characters, as KubeRay makes longer names of them, up to the limit of 63. */}}
{{- define "schoolhouse.fullname" -}}
{{- default .Release.Name .Values.nameOverride | trunc 40 | trimSuffix "-" -}}
{{- end -}}

{{- define "schoolhouse.labels" -}}
app.kubernetes.io/name: schoolhouse
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
{{- end -}}

{{- define "schoolhouse.image" -}}
{{ .Values.image.repository }}:{{ default .Chart.AppVersion .Values.image.tag }}
{{- end -}}

{{/* The pool file: the values under pool, with the paths at which the Secrets of tls and tokens are mounted. */}}
{{- define "schoolhouse.poolFile" -}}
{{- $security := dict -}}
{{- if .Values.tls.secretName -}}
{{- $files := dict "cert" "/etc/schoolhouse-tls/tls.crt" "key" "/etc/schoolhouse-tls/tls.key" -}}
{{- if .Values.tls.mutual -}}
{{- $_ := set $files "client_ca" "/etc/schoolhouse-tls/ca.crt" -}}
{{- end -}}
{{- $_ := set $security "tls" $files -}}
{{- end -}}
{{- if .Values.tokens.secretName -}}
{{- $_ := set $security "tokens" "/etc/schoolhouse-tokens/tokens.yaml" -}}
{{- end -}}
{{- if $security -}}
{{- toYaml (mergeOverwrite (deepCopy .Values.pool) (dict "security" $security)) -}}
{{- else -}}
{{- toYaml .Values.pool -}}
{{- end -}}
{{- end -}}

{{/* A digest of the pool's files and image; it changes when one of them does. */}}
{{- define "schoolhouse.digest" -}}
{{- list (include "schoolhouse.poolFile" .) (toYaml .Values.files) (include "schoolhouse.image" .) | join "\n" | sha256sum | trunc 10 -}}
{{- end -}}

{{/* The first and last port that a replica may listen on: of pool.ports ("7100-7199"), or Linux's ephemeral ports. */}}
{{- define "schoolhouse.replicaPorts" -}}
{{- $ports := default "32768-60999" .Values.pool.ports | toString | splitList "-" -}}
port: {{ first $ports }}
endPort: {{ last $ports }}
{{- end -}}

{{/* The environment, mounts and security context that the head and the workers share. */}}
{{- define "schoolhouse.rayContainer" -}}
image: {{ include "schoolhouse.image" . }}
imagePullPolicy: {{ .Values.image.pullPolicy }}
securityContext:
  {{- toYaml .Values.securityContext | nindent 2 }}
env:
  - {name: RAY_USAGE_STATS_ENABLED, value: "0"}
  {{- include "schoolhouse.authentication" . | nindent 2 }}
  {{- with .Values.env }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
lifecycle:
  preStop:
    exec:
      command: [ray, stop, "--grace-period={{ .Values.shutdown.rayStopSeconds }}"]
volumeMounts:
  - {name: pool, mountPath: /etc/schoolhouse, readOnly: true}
  - {name: shm, mountPath: /dev/shm}
  - {name: ray-logs, mountPath: /tmp/ray}
  {{- if .Values.tls.secretName }}
  - {name: tls, mountPath: /etc/schoolhouse-tls, readOnly: true}
  {{- end }}
  {{- if .Values.tokens.secretName }}
  - {name: tokens, mountPath: /etc/schoolhouse-tokens, readOnly: true}
  {{- end }}
  {{- if .Values.models.existingClaim }}
  - {name: models, mountPath: {{ .Values.models.mountPath | quote }}, readOnly: true}
  {{- end }}
{{- end -}}

{{- define "schoolhouse.pod" -}}
automountServiceAccountToken: {{ and .head .root.Values.autoscaling.enabled }}
terminationGracePeriodSeconds: {{ .root.Values.shutdown.terminationGracePeriodSeconds }}
securityContext:
  {{- toYaml .root.Values.podSecurityContext | nindent 2 }}
{{- with .root.Values.serviceAccount.name }}
serviceAccountName: {{ . }}
{{- end }}
{{- with .root.Values.image.pullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .group.runtimeClassName }}
runtimeClassName: {{ . }}
{{- end }}
{{- with .group.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .group.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .group.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
volumes:
  - name: pool
    configMap: {name: {{ include "schoolhouse.fullname" .root }}-pool}
  - name: shm
    emptyDir: {medium: Memory, sizeLimit: {{ .root.Values.objectStore.shmSize }}}
  - name: ray-logs  # KubeRay shares the volume of this name with its autoscaler
    emptyDir: {}
  {{- with .root.Values.tls.secretName }}
  - name: tls
    secret: {secretName: {{ . }}, defaultMode: 288}  # 0440
  {{- end }}
  {{- with .root.Values.tokens.secretName }}
  - name: tokens
    secret: {secretName: {{ . }}, defaultMode: 288}
  {{- end }}
  {{- with .root.Values.models.existingClaim }}
  - name: models
    persistentVolumeClaim: {claimName: {{ . }}, readOnly: true}
  {{- end }}
{{- end -}}

{{/* The name of the Secret with Ray's token: your own, or the one that KubeRay makes, which has the cluster's name. */}}
{{- define "schoolhouse.authentication" -}}
{{- if .Values.authentication.enabled -}}
- {name: RAY_AUTH_MODE, value: token}
- name: RAY_AUTH_TOKEN
  valueFrom:
    secretKeyRef: {name: {{ default (include "schoolhouse.fullname" .) .Values.authentication.secretName }}, key: auth_token}
{{- else -}}
- {name: RAY_AUTH_MODE, value: disabled}
{{- end -}}
{{- end -}}

{{/* The resources of a worker's container: those of its group, with memory for the checkpoint if its size is given. */}}
{{- define "schoolhouse.workerResources" -}}
{{- $resources := deepCopy .resources -}}
{{- if hasKey . "checkpointGiB" -}}
{{- $memory := dict "memory" (printf "%dGi" (add (int .checkpointGiB) 8)) -}}
{{- range list "requests" "limits" -}}
{{- $_ := set $resources . (merge (deepCopy (get $resources .)) $memory) -}}
{{- end -}}
{{- end -}}
{{- toYaml $resources -}}
{{- end -}}
