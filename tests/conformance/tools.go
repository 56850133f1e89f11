//go:build tools

// Package conformance names the suite, so that go.mod keeps what it is made of. The test that is compiled is the suite's own.
package conformance

import _ "sigs.k8s.io/gateway-api/conformance"
