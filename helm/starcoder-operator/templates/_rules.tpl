{{/*
Rights in the namespaces of runs. They equal PERMISSIONS in operator/starcoder_operator/adapters/kinds.py; a test compares.
Leases: patch is for the runs' agents. Nobody may grant what they don't hold, and so no right to escalate is needed.
*/}}
{{- define "starcoder-operator.namespacedRules" -}}
- apiGroups: [starcoder.dev]
  resources: [starcoderruns]
  verbs: [get, list, watch]
- apiGroups: [starcoder.dev]
  resources: [starcoderruns/status]
  verbs: [patch]
- apiGroups: [""]
  resources: [pods]
  verbs: [get, list, watch, create, delete]
- apiGroups: [""]
  resources: [pods/status]
  verbs: [patch]
- apiGroups: [""]
  resources: [configmaps]
  verbs: [get, list, watch, create, update]
- apiGroups: [""]
  resources: [serviceaccounts]
  verbs: [get, create]
- apiGroups: [coordination.k8s.io]
  resources: [leases]
  verbs: [get, list, watch, create, update, patch]
- apiGroups: [rbac.authorization.k8s.io]
  resources: [roles]
  verbs: [get, create, update]
- apiGroups: [rbac.authorization.k8s.io]
  resources: [rolebindings]
  verbs: [get, create, update, delete]
- apiGroups: [scheduling.k8s.io]
  resources: [podgroups]
  verbs: [get, list, watch, create, patch, delete]
- apiGroups: [policy]
  resources: [poddisruptionbudgets]
  verbs: [get, create, patch]
- apiGroups: [events.k8s.io]
  resources: [events]
  verbs: [get, create, patch]
{{- end }}

{{/* Nodes have no namespace. */}}
{{- define "starcoder-operator.clusterRules" -}}
- apiGroups: [""]
  resources: [nodes]
  verbs: [get, list, watch]
{{- end }}
