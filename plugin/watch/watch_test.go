package watch

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	eventsapi "github.com/containerd/containerd/api/events"
	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/events"
	"github.com/containerd/containerd/v2/core/images"
	ctdarchive "github.com/containerd/containerd/v2/core/images/archive"
	"github.com/containerd/containerd/v2/plugins/content/local"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/containerd/typeurl/v2"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/beam-cloud/containerd-clip/archive"
	"github.com/beam-cloud/containerd-clip/internal/testutil"
	"github.com/beam-cloud/containerd-clip/plugin/export"
)

func TestNewRefuses(t *testing.T) {
	push := Rule{Action: "push"}
	for name, c := range map[string]struct {
		opts    Options
		message string
	}{
		"no namespace":     {Options{Directory: "/d", Rules: []Rule{push}}, "no namespace"},
		"no action":        {Options{Directory: "/d", Namespaces: []string{"default"}, Rules: []Rule{push, {}}}, "rule 2: there is neither an action"},
		"no such bucket":   {Options{Directory: "/d", Namespaces: []string{"default"}, Rules: []Rule{push, {To: "ftp://host"}}}, `rule 2: to: location "ftp://host"`},
		"bad object name":  {Options{Directory: "/d", Namespaces: []string{"default"}, Rules: []Rule{{To: "s3://b/{{.Size}}.clip"}}}, "Size"},
		"unknown action":   {Options{Directory: "/d", Namespaces: []string{"default"}, Rules: []Rule{{Action: "pull"}}}, `action "pull" is none of`},
		"no directory":     {Options{Namespaces: []string{"default"}, Rules: []Rule{push}}, "no directory"},
		"bad platform":     {Options{Directory: "/d", Namespaces: []string{"default"}, Rules: []Rule{{Action: "push", Platforms: []string{"a/b/c/d"}}}}, `platform "a/b/c/d"`},
		"bad template":     {Options{Directory: "/d", Namespaces: []string{"default"}, Rules: []Rule{{Action: "push", StorageRef: "{{.Name"}}}, "storage_ref"},
		"unknown field":    {Options{Directory: "/d", Namespaces: []string{"default"}, Rules: []Rule{{Action: "push", StorageRef: "{{.Image}}"}}}, "Image"},
		"not a reference":  {Options{Directory: "/d", Namespaces: []string{"default"}, Rules: []Rule{{Action: "push", StorageRef: "Not A Ref"}}}, "Not A Ref"},
		"all that is good": {Options{Directory: "/d", Namespaces: []string{"default"}, Rules: []Rule{push, {Action: "index", Platforms: []string{"all"}}, {To: "s3://b"}, {Action: "both", To: "file:///d"}}}, ""},
	} {
		_, err := New(c.opts)
		if c.message == "" {
			require.NoError(t, err, name)
			continue
		}
		require.ErrorContains(t, err, c.message, name)
	}
}

func compiled(t *testing.T, r Rule) rule {
	t.Helper()
	if r.Action == "" {
		r.Action = "push"
	}
	c, err := r.compile()
	require.NoError(t, err)
	return c
}

func TestMatch(t *testing.T) {
	sha := digest.FromString("")
	for _, c := range []struct {
		rule  Rule
		name  string
		label map[string]string
		want  bool
	}{
		{Rule{}, "example.com/app:1", nil, true},
		{Rule{Names: []string{"example.com/*"}}, "example.com/a/b:1", nil, true},
		{Rule{Names: []string{"other/*", "*:1"}}, "example.com/a/b:1", nil, true},
		{Rule{Names: []string{"example.com/*"}}, "exampleXcom/a", nil, false},
		{Rule{Names: []string{"example.com/*"}}, "my.example.com/a", nil, false},
		{Rule{Names: []string{"example.com/a"}}, "example.com/a:1", nil, false},
		{Rule{Labels: map[string]string{"clip": "auto"}}, "a:1", map[string]string{"clip": "auto"}, true},
		{Rule{Labels: map[string]string{"clip": "auto"}}, "a:1", map[string]string{"clip": "no"}, false},
		{Rule{Labels: map[string]string{"clip": ""}}, "a:1", map[string]string{"clip": "no"}, true},
		{Rule{Labels: map[string]string{"clip": ""}}, "a:1", nil, false},
		{Rule{}, "sha256:" + strings.Repeat("a", 64), nil, false},
		{Rule{}, ctdarchive.DigestTranslator("overlayfs")(sha), nil, false},
		{Rule{}, ctdarchive.DigestTranslator("clip")(sha), nil, false},
		{Rule{}, ctdarchive.DigestTranslator("import")(sha), nil, false},
		{Rule{}, ctdarchive.DigestTranslator("import-2026-11-23")(sha), nil, false},
		{Rule{}, ctdarchive.AddRefPrefix("import-2026-11-23")("1"), nil, false},
		{Rule{}, "moby-dangling@" + sha.String(), nil, false},
		{Rule{}, "example.com/app:1-tmp-reduced-platform", nil, false},
		{Rule{}, "example.com/app:1-tmp-esgz", nil, false},
		{Rule{}, "example.com/app@" + sha.String(), nil, true},
		{Rule{}, "localhost/app@" + sha.String(), nil, true},
		{Rule{}, "example.com:5000/app:1@" + sha.String(), nil, true},
		{Rule{}, "import-registry.example.com/app:1", nil, true},
		{Rule{}, "import-2026-11-23/app:1", nil, true},
		{Rule{}, "sha256/app:1", nil, true},
		{Rule{}, "app:1-tmp-esgz-2", nil, true},
	} {
		w := &Watcher{rules: []rule{compiled(t, c.rule)}}
		_, ok := w.match(images.Image{Name: c.name, Labels: c.label})
		require.Equal(t, c.want, ok, "%+v %s", c.rule, c.name)
		if ok {
			require.True(t, w.mayMatch(c.name))
		}
	}
	w := &Watcher{rules: []rule{compiled(t, Rule{Names: []string{"a*"}, Action: "push"}), compiled(t, Rule{Action: "index"})}}
	first, _ := w.match(images.Image{Name: "app:1"})
	second, _ := w.match(images.Image{Name: "other:1"})
	require.Equal(t, []string{"push", "index"}, []string{first.action, second.action}, "the first rule that matches holds")
}

func TestReference(t *testing.T) {
	sha := "sha256:" + strings.Repeat("a", 64)
	for _, c := range []struct{ text, name, ref, repository string }{
		{"", "example.com/team/app:1", "example.com/team/app:1", "example.com/team/app"},
		{"", "example.com/team/app@" + sha, "example.com/team/app@" + sha, "example.com/team/app"},
		{"registry.local:5000/{{.Path}}:{{.Tag}}", "docker.io/library/app:2", "registry.local:5000/library/app:2", "registry.local:5000/library/app"},
		{"registry.local/{{.Domain}}/{{.Path}}@{{.Digest}}", "example.com/app@" + sha, "registry.local/example.com/app@" + sha, "registry.local/example.com/app"},
	} {
		got, err := compiled(t, Rule{StorageRef: c.text}).reference(c.name)
		require.NoError(t, err, c.name)
		require.Equal(t, place{ref: c.ref, repository: c.repository}, got)
	}
	_, err := compiled(t, Rule{}).reference("Not A Name")
	require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
	_, err = compiled(t, Rule{StorageRef: "registry.local/{{.Path}}:{{.Tag}}"}).reference("example.com/app@" + sha)
	require.ErrorIs(t, err, errdefs.ErrInvalidArgument, "no tag")
}

// TestPlan has another place be another plan, and what a name has to do with it.
func TestPlan(t *testing.T) {
	image := images.Image{Name: "example.com/app:1", Target: ocispec.Descriptor{Digest: digest.FromString("target")}}
	plan := func(r Rule) string {
		c, err := r.compile()
		require.NoError(t, err)
		at, err := c.place(image)
		require.NoError(t, err)
		return c.plan(at)
	}
	here := platforms.DefaultString()
	require.Equal(t, "push "+here+" example.com/app", plan(Rule{Action: "push"}))
	require.Equal(t, "push "+here+" example.com/app s3://b/1.clip", plan(Rule{Action: "push", To: "s3://b/{{.Tag}}.clip?region=r"}))
	require.Equal(t, "store "+here+" example.com/app file:///srv/app/sha256-"+image.Target.Digest.Encoded()+".clip", plan(Rule{To: "file:///srv/{{.Path}}"}))
	c, err := Rule{To: "s3://b/{{slice .Tag 0 1}}.clip"}.compile()
	require.NoError(t, err)
	_, err = c.place(images.Image{Name: "example.com/app@" + image.Target.Digest.String(), Target: image.Target})
	require.ErrorIs(t, err, errdefs.ErrInvalidArgument, "no tag")
}

// TestStore puts an archive into a directory.
func TestStore(t *testing.T) {
	img := testutil.NewImage(t, testutil.Tar(t, testutil.File{Name: "a", Data: "1"}))
	dir, file := t.TempDir(), filepath.Join(t.TempDir(), "a.clip")
	const ref = "registry.example.com/team/app:1"
	img.WriteArchive(t, file, ref)
	c, err := Rule{To: "file://" + dir + "/archives/{{.Path}}-{{.Tag}}.clip"}.compile()
	require.NoError(t, err)
	defer c.to.Close()
	j := job{rule: c, at: place{ref: ref}}
	for range 2 {
		places, err := j.publish(t.Context(), file, img.Descriptor.Digest)
		require.NoError(t, err)
		stored := dir + "/archives/team/app-1.clip"
		require.Equal(t, map[string]string{labelStored: "file://" + stored}, places)
		a, err := archive.OpenFile(stored)
		require.NoError(t, err)
		require.Equal(t, img.Descriptor.Digest, a.Info().Descriptor.Digest)
		require.NoError(t, a.Close())
	}
	one := export.Manifest{Descriptor: img.Descriptor}
	two := export.Manifest{Descriptor: ocispec.Descriptor{Digest: digest.FromString("another platform's")}}
	require.NoError(t, j.checkNames([]export.Manifest{one}))
	require.ErrorIs(t, j.checkNames([]export.Manifest{one, two}), errdefs.ErrInvalidArgument)
	require.NoError(t, job{}.checkNames([]export.Manifest{one, two}))
	require.NoError(t, os.Remove(file))
	_, err = j.publish(t.Context(), file, img.Descriptor.Digest)
	require.ErrorIs(t, err, os.ErrNotExist)
}

func TestSelection(t *testing.T) {
	amd64, arm64 := platforms.MustParse("linux/amd64"), platforms.MustParse("linux/arm64")
	s, err := selection([]string{"linux/amd64", "linux/arm64"})
	require.NoError(t, err)
	require.True(t, s.All && s.Whole && s.Match.Match(amd64) && s.Match.Match(arm64))
	require.False(t, s.Match.Match(platforms.MustParse("linux/riscv64")))
	s, err = selection(nil)
	require.NoError(t, err)
	require.False(t, s.All || s.Whole)
	require.Equal(t, platforms.DefaultString(), s.Name)
}

// TestPlatformsArrive has the content of two platforms arrive blob by blob, the one before the other.
func TestPlatformsArrive(t *testing.T) {
	amd64, arm64, riscv64 := platforms.MustParse("linux/amd64"), platforms.MustParse("linux/arm64"), platforms.MustParse("linux/riscv64")
	image := func(p ocispec.Platform) *testutil.Image {
		return testutil.NewPlatformImage(t, p, testutil.Tar(t, testutil.File{Name: "a", Data: p.Architecture}))
	}
	first, second, unnamed := image(amd64), image(arm64), image(riscv64)
	index := ocispec.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex}
	for _, img := range []*testutil.Image{first, second, unnamed} {
		desc := img.Descriptor
		desc.Platform = &img.Platform
		index.Manifests = append(index.Manifests, desc)
	}
	parsed := func(names ...string) export.Selection {
		s, err := selection(names)
		require.NoError(t, err)
		return s
	}
	for name, order := range map[string][]*testutil.Image{"amd64 first": {first, second}, "arm64 first": {second, first}} {
		t.Run(name, func(t *testing.T) {
			store, err := local.NewStore(t.TempDir())
			require.NoError(t, err)
			arrive := func(desc ocispec.Descriptor, b []byte) {
				require.NoError(t, content.WriteBlob(t.Context(), store, desc.Digest.String(), bytes.NewReader(b), desc))
			}
			source := &export.Source{Name: "app:1", Provider: store}
			source.Target = testutil.Blobs{}.Add(index.MediaType, testutil.JSON(t, index))
			named, here := parsed("linux/amd64", "linux/arm64"), parsed("all")
			arrive(source.Target, testutil.JSON(t, index))
			for i, img := range order {
				blobs := append([]ocispec.Descriptor{img.Descriptor, {Digest: digest.FromBytes(img.Config), Size: int64(len(img.Config))}}, img.Layers...)
				for _, desc := range blobs {
					_, err := source.Manifests(t.Context(), named)
					require.ErrorIs(t, err, errdefs.ErrNotFound, "which has it tried again")
					arrive(desc, img.Blobs[desc.Digest])
				}
				found, err := source.Manifests(t.Context(), here)
				require.NoError(t, err)
				require.Len(t, found, i+1, "no platform is named: what is here will do")
			}
			found, err := source.Manifests(t.Context(), named)
			require.NoError(t, err)
			require.Len(t, found, 2)
			_, err = source.Manifests(t.Context(), parsed("linux/amd64", "linux/s390x"))
			require.NoError(t, err, "what the image does not list will never be there")
		})
	}
}

func TestQueue(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		q, start := newQueue(), time.Now()
		a, b := key{"ns", "a"}, key{"ns", "b"}
		q.add(a, start.Add(3*time.Second))
		q.add(b, start.Add(2*time.Second))
		q.add(a, start.Add(time.Second))
		type taken struct {
			key
			at time.Duration
		}
		var got []taken
		for range 2 {
			k, attempt, ok := q.next(t.Context())
			require.True(t, ok)
			require.Zero(t, attempt)
			got = append(got, taken{k, time.Since(start)})
		}
		require.Equal(t, []taken{{a, time.Second}, {b, 2 * time.Second}}, got)

		// Something added while next waits, and failures.
		go func() {
			time.Sleep(time.Minute)
			q.add(b, time.Now())
		}()
		for attempt := range 3 {
			k, n, ok := q.next(t.Context())
			require.True(t, ok)
			require.Equal(t, b, k)
			require.Equal(t, attempt, n)
			q.done(k, again{after: time.Second, failed: attempt < 2})
		}
		_, n, _ := q.next(t.Context())
		require.Equal(t, 2, n, "a wait that is no failure forgets none")
		q.done(b, again{})
		require.Empty(t, q.tries)

		// What came while it was worked on comes first.
		q.add(a, time.Now())
		k, _, _ := q.next(t.Context())
		q.add(a, time.Now().Add(time.Second))
		q.done(k, again{after: time.Hour, failed: true})
		before := time.Now()
		k, n, _ = q.next(t.Context())
		require.Equal(t, a, k)
		require.Equal(t, 1, n)
		require.Equal(t, time.Second, time.Since(before))

		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		_, _, ok := q.next(ctx)
		require.False(t, ok)
	})
}

// TestSettle has an image be worked on a second after the last that is heard of it, and once.
func TestSettle(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := &Watcher{rules: []rule{compiled(t, Rule{})}, queue: newQueue()}
		last := time.Now()
		for _, event := range []any{&eventsapi.ImageCreate{Name: "app:1"}, &eventsapi.ImageUpdate{Name: "app:1"}, &eventsapi.ImageUpdate{Name: "app:1"}} {
			last = time.Now()
			e, err := typeurl.MarshalAny(event)
			require.NoError(t, err)
			w.handle(t.Context(), &events.Envelope{Namespace: "ns", Event: e})
			ctx, cancel := context.WithTimeout(t.Context(), 900*time.Millisecond)
			_, _, due := w.queue.next(ctx)
			cancel()
			require.False(t, due)
		}
		k, _, ok := w.queue.next(t.Context())
		require.True(t, ok)
		require.Equal(t, key{"ns", "app:1"}, k)
		require.Equal(t, time.Second, time.Since(last))
		require.Zero(t, w.queue.waiting())
	})
}

// late is an event service that takes a subscription in some time after Subscribe, as containerd does when it is busy.
// What is published before then reaches nobody.
type late struct {
	events.Forwarder
	from   time.Time
	stream chan *events.Envelope
	failed chan error
}

func (l *late) Subscribe(context.Context, ...string) (<-chan *events.Envelope, <-chan error) {
	l.from = time.Now().Add(500 * time.Millisecond)
	return l.stream, l.failed
}

func (l *late) Publish(_ context.Context, topic string, event events.Event) error {
	if time.Now().Before(l.from) {
		return nil
	}
	e, err := typeurl.MarshalAny(event)
	l.stream <- &events.Envelope{Namespace: "ns", Topic: topic, Event: e}
	return err
}

// lister is an image store that has no images when it is asked for all, and another immediately after.
type lister struct {
	images.Store
	events events.Publisher
}

func (l lister) List(ctx context.Context, _ ...string) ([]images.Image, error) {
	return nil, l.events.Publish(ctx, "/images/create", &eventsapi.ImageCreate{Name: "app:1"})
}

// TestSubscribed misses no image that comes while the watcher begins.
func TestSubscribed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		service := &late{stream: make(chan *events.Envelope, 10), failed: make(chan error)}
		client, err := containerd.New("", containerd.WithServices(containerd.WithEventService(service), containerd.WithImageStore(lister{events: service})))
		require.NoError(t, err)
		w := &Watcher{opts: Options{Namespaces: []string{"ns"}}, rules: []rule{compiled(t, Rule{})}, queue: newQueue()}
		ended := make(chan error)
		go func() { ended <- w.watch(t.Context(), client) }()
		time.Sleep(900 * time.Millisecond)
		assert.Equal(t, 1, w.queue.waiting())
		close(service.failed)
		require.ErrorContains(t, <-ended, "events ended")
	})
}

func TestBackoff(t *testing.T) {
	for attempt, most := range map[int]time.Duration{0: 1250 * time.Millisecond, 1: 1376 * time.Millisecond, 10: 3243 * time.Millisecond, 60: 375 * time.Second, 100000: 375 * time.Second} {
		for range 100 {
			d := backoff(attempt)
			require.LessOrEqual(t, d, most, attempt)
			require.GreaterOrEqual(t, d, most*5/10, attempt)
		}
	}
}

// record is an image store with one image.
type record struct {
	images.Store
	image   images.Image
	updates int
}

func (r *record) Get(context.Context, string) (images.Image, error) { return r.image, nil }

func (r *record) Update(_ context.Context, image images.Image, paths ...string) (images.Image, error) {
	r.updates++
	for _, path := range paths {
		label, ok := strings.CutPrefix(path, "labels.")
		if !ok {
			return image, errors.New("only labels may be changed")
		}
		if image.Labels[label] == "" {
			delete(r.image.Labels, label)
		} else {
			r.image.Labels[label] = image.Labels[label]
		}
	}
	return r.image, nil
}

func TestStatus(t *testing.T) {
	target := digest.FromString("target")
	r := &record{image: images.Image{Name: "a:1", Target: ocispec.Descriptor{Digest: target}, Labels: map[string]string{"mine": "yes"}}}
	at := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	for _, s := range []status{
		{target: target, plan: "push linux/amd64 example.com/app", err: "why", retry: at, archives: map[string]string{}},
		{target: target, plan: "push linux/amd64 example.com/app", archives: map[string]string{labelArchive + "linux/arm/v7": "sha256:1", labelFile + "linux/arm/v7": "/b", labelArchive + "linux/amd64": "sha256:2"}},
		{target: target, plan: "index any example.com/app", archives: map[string]string{labelFile + "linux/amd64": "/file", labelStored + "linux/amd64": "s3://b/a.clip"}},
	} {
		require.NoError(t, s.write(t.Context(), r, "a:1"))
		require.Equal(t, s, readStatus(r.image.Labels))
		require.Equal(t, "yes", r.image.Labels["mine"])
		before := r.updates
		require.NoError(t, s.write(t.Context(), r, "a:1"))
		require.Equal(t, before, r.updates, "nothing changed, nothing written: an update would be an event")
	}
	require.Equal(t, []string{"linux/amd64 /file", "linux/amd64 s3://b/a.clip"}, Archives(r.image.Labels))
	long := status{target: target, err: strings.Repeat("ä", 5000)}
	require.NoError(t, long.write(t.Context(), r, "a:1"))
	require.Less(t, len(r.image.Labels[LabelError]), 1100)
	require.False(t, status{target: target, plan: "a"}.sameWork(status{target: target, plan: "b"}))
}

func TestFileName(t *testing.T) {
	one, two := digest.FromString("1"), digest.FromString("2")
	names := map[string]bool{}
	for _, repository := range []string{"example.com/a", "example.com/b", "example.com/" + strings.Repeat("a/", 150) + "a"} {
		for _, d := range []digest.Digest{one, two} {
			name := fileName(repository, d)
			require.Less(t, len(name), 160)
			require.NotContains(t, name, "/")
			require.True(t, kept.MatchString(name))
			require.True(t, kept.MatchString("."+name+".4711"), "what a write leaves that was cut short")
			names[name] = true
		}
	}
	require.Len(t, names, 6)
	require.False(t, kept.MatchString("app.clip"))
}
