//go:build tools

// Package tools keeps in go.mod what is built straight from its own module.
package tools

import _ "helm.sh/helm/v4/cmd/helm"
