{{/* What every pod has. No service links: they are variables of the names of services, and GRAFT_ is our prefix. The
     shared process namespace gives the container a first process that reaps what trainers leave, and lets a signal end
     a process that has not installed its handlers yet. */}}
{{- define "graft.pod" -}}
{{- with .root.Values.images.pullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
automountServiceAccountToken: false
enableServiceLinks: false
shareProcessNamespace: true
securityContext:
  runAsNonRoot: true
  runAsUser: 10001
  runAsGroup: 10001
  fsGroup: 10001
  fsGroupChangePolicy: OnRootMismatch
  seccompProfile: {type: RuntimeDefault}
{{- with .nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{- define "graft.container" -}}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities: {drop: [ALL]}
{{- end }}

{{/* A change of settings has to reach processes that read them once. */}}
{{- define "graft.checksums" -}}
checksum/settings: {{ list .Values.secrets .Values.existingSecret .Values.capacity .Values.catalogue | toJson | sha256sum }}
{{- end }}

{{- define "graft.spread" -}}
topologySpreadConstraints:
  - maxSkew: 1
    topologyKey: kubernetes.io/hostname
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels:
        {{- include "graft.selector" . | nindent 8 }}
{{- end }}

{{- define "graft.fileMounts" -}}
{{- if .Values.models }}
- {name: models, mountPath: /models, readOnly: true}
{{- end }}
{{- if or .Values.capacity .Values.catalogue }}
- {name: tables, mountPath: /etc/graft, readOnly: true}
{{- end }}
{{- end }}

{{- define "graft.fileVolumes" -}}
{{- with .Values.models }}
- name: models
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- if or .Values.capacity .Values.catalogue }}
- {name: tables, configMap: {name: {{ include "graft.fullname" . }}-tables}}
{{- end }}
{{- end }}

{{/* A volume that can be written: what is named beside the default stands in for it. */}}
{{- define "graft.state" -}}
{{- omit . "emptyDir" | default . | toYaml }}
{{- end }}
