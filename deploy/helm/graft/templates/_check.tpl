{{/* What a schema cannot say. */}}
{{- define "graft.check" -}}
{{- with .Values }}
{{- range $image := list "api" "prepare" "worker" }}
{{- if not (index $.Values.images $image) }}
{{- fail (printf "images.%s: where your registry has the image graft-%s; deploy/README.md tells how it is built" $image $image) }}
{{- end }}
{{- end }}
{{- if not .existingSecret }}
{{- if not (hasPrefix "postgresql://" .secrets.databaseUrl) }}
{{- fail "secrets.databaseUrl: postgresql://user:password@host:5432/graft; or name a Secret of yours in existingSecret" }}
{{- end }}
{{- if not .secrets.brokerUrl }}
{{- fail "secrets.brokerUrl: redis://:password@host:6379/0; or name a Secret of yours in existingSecret" }}
{{- end }}
{{- if not (or .secrets.apiKeys .secrets.keyPepper) }}
{{- fail "secrets.apiKeys: the API does not start without a key; tenant=key, and `openssl rand -hex 24` makes one" }}
{{- end }}
{{- if ne (empty .secrets.s3AccessKeyId) (empty .secrets.s3SecretAccessKey) }}
{{- fail "secrets.s3AccessKeyId and secrets.s3SecretAccessKey: both, or neither for the identity of the pod" }}
{{- end }}
{{- end }}
{{- if .networkPolicy.enabled }}
{{- range $edge, $address := dict "postgres" .secrets.databaseUrl "redis" .secrets.brokerUrl "store" .s3.endpointUrl }}
{{- $port := include "graft.port" $address }}
{{- if and $port (ne $port (toString (index $.Values.networkPolicy $edge).port)) }}
{{- fail (printf "networkPolicy.%s.port: %s, as the address says; or nothing would get there" $edge $port) }}
{{- end }}
{{- end }}
{{- end }}
{{- $classes := list }}
{{- range .workers }}
{{- if has .class $classes }}
{{- fail (printf "workers: the class %s is there twice; raise its replicas instead" .class) }}
{{- end }}
{{- $classes = append $classes .class }}
{{- if $.Values.capacity }}
{{- if not (hasKey (fromYaml $.Values.capacity).classes .class) }}
{{- fail (printf "workers: capacity has no class %s" .class) }}
{{- end }}
{{- end }}
{{- end }}
{{- if and .ingress.enabled (not .ingress.host) }}
{{- fail "ingress.host: the name by which users reach the API" }}
{{- end }}
{{- if and .metrics.podMonitor.enabled .networkPolicy.enabled (not .networkPolicy.metrics) }}
{{- fail "networkPolicy.metrics: where Prometheus is, or nothing would let it in" }}
{{- end }}
{{- end }}
{{- end }}

{{/* The port of an address, if it is one. */}}
{{- define "graft.port" -}}
{{- $usual := dict "postgresql" "5432" "redis" "6379" "rediss" "6379" "https" "443" "http" "80" }}
{{- $host := regexReplaceAll "^[a-z]+://([^@/]*@)?([^/?]*).*$" . "${2}" }}
{{- if . }}{{ regexFind ":[0-9]+$" $host | trimPrefix ":" | default (get $usual (regexFind "^[a-z]+" .)) }}{{ end }}
{{- end }}
