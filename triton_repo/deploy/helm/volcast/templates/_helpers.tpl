{{- define "volcast.name" -}}
{{- printf "%s-%s" .Release.Name .Chart.Name | trunc 63 | trimSuffix "-" -}}
{{- end -}}

{{- define "volcast.selector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "volcast.labels" -}}
{{ include "volcast.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end -}}

{{- define "volcast.secret" -}}
{{- if .Values.existingSecret -}}
{{ .Values.existingSecret }}
{{- else if .Values.keys -}}
{{ include "volcast.name" . }}
{{- else -}}
{{ fail "give keys or existingSecret: volcast serves nobody beyond its own machine without API keys" }}
{{- end -}}
{{- end -}}

{{/* MiB of /dev/shm, see docs/deploy.md: 2 x instances x (input + output), float32. */}}
{{- define "volcast.shm" -}}
{{- $volume := div (add (mul 4 (int64 .Values.serve.maxVoxels)) 1048575) 1048576 -}}
{{- mul 2 (max 1 (int .Values.gpus)) 2 $volume -}}
{{- end -}}

{{/* MiB requested, see docs/deploy.md: /dev/shm is of the container's memory too. */}}
{{- define "volcast.memory" -}}
{{- add (int .Values.modelMib) (int .Values.serve.storeMib) (int .Values.serve.heldMib) (int (include "volcast.shm" .)) -}}
{{- end -}}
