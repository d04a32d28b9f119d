// Package bucket keeps archives as objects in buckets, and as files in directories.
//
// A location says where: a URL whose scheme is s3, gs, azblob or file, whose
// host is the bucket or container, whose path is a template of the object's
// name, and whose query is for the bucket's driver (gocloud.dev/blob has its
// documentation), such as
//
//	s3://archives/{{.Path}}/{{.Manifest}}.clip?region=eu-central-1
//
// A path that does not end in .clip is a directory: {{.Manifest}}.clip comes
// behind it. Objects are .clip files as they are, which upstream CLIP mounts,
// too. Credentials are those that the provider's own tools use.
package bucket

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"text/template"
	parsed "text/template/parse"

	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	"gocloud.dev/blob"
	_ "gocloud.dev/blob/azureblob" // azblob://
	_ "gocloud.dev/blob/fileblob"  // file://
	_ "gocloud.dev/blob/gcsblob"   // gs://
	_ "gocloud.dev/blob/s3blob"    // s3://
	"gocloud.dev/gcerrors"
)

// suffix of objects that are archives.
const suffix = ".clip"

// defaultName is what an archive is called where only a directory is given.
const defaultName = "{{.Manifest}}" + suffix

// Location is a place for archives. Its methods are safe for concurrent use.
type Location struct {
	text string             // as it was given, without what is for the driver
	url  string             // of the bucket, for gocloud
	dir  string             // of a file location; else empty
	name *template.Template // of the object in the bucket

	mu     sync.Mutex   // guards bucket
	bucket *blob.Bucket // nil until it is needed
}

// fields are what a name is made of.
type fields struct {
	Manifest          string // digest of the image's manifest, as sha256-<hex>
	Domain, Path, Tag string // of the image's reference
}

// Parse checks the text of a location. It opens nothing: that is for the first
// use. The caller closes the location.
func Parse(text string) (*Location, error) {
	l, err := parse(text)
	if err != nil {
		return nil, fmt.Errorf("location %q: %w", text, errors.Join(err, errdefs.ErrInvalidArgument))
	}
	return l, nil
}

func parse(text string) (*Location, error) {
	scheme, rest, ok := strings.Cut(text, "://")
	if !ok {
		return nil, errors.New("it is not a URL, such as s3://bucket/directory or file:///directory")
	}
	rest, query, _ := strings.Cut(rest, "?")
	options, err := url.ParseQuery(query)
	if err != nil {
		return nil, err
	}
	host, path, _ := strings.Cut(rest, "/")
	if !strings.HasSuffix(path, suffix) {
		path = strings.TrimSuffix(path, "/") + "/" + defaultName
	}
	path = strings.TrimPrefix(path, "/")
	text, _, _ = strings.Cut(text, "?")
	l := &Location{text: text}
	switch scheme {
	case "s3", "gs", "azblob":
		if host == "" {
			return nil, errors.New("it names no bucket")
		}
	case "file":
		if host != "" {
			return nil, errors.New("a directory is written with three slashes: file:///directory")
		}
		// The template may make directories, too.
		fixed, _, _ := strings.Cut(path, "{{")
		fixed = fixed[:strings.LastIndexByte(fixed, '/')+1]
		l.dir, path = "/"+fixed, path[len(fixed):]
		// No files but archives, and none that is not whole.
		options.Set("metadata", "skip")
		options.Set("no_tmp_dir", "1")
	default:
		return nil, fmt.Errorf("scheme %q is none of s3, gs, azblob and file", scheme)
	}
	l.url = scheme + "://" + host + l.dir + "?" + options.Encode()
	l.name, err = template.New("name").Option("missingkey=error").Parse(path)
	if err != nil {
		return nil, err
	}
	_, err = l.Name("registry.example.com/team/app:1", digest.FromString(""))
	return l, err
}

// String names the location in messages.
func (l *Location) String() string { return l.text }

// Fixed says whether the location is one object, whatever the image.
func (l *Location) Fixed() bool {
	nodes := l.name.Root.Nodes
	return len(nodes) == 1 && nodes[0].Type() == parsed.NodeText
}

// Name returns the name of the archive of an image manifest that is pulled, or
// stored, by ref.
func (l *Location) Name(ref string, manifest digest.Digest) (string, error) {
	f := fields{Manifest: strings.Replace(manifest.String(), ":", "-", 1)}
	if named, err := reference.ParseNormalizedNamed(ref); err == nil {
		f.Domain, f.Path = reference.Domain(named), reference.Path(named)
		if tagged, ok := named.(reference.Tagged); ok {
			f.Tag = tagged.Tag()
		}
	}
	var b strings.Builder
	if err := l.name.Execute(&b, f); err != nil {
		return "", fmt.Errorf("name of an archive in %s: %w", l, errors.Join(err, errdefs.ErrInvalidArgument))
	}
	return b.String(), nil
}

// URL names an object in the bucket, without what is for the driver.
func (l *Location) URL(name string) string {
	base, _, _ := strings.Cut(l.url, "?")
	return strings.TrimSuffix(base, "/") + "/" + name
}

// CheckNames makes sure that the archives of several manifests of an image, one
// for each platform, do not replace each other.
func (l *Location) CheckNames(ref string, manifests []digest.Digest) error {
	seen := map[string]digest.Digest{}
	for _, m := range manifests {
		name, err := l.Name(ref, m)
		if err != nil {
			return err
		}
		if other, ok := seen[name]; ok && other != m {
			return fmt.Errorf("%s is the name of the archives of both %s and %s; a template with {{.Manifest}} tells them apart: %w",
				l.URL(name), other, m, errdefs.ErrInvalidArgument)
		}
		seen[name] = m
	}
	return nil
}

// Open returns the archive of an image manifest that is pulled by ref. The
// caller closes it. The error is errdefs.ErrNotFound if there is none.
func (l *Location) Open(ctx context.Context, ref string, manifest digest.Digest) (io.ReadCloser, error) {
	name, err := l.Name(ref, manifest)
	if err != nil {
		return nil, err
	}
	b, err := l.open(ctx)
	if err != nil {
		return nil, err
	}
	r, err := b.NewReader(ctx, name, nil)
	if err != nil {
		return nil, fmt.Errorf("%s in %s: %w", name, l, classified(err))
	}
	return r, nil
}

// Put stores the file at path as the archive of an image manifest. What was
// there is replaced at once, when all of the file has arrived, and stays if that
// does not happen. It returns the name of the object.
func (l *Location) Put(ctx context.Context, path, ref string, manifest digest.Digest) (name string, err error) {
	if name, err = l.Name(ref, manifest); err != nil {
		return "", err
	}
	if l.dir != "" {
		if err := os.MkdirAll(l.dir, 0o755); err != nil {
			return "", err
		}
	}
	b, err := l.open(ctx)
	if err != nil {
		return "", err
	}
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	if err := upload(ctx, b, name, f); err != nil {
		return "", fmt.Errorf("storing %s in %s: %w", name, l, classified(err))
	}
	return name, nil
}

// upload stores what r has as an object, or leaves what was there.
func upload(ctx context.Context, b *blob.Bucket, name string, r io.Reader) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	return b.Upload(ctx, name, source{r, cancel}, &blob.WriterOptions{ContentType: "application/octet-stream"})
}

// source is what is uploaded. Drivers that do not read it themselves are written
// to, and then closed, which makes an object of what was written even if that is
// not all: unless the context has ended.
type source struct {
	io.Reader
	cancel context.CancelFunc
}

// WriteTo implements io.WriterTo.
func (s source) WriteTo(w io.Writer) (int64, error) {
	n, err := io.Copy(w, s.Reader)
	if err != nil {
		s.cancel()
	}
	return n, err
}

// open opens the bucket, once.
func (l *Location) open(ctx context.Context) (*blob.Bucket, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.bucket != nil {
		return l.bucket, nil
	}
	if l.dir != "" {
		if _, err := os.Stat(filepath.Clean(l.dir)); os.IsNotExist(err) {
			return nil, fmt.Errorf("directory of %s: %w", l, errors.Join(err, errdefs.ErrNotFound))
		}
	}
	// What the bucket keeps of the context outlives this call.
	b, err := blob.OpenBucket(context.WithoutCancel(ctx), l.url)
	if err != nil {
		return nil, fmt.Errorf("opening %s: %w", l, errors.Join(err, errdefs.ErrUnavailable))
	}
	l.bucket = b
	return b, nil
}

// Close closes the bucket.
func (l *Location) Close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.bucket == nil {
		return nil
	}
	b := l.bucket
	l.bucket = nil
	return b.Close()
}

// classified gives a provider's answer its errdefs kind.
func classified(err error) error {
	switch gcerrors.Code(err) {
	case gcerrors.NotFound:
		return errors.Join(err, errdefs.ErrNotFound)
	case gcerrors.PermissionDenied:
		return errors.Join(err, errdefs.ErrPermissionDenied)
	case gcerrors.InvalidArgument:
		return errors.Join(err, errdefs.ErrInvalidArgument)
	case gcerrors.Canceled:
		return err
	}
	return errors.Join(err, errdefs.ErrUnavailable)
}
