// Package containerdclip holds what the programs install: containerd's registration of the snapshotter.
package containerdclip

import _ "embed"

// ContainerdConfig is config.toml.example, with the default paths.
//
//go:embed config.toml.example
var ContainerdConfig string
