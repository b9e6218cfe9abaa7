{{- define "mcp-auth-proxy.name" -}}
{{- printf "%s" (ternary .Release.Name (printf "%s-mcp-auth-proxy" .Release.Name) (contains "mcp-auth-proxy" .Release.Name)) | replace "." "-" | trunc 63 | trimSuffix "-" -}}
{{- end }}

{{- define "mcp-auth-proxy.selector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "mcp-auth-proxy.labels" -}}
{{ include "mcp-auth-proxy.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end }}

{{/* Whether the store is a PostgreSQL database, which all replicas use. */}}
{{- define "mcp-auth-proxy.postgresql" -}}
{{- if .Values.store.url }}yes{{ end -}}
{{- end }}

{{- define "mcp-auth-proxy.persistent" -}}
{{- $default := and (eq .Values.mode "shared") (not .Values.store.url) -}}
{{- if kindIs "invalid" .Values.persistence.enabled }}{{ if $default }}yes{{ end }}{{ else if .Values.persistence.enabled }}yes{{ end -}}
{{- end }}

{{/* Faults of the values. Each message names the value and the remedy. */}}
{{- define "mcp-auth-proxy.check" -}}
{{- if not (has .Values.mode (list "shared" "sidecar")) }}{{ fail (printf "mode is %q; it must be shared or sidecar" .Values.mode) }}{{ end -}}
{{- if lt (int .Values.replicas) 1 }}{{ fail (printf "replicas is %v; it must be 1 or more" .Values.replicas) }}{{ end -}}
{{- if and (gt (int .Values.replicas) 1) (not .Values.store.url) }}{{ fail (printf "replicas is %v; it must be 1, because the SQLite store works on one host, or set store.url to a postgresql:// database" .Values.replicas) }}{{ end -}}
{{- with .Values.store.url -}}
{{- if not (or (regexMatch "^postgres(ql)?://" .) (regexMatch "^file:/run/secrets/mcp-auth-proxy/[^/]+$" .)) }}{{ fail "store.url must be postgresql://USER@HOST/DATABASE, or file:/run/secrets/mcp-auth-proxy/KEY with the URL in the Secret; leave it empty for SQLite" }}{{ end -}}
{{- if or (regexMatch "^[^/]*//[^/?@]*:[^/?@]*@" .) (regexMatch "[?&]password=" .) }}{{ fail "store.url has a password, and the configuration is a ConfigMap; put the URL into the Secret, and set store.url to file:/run/secrets/mcp-auth-proxy/KEY" }}{{ end -}}
{{- if $.Values.persistence.enabled }}{{ fail "persistence.enabled is true; with store.url everything is in the database, so remove it" }}{{ end -}}
{{- end -}}
{{- if and .Values.store.importSecret (not (or .Values.store.url (include "mcp-auth-proxy.persistent" .))) }}{{ fail "store.importSecret needs a store that outlasts the pod, because the refresh tokens in the Secret are used up after the first renewal; set persistence.enabled or store.url" }}{{ end -}}
{{- if not .Values.secretName }}{{ fail "secretName is empty; create a Secret with the key store-key and name it (values.yaml has the command)" }}{{ end -}}
{{- if not .Values.config.servers }}{{ fail "config.servers is empty; at least one server must be configured" }}{{ end -}}
{{- range $key := list "listen" "health_listen" "health_quit" "store" "public_url" }}
{{- if hasKey $.Values.config $key }}{{ fail (printf "config.%s is set by the chart; remove it (public_url is the value publicUrl)" $key) }}{{ end -}}
{{- end -}}
{{- range $server, $settings := .Values.config.servers }}
{{- $oauth := get ($settings | default dict) "oauth" | default dict -}}
{{- $idp := get $oauth "idp" | default dict -}}
{{- $secrets := dict "client_secret" (get $oauth "client_secret") "private_key" (get $oauth "private_key") "idp.client_secret" (get $idp "client_secret") -}}
{{- range $key, $text := $secrets }}
{{- if and $text (not (hasPrefix "file:" (toString $text))) }}{{ fail (printf "config.servers.%s.oauth.%s must be file:/run/secrets/mcp-auth-proxy/KEY, with the value in the Secret; the configuration is a ConfigMap" $server $key) }}{{ end -}}
{{- end -}}
{{- end -}}
{{- if and (eq .Values.mode "shared") (not .Values.allowAnonymous) }}{{ fail "allowAnonymous is false; whoever reaches the Service uses its grants, so set it to true if the NetworkPolicy lets only those callers through who may" }}{{ end -}}
{{- if and (eq .Values.mode "sidecar") (not .Values.agent.image) }}{{ fail "agent.image is empty; with mode sidecar it is the container that uses the proxy" }}{{ end -}}
{{- end }}

{{/* The configuration file. */}}
{{- define "mcp-auth-proxy.config" -}}
{{- $shared := eq .Values.mode "shared" -}}
{{- $config := deepCopy .Values.config -}}
{{- $_ := set $config "listen" (ternary "0.0.0.0:8787" "127.0.0.1:8787" $shared) -}}
{{- $_ := set $config "health_listen" "0.0.0.0:8788" -}}
{{- $store := dict "url" (.Values.store.url | default "sqlite:////data/mcp-auth-proxy.db") "keys" (list "file:/run/secrets/mcp-auth-proxy/store-key") -}}
{{- if .Values.store.importSecret -}}
{{- $_ := set $store "import" (list "file:/run/secrets/mcp-auth-proxy-logins/logins") -}}
{{- $_ := set $store "import_passphrase" "file:/run/secrets/mcp-auth-proxy/import-passphrase" -}}
{{- end -}}
{{- $_ := set $config "store" $store -}}
{{- with .Values.publicUrl }}{{ $_ := set $config "public_url" . }}{{ end -}}
{{- if $shared -}}
{{- $inbound := dict "allow_anonymous" true -}}
{{- $name := include "mcp-auth-proxy.name" . -}}
{{- $hosts := list $name (printf "%s.%s" $name .Release.Namespace) (printf "%s.%s.svc" $name .Release.Namespace) (printf "%s.%s.svc.cluster.local" $name .Release.Namespace) -}}
{{- $given := $config.inbound | default dict -}}
{{- $_ := set $inbound "allowed_hosts" (concat $hosts ($given.allowed_hosts | default list) | uniq) -}}
{{- $_ := set $config "inbound" (merge $inbound $given) -}}
{{- end -}}
{{- toYaml $config -}}
{{- end }}

{{/* The proxy's container; with mode sidecar an init container that keeps running. */}}
{{- define "mcp-auth-proxy.container" -}}
name: mcp-auth-proxy
image: "{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}"
imagePullPolicy: {{ .Values.image.pullPolicy }}
{{- if eq .Values.mode "sidecar" }}
restartPolicy: Always
{{- end }}
ports:
  {{- if eq .Values.mode "shared" }}
  - {name: http, containerPort: 8787}
  {{- end }}
  - {name: health, containerPort: 8788}
startupProbe:
  httpGet: {path: /readyz, port: health}
  periodSeconds: 1
  timeoutSeconds: 5
  failureThreshold: 60
readinessProbe:
  httpGet: {path: /readyz, port: health}
  periodSeconds: 10
  timeoutSeconds: 5
livenessProbe:
  httpGet: {path: /healthz, port: health}
  periodSeconds: 20
  timeoutSeconds: 5
  failureThreshold: 3
{{- if and (include "mcp-auth-proxy.postgresql" .) (eq .Values.mode "shared") }}
# Until all nodes know that this pod ends, requests still come to it, and are served.
lifecycle:
  preStop:
    exec: {command: [python3, -c, "import time; time.sleep(5)"]}
{{- end }}
resources:
  {{- toYaml .Values.resources | nindent 2 }}
securityContext:
  runAsNonRoot: true
  runAsUser: 10001
  runAsGroup: 0
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities: {drop: [ALL]}
  seccompProfile: {type: RuntimeDefault}
volumeMounts:
  - {name: config, mountPath: /etc/mcp-auth-proxy, readOnly: true}
  - {name: secrets, mountPath: /run/secrets/mcp-auth-proxy, readOnly: true}
  {{- if .Values.store.importSecret }}
  - {name: logins, mountPath: /run/secrets/mcp-auth-proxy-logins, readOnly: true}
  {{- end }}
  - {name: data, mountPath: /data}
{{- end }}

{{- define "mcp-auth-proxy.volumes" -}}
- name: config
  configMap: {name: {{ include "mcp-auth-proxy.name" . }}}
- name: secrets
  secret: {secretName: {{ .Values.secretName | quote }}, defaultMode: 0400}
{{- with .Values.store.importSecret }}
- name: logins
  secret: {secretName: {{ . | quote }}, defaultMode: 0400}
{{- end }}
- name: data
  {{- if include "mcp-auth-proxy.persistent" . }}
  persistentVolumeClaim: {claimName: {{ .Values.persistence.existingClaim | default (include "mcp-auth-proxy.name" .) | quote }}}
  {{- else }}
  emptyDir: {sizeLimit: 64Mi}
  {{- end }}
{{- end }}
