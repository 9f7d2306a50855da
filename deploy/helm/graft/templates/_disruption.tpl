{{/* Of so many at a time: a floor (`minAvailable`) would keep the node of a single pod from ever being drained. */}}
{{- define "graft.disruption" -}}
apiVersion: policy/v1
kind: PodDisruptionBudget
metadata:
  {{- include "graft.metadata" . | nindent 2 }}
spec:
  maxUnavailable: {{ .most }}
  selector:
    matchLabels:
      {{- include "graft.selector" . | nindent 6 }}
{{- end }}
