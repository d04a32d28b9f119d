package main

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"time"

	"github.com/beam-cloud/clip/pkg/clip"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"golang.org/x/sys/unix"

	"github.com/beam-cloud/containerd-clip/tests/bench/testbed"
	"github.com/beam-cloud/containerd-clip/tests/internal/harness"
	"github.com/beam-cloud/containerd-clip/tests/internal/images"
)

// links are what lies between the registry and the builder in the runs: for base, push and archive alike.
var links = []testbed.Link{
	{Name: "loopback"},
	{Name: "1 Gbit/s", Link: harness.Link{Rate: 125e6, Up: 125e6, Latency: time.Millisecond / 2}},
	{Name: "100 Mbit/s", Link: harness.Link{Rate: 12.5e6, Up: 12.5e6, Latency: 10 * time.Millisecond}},
}

// prepared is what all runs build from.
type prepared struct {
	options harness.Options
	image   v1.Image // the base
	base    int64    // bytes of its layers
	context string   // directory of the build
}

// outcome is what a run took.
type outcome struct {
	build         time.Duration // until the build has pushed the image
	total         time.Duration // until there is an archive
	image         int64         // bytes of the layers
	fetched, sent int64         // bytes from and to the registry
}

// contestant is who makes the archive of an image that was built and pushed.
type contestant struct {
	name    string
	watched bool // the builder's images are indexed by themselves
	index   func(context.Context, *site) error
}

var contestants = []contestant{
	{"ours, by itself", true, awaitArchive},
	{"upstream CLIP", false, indexUpstream},
}

// prepare makes the build's context: an app with weights of a model, such that the image has size bytes.
func prepare(ctx context.Context, size int64) (*prepared, error) {
	options, err := harness.Installed()
	if err != nil {
		return nil, err
	}
	cache := filepath.Join(filepath.Dir(options.Parts), "images")
	dir, err := images.Bench(ctx, cache)
	if err != nil {
		return nil, err
	}
	p := &prepared{options: options}
	if p.image, err = testbed.ReadImage(dir, images.ShortName(images.BenchGzip)); err != nil {
		return nil, err
	}
	if p.base, err = layersSize(p.image); err != nil {
		return nil, err
	}
	if size <= p.base {
		return nil, fmt.Errorf("the base alone has %d bytes", p.base)
	}
	if p.context, err = os.MkdirTemp("", "clip-build-"); err != nil {
		return nil, err
	}
	const shrinks = 0.925 // what gzip leaves of weights
	if err := writeWeights(filepath.Join(p.context, "weights"), int64(float64(size-p.base)/shrinks)); err != nil {
		return nil, errors.Join(err, p.remove())
	}
	return p, nil
}

func (p *prepared) remove() error { return os.RemoveAll(p.context) }

func layersSize(img v1.Image) (n int64, err error) {
	m, err := img.Manifest()
	if err != nil {
		return 0, err
	}
	for _, l := range m.Layers {
		n += l.Size
	}
	return n, nil
}

// writeWeights writes size bytes of floating-point numbers as a model has them, in files of 256 MiB.
func writeWeights(dir string, size int64) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	random := rand.New(rand.NewChaCha8([32]byte{'w'}))
	const part = 256 << 20
	for i := 0; size > 0; i++ {
		f, err := os.Create(filepath.Join(dir, fmt.Sprintf("%02d.bin", i)))
		if err != nil {
			return err
		}
		w := bufio.NewWriterSize(f, 1<<20)
		var b [4]byte
		for range min(size, part) / 4 {
			binary.LittleEndian.PutUint32(b[:], math.Float32bits(float32(random.NormFloat64())))
			_, _ = w.Write(b[:]) // Flush says it
		}
		if err := errors.Join(w.Flush(), f.Close()); err != nil {
			return err
		}
		size -= part
	}
	return nil
}

// site is one builder with all that belongs to it.
type site struct {
	lab      *harness.Lab
	registry *harness.Registry
	builder  *harness.Containerd
	buildkit *harness.Buildkit
	ref      string // of the image that is built
}

// newSite starts a site. With watched, the builder's images are indexed by themselves.
func (p *prepared) newSite(ctx context.Context, watched bool) (_ *site, err error) {
	lab, err := harness.NewLab(p.options)
	if err != nil {
		return nil, err
	}
	s := &site{lab: lab}
	defer func() {
		if err != nil {
			err = errors.Join(err, lab.Close())
		}
	}()
	if s.registry, err = lab.StartRegistry(ctx); err != nil {
		return nil, err
	}
	base, err := name.ParseReference(s.registry.Ref("bench/base:1"))
	if err != nil {
		return nil, err
	}
	if err := remote.Write(base, p.image, remote.WithContext(ctx)); err != nil {
		return nil, err
	}
	dockerfile := "FROM " + base.String() + "\nCOPY weights /srv/weights\nRUN date > /srv/built\nCOPY version /srv/version\n"
	if err := os.WriteFile(filepath.Join(p.context, "Dockerfile"), []byte(dockerfile), 0o644); err != nil {
		return nil, err
	}
	if s.builder, err = lab.StartContainerd(ctx, "builder", nil); err != nil {
		return nil, err
	}
	if watched {
		config := fmt.Sprintf("[watch]\ncontainerd = %q\ncache_dir = %q\n[[watch.rules]]\nnames = [%q]\naction = \"push\"\n",
			s.builder.Socket, lab.Path("cache"), s.registry.Ref("*"))
		if _, err := lab.StartDaemon(ctx, "watcher", config); err != nil {
			return nil, err
		}
	}
	s.buildkit, err = lab.StartBuildkit(ctx, "buildkit", s.builder, "overlayfs", s.registry)
	return s, err
}

// run measures a contestant on a site of its own: a first build, and another one when the last step has changed.
func (p *prepared) run(ctx context.Context, c contestant, l testbed.Link) (both [2]outcome, err error) {
	s, err := p.newSite(ctx, c.watched)
	if err != nil {
		return both, err
	}
	defer func() { err = errors.Join(err, s.lab.Close()) }()
	for i := range both {
		version := fmt.Sprint(i + 1)
		s.ref = s.registry.Ref("bench/app:" + version)
		if err := os.WriteFile(filepath.Join(p.context, "version"), []byte(version), 0o644); err != nil {
			return both, err
		}
		if both[i], err = p.build(ctx, s, c, l); err != nil {
			return both, err
		}
	}
	return both, nil
}

// build measures one build.
func (p *prepared) build(ctx context.Context, s *site, c contestant, l testbed.Link) (o outcome, err error) {
	if err := flush(s.lab.Dir); err != nil { // what earlier builds left to write is not this one's business
		return o, err
	}
	s.registry.Shape(l.Link)
	defer s.registry.Shape(harness.Link{})
	_, fetched := s.registry.Traffic()
	received := s.registry.Received()
	began := time.Now()
	if _, err := s.buildkit.BuildWith(ctx, p.context, "type=image,name="+s.ref+",push=true"); err != nil {
		return o, err
	}
	o.build = time.Since(began)
	if err := c.index(ctx, s); err != nil {
		return o, err
	}
	o.total = time.Since(began)
	_, o.fetched = s.registry.Traffic()
	o.fetched -= fetched
	o.sent = s.registry.Received() - received
	s.registry.Shape(harness.Link{})
	testbed.Say("%s, %s, %s: build and push %.1f s, all %.1f s; fetched %.1f MB, sent %.1f MB",
		c.name, l.Name, s.ref, o.build.Seconds(), o.total.Seconds(), float64(o.fetched)/1e6, float64(o.sent)/1e6)
	o.image, err = s.check(c)
	return o, err
}

func flush(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer f.Close()
	return unix.Syncfs(int(f.Fd()))
}

// check makes sure that the archive is where it belongs, and returns how large the image is.
func (s *site) check(c contestant) (size int64, err error) {
	ref, err := name.ParseReference(s.ref)
	if err != nil {
		return 0, err
	}
	img, err := remote.Image(ref)
	if err != nil {
		return 0, err
	}
	if c.watched {
		id, err := img.Digest()
		if err != nil {
			return 0, err
		}
		list, err := remote.Referrers(ref.Context().Digest(id.String()))
		if err != nil {
			return 0, err
		}
		m, err := list.IndexManifest()
		if err != nil {
			return 0, err
		}
		if len(m.Manifests) != 1 {
			return 0, fmt.Errorf("the registry has %d archives of the image", len(m.Manifests))
		}
	}
	return layersSize(img)
}

// awaitArchive waits until the watcher says that the archive is in the registry.
func awaitArchive(ctx context.Context, s *site) error {
	const labels = "cloud.beam.clip/"
	for {
		image, err := s.builder.Client().ImageService().Get(ctx, s.ref)
		if err != nil {
			return err
		}
		if image.Labels[labels+"archive.linux/"+runtime.GOARCH] != "" {
			return nil
		}
		if reason := image.Labels[labels+"error"]; reason != "" && image.Labels[labels+"retry"] == "" {
			return fmt.Errorf("the watcher gave up: %s", reason)
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// indexUpstream has upstream CLIP's indexer read the image from the registry. What it writes would still have to be
// brought to the workers.
func indexUpstream(ctx context.Context, s *site) error {
	return clip.CreateFromOCIImage(ctx, clip.CreateFromOCIImageOptions{ImageRef: s.ref, OutputPath: s.lab.Path("upstream.clip")})
}
