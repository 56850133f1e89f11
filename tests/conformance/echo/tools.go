//go:build tools

// Package echo names the programs that the suite's mesh manifests call echo-advanced, so that go.mod keeps what they are made of.
package echo

import (
	_ "istio.io/istio/pkg/test/echo/cmd/client"
	_ "istio.io/istio/pkg/test/echo/cmd/server"
)
