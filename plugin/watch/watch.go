// Package watch indexes images as they come into containerd's store.
//
// A Watcher follows the image events of the namespaces it is told. An image
// that a rule names is indexed once all its content is there, and its archive
// kept as a file, pushed to its registry, stored in a bucket, or several of these.
// What became of it is said in labels of the image, and of its manifest in the
// content store, which outlive a new image of the same name; they are all the
// state there is. Events are not durable: at the start, and whenever the stream of
// events was lost, all images are looked at again.
//
// Images are worked on one after the other. A manifest that was indexed is not
// indexed again if its archive would go to the same place, whatever the image's
// name and namespace.
//
// Archives that were kept are removed when no image is labelled with them any
// more.
//
// The package does not say where images come from: a build, an import and a
// pull are the same to it. It removes nothing from registries and buckets.
package watch

import (
	"context"
	"errors"
	"fmt"
	"time"

	eventsapi "github.com/containerd/containerd/api/events"
	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/events"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/log"
	"github.com/containerd/typeurl/v2"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/beam-cloud/containerd-clip/plugin/index"
)

// Options configures a Watcher.
type Options struct {
	Address    string        // containerd's socket
	Namespaces []string      // that are watched
	Rules      []Rule        // the first that matches an image holds
	Directory  string        // of archives; of this watcher alone
	Index      index.Options // workers and cache
}

// Watcher indexes images as they come. New makes one.
type Watcher struct {
	opts    Options
	rules   []rule
	queue   *queue
	metrics metrics
}

// New checks the rules and returns a watcher, which does nothing until Run.
func New(opts Options) (*Watcher, error) {
	w := &Watcher{opts: opts, queue: newQueue()}
	w.metrics = newMetrics(w.queue.waiting)
	w.opts.Index.Progress = w.metrics
	if len(opts.Namespaces) == 0 {
		return nil, errors.New("no namespace to watch is named")
	}
	if opts.Directory == "" {
		return nil, errors.New("no directory for archives is named")
	}
	for i, r := range opts.Rules {
		compiled, err := r.compile()
		if err != nil {
			return nil, fmt.Errorf("rule %d: %w", i+1, err)
		}
		w.rules = append(w.rules, compiled)
	}
	return w, nil
}

const (
	// settle is how long an image must have been left alone before it is
	// looked at: builds and pulls write it several times.
	settle = time.Second
	// reconnect is the longest time between two attempts to reach containerd.
	reconnect = 15 * time.Second
	// probe is the topic of the watcher's own events, which say nothing, and
	// probing the time between two of them.
	probe   = "/containerd-clip/subscribed"
	probing = 100 * time.Millisecond
	// probes is how many are sent before the stream counts as broken.
	probes = 300
)

// Run watches until ctx ends. It waits for a containerd that is not there yet,
// or not there any more.
func (w *Watcher) Run(ctx context.Context) error {
	defer w.closeBuckets()
	for wait := time.Second; ; wait = min(2*wait, reconnect) {
		began := time.Now()
		err := w.session(ctx)
		if ctx.Err() != nil {
			return nil
		}
		log.G(ctx).WithError(err).WithField("address", w.opts.Address).Warn("lost containerd's events; all images are looked at once it is back")
		if time.Since(began) > reconnect {
			wait = time.Second
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(wait):
		}
	}
}

func (w *Watcher) closeBuckets() {
	for _, r := range w.rules {
		if r.to != nil {
			_ = r.to.Close() // what was written is there
		}
	}
}

// session watches over one connection, until that breaks.
func (w *Watcher) session(ctx context.Context) error {
	client, err := containerd.New(w.opts.Address)
	if err != nil {
		return err
	}
	defer client.Close()
	return w.watch(ctx, client)
}

// watch follows the events of client until their stream ends.
func (w *Watcher) watch(ctx context.Context, client *containerd.Client) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, errs := client.Subscribe(ctx, w.filters()...)
	if err := w.subscribed(ctx, client.EventService(), stream, errs); err != nil {
		return err
	}
	if err := w.reconcile(ctx, client); err != nil { // after the subscription: nothing falls between
		return err
	}
	log.G(ctx).WithField("namespaces", w.opts.Namespaces).Info("watching for images to index")
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		w.work(ctx, client)
	}()
	defer func() { <-ended }()
	defer cancel()
	for {
		select {
		case e := <-stream:
			w.handle(ctx, e)
		case err := <-errs:
			return streamEnded(err)
		}
	}
}

// subscribed returns once events come. containerd takes a subscription in some
// time after Subscribe has returned, and does not say when: events of the
// watcher's own are sent until one arrives.
func (w *Watcher) subscribed(ctx context.Context, service events.Publisher, stream <-chan *events.Envelope, errs <-chan error) error {
	ticker := time.NewTicker(probing)
	defer ticker.Stop()
	for range probes {
		err := service.Publish(namespaces.WithNamespace(ctx, w.opts.Namespaces[0]), probe, &emptypb.Empty{})
		if err != nil {
			return fmt.Errorf("sending an event: %w", err)
		}
		select {
		case e := <-stream:
			w.handle(ctx, e)
			return nil
		case err := <-errs:
			return streamEnded(err)
		case <-ticker.C:
		}
	}
	return errors.New("no event that was sent has come back")
}

func streamEnded(err error) error {
	if err == nil {
		return errors.New("the stream of events ended")
	}
	return err
}

func (w *Watcher) filters() []string {
	all := []string{fmt.Sprintf("topic==%q", probe)}
	for _, ns := range w.opts.Namespaces {
		all = append(all, fmt.Sprintf(`namespace==%q,topic~="^/images/(create|update|delete)$"`, ns))
	}
	return all
}

// reconcile queues all images that are there, and those that are gone.
func (w *Watcher) reconcile(ctx context.Context, client *containerd.Client) error {
	w.queue.add(sweeping, time.Now().Add(settle))
	for _, ns := range w.opts.Namespaces {
		images, err := client.ImageService().List(namespaces.WithNamespace(ctx, ns))
		if err != nil {
			return fmt.Errorf("listing the images of namespace %s: %w", ns, err)
		}
		for _, image := range images {
			if w.mayMatch(image.Name) {
				w.queue.add(key{ns, image.Name}, time.Now())
			}
		}
	}
	return nil
}

// handle queues the image of an event.
func (w *Watcher) handle(ctx context.Context, e *events.Envelope) {
	event, err := typeurl.UnmarshalAny(e.Event)
	if err != nil {
		log.G(ctx).WithError(err).WithField("topic", e.Topic).Warn("event is not understood")
		return
	}
	var name string
	switch event := event.(type) {
	case *eventsapi.ImageCreate:
		name = event.Name
	case *eventsapi.ImageUpdate:
		name = event.Name
	case *eventsapi.ImageDelete:
		w.queue.add(sweeping, time.Now().Add(settle))
		return
	default: // a probe
		return
	}
	if w.mayMatch(name) {
		w.queue.add(key{e.Namespace, name}, time.Now().Add(settle))
	}
}

// work takes images from the queue, one after the other, until ctx ends.
func (w *Watcher) work(ctx context.Context, client *containerd.Client) {
	for {
		k, attempt, ok := w.queue.next(ctx)
		if !ok {
			return
		}
		var again again
		if k == sweeping {
			again = w.sweep(ctx, client)
		} else {
			again = w.process(namespaces.WithNamespace(ctx, k.namespace), client, k, attempt)
		}
		if ctx.Err() != nil {
			return // what was cut short is queued again by the next session
		}
		w.queue.done(k, again)
	}
}
