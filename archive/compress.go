package archive

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"

	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
)

// AnnotationTail is the annotation of an archive in a registry that holds a
// Tail as JSON.
const AnnotationTail = "vnd.beam.clip.archive.tail"

// Tail locates the sections in a compressed archive. They are all that a worker
// reads; the front part, most of an archive, is for CLIP.
type Tail struct {
	Digest digest.Digest `json:"digest"` // of the compressed archive from In to its end
	In     int64         `json:"in"`     // offset in the compressed archive, where a zstd frame starts
	Out    int64         `json:"out"`    // offset in the archive
}

// Compress returns the archive as one zstd stream, the same bytes every time,
// and where in it the sections are.
func (a *Archive) Compress() ([]byte, Tail, error) {
	start := a.s.start()
	var b bytes.Buffer
	// One goroutine and a fixed level: the same archive becomes the same blob.
	enc, err := zstd.NewWriter(&b, zstd.WithEncoderConcurrency(1), zstd.WithEncoderLevel(zstd.SpeedBetterCompression))
	if err != nil {
		return nil, Tail{}, err
	}
	frame := func(from, to int64) error {
		enc.Reset(&b)
		if _, err := io.Copy(enc, io.NewSectionReader(a.s.r, from, to-from)); err != nil {
			return fmt.Errorf("compressing an archive: %w", err)
		}
		return enc.Close()
	}
	if err := frame(0, start); err != nil {
		return nil, Tail{}, err
	}
	in := b.Len()
	if err := frame(start, a.s.size); err != nil {
		return nil, Tail{}, err
	}
	return b.Bytes(), Tail{Digest: digest.FromBytes(b.Bytes()[in:]), In: int64(in), Out: start}, nil
}

// TailOf returns the Tail that annotations hold for a compressed archive of
// size bytes. Without a usable one there is only the archive as a whole.
func TailOf(annotations map[string]string, size int64) (t Tail, ok bool) {
	if err := json.Unmarshal([]byte(annotations[AnnotationTail]), &t); err != nil {
		return Tail{}, false
	}
	return t, t.Digest.Validate() == nil && t.In >= 0 && t.In < size && t.Out >= 0
}
