package archive

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"

	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
)

// AnnotationParts is the annotation of an archive in a registry that holds Parts
// as JSON.
const AnnotationParts = "vnd.beam.clip.archive.parts"

// AnnotationRevision is the annotation of an archive in a registry that says, as a
// decimal number, how much the program that wrote it says of an image. Of archives of
// one image that nothing else tells apart, the one with the highest is the best; of
// one that does not say it is 1.
const AnnotationRevision = "vnd.beam.clip.archive.revision"

// Revision is this program's: it says what files load (2), and the windows of seek
// points can be fetched one by one (3).
const Revision = 3

// Parts locates in a compressed archive what a worker reads: the sections. The
// front part, most of an archive, is for CLIP. Each part is one zstd frame.
type Parts struct {
	// Windows is what need not be fetched as a whole, see Place; zero if there is nothing.
	// It has no digest: each group has one.
	Windows Part `json:"windows,omitzero"`
	Spans   Part `json:"spans"` // the layers' spans and seek points; empty if they are not together
	Rest    Part `json:"rest"`  // all other sections, table and footer; up to the end
}

// Part is a piece of a compressed archive that can be decompressed alone. It ends
// where the next one begins.
type Part struct {
	Digest digest.Digest `json:"digest,omitempty"` // of the compressed bytes
	In     int64         `json:"in"`               // offset in the compressed archive
	Out    int64         `json:"out"`              // offset in the archive
}

// Compress returns the archive as one zstd stream, the same bytes every time,
// and where in it the sections are.
func (a *Archive) Compress() ([]byte, Parts, error) {
	var b bytes.Buffer
	// One goroutine and a fixed level: the same archive becomes the same blob.
	enc, err := zstd.NewWriter(&b, zstd.WithEncoderConcurrency(1), zstd.WithEncoderLevel(zstd.SpeedBetterCompression))
	if err != nil {
		return nil, Parts{}, err
	}
	part := func(from, to int64) (Part, error) {
		p := Part{In: int64(b.Len()), Out: from}
		if from < to {
			enc.Reset(&b)
			if _, err := io.Copy(enc, io.NewSectionReader(a.s.r, from, to-from)); err != nil {
				return p, fmt.Errorf("compressing an archive: %w", err)
			}
			if err := enc.Close(); err != nil {
				return p, err
			}
		}
		p.Digest = digest.FromBytes(b.Bytes()[p.In:])
		return p, nil
	}
	windows, spans, rest := a.s.borders()
	var parts Parts
	if _, err = part(0, windows); err == nil && windows < spans {
		parts.Windows = Part{In: int64(b.Len()), Out: windows}
		err = storePart(&b, a.s.r, windows, spans)
	}
	if err == nil {
		parts.Spans, err = part(spans, rest)
	}
	if err == nil {
		parts.Rest, err = part(rest, a.s.size)
	}
	return b.Bytes(), parts, err
}

// storePart appends the bytes [from, to) of r to b without compressing them.
func storePart(b *bytes.Buffer, r io.ReaderAt, from, to int64) error {
	frame, err := appendStored(nil, io.NewSectionReader(r, from, to-from), to-from)
	if err != nil {
		return fmt.Errorf("compressing an archive: %w", err)
	}
	_, err = b.Write(frame)
	return err
}

// PartsOf returns the Parts that annotations hold for a compressed archive of
// size bytes. Without usable ones there is only the archive as a whole.
func PartsOf(annotations map[string]string, size int64) (p Parts, ok bool) {
	if err := json.Unmarshal([]byte(annotations[AnnotationParts]), &p); err != nil {
		return Parts{}, false
	}
	ordered := p.Windows.In >= 0 && p.Windows.In <= p.Spans.In && p.Spans.In <= p.Rest.In && p.Rest.In < size &&
		p.Windows.Out >= 0 && p.Windows.Out <= p.Spans.Out && p.Spans.Out <= p.Rest.Out
	return p, ordered && p.Spans.Digest.Validate() == nil && p.Rest.Digest.Validate() == nil
}
