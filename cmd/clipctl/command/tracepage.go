package command

import (
	_ "embed"
	"fmt"
	"html/template"
	"io"
	"slices"
	"time"

	"github.com/beam-cloud/containerd-clip/snapshotter/control"
	"github.com/beam-cloud/containerd-clip/snapshotter/record"
)

//go:embed trace.html
var tracePage string

// Drawings are traceWidth units wide; a layer's map has traceCells cells.
const (
	traceWidth = 1000.0
	traceCells = 250
)

// trace is what the page shows.
type trace struct {
	Image, Command string
	Began          time.Time
	Seconds        float64
	Ticks          []mark
	Layers         []*tracedLayer
	Total          tracedSums
	Waited         float64 // seconds in which a request of a reader was under way
	Hidden         []int   // layers of which not all reads are known
}

// tracedSums are figures of a layer, or of all. Sizes are in bytes.
type tracedSums struct {
	Size, Touched, Fetched, Vain int64 // uncompressed
	Bytes                        int64 // compressed
	Requests, ByReaders          int
}

type tracedLayer struct {
	Name string
	tracedSums
	Fetches []mark // over time
	Reads   []mark
	Map     []mark // over the layer
}

// mark is a piece of a drawing: [X, X+W) of traceWidth.
type mark struct {
	X, W float64
	Kind string // class in the page's style
	Text string
}

func newTrace(image, command string, doc record.Document, fetches []control.Fetch, layers []control.Layer) *trace {
	t := &trace{Image: image, Command: command, Began: doc.Began, Hidden: doc.Hidden}
	fetches = slices.DeleteFunc(fetches, func(f control.Fetch) bool { return !slices.Contains(doc.Layers, f.DiffID) })
	for _, touch := range doc.Touches {
		t.Seconds = max(t.Seconds, float64(touch.Millis)/1e3)
	}
	// What the background fetches after the last read is no part of the start.
	const after = 0.5 // seconds
	end := doc.Began.Add(time.Duration((t.Seconds + after) * float64(time.Second)))
	fetches = slices.DeleteFunc(fetches, func(f control.Fetch) bool { return f.Began.After(end) })
	for _, f := range fetches {
		t.Seconds = max(t.Seconds, f.Began.Sub(doc.Began).Seconds()+f.Millis/1e3)
	}
	t.Seconds = max(t.Seconds, 0.001)
	t.Ticks = ticks(t.Seconds)
	for i, diffID := range doc.Layers {
		l := &tracedLayer{Name: fmt.Sprintf("%d: %.12s", i+1, diffID.Encoded())}
		if at := slices.IndexFunc(layers, func(c control.Layer) bool { return c.DiffID == diffID }); at >= 0 {
			l.Size = layers[at].Size
		}
		var own []control.Fetch
		for _, f := range fetches {
			if f.DiffID == diffID {
				own = append(own, f)
			}
		}
		t.draw(l, i, doc, own)
		t.Layers = append(t.Layers, l)
		t.Total.add(l.tracedSums)
	}
	t.Waited = waited(fetches)
	return t
}

func (s *tracedSums) add(o tracedSums) {
	s.Size, s.Touched, s.Fetched, s.Vain, s.Bytes = s.Size+o.Size, s.Touched+o.Touched, s.Fetched+o.Fetched, s.Vain+o.Vain, s.Bytes+o.Bytes
	s.Requests, s.ByReaders = s.Requests+o.Requests, s.ByReaders+o.ByReaders
}

// tracePiece is the size of the pieces in which layers are compared: that of
// the parts that are recorded.
const tracePiece = 16 << 10

// draw fills in layer number n from its touches and fetches.
func (t *trace) draw(l *tracedLayer, n int, doc record.Document, fetches []control.Fetch) {
	pieces := int((l.Size + tracePiece - 1) / tracePiece)
	touched, fetched := make([]bool, pieces), make([]bool, pieces)
	paint := func(set []bool, off, size int64) {
		for i := off / tracePiece; i < int64(pieces) && i*tracePiece < off+size; i++ {
			set[i] = true
		}
	}
	x := func(seconds float64) float64 { return seconds / t.Seconds * traceWidth }
	for _, touch := range doc.Touches {
		if touch.Layer != n {
			continue
		}
		paint(touched, touch.Off, touch.Len)
		at := float64(touch.Millis) / 1e3
		l.Reads = append(l.Reads, mark{X: x(at), W: 1, Kind: "read", Text: fmt.Sprintf("%.3f s: %s at %d read", at, size(touch.Len), touch.Off)})
	}
	for _, f := range fetches {
		paint(fetched, f.Off, f.Len)
		l.Requests++
		l.Bytes += f.Bytes
		if f.Reason == "reader" || f.Reason == "readahead" {
			l.ByReaders++
		}
		at, kind := f.Began.Sub(doc.Began).Seconds(), f.Reason
		if f.Error != "" {
			kind = "failed"
		}
		l.Fetches = append(l.Fetches, mark{X: x(at), W: max(x(f.Millis/1e3), 1), Kind: kind,
			Text: fmt.Sprintf("%.3f s: %s for %s from %s in %.0f ms %s", at, size(f.Bytes), f.Reason, f.Host, f.Millis, f.Error)})
	}
	l.count(touched, fetched)
}

// count adds up the pieces of a layer and draws its map.
func (l *tracedLayer) count(touched, fetched []bool) {
	n := len(touched)
	kinds := make([]string, n)
	for i := range n {
		bytes := min(tracePiece, l.Size-int64(i)*tracePiece)
		switch {
		case touched[i] && fetched[i]:
			kinds[i] = "used"
		case touched[i]:
			kinds[i] = "here" // it was on disk before
		case fetched[i]:
			kinds[i] = "vain"
			l.Vain += bytes
		}
		if touched[i] {
			l.Touched += bytes
		}
		if fetched[i] {
			l.Fetched += bytes
		}
	}
	order := []string{"used", "here", "vain", ""} // the first that a cell has counts
	cells := min(traceCells, n)
	for c := range cells {
		part := kinds[c*n/cells : (c+1)*n/cells]
		kind := order[slices.IndexFunc(order, func(k string) bool { return slices.Contains(part, k) })]
		last := len(l.Map) - 1
		width := traceWidth / float64(cells)
		if last >= 0 && l.Map[last].Kind == kind {
			l.Map[last].W += width
			continue
		}
		l.Map = append(l.Map, mark{X: float64(c) * width, W: width, Kind: kind, Text: kind})
	}
}

// waited returns the seconds in which a request of a reader was under way.
func waited(fetches []control.Fetch) (seconds float64) {
	var spans [][2]time.Time
	for _, f := range fetches {
		if f.Reason == "reader" || f.Reason == "readahead" {
			spans = append(spans, [2]time.Time{f.Began, f.Began.Add(time.Duration(f.Millis * float64(time.Millisecond)))})
		}
	}
	slices.SortFunc(spans, func(a, b [2]time.Time) int { return a[0].Compare(b[0]) })
	var until time.Time
	for _, s := range spans {
		if s[0].Before(until) {
			s[0] = until
		}
		if s[1].After(s[0]) {
			seconds += s[1].Sub(s[0]).Seconds()
			until = s[1]
		}
	}
	return seconds
}

// ticks are about ten round numbers of seconds.
func ticks(seconds float64) (all []mark) {
	step := 0.001
	for i := 0; seconds/step > 10; i++ {
		step *= []float64{2, 2.5, 2}[i%3]
	}
	for at := 0.0; at <= seconds; at += step {
		all = append(all, mark{X: at / seconds * traceWidth, Text: fmt.Sprintf("%.4g s", at)})
	}
	return all
}

// ListRequests is about how many requests a prefetch list would take: they ask
// for what arrives in a tenth of a second.
func (t *trace) ListRequests() int64 {
	const each = 8 << 20
	return (t.Total.Touched + each - 1) / each
}

func (t *trace) summary() string {
	return fmt.Sprintf("%d requests, %s; %s read, %s fetched in vain", t.Total.Requests, size(t.Total.Bytes), size(t.Total.Touched), size(t.Total.Vain))
}

func (t *trace) write(w io.Writer) error {
	page, err := template.New("trace").Funcs(template.FuncMap{
		"size": size,
		"px":   func(v float64) string { return fmt.Sprintf("%.1f", v) },
	}).Parse(tracePage)
	if err != nil {
		return err
	}
	return page.Execute(w, t)
}
