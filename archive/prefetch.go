package archive

import (
	"encoding/binary"
	"fmt"
	"time"
)

// Prefetch is what a start of the image reads: spans in the order in which
// they were first touched when it was recorded. It says what is worth fetching
// before it is asked for, and nothing else depends on it.
type Prefetch struct {
	Recorded time.Time   // to the second
	Spans    []SpanRange // no span is named twice
}

// SpanRange is a range of spans of one layer.
type SpanRange struct {
	Layer int // position in the manifest
	First int // number of the first span
	Count int // at least 1
}

// End returns the number of the span behind the range.
func (r SpanRange) End() int { return r.First + r.Count }

// Bounds on a prefetch list. maxPrefetch ranges are more than any start
// touches; the longest encoding of one takes maxRangeBytes.
const (
	maxPrefetch   = 1 << 16
	maxRangeBytes = 3 * binary.MaxVarintLen64
	maxSpans      = 1 << 30 // of one layer; less than a section of spans can hold
	maxRecorded   = 1 << 40 // seconds
)

// append appends the encoded list: the time, the number of ranges, and of each
// its layer, its first span minus the end of the layer's range before, and its
// count.
func (p *Prefetch) append(b []byte) []byte {
	b = binary.AppendUvarint(b, uint64(max(p.Recorded.Unix(), 0)))
	b = binary.AppendUvarint(b, uint64(len(p.Spans)))
	ends := map[int]int{}
	for _, r := range p.Spans {
		b = binary.AppendUvarint(b, uint64(r.Layer))
		b = binary.AppendVarint(b, int64(r.First-ends[r.Layer]))
		b = binary.AppendUvarint(b, uint64(r.Count))
		ends[r.Layer] = r.End()
	}
	return b
}

// decodePrefetch decodes a list for an image of that many layers. Which spans
// a layer has is not known here: whoever fetches them finds out.
func decodePrefetch(b []byte, layers int) (*Prefetch, error) {
	var bad error
	uint := func(most uint64, what string) int64 {
		v, n := binary.Uvarint(b)
		if bad == nil && (n <= 0 || v > most) {
			bad = fmt.Errorf("%w: prefetch list: %s", ErrCorrupt, what)
		}
		if bad != nil {
			return 0
		}
		b = b[n:]
		return int64(v)
	}
	p := &Prefetch{Recorded: time.Unix(uint(maxRecorded, "time"), 0).UTC()}
	// A range takes three bytes at least.
	n := uint(min(maxPrefetch, uint64(len(b)/3)), "number of ranges")
	ends := map[int]int{}
	for range n {
		if layers == 0 {
			return nil, fmt.Errorf("%w: prefetch list: the image has no layers", ErrCorrupt)
		}
		r := SpanRange{Layer: int(uint(uint64(layers-1), "a layer that the image does not have"))}
		step, k := binary.Varint(b)
		if bad == nil && k <= 0 {
			bad = fmt.Errorf("%w: prefetch list: first span", ErrCorrupt)
		}
		if bad != nil {
			return nil, bad
		}
		b = b[k:]
		first := int64(ends[r.Layer]) + step
		if step < -maxSpans || step > maxSpans || first < 0 || first > maxSpans {
			return nil, fmt.Errorf("%w: prefetch list: span %d", ErrCorrupt, first)
		}
		r.First, r.Count = int(first), int(uint(maxSpans, "number of spans"))
		if bad == nil && r.Count == 0 {
			bad = fmt.Errorf("%w: prefetch list: an empty range", ErrCorrupt)
		}
		if bad != nil {
			return nil, bad
		}
		ends[r.Layer] = r.End()
		p.Spans = append(p.Spans, r)
	}
	if bad == nil && len(b) > 0 {
		bad = fmt.Errorf("%w: prefetch list: %d bytes too many", ErrCorrupt, len(b))
	}
	if bad != nil {
		return nil, bad
	}
	return p, nil
}

// Prefetch returns what a start of the image reads, or nil if that was not
// recorded. The spans need not exist: whoever fetches them must check that.
func (a *Archive) Prefetch() (*Prefetch, error) {
	if !a.s.has(kindPrefetch, 0) {
		return nil, nil
	}
	raw, err := a.s.read(kindPrefetch, 0, maxPrefetch*maxRangeBytes)
	if err != nil {
		return nil, err
	}
	return decodePrefetch(raw, len(a.diffIDs))
}

// Image returns what the archive was made from, so that it can be written
// again with another prefetch list. If windows are elsewhere, it cannot.
func (a *Archive) Image() (*Image, error) {
	img := &Image{
		StorageRef: a.info.StorageRef, Platform: a.info.Platform, Descriptor: a.info.Descriptor,
		Manifest: a.rawMan, Config: a.rawConf, Layers: make([]Layer, len(a.diffIDs)),
	}
	var err error
	for i := range img.Layers {
		if img.Layers[i].Reason = a.NotLazy(i); img.Layers[i].Reason != "" {
			continue
		}
		if img.Layers[i].Index, err = a.Layer(i); err != nil {
			return nil, err
		}
	}
	img.Prefetch, err = a.Prefetch()
	return img, err
}

// validatePrefetch checks that the spans of the list exist, once each.
func (img *Image) validatePrefetch() error {
	if img.Prefetch == nil {
		return nil
	}
	if len(img.Prefetch.Spans) > maxPrefetch {
		return fmt.Errorf("the prefetch list has %d ranges, more than %d", len(img.Prefetch.Spans), maxPrefetch)
	}
	seen := map[SpanRange]bool{}
	for _, r := range img.Prefetch.Spans {
		if r.Layer < 0 || r.Layer >= len(img.Layers) || img.Layers[r.Layer].Index == nil {
			return fmt.Errorf("the prefetch list names layer %d, which has no index", r.Layer)
		}
		spans := len(img.Layers[r.Layer].Index.Spans)
		if r.First < 0 || r.Count < 1 || r.First > spans || r.Count > spans-r.First {
			return fmt.Errorf("the prefetch list names spans [%d, %d) of layer %d, which has %d", r.First, r.End(), r.Layer, spans)
		}
		for span := r.First; span < r.End(); span++ {
			one := SpanRange{r.Layer, span, 1}
			if seen[one] {
				return fmt.Errorf("the prefetch list names span %d of layer %d twice", span, r.Layer)
			}
			seen[one] = true
		}
	}
	return nil
}
