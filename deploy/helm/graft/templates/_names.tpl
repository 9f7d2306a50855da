{{- define "graft.fullname" -}}
{{- if contains "graft" .Release.Name }}{{ .Release.Name | trunc 30 | trimSuffix "-" }}{{ else }}{{ printf "%s-graft" (.Release.Name | trunc 24 | trimSuffix "-") }}{{ end }}
{{- end }}

{{- define "graft.secretName" -}}
{{- .Values.existingSecret | default (include "graft.fullname" .) }}
{{- end }}

{{/* Of one component: (dict "root" $ "component" "api"). */}}
{{- define "graft.selector" -}}
app.kubernetes.io/name: graft
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end }}

{{- define "graft.labels" -}}
{{ include "graft.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version }}
{{- end }}

{{- define "graft.metadata" -}}
name: {{ include "graft.fullname" .root }}-{{ .component }}
namespace: {{ .root.Release.Namespace }}
labels:
  {{- include "graft.labels" . | nindent 2 }}
{{- end }}
