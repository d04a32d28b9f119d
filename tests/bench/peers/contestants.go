package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/remote"

	"github.com/beam-cloud/containerd-clip/tests/bench/testbed"
	"github.com/beam-cloud/containerd-clip/tests/internal/images"
)

// contestant is a snapshotter with the images that it wants.
type contestant struct {
	name              string
	open              func(context.Context) (*testbed.Site, error)
	whole, one, forty string // references; no one and forty, no pulls of them, see complete
	works             []testbed.Work

	results map[testbed.Link]*results
}

// complete says whether a contestant does everything, and not just the works of knowing.
func (who *contestant) complete() bool { return who.forty != "" }

// results are what a contestant did on a link, round by round.
type results struct {
	starts         map[string][]testbed.Start // by the name of the work
	find, again    []testbed.Sample           // of which the registry's part is not known
	one, forty     []testbed.Sample           // pulls
	resident, most []int64                    // bytes of the daemon when every file was read, and until then
}

// preparation is what an image needs before it can be pulled.
type preparation struct {
	name    string
	seconds float64
	added   int64 // bytes in the registry
	remark  string
}

// contest is everybody who takes part.
type contest struct {
	*testbed.World
	only         *regexp.Regexp // who is in it besides ours
	contestants  []*contestant
	preparations []preparation
	missing      []string // sentences
}

// knowing are the works of contestants that know the heavy import beforehand: what it gains and what others lose.
var knowing = []testbed.Work{testbed.Echo, testbed.Heavy}

func (c *contest) add(new contestant) {
	if new.name != ours && !c.only.MatchString(new.name) {
		return
	}
	new.results = map[testbed.Link]*results{}
	for _, l := range links {
		new.results[l] = &results{starts: map[string][]testbed.Start{}}
	}
	c.contestants = append(c.contestants, &new)
}

// prepare finds the contestants and makes their images.
func (c *contest) prepare(ctx context.Context) error {
	open := func(ctx context.Context) (*testbed.Site, error) { return c.Open(ctx, testbed.Ours, "") }
	c.add(contestant{name: ours, open: open, whole: c.Whole.Ref, one: c.One.Ref, forty: c.Forty.Ref, works: testbed.Works})
	c.preparations = append(c.preparations, preparation{"`clipctl index`", c.Whole.Index.Took.Seconds(), c.Whole.Archive, "the image stays as it is"})
	c.add(contestant{name: plain, whole: c.Whole.Ref, one: c.One.Ref, forty: c.Forty.Ref, works: testbed.Works,
		open: func(ctx context.Context) (*testbed.Site, error) { return c.Open(ctx, testbed.Plain, "") }})
	for _, peer := range []struct {
		name     string
		programs []string
		prepare  func(context.Context) error
	}{
		{"SOCI", []string{soci.Program, sociConvert}, c.prepareSOCI},
		{"eStargz", []string{stargz.Program, estargzConvert}, c.prepareStargz},
	} {
		if !c.only.MatchString(peer.name) {
			continue
		}
		if missing := slices.DeleteFunc(peer.programs, func(p string) bool { _, err := c.Lab.Look(p); return err == nil }); len(missing) > 0 {
			c.missing = append(c.missing, fmt.Sprintf("%s is missing: %s could not be built and is not in PATH.", peer.name, strings.Join(missing, " and ")))
			continue
		}
		if err := peer.prepare(ctx); err != nil {
			return fmt.Errorf("preparing images for %s: %w", peer.name, err)
		}
	}
	if !c.only.MatchString(recorded) {
		return nil
	}
	return c.prepareRecorded(ctx, open)
}

// Names of contestants, and of what makes images for them.
const (
	ours, plain                 = "ours", "overlayfs"
	estargz, recorded           = "eStargz", "ours, recorded"
	estargzOptimized            = "eStargz, optimized"
	sociConvert, estargzConvert = "soci-convert", "estargz-convert"
)

var (
	soci   = testbed.Peer{Name: "soci", Program: "soci-snapshotter-grpc"}
	stargz = testbed.Peer{Name: "stargz", Program: "containerd-stargz-grpc"}
)

// sociConfig has what differs from the defaults: its daemon looks for artifacts in containerd's content store.
const sociConfig = "[content_store]\ncontainerd_address = '{containerd}'\n"

func (c *contest) prepareSOCI(ctx context.Context) error {
	refs := map[string]string{}
	for _, img := range []testbed.Image{c.Whole, c.One, c.Forty} {
		testbed.Say("making the SOCI index of %s", img.Name)
		dir := c.Lab.Path("layouts", "soci-"+img.Name)
		took, err := c.convert(ctx, sociConvert, dir, img)
		if err != nil {
			return err
		}
		refs[img.Name] = c.Ref("soci-" + img.Name)
		added, err := c.Added(func() error { return pushIndex(ctx, dir, refs[img.Name]) })
		if err != nil {
			return err
		}
		if img.Name == c.Whole.Name {
			c.preparations = append(c.preparations, preparation{"`soci convert` (index version 2)", took, added, "new digests of manifest and image"})
		}
		if err := os.RemoveAll(dir); err != nil {
			return err
		}
	}
	c.add(contestant{name: "SOCI", whole: refs[c.Whole.Name], one: refs[c.One.Name], forty: refs[c.Forty.Name], works: testbed.Works,
		open: func(ctx context.Context) (*testbed.Site, error) { return c.OpenPeer(ctx, soci, sociConfig) }})
	return nil
}

func (c *contest) prepareStargz(ctx context.Context) error {
	refs := map[string]string{}
	for _, img := range []testbed.Image{c.One, c.Forty, c.Whole} {
		testbed.Say("making eStargz of %s", img.Name)
		p, err := c.estargz(ctx, img, img.Name, nil)
		if err != nil {
			return err
		}
		refs[img.Name] = c.Ref("estargz-" + img.Name)
		if img.Name == c.Whole.Name {
			c.preparations = append(c.preparations, p)
		}
	}
	open := func(ctx context.Context) (*testbed.Site, error) { return c.OpenPeer(ctx, stargz, "") }
	c.add(contestant{name: estargz, open: open, whole: refs[c.Whole.Name], one: refs[c.One.Name], forty: refs[c.Forty.Name], works: testbed.Works})

	testbed.Say("making eStargz optimized for the heavy import")
	p, err := c.estargz(ctx, c.Whole, "optimized", func(file string) error { return c.opened(ctx, refs[c.Whole.Name], file) })
	if err != nil {
		return err
	}
	c.preparations = append(c.preparations, p)
	c.add(contestant{name: estargzOptimized, open: open, whole: c.Ref("estargz-optimized"), works: knowing})
	return nil
}

// estargz makes eStargz of an image, or takes what an earlier run made, and pushes it. first writes the file of paths
// to be put first, if any are.
func (c *contest) estargz(ctx context.Context, img testbed.Image, short string, first func(file string) error) (p preparation, err error) {
	const recipe = "estargz-0.19.1-"
	dir, err := images.BenchDerived(c.Cache, recipe+short, func(work string) (string, error) {
		var args []string
		if first != nil {
			args = []string{filepath.Join(work, "first.txt")}
			if err := first(args[0]); err != nil {
				return "", err
			}
		}
		in, out := filepath.Join(work, "in"), filepath.Join(work, "out")
		took, err := c.convert(ctx, estargzConvert, in, img, args...)
		if err != nil {
			return "", err
		}
		made, err := testbed.ReadImage(in, testbed.LayoutTag)
		if err != nil {
			return "", err
		}
		if err := testbed.WriteLayout(out, made); err != nil {
			return "", err
		}
		return out, os.WriteFile(filepath.Join(out, tookFile), strconv.AppendFloat(nil, took, 'f', 2, 64), 0o644)
	})
	if err != nil {
		return p, err
	}
	text, err := os.ReadFile(filepath.Join(dir, tookFile))
	if err != nil {
		return p, err
	}
	p = preparation{name: "`ctr-remote image convert --estargz`", remark: "new layers, new digests of everything"}
	if first != nil {
		p.name = "`ctr-remote image optimize`, without the run that it records"
	}
	if p.seconds, err = strconv.ParseFloat(string(text), 64); err != nil {
		return p, err
	}
	p.added, err = c.Added(func() error { return pushImage(ctx, dir, c.Ref("estargz-"+short)) })
	return p, err
}

// tookFile has in a cached layout the seconds that making it took.
const tookFile = "took"

// convert writes a layout and has a peer's program convert it. It returns the seconds that it took.
func (c *contest) convert(ctx context.Context, program, dir string, img v1.Image, args ...string) (float64, error) {
	if err := testbed.WriteLayout(dir, img); err != nil {
		return 0, err
	}
	result, err := c.Lab.Run(ctx, program, append([]string{dir}, args...)...)
	return result.Took.Seconds(), err
}

var openedLine = regexp.MustCompile(`msg="?file accessed: ([^" ]+)`)

// opened writes to a file which paths the heavy import opens, as stargz-snapshotter sees it.
func (c *contest) opened(ctx context.Context, ref, file string) (err error) {
	s, err := c.OpenPeer(ctx, stargz, "log_file_access = true\n", "--log-level", "debug")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.Close(ctx, ref)) }()
	if _, err := s.Cold(ctx, testbed.Unshaped, ref, testbed.Heavy); err != nil {
		return err
	}
	var paths strings.Builder
	seen := map[string]bool{}
	for _, match := range openedLine.FindAllStringSubmatch(s.Process.Log(), -1) {
		if path := match[1]; !seen[path] {
			seen[path] = true
			fmt.Fprintln(&paths, path)
		}
	}
	if len(seen) < 100 {
		return fmt.Errorf("the daemon has logged %d opened files, which cannot be all:\n%.2000s", len(seen), s.Process.Log())
	}
	testbed.Say("the heavy import opens %d files", len(seen))
	return os.WriteFile(file, []byte(paths.String()), 0o644)
}

// prepareRecorded publishes image M once more, with an archive that knows the heavy import.
func (c *contest) prepareRecorded(ctx context.Context, open func(context.Context) (*testbed.Site, error)) (err error) {
	testbed.Say("recording the heavy import")
	img, err := c.Publish(ctx, "recorded", c.Whole.Image)
	if err != nil {
		return err
	}
	s, err := open(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.Close(ctx, img.Ref)) }()
	if _, err := s.Pull(ctx, img.Ref); err != nil {
		return err
	}
	result, err := s.Clipctl(ctx, append([]string{"record", img.Ref, "--push", "--"}, testbed.Heavy.Command...)...)
	if err != nil {
		return err
	}
	c.preparations = append(c.preparations, preparation{"`clipctl record`, with the run that it records", result.Took.Seconds(), 0, "the image stays as it is"})
	c.add(contestant{name: recorded, open: open, whole: img.Ref, works: knowing})
	return nil
}

// pushImage pushes the image of a layout.
func pushImage(ctx context.Context, dir, to string) error {
	img, err := testbed.ReadImage(dir, testbed.LayoutTag)
	if err != nil {
		return err
	}
	ref, err := name.ParseReference(to)
	if err != nil {
		return err
	}
	return remote.Write(ref, img, remote.WithContext(ctx))
}

// pushIndex pushes the image index that is the image of a layout.
func pushIndex(ctx context.Context, dir, to string) error {
	top, err := layout.ImageIndexFromPath(dir)
	if err != nil {
		return err
	}
	manifest, err := top.IndexManifest()
	if err != nil {
		return err
	}
	index, err := top.ImageIndex(manifest.Manifests[0].Digest)
	if err != nil {
		return err
	}
	ref, err := name.ParseReference(to)
	if err != nil {
		return err
	}
	return remote.WriteIndex(ref, index, remote.WithContext(ctx))
}
