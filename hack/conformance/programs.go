// Package conformance pins what the aggregated API server is compared with: the server that Kubernetes ships as the
// model of one, and Kubernetes' own reading of a request.
package conformance

import (
	_ "k8s.io/apiserver/pkg/endpoints/request"
	_ "k8s.io/sample-apiserver/pkg/cmd/server"
)
