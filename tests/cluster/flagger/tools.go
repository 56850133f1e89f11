//go:build tools

// Package flagger names Flagger's controller, so that go.mod keeps what it is made of.
package flagger

import _ "github.com/fluxcd/flagger/cmd/flagger"
