package watch

import (
	"context"
	"fmt"
	"os"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
)

// What is done is also said of each manifest in containerd's content store, by
// labelArchive, labelFile and labelStored with a digest of the plan in place of
// a platform. Labels of an image do not last: a pull, an import and a build of
// the same name replace the image, labels and all.

// work is what is done with one manifest.
type work struct {
	manifest                   digest.Digest
	action, repository, object string
}

// label is the one that says of the manifest what another says of an image.
func (k work) label(label string) string {
	return label + digest.FromString(k.action + " " + k.repository + " " + k.object).Encoded()[:16]
}

// done returns where the archive is, by label, if the work was done, be it for
// an image of another name, index or namespace; else nil. An archive that was
// kept and is gone is not done.
func (k work) done(ctx context.Context, client *containerd.Client) (map[string]string, error) {
	var places map[string]string
	err := k.everywhere(ctx, client, func(_ context.Context, labels map[string]string) error {
		found := map[string]string{}
		for _, label := range []string{labelArchive, labelFile, labelStored} {
			if place := labels[k.label(label)]; place != "" {
				found[label] = place
			}
		}
		if file := found[labelFile]; file != "" {
			if _, err := os.Stat(file); err != nil {
				return nil
			}
		}
		if len(found) > 0 {
			places = found
		}
		return nil
	})
	return places, err
}

// remember says in the namespace of ctx that the work is done.
func (k work) remember(ctx context.Context, client *containerd.Client, places map[string]string) error {
	said := map[string]string{}
	for label, place := range places {
		said[k.label(label)] = place
	}
	return k.say(ctx, client, said)
}

// forget has the work done again.
func (k work) forget(ctx context.Context, client *containerd.Client) error {
	return k.everywhere(ctx, client, func(ctx context.Context, labels map[string]string) error {
		said := map[string]string{}
		for _, label := range []string{labelArchive, labelFile, labelStored} {
			if _, ok := labels[k.label(label)]; ok {
				said[k.label(label)] = "" // containerd removes it
			}
		}
		return k.say(ctx, client, said)
	})
}

// displace forgets that the work was done for another manifest whose archive has
// the object's name, which is given to this one's: that of an image which moves.
func (k work) displace(ctx context.Context, client *containerd.Client) error {
	if k.object == "" {
		return nil
	}
	spaces, err := client.NamespaceService().List(ctx)
	if err != nil {
		return err
	}
	others := map[digest.Digest]bool{}
	for _, ns := range spaces {
		err := client.ContentStore().Walk(namespaces.WithNamespace(ctx, ns), func(info content.Info) error {
			others[info.Digest] = true
			return nil
		}, fmt.Sprintf("labels.%q==%q", k.label(labelStored), k.object))
		if err != nil {
			return err
		}
	}
	delete(others, k.manifest)
	for k.manifest = range others {
		if err := k.forget(ctx, client); err != nil {
			return err
		}
	}
	return nil
}

func (k work) say(ctx context.Context, client *containerd.Client, labels map[string]string) error {
	var paths []string
	for label := range labels {
		paths = append(paths, "labels."+label)
	}
	if len(paths) == 0 {
		return nil // no path is all of them
	}
	_, err := client.ContentStore().Update(ctx, content.Info{Digest: k.manifest, Labels: labels}, paths...)
	return err
}

// everywhere calls fn with the labels of the manifest in each namespace that
// has it.
func (k work) everywhere(ctx context.Context, client *containerd.Client, fn func(context.Context, map[string]string) error) error {
	spaces, err := client.NamespaceService().List(ctx)
	if err != nil {
		return err
	}
	for _, ns := range spaces {
		ctx := namespaces.WithNamespace(ctx, ns)
		info, err := client.ContentStore().Info(ctx, k.manifest)
		if errdefs.IsNotFound(err) {
			continue
		}
		if err != nil {
			return err
		}
		if err := fn(ctx, info.Labels); err != nil {
			return err
		}
	}
	return nil
}
