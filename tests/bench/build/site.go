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

	"github.com/beam-cloud/containerd-clip/tests/bench/testbed"
	"github.com/beam-cloud/containerd-clip/tests/internal/harness"
	"github.com/beam-cloud/containerd-clip/tests/internal/images"
)

// gigabit is the link of the row with one; it is between the registry and who fetches from it.
var gigabit = harness.Link{Rate: 125e6, Latency: time.Millisecond / 2}

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
	total, linked time.Duration // until there is an archive; linked over the gigabit link
	image         int64         // bytes of the layers
	fetched, sent int64         // bytes from and to the registry
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
	dockerfile := "FROM " + base.String() + "\nCOPY weights /srv/weights\nRUN date > /srv/built\n"
	if err := os.WriteFile(filepath.Join(p.context, "Dockerfile"), []byte(dockerfile), 0o644); err != nil {
		return nil, err
	}
	s.ref = s.registry.Ref("bench/app:1")
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

// meter is the clock and the counts of a run.
type meter struct {
	began         time.Time
	fetched, sent int64
}

func (s *site) start() meter {
	_, fetched := s.registry.Traffic()
	return meter{time.Now(), fetched, s.registry.Received()}
}

// stop ends a run.
func (m meter) stop(s *site, o *outcome) {
	o.total = time.Since(m.began)
	_, fetched := s.registry.Traffic()
	o.fetched, o.sent = fetched-m.fetched, s.registry.Received()-m.sent
}

// pushed builds and pushes the image.
func (s *site) pushed(ctx context.Context, dir string, o *outcome, m meter) error {
	_, err := s.buildkit.BuildWith(ctx, dir, "type=image,name="+s.ref+",push=true")
	o.build = time.Since(m.began)
	return err
}

// measureImage asks the registry how large the image is.
func (s *site) measureImage(o *outcome) error {
	ref, err := name.ParseReference(s.ref)
	if err != nil {
		return err
	}
	img, err := remote.Image(ref)
	if err != nil {
		return err
	}
	o.image, err = layersSize(img)
	return err
}

func say(who string, o outcome) {
	fmt.Fprintf(os.Stderr, "%s: build and push %.1f s, all %.1f s, over the link %.1f s; fetched %.1f MB, sent %.1f MB\n",
		who, o.build.Seconds(), o.total.Seconds(), o.linked.Seconds(), float64(o.fetched)/1e6, float64(o.sent)/1e6)
}

// hooked runs a build whose image is indexed by itself.
func (p *prepared) hooked(ctx context.Context) (o outcome, err error) {
	s, err := p.newSite(ctx, true)
	if err != nil {
		return o, err
	}
	defer func() { err = errors.Join(err, s.lab.Close()) }()
	const label = "cloud.beam.clip/archive.linux/" + runtime.GOARCH
	m := s.start()
	if err := s.pushed(ctx, p.context, &o, m); err != nil {
		return o, err
	}
	for {
		image, err := s.builder.Client().ImageService().Get(ctx, s.ref)
		if err != nil {
			return o, err
		}
		if image.Labels[label] != "" {
			break
		}
		select {
		case <-ctx.Done():
			return o, ctx.Err()
		case <-time.After(20 * time.Millisecond):
		}
	}
	m.stop(s, &o)
	say("ours", o)
	return o, s.measureImage(&o)
}

// upstream runs a build and then upstream CLIP's indexer, twice: as fast as loopback is, and over a link.
func (p *prepared) upstream(ctx context.Context) (o outcome, err error) {
	s, err := p.newSite(ctx, false)
	if err != nil {
		return o, err
	}
	defer func() { err = errors.Join(err, s.lab.Close()) }()
	m := s.start()
	if err := s.pushed(ctx, p.context, &o, m); err != nil {
		return o, err
	}
	index := func() error {
		return clip.CreateFromOCIImage(ctx, clip.CreateFromOCIImageOptions{ImageRef: s.ref, OutputPath: s.lab.Path("upstream.clip")})
	}
	if err := index(); err != nil {
		return o, err
	}
	m.stop(s, &o)
	s.registry.Shape(gigabit)
	began := time.Now()
	if err := index(); err != nil {
		return o, err
	}
	o.linked = o.build + time.Since(began)
	say("upstream CLIP", o)
	return o, s.measureImage(&o)
}
