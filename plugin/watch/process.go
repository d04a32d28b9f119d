package watch

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"

	"github.com/beam-cloud/containerd-clip/archive"
	"github.com/beam-cloud/containerd-clip/plugin/export"
	"github.com/beam-cloud/containerd-clip/plugin/index"
	"github.com/beam-cloud/containerd-clip/plugin/publish"
)

// unpushed is the part of the directory where archives are until they are
// published.
const unpushed = "unpushed"

const (
	firstRetry = time.Second
	lastRetry  = 5 * time.Minute
	// growth of the time between attempts. What is waited for, most often the
	// push, may take seconds or minutes; this notices its end after a tenth more.
	growth = 1.1
	// quiet is how many failures in a row are nothing to tell: an image is in
	// the store before its content is whole, and before it is pushed. A bucket
	// is no part of that: its failure is told at once.
	quiet = 4
)

// bucketError is that a bucket did not take an archive.
type bucketError struct{ error }

func (e bucketError) Unwrap() error { return e.error }

// backoff is how long to wait after so many failures: longer each time, and not
// the same for all.
func backoff(attempt int) time.Duration {
	d := time.Duration(min(float64(firstRetry)*math.Pow(growth, float64(attempt)), float64(lastRetry)))
	return d*3/4 + rand.N(d/2)
}

// job is what a rule wants of an image.
type job struct {
	client  *containerd.Client
	image   images.Image
	rule    rule
	at      place
	redo    bool // whatever was done before
	attempt int  // how often it has failed in a row
}

// process does what a rule says with the image called k, if there is still
// something to do, and labels the image with the result.
func (w *Watcher) process(ctx context.Context, client *containerd.Client, k key, attempt int) again {
	ctx = log.WithLogger(ctx, log.G(ctx).WithField("namespace", k.namespace).WithField("image", k.name))
	image, err := client.ImageService().Get(ctx, k.name)
	if errdefs.IsNotFound(err) {
		return again{}
	}
	if err != nil {
		log.G(ctx).WithError(err).Warn("cannot look at the image")
		return again{after: backoff(attempt), failed: true}
	}
	r, ok := w.match(image)
	if !ok {
		return again{}
	}
	at, err := r.place(image)
	s := status{target: image.Target.Digest, plan: r.plan(at)}
	old := readStatus(image.Labels)
	if old.sameWork(s) {
		if old.err == "" || old.retry.IsZero() {
			return again{}
		}
		if wait := time.Until(old.retry); wait > 0 {
			return again{after: wait}
		}
	}
	if err == nil {
		redo := old.target == "" && old.plan != "" // who replaces an image takes both away
		s.archives, err = w.archives(ctx, job{client, image, r, at, redo, attempt})
	}
	if ctx.Err() != nil {
		return again{}
	}
	next := again{}
	if err != nil {
		s.err = err.Error()
		if !errdefs.IsInvalidArgument(err) && !errdefs.IsDataLoss(err) {
			next = again{after: backoff(attempt), failed: true}
			s.retry = time.Now().Add(next.after)
			if attempt < quiet && !errors.As(err, new(bucketError)) {
				log.G(ctx).WithError(err).WithField("retry", next.after).Debug("image cannot be indexed yet")
				return next
			}
		}
		log.G(ctx).WithError(err).WithField("retry", next.after).Warn("image is not indexed")
	}
	if err := s.write(ctx, client.ImageService(), image.Name); err != nil && !errdefs.IsNotFound(err) {
		log.G(ctx).WithError(err).Warn("cannot label the image with what became of it")
		return again{after: backoff(attempt), failed: true}
	}
	return next
}

// plan says in words what the rule does with an image: what is the same plan
// for the same manifest is the same work.
func (r rule) plan(at place) string {
	return strings.TrimSpace(strings.Join([]string{r.action, r.selection.Name, at.repository, at.object}, " "))
}

// archives makes the archives of an image, and returns where they are, by
// label. What is done already is not done again.
func (w *Watcher) archives(ctx context.Context, j job) (map[string]string, error) {
	source, err := export.FromStore(ctx, j.client, j.image.Name)
	if err != nil {
		return nil, err
	}
	defer source.Close()
	manifests, err := source.Selected(ctx, j.rule.selection)
	if err != nil {
		return nil, err
	}
	if err := j.checkNames(manifests); err != nil {
		return nil, err
	}
	done := make([]map[string]string, len(manifests))
	for i, m := range manifests {
		if done[i], err = w.done(ctx, m, j); err != nil {
			return nil, err
		}
		if done[i] != nil {
			continue
		}
		if err := source.CheckLayers(ctx, m); err != nil { // of all of them before work on one begins
			return nil, err
		}
	}
	made := map[string]string{}
	for i, m := range manifests {
		if done[i] == nil {
			if done[i], err = w.archive(ctx, source, m, j); err != nil {
				return nil, err
			}
		}
		if err := j.work(m.Descriptor.Digest).remember(ctx, j.client, done[i]); err != nil {
			return nil, fmt.Errorf("labelling manifest %s: %w", m.Descriptor.Digest, err)
		}
		for label, place := range done[i] {
			made[label+platforms.Format(m.Platform)] = place
		}
	}
	return made, nil
}

// work is what the rule does with one of the image's manifests.
func (j job) work(manifest digest.Digest) work {
	object := ""
	if j.rule.to != nil {
		name, _ := j.rule.to.Name(j.at.ref, manifest) // checkNames has had it
		object = j.rule.to.URL(name)
	}
	return work{manifest, j.rule.action, j.at.repository, object}
}

// done returns where the archive of a manifest is, by label, if it needs no
// work; else nil.
func (w *Watcher) done(ctx context.Context, m export.Manifest, j job) (map[string]string, error) {
	if !j.redo {
		places, err := j.work(m.Descriptor.Digest).done(ctx, j.client)
		if places != nil {
			log.G(ctx).WithField("digest", m.Descriptor.Digest).Info("was indexed before")
		}
		return places, err
	}
	if j.attempt == 0 {
		if err := os.Remove(w.unpushed(m, j)); err != nil && !errors.Is(err, os.ErrNotExist) {
			return nil, err
		}
	}
	return nil, j.work(m.Descriptor.Digest).forget(ctx, j.client)
}

// unpushed is the file that has the archive of a manifest until it is published.
func (w *Watcher) unpushed(m export.Manifest, j job) string {
	return filepath.Join(w.opts.Directory, unpushed, fileName(j.at.repository, m.Descriptor.Digest))
}

// checkNames makes sure that each of the manifests has an object of its own.
func (j job) checkNames(manifests []export.Manifest) error {
	if j.rule.to == nil {
		return nil
	}
	var digests []digest.Digest
	for _, m := range manifests {
		digests = append(digests, m.Descriptor.Digest)
	}
	return j.rule.to.CheckNames(j.at.ref, digests)
}

// archive makes the archive of one manifest. It returns where it is, by label.
// What could not be published stays for the next attempt.
func (w *Watcher) archive(ctx context.Context, source *export.Source, m export.Manifest, j job) (map[string]string, error) {
	path := w.unpushed(m, j)
	if !isArchive(path, j.at.ref) {
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			return nil, err
		}
		began := time.Now()
		_, err := index.WriteArchive(ctx, source, m, j.at.ref, path, w.opts.Index)
		outcome := "indexed"
		if err != nil {
			outcome = "failed"
		}
		w.metrics.took.WithLabelValues(outcome).Observe(time.Since(began).Seconds())
		if err != nil {
			return nil, err
		}
	}
	if err := j.work(m.Descriptor.Digest).displace(ctx, j.client); err != nil {
		return nil, err
	}
	places, err := j.publish(ctx, path, m.Descriptor.Digest)
	if err != nil {
		return nil, err
	}
	if j.rule.keep {
		places[labelFile] = filepath.Join(w.opts.Directory, filepath.Base(path))
		err = os.Rename(path, places[labelFile])
	} else {
		err = os.Remove(path)
	}
	if err != nil {
		return nil, err
	}
	log.G(ctx).WithField("platform", platforms.Format(m.Platform)).WithField("archive", strings.Join(slices.Sorted(maps.Values(places)), ", ")).Info("indexed")
	return places, nil
}

// publish has the archive at path where others find it, and returns where that
// is, by label. Both can be done again: the registry, which may refuse, comes
// first.
func (j job) publish(ctx context.Context, path string, manifest digest.Digest) (map[string]string, error) {
	places := map[string]string{}
	if j.rule.push {
		id, _, err := publish.Push(ctx, path, j.at.ref)
		if err != nil {
			return nil, err
		}
		places[labelArchive] = id.String()
	}
	if j.rule.to != nil {
		name, err := j.rule.to.Put(ctx, path, j.at.ref, manifest)
		if err != nil {
			return nil, bucketError{err}
		}
		places[labelStored] = j.rule.to.URL(name)
	}
	return places, nil
}

// isArchive says whether there is an archive at path that stores ref. If so it
// is as good as new.
func isArchive(path, ref string) bool {
	a, err := archive.OpenFile(path)
	if err != nil {
		return false
	}
	defer a.Close()
	return a.Info().StorageRef == ref && os.Chtimes(path, time.Time{}, time.Now()) == nil
}

// fileName is of an archive that is kept: readable, and one for each manifest
// and repository.
func fileName(repository string, manifest digest.Digest) string {
	const readable = 100 // bytes; a name may have 255
	name := strings.ReplaceAll(repository, "/", "_")
	name = name[max(0, len(name)-readable):]
	return name + "-" + digest.FromString(repository + "@" + manifest.String()).Encoded()[:32] + ".clip"
}
