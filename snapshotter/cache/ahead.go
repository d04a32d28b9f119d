package cache

import "github.com/beam-cloud/containerd-clip/archive/layer"

// leastRun is how much a run for a reader brings, counted from where its decoding
// starts, in uncompressed bytes: what is read next lies nearby, more often than
// not, since what belongs together was unpacked side by side. It is more than the
// distance of seek points: less of it takes more requests, more of it brings more
// that nobody reads.
const leastRun = 1920 << 10

// Where what runs bring along is not read, they bring nothing along.
const (
	guessesTried = 64 // spans that are brought along before they are judged by it
	guessesKept  = 4  // one of so many must have been read
	guessesMost  = 1024
)

// guesses are the spans of a layer that came with others, and how many of them
// were worth it.
type guesses struct {
	open          bitmap // those that nobody has read yet; nil if there are none
	brought, read int    // lately
}

// good says whether to go on guessing.
func (g *guesses) good() bool {
	return g.brought < guessesTried || g.read*guessesKept >= g.brought
}

// add notes that a span of so many came along.
func (g *guesses) add(span, spans int) {
	if g.open == nil {
		g.open = newBitmap(spans)
	}
	g.open.set(span)
	if g.brought++; g.brought > guessesMost {
		g.brought, g.read = g.brought/2, g.read/2
	}
}

// touch notes that a span is read.
func (g *guesses) touch(span int) {
	if g.open != nil && g.open.get(span) {
		g.open.clear(span)
		g.read++
	}
}

// goOnLocked returns where a run that decodes from the span first on and must go
// to end should go to: so far that it is worth it, and then to where another one
// resumes. The caller holds l.mu.
func (l *Layer) goOnLocked(x *layer.Index, first, end int, far *run) int {
	if !l.guesses.good() {
		return end
	}
	for least := first + int(leastRun/l.head.SpanSize); end < l.spans && l.missingLocked(end, far); end++ {
		if end >= least && (l.pauses() || l.resumes(x, end)) {
			break
		}
	}
	return end
}

// resumes says whether another run can go on behind one that ends before the span
// end, and decodes no more than a part of a span twice, even if that has not ended.
func (l *Layer) resumes(x *layer.Index, end int) bool {
	last, stop := l.spanRange(end - 1)
	point, _ := x.DecodeRange(stop)
	return point > last
}
