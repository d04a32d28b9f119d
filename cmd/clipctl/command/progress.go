package command

import (
	"fmt"
	"io"
	"os"
	"sync"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/vbauerster/mpb/v8"
	"github.com/vbauerster/mpb/v8/decor"
	"golang.org/x/sys/unix"

	"github.com/beam-cloud/containerd-clip/plugin/index"
)

// progress shows how indexing goes: a bar per layer on a terminal, a line per
// layer elsewhere. It implements index.Progress.
type progress struct {
	w      io.Writer
	layers []ocispec.Descriptor
	start  time.Time
	bars   *mpb.Progress // nil elsewhere
	bar    []*mpb.Bar
	mu     sync.Mutex // serialises lines
}

func newProgress(w io.Writer, layers []ocispec.Descriptor) *progress {
	p := &progress{w: w, layers: layers, start: time.Now()}
	if !isTerminal(w) {
		return p
	}
	p.bars = mpb.New(mpb.WithOutput(w), mpb.WithWidth(40))
	for _, l := range layers {
		p.bar = append(p.bar, p.bars.AddBar(l.Size,
			mpb.PrependDecorators(decor.Name(l.Digest.Encoded()[:12]), decor.CountersKiloByte(" % .1f / % .1f", decor.WC{W: 22})),
			mpb.AppendDecorators(decor.Percentage(decor.WC{W: 5}))))
	}
	return p
}

func isTerminal(w io.Writer) bool {
	f, ok := w.(*os.File)
	if !ok {
		return false
	}
	_, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	return err == nil
}

// Read implements index.Progress.
func (p *progress) Read(i int, n int64) {
	if p.bars != nil {
		p.bar[i].IncrInt64(n)
	}
}

// Done implements index.Progress.
func (p *progress) Done(i int, how index.Outcome) {
	if p.bars != nil {
		p.bar[i].SetTotal(-1, true)
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	outcome := "indexed"
	switch {
	case how.NotLazy != nil:
		outcome = "not lazy"
	case how.Cached:
		outcome = "from cache"
	}
	fmt.Fprintf(p.w, "layer %d/%d %s %s %s after %.1fs\n",
		i+1, len(p.layers), p.layers[i].Digest, size(p.layers[i].Size), outcome, time.Since(p.start).Seconds())
}

// close ends the display.
func (p *progress) close(err error) {
	if p.bars == nil {
		return
	}
	if err != nil {
		for _, b := range p.bar {
			b.Abort(false)
		}
	}
	p.bars.Wait()
}
