package command

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strings"

	introspectionapi "github.com/containerd/containerd/api/services/introspection/v1"
	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/plugins"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"

	"github.com/beam-cloud/containerd-clip/plugin/watch"
)

// inContainerd is what containerd knows of the images and containers that use
// the clip snapshotter, in all namespaces.
type inContainerd struct {
	asked      bool // there is a containerd
	registered bool // it has the snapshotter
	images     []knownImage
	containers map[string]knownContainer // by namespace/key
	indexed    []indexedView
}

type knownImage struct {
	namespace, name string
	chainID         digest.Digest
}

type knownContainer struct{ name, image string }

// indexedView is what a watcher made of an image.
type indexedView struct {
	Namespace string `json:"namespace"`
	Image     string `json:"image"`
	Indexed   string `json:"indexed"` // yes, no, failed, or when it is tried again
	What      string `json:"what"`    // where its archives are, or why there are none
}

// askContainerd asks containerd, if there is one: the daemon works without.
func askContainerd(ctx context.Context, g *globals) (known inContainerd, err error) {
	known.indexed, known.containers = []indexedView{}, map[string]knownContainer{}
	ctx, client, err := g.connect(ctx)
	if err != nil {
		return known, nil // there is no containerd here
	}
	defer client.Close()
	defer func() {
		if err != nil {
			err = fmt.Errorf("asking containerd at %s: %w", g.address, err)
		}
	}()
	registered, err := registration(ctx, client)
	if err != nil {
		return known, err
	}
	known.asked, known.registered = true, len(registered) > 0
	spaces, err := client.NamespaceService().List(ctx)
	if err != nil {
		return known, err
	}
	for _, ns := range spaces {
		if err := known.addNamespace(namespaces.WithNamespace(ctx, ns), client, ns); err != nil {
			return known, err
		}
	}
	return known, nil
}

// registration is what containerd says of the clip snapshotter; nothing if it
// does not have it.
func registration(ctx context.Context, client *containerd.Client) ([]*introspectionapi.Plugin, error) {
	found, err := client.IntrospectionService().Plugins(ctx, fmt.Sprintf("type==%s,id==%s", plugins.SnapshotPlugin, snapshotterName))
	if err != nil {
		return nil, fmt.Errorf("containerd's plugins: %w", err)
	}
	return found.Plugins, nil
}

func (k *inContainerd) addNamespace(ctx context.Context, client *containerd.Client, ns string) error {
	found, err := client.ImageService().List(ctx)
	if err != nil {
		return err
	}
	slices.SortFunc(found, func(a, b images.Image) int { return cmp.Compare(a.Name, b.Name) })
	for _, image := range found {
		if image.Labels[watch.LabelTarget] != "" {
			indexed, what := indexedAs(image)
			k.indexed = append(k.indexed, indexedView{ns, image.Name, indexed, what})
		}
		if !k.registered {
			continue
		}
		chainID, err := unpacked(ctx, client, image)
		if errdefs.IsNotFound(err) {
			continue // by another snapshotter, or not at all
		}
		if err != nil {
			// One that is damaged must not hide the others.
			log.G(ctx).WithError(err).WithField("image", image.Name).Warn("cannot tell whether the image is lazy")
			continue
		}
		k.images = append(k.images, knownImage{ns, image.Name, chainID})
	}
	containers, err := client.ContainerService().List(ctx, "snapshotter=="+snapshotterName)
	if err != nil {
		return err
	}
	for _, c := range containers {
		k.containers[ns+"/"+c.SnapshotKey] = knownContainer{c.ID, c.Image}
	}
	return nil
}

// unpacked returns what the clip snapshotter calls an image, or
// errdefs.ErrNotFound if it does not have it.
func unpacked(ctx context.Context, client *containerd.Client, image images.Image) (digest.Digest, error) {
	diffIDs, err := containerd.NewImage(client, image).RootFS(ctx)
	if err != nil {
		return "", err
	}
	chainID := identity.ChainID(diffIDs)
	_, err = client.SnapshotService(snapshotterName).Stat(ctx, chainID.String())
	if errdefs.IsInvalidArgument(err) {
		return "", fmt.Errorf("containerd has no snapshotter %s: %w", snapshotterName, errdefs.ErrNotFound)
	}
	return chainID, err
}

// indexedAs says whether an image is indexed, and where its archives are or
// why there are none.
func indexedAs(image images.Image) (indexed, what string) {
	labels := image.Labels
	if labels[watch.LabelTarget] != image.Target.Digest.String() {
		return "no", "the image has changed since"
	}
	if reason := labels[watch.LabelError]; reason != "" {
		if retry := labels[watch.LabelRetry]; retry != "" {
			return "retry " + retry, reason
		}
		return "failed", reason
	}
	return "yes", strings.Join(watch.Archives(labels), ", ")
}
