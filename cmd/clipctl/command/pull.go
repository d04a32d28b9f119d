package command

import (
	"context"
	"fmt"
	"io"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/transfer"
	"github.com/containerd/containerd/v2/core/transfer/image"
	"github.com/containerd/containerd/v2/core/transfer/registry"
	"github.com/containerd/platforms"
	"github.com/spf13/cobra"
	"github.com/vbauerster/mpb/v8"
	"github.com/vbauerster/mpb/v8/decor"

	"github.com/beam-cloud/containerd-clip/snapshotter/control"
	"github.com/beam-cloud/containerd-clip/snapshotter/remote"
)

type pullOptions struct {
	hosts string
}

func newPullCommand(g *globals) *cobra.Command {
	var o pullOptions
	cmd := &cobra.Command{
		Use:   "pull IMAGE",
		Short: "Pull an image with the clip snapshotter, and say whether it is lazy",
		Long: `Have containerd pull an image for this machine's platform with the clip
snapshotter, as "ctr image pull --snapshotter clip" does, with the credentials
of docker's config file and its helpers. What has to be downloaded is shown as
it comes: of a lazy image, manifest and config; of others, layers too.`,
		Example: `  clipctl pull registry.example.com/team/app:1
  clipctl --namespace k8s.io pull registry.example.com/team/app:1`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return runPull(cmd.Context(), g, args[0], o, cmd.OutOrStdout(), cmd.ErrOrStderr())
		},
	}
	cmd.Flags().StringVar(&o.hosts, "hosts-dir", "", "directory with containerd's <host>/hosts.toml files (default: what containerd is configured with)")
	return cmd
}

func runPull(ctx context.Context, g *globals, name string, o pullOptions, stdout, stderr io.Writer) error {
	start := time.Now()
	ctx, client, err := g.connect(ctx)
	if err != nil {
		return err
	}
	defer client.Close()
	reg, err := registry.NewOCIRegistry(ctx, name, registry.WithCredentials(credentials{}), registry.WithHostDir(o.hosts))
	if err != nil {
		return fmt.Errorf("reference %q: %w", name, err)
	}
	platform := platforms.DefaultSpec()
	store := image.NewStore(name, image.WithPlatforms(platform), image.WithUnpack(platform, snapshotterName))
	progress := newPullProgress(stderr)
	err = client.Transfer(ctx, reg, store, transfer.WithProgress(progress.on))
	progress.close()
	if err != nil {
		return fmt.Errorf("pulling %s (clipctl doctor %s may know why): %w", name, name, err)
	}
	pulled, err := client.ImageService().Get(ctx, name)
	if err != nil {
		return err
	}
	fmt.Fprintf(stdout, "pulled %s\t%s\t%.1fs\n", name, pulled.Target.Digest, time.Since(start).Seconds())
	chainID, err := unpacked(ctx, client, pulled)
	if err != nil {
		return err
	}
	return withStatus(ctx, g, func(st control.Status) error {
		v := newView(st, inContainerd{asked: true, images: []knownImage{{g.namespace, name, chainID}}})
		for _, i := range v.Images {
			if i.Lazy == i.Layers {
				fmt.Fprintf(stdout, "lazy\t%d layers, %s to be fetched when they are read\n", i.Layers, size(i.Total-i.Fetched))
			} else {
				fmt.Fprintf(stdout, "not lazy\t%d of %d layers: %s\n", i.Layers-i.Lazy, i.Layers, i.Reason)
			}
		}
		return nil
	})
}

// credentials are those of docker's config, for containerd.
type credentials struct{}

// GetCredentials implements registry.CredentialHelper.
func (credentials) GetCredentials(_ context.Context, _, host string) (registry.Credentials, error) {
	l, err := remote.DockerLogin(host)
	return registry.Credentials{Host: host, Username: l.User, Secret: l.Secret}, err
}

// pullProgress shows how a pull goes: a bar for each blob on a terminal, a line
// when one is there elsewhere.
type pullProgress struct {
	w    io.Writer
	bars *mpb.Progress // nil elsewhere

	state sync.Map // from name to event, for bars to see without a lock

	mu    sync.Mutex // guards byRef
	byRef map[string]*mpb.Bar
}

func newPullProgress(w io.Writer) *pullProgress {
	p := &pullProgress{w: w, byRef: map[string]*mpb.Bar{}}
	if isTerminal(w) {
		p.bars = mpb.New(mpb.WithOutput(w), mpb.WithWidth(40))
	}
	return p
}

// on is a transfer.ProgressFunc.
func (p *pullProgress) on(e transfer.Progress) {
	if e.Name == "" || e.Desc == nil {
		return // about the image as a whole
	}
	before, _ := p.state.Swap(e.Name, e.Event)
	if p.bars == nil {
		if before != e.Event && settled(e.Event) {
			fmt.Fprintf(p.w, "%s %s %s\n", e.Name, size(e.Desc.Size), e.Event)
		}
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	bar := p.byRef[e.Name]
	if bar == nil {
		name := e.Name
		bar = p.bars.AddBar(e.Desc.Size, mpb.PrependDecorators(decor.Name(fmt.Sprintf("%.32s", name), decor.WC{W: 33, C: decor.DindentRight}),
			decor.CountersKiloByte("% .1f / % .1f", decor.WC{W: 22})),
			mpb.AppendDecorators(decor.Any(func(decor.Statistics) string {
				state, _ := p.state.Load(name)
				return fmt.Sprint(state)
			})))
		p.byRef[name] = bar
	}
	if settled(e.Event) {
		bar.SetCurrent(e.Desc.Size)
		return
	}
	bar.SetCurrent(min(e.Progress, max(e.Desc.Size-1, 0)))
}

// settled says that a blob is there.
func settled(event string) bool {
	return event == "complete" || event == "extracted" || event == "already exists"
}

// close ends the display.
func (p *pullProgress) close() {
	if p.bars == nil {
		return
	}
	p.mu.Lock()
	for _, bar := range p.byRef {
		bar.Abort(false)
	}
	p.mu.Unlock()
	p.bars.Wait()
}
