package command

import (
	"context"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/containerd/log"

	"github.com/beam-cloud/containerd-clip/archive"
	"github.com/beam-cloud/containerd-clip/plugin/clipindex"
	"github.com/beam-cloud/containerd-clip/plugin/export"
	"github.com/beam-cloud/containerd-clip/plugin/index"
)

// Engines of clipctl index.
const (
	engineOurs = "span"
	engineCLIP = "clip"
)

// checkEngine says whether the engine is known and can do what is asked.
func (o indexOptions) checkEngine() error {
	switch {
	case o.engine == engineOurs:
		return nil
	case o.engine != engineCLIP:
		return fmt.Errorf("engine %q: must be %s or %s", o.engine, engineOurs, engineCLIP)
	case o.push || o.to != "":
		return fmt.Errorf("--push and --to need layer indexes, which the engine %s does not make; write a file with -o", engineCLIP)
	}
	return nil
}

// indexWithCLIP is indexOne with upstream CLIP's indexer.
func indexWithCLIP(ctx context.Context, source *export.Source, m export.Manifest, ref string, o indexOptions, several bool, stdout, stderr io.Writer) error {
	if _, limit, err := archive.UpstreamRef(ref); err != nil {
		return err
	} else if limit != "" {
		log.G(ctx).WithField("image", source.Name).Warn(limit)
	}
	path, cleanup, err := o.path(source.Name, m, several)
	if err != nil {
		return err
	}
	defer cleanup()
	start := time.Now()
	progress := newProgress(stderr, m.Layers)
	err = clipindex.WriteFile(ctx, path, source.Provider, index.Of(m, ref), progress)
	progress.close(err)
	if err != nil {
		return fmt.Errorf("indexing %s: %w", source.Name, err)
	}
	st, err := os.Stat(path)
	if err != nil {
		return err
	}
	fmt.Fprintf(stdout, "%s\t%s\t%d layers\t%.1fs\n", path, size(st.Size()), len(m.Layers), time.Since(start).Seconds())
	return nil
}
