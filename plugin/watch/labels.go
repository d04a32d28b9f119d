package watch

import (
	"context"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/opencontainers/go-digest"
)

// Labels that a watcher sets on images. They are about the image that they
// name as target: one whose target is another was changed since.
const (
	// LabelTarget is the digest of what was worked on. Without it, and with a
	// plan, the work is done again at once.
	LabelTarget = "cloud.beam.clip/target"
	// labelPlan is what was to be done: action, platforms, repository, object.
	labelPlan = "cloud.beam.clip/plan"
	// labelArchive and a platform have the digest of the artifact in the registry.
	labelArchive = "cloud.beam.clip/archive."
	// labelFile and a platform have the name of the file that is kept.
	labelFile = "cloud.beam.clip/file."
	// labelStored and a platform have the URL of the object in a bucket or directory.
	labelStored = "cloud.beam.clip/stored."
	// LabelError says why there is none.
	LabelError = "cloud.beam.clip/error"
	// LabelRetry is when that is tried again (RFC 3339). Without it an error is
	// final for this target.
	LabelRetry = "cloud.beam.clip/retry"
)

// maxError bounds what LabelError says: containerd allows a label 4096 bytes.
const maxError = 1024

// status is what the labels say.
type status struct {
	target   digest.Digest
	plan     string
	archives map[string]string // places of archives by label
	err      string
	retry    time.Time
}

func readStatus(labels map[string]string) status {
	s := status{target: digest.Digest(labels[LabelTarget]), plan: labels[labelPlan], err: labels[LabelError], archives: map[string]string{}}
	s.retry, _ = time.Parse(time.RFC3339, labels[LabelRetry]) // zero if there is none
	for k, v := range labels {
		if _, ok := platformOf(k); ok && v != "" {
			s.archives[k] = v
		}
	}
	return s
}

// platformOf returns the platform in a label that says where an archive is.
func platformOf(label string) (platform string, ok bool) {
	for _, prefix := range []string{labelArchive, labelFile, labelStored} {
		if platform, ok = strings.CutPrefix(label, prefix); ok {
			return platform, true
		}
	}
	return "", false
}

// Archives says in words where the archives of an image are, of which these
// are the labels: platform and place.
func Archives(labels map[string]string) (places []string) {
	for k, v := range labels {
		if platform, ok := platformOf(k); ok {
			places = append(places, platform+" "+v)
		}
	}
	slices.Sort(places)
	return places
}

// sameWork says whether s is about the work that other is about.
func (s status) sameWork(other status) bool {
	return s.target == other.target && s.plan == other.plan
}

// write labels the image called name. Labels that say nothing any more are
// removed; an empty value does that in containerd.
func (s status) write(ctx context.Context, store images.Store, name string) error {
	old, err := store.Get(ctx, name)
	if err != nil {
		return err
	}
	labels := map[string]string{LabelTarget: s.target.String(), labelPlan: s.plan, LabelError: truncate(s.err), LabelRetry: ""}
	if !s.retry.IsZero() {
		labels[LabelRetry] = s.retry.UTC().Format(time.RFC3339)
	}
	for k := range old.Labels {
		if _, ok := platformOf(k); ok {
			labels[k] = ""
		}
	}
	maps.Copy(labels, s.archives)
	var changed []string
	for k, v := range labels {
		if old.Labels[k] != v {
			changed = append(changed, "labels."+k)
		}
	}
	if len(changed) == 0 {
		return nil
	}
	_, err = store.Update(ctx, images.Image{Name: name, Labels: labels}, changed...)
	return err
}

func truncate(s string) string {
	if len(s) > maxError {
		return strings.ToValidUTF8(s[:maxError], "") + "..."
	}
	return s
}
