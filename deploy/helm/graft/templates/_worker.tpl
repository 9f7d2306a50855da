{{/* A kind of worker: (dict "root" $ "component" "worker-24gb" "stage" "train" "image" … "worker" its values). */}}
{{- define "graft.worker" -}}
{{- $worker := .worker }}
{{- $values := .root.Values }}
{{- $gpus := int $worker.gpus }}
apiVersion: apps/v1
kind: Deployment
metadata:
  {{- include "graft.metadata" . | nindent 2 }}
spec:
  {{- if not .scaled }}
  replicas: {{ $worker.replicas }}
  {{- end }}
  strategy: {rollingUpdate: {maxSurge: 0, maxUnavailable: {{ $values.unavailable }}}}
  selector:
    matchLabels:
      {{- include "graft.selector" . | nindent 6 }}
  template:
    metadata:
      labels:
        {{- include "graft.labels" . | nindent 8 }}
      annotations:
        {{- include "graft.checksums" .root | nindent 8 }}
    spec:
      serviceAccountName: {{ include "graft.fullname" .root }}-worker
      {{- include "graft.pod" (dict "root" .root "nodeSelector" $worker.nodeSelector "tolerations" $worker.tolerations) | nindent 6 }}
      {{- with $worker.runtimeClassName }}
      runtimeClassName: {{ . }}
      {{- end }}
      terminationGracePeriodSeconds: {{ add $values.drain.checkpointSeconds $values.drain.uploadSeconds }}
      containers:
        - name: worker
          image: {{ .image | quote }}
          imagePullPolicy: {{ $values.images.pullPolicy }}
          command: [python, -m, graft_worker]
          {{- include "graft.container" . | nindent 10 }}
          ports:
            - {name: metrics, containerPort: {{ .root.Values.metrics.port }}}
          {{- include "graft.environmentFrom" .root | nindent 10 }}
          env:
            {{- include "graft.stores" (dict "root" .root) | nindent 12 }}
            {{- include "graft.broker" .root | nindent 12 }}
            {{- include "graft.watched" .root | nindent 12 }}
            {{- include "graft.jobs" .root | nindent 12 }}
            {{- include "graft.plain" (dict
              "GRAFT_WORKER_STAGE" .stage
              "GRAFT_WORKER_DEVICE" (ternary "cuda:0" "cpu" (gt $gpus 0))
              "GRAFT_CACHE_MAX_BYTES" (int64 $worker.cacheMaxBytes)
              "GRAFT_STOP_GRACE_SECONDS" $values.drain.checkpointSeconds) | nindent 12 }}
            - {name: GRAFT_WORKER_NAME, valueFrom: {fieldRef: {fieldPath: metadata.name}}}
          readinessProbe: # the fleet has heard of it lately
            exec: &heard
              command: [python, -m, graft_worker.health]
            initialDelaySeconds: 10
            periodSeconds: 30
            timeoutSeconds: 20
            failureThreshold: 3
          livenessProbe: # who was not heard of for a quarter of an hour holds no lease: nothing is lost with it
            exec: *heard
            initialDelaySeconds: 60
            periodSeconds: 60
            timeoutSeconds: 30
            failureThreshold: 15
          resources:
            {{- $resources := deepCopy $worker.resources }}
            {{- if $gpus }}
            {{- $_ := set $resources "limits" (set ($resources.limits | default dict) "nvidia.com/gpu" $gpus) }}
            {{- end }}
            {{- toYaml $resources | nindent 12 }}
          volumeMounts:
            - {name: state, mountPath: /var/lib/graft}
            - {name: tmp, mountPath: /tmp}
            {{- if $gpus }}
            - {name: shm, mountPath: /dev/shm}
            {{- end }}
            {{- include "graft.fileMounts" .root | nindent 12 }}
      volumes:
        - name: state
          {{- include "graft.state" $worker.state | nindent 10 }}
        - {name: tmp, emptyDir: {}}
        {{- if $gpus }}
        - {name: shm, emptyDir: {medium: Memory, sizeLimit: 1Gi}}
        {{- end }}
        {{- include "graft.fileVolumes" .root | nindent 8 }}
---
{{ include "graft.disruption" (dict "root" .root "component" .component "most" $values.unavailable) }}
{{- end }}

{{/* The values of an entry of `workers`, as JSON, with what it leaves out: (dict "root" $ "entry" .). Not sprig's `merge`,
     which takes a 0 for something left out. */}}
{{- define "graft.workerValues" -}}
{{- $worker := deepCopy .root.Values.workerDefaults }}
{{- range $name, $value := .entry }}
{{- $_ := set $worker $name $value }}
{{- end }}
{{- toJson $worker }}
{{- end }}
