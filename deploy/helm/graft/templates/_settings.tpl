{{/* (dict "root" $ "name" "GRAFT_…" "key" "…" "optional" true "secret" "another than ours") */}}
{{- define "graft.fromSecret" -}}
- name: {{ .name }}
  valueFrom:
    secretKeyRef:
      name: {{ .secret | default (include "graft.secretName" .root) }}
      key: {{ .key }}
      {{- if .optional }}
      optional: true
      {{- end }}
{{- end }}

{{/* A variable for each value that says something: (dict "GRAFT_…" value …). */}}
{{- define "graft.plain" -}}
{{- range $name, $value := . }}
{{- if not (or (kindIs "invalid" $value) (eq (toString $value) "")) }}
- {name: {{ $name }}, value: {{ if kindIs "float64" $value }}{{ printf "%.17g" $value | quote }}{{ else }}{{ toString $value | quote }}{{ end }}}
{{- end }}
{{- end }}
{{- end }}

{{/* Database and bucket: what every process needs, the first ones included. */}}
{{- define "graft.stores" -}}
{{- include "graft.fromSecret" (dict "root" .root "secret" .secret "name" "GRAFT_DATABASE_URL" "key" "database-url") }}
{{ include "graft.fromSecret" (dict "root" .root "secret" .secret "name" "GRAFT_S3_ACCESS_KEY_ID" "key" "s3-access-key-id" "optional" true) }}
{{ include "graft.fromSecret" (dict "root" .root "secret" .secret "name" "GRAFT_S3_SECRET_ACCESS_KEY" "key" "s3-secret-access-key" "optional" true) }}
{{- with .root.Values.s3 }}
{{- include "graft.plain" (dict "GRAFT_S3_BUCKET" .bucket "GRAFT_S3_ENDPOINT_URL" .endpointUrl "GRAFT_S3_REGION" .region) }}
{{- end }}
{{- end }}

{{- define "graft.broker" -}}
{{- include "graft.fromSecret" (dict "root" . "name" "GRAFT_BROKER_URL" "key" "broker-url") }}
{{- end }}

{{/* What API and workers must agree on. */}}
{{- define "graft.jobs" -}}
{{- include "graft.fromSecret" (dict "root" . "name" "GRAFT_HUB_TOKEN" "key" "hub-token" "optional" true) }}
{{- with .Values }}
{{- include "graft.plain" (dict
  "GRAFT_MODELS_DIR" (ternary "/models" "" (not (empty .models)))
  "GRAFT_CAPACITY_PATH" (ternary "/etc/graft/capacity.yaml" "" (not (empty .capacity)))
  "GRAFT_CATALOGUE_PATH" (ternary "/etc/graft/catalogue.yaml" "" (not (empty .catalogue)))
  "GRAFT_HUB_ALLOWED" .hubAllowed
  "GRAFT_HUB_TOKEN_DATASETS" .hubTokenDatasets
  "GRAFT_DATASET_BUCKETS" .datasetBuckets
  "GRAFT_QUOTA_QUEUED_JOBS" .quotas.queuedJobs
  "GRAFT_QUOTA_RUNNING_JOBS" .quotas.runningJobs
  "GRAFT_QUOTA_GPU_HOURS" .quotas.gpuHours
  "GRAFT_QUOTA_STORED_BYTES" .quotas.storedBytes) }}
{{- end }}
{{- end }}

{{- define "graft.webhooks" -}}
{{- include "graft.fromSecret" (dict "root" . "name" "GRAFT_WEBHOOK_SECRET" "key" "webhook-secret" "optional" true) }}
{{- include "graft.plain" (dict "GRAFT_WEBHOOK_HOSTS" .Values.webhookHosts) }}
{{- end }}

{{/* Figures, and what the operator adds. */}}
{{- define "graft.watched" -}}
{{- include "graft.plain" (dict "GRAFT_METRICS_PORT" .Values.metrics.port "GRAFT_METRICS_HOST" "0.0.0.0") }}
{{- include "graft.plain" .Values.environment }}
{{- end }}

{{- define "graft.environmentFrom" -}}
{{- with .Values.environmentFrom }}
envFrom:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}
