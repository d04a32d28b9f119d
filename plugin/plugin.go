// Package plugin makes containerd export images as archives.
//
// Importing it registers Export with containerd, as a destination of its
// transfer service, and a plugin that holds Export's settings. In a containerd
// that is built with it, the image store transfers to an Export inside
// containerd: no blob goes through a socket. Against any other containerd the
// same object works in the caller's process; Run chooses.
//
// There is no second transferrer: containerd's CRI and its clients expect to
// find one.
package plugin

import (
	"sync/atomic"

	"github.com/containerd/containerd/v2/core/transfer/plugins"
	containerdplugins "github.com/containerd/containerd/v2/plugins"
	"github.com/containerd/plugin"
	"github.com/containerd/plugin/registry"
	"github.com/containerd/typeurl/v2"

	"github.com/beam-cloud/containerd-clip/plugin/index"
)

// ID is what containerd calls the plugin: io.containerd.internal.v1.clip.
const ID = "clip"

// Config is the plugin's section of containerd's configuration.
type Config struct {
	// CacheDir is where indexes of layers are kept; empty for the directory
	// that containerd gives its plugin.
	CacheDir string `toml:"cache_dir"`
	// Workers is how many layers are indexed at once; 0 for index.Options' default.
	Workers int `toml:"workers"`
}

// settings are those of a containerd that has the plugin. Containerd makes
// destinations out of nothing but what the client sent, so there is no other
// way to hand them over. They are set once, when containerd starts.
var settings atomic.Pointer[index.Options]

func init() {
	typeurl.Register(&wire{}, "cloud.beam.clip", "transfer.v1", "Export")
	plugins.Register(&wire{}, &Export{})
	registry.Register(&plugin.Registration{
		Type:   containerdplugins.InternalPlugin,
		ID:     ID,
		Config: &Config{},
		InitFn: load,
	})
}

func load(ic *plugin.InitContext) (any, error) {
	config := ic.Config.(*Config)
	opts := index.Options{Workers: max(config.Workers, 0)}
	dir := config.CacheDir
	if dir == "" {
		dir = ic.Properties[containerdplugins.PropertyRootDir]
	}
	var err error
	if opts.Cache, err = index.OpenCache(dir, index.DefaultCacheSize); err != nil {
		return nil, err
	}
	settings.Store(&opts)
	return &opts, nil
}
