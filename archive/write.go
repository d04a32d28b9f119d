package archive

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"

	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"

	"github.com/beam-cloud/containerd-clip/archive/inflate"
	"github.com/beam-cloud/containerd-clip/archive/layer"
	"github.com/beam-cloud/containerd-clip/archive/tree"
)

// Stats says what an archive holds and where its bytes go.
type Stats struct {
	Size     int64 // of the file
	Compat   int64 // of the part that upstream CLIP reads
	Sections int64 // of ours
	Files    int   // paths in the merged root
	NotLazy  int   // layers without an index
}

// WriteFile writes the archive of img to path, or leaves path as it was. It
// reads the file back before it takes its name.
func WriteFile(path string, img *Image) (_ Stats, err error) {
	tmp, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".*")
	if err != nil {
		return Stats{}, err
	}
	defer func() {
		err = errors.Join(err, tmp.Close())
		if err != nil {
			os.Remove(tmp.Name())
		}
	}()
	buf := bufio.NewWriterSize(tmp, 1<<20)
	st, err := Write(buf, img)
	if err != nil {
		return st, err
	}
	if err := buf.Flush(); err != nil {
		return st, err
	}
	if err := tmp.Chmod(0o644); err != nil {
		return st, err
	}
	var synced errgroup.Group // the disk writes while the file is read
	synced.Go(tmp.Sync)
	if err = verify(tmp, st.Size, img); err != nil {
		err = fmt.Errorf("reading %s back: %w", tmp.Name(), err)
	}
	if err = errors.Join(err, synced.Wait()); err != nil {
		return st, err
	}
	return st, os.Rename(tmp.Name(), path)
}

// verify opens a written archive and decodes all of it.
func verify(r io.ReaderAt, size int64, img *Image) error {
	a, err := Open(r, size)
	if err != nil {
		return err
	}
	if _, err := a.Prefetch(); err != nil {
		return err
	}
	var g errgroup.Group
	g.SetLimit(runtime.GOMAXPROCS(0))
	for i, l := range img.Layers {
		if l.Index == nil {
			continue
		}
		g.Go(func() error { return a.check(i) })
	}
	return g.Wait()
}

// Write writes the archive of img to w. Equal images give equal bytes.
func Write(w io.Writer, img *Image) (Stats, error) {
	m, err := img.validate()
	if err != nil {
		return Stats{}, err
	}
	var g errgroup.Group
	var s *sectionWriter
	g.Go(func() (err error) {
		s, err = img.sections(m)
		return err
	})
	compat, files, err := img.compat(m)
	if err = errors.Join(err, g.Wait()); err != nil {
		return Stats{}, err
	}
	st := Stats{Compat: int64(length(compat)), Files: files}
	for _, l := range img.Layers {
		if l.Index == nil {
			st.NotLazy++
		}
	}
	sections, err := s.finish(uint64(st.Compat))
	if err != nil {
		return Stats{}, err
	}
	st.Sections = int64(length(sections))
	st.Size = st.Compat + st.Sections
	if err := writeAll(w, append(compat, sections...)); err != nil {
		return Stats{}, err
	}
	return st, nil
}

func writeAll(w io.Writer, pieces [][]byte) error {
	for _, p := range pieces {
		if _, err := w.Write(p); err != nil {
			return err
		}
	}
	return nil
}

// sections returns the sections, not yet placed in the file.
func (img *Image) sections(m ocispec.Manifest) (*sectionWriter, error) {
	enc, err := newEncoder()
	if err != nil {
		return nil, err
	}
	info, err := json.Marshal(img.info(m))
	if err != nil {
		return nil, err
	}
	encoded, err := img.encode(enc)
	if err != nil {
		return nil, err
	}
	// A worker fetches the spans last, since everything else can be put to use meanwhile,
	// and of the windows only what it needs.
	s := new(sectionWriter)
	for i, e := range encoded {
		if e != nil {
			s.addOptional(kindWindows, i, e.windows)
		}
	}
	for i, e := range encoded {
		if e != nil {
			s.addSpans(i, e)
		}
	}
	s.add(kindInfo, 0, compress(enc, info))
	s.add(kindManifest, 0, compress(enc, img.Manifest))
	s.add(kindConfig, 0, compress(enc, img.Config))
	for i, e := range encoded {
		if e != nil {
			s.add(kindEntries, i, e.entries)
		}
	}
	for i, e := range encoded {
		if e != nil {
			s.addOptional(kindImports, i, e.imports)
		}
	}
	if img.Prefetch != nil {
		s.add(kindPrefetch, 0, compress(enc, img.Prefetch.append(nil)))
	}
	return s, nil
}

// encode returns the layers' indexes in their sections, nil for a layer without.
func (img *Image) encode(enc *zstd.Encoder) ([]*EncodedIndex, error) {
	encoded := make([]*EncodedIndex, len(img.Layers))
	indexes := &IndexEncoder{enc: enc}
	for i, l := range img.Layers {
		if l.Index == nil {
			continue
		}
		if encoded[i] = l.encoded; l.encoded != nil && l.encoded.index == l.Index {
			continue
		}
		var err error
		if encoded[i], err = indexes.Encode(l.Index); err != nil {
			return nil, err
		}
	}
	return encoded, nil
}

// compat returns the part that upstream CLIP reads and the number of paths.
func (img *Image) compat(m ocispec.Manifest) ([][]byte, int, error) {
	root, err := img.root()
	if err != nil {
		return nil, 0, err
	}
	return compatPart(img, m, root)
}

func (img *Image) info(m ocispec.Manifest) Info {
	info := Info{StorageRef: img.StorageRef, Platform: img.Platform, Descriptor: img.Descriptor}
	info.Descriptor.Annotations = nil // of the index entry, not of the image
	info.Descriptor.Platform = nil
	for i, l := range img.Layers {
		if l.Index != nil {
			if info.Sizes == nil {
				info.Sizes = map[digest.Digest]inflate.Out{}
			}
			info.Sizes[m.Layers[i].Digest] = l.Index.OutSize
			continue
		}
		if info.NotLazy == nil {
			info.NotLazy = map[digest.Digest]string{}
		}
		info.NotLazy[m.Layers[i].Digest] = l.Reason
	}
	return info
}

// root returns the merged root, or nil if a layer has no index.
func (img *Image) root() (*tree.Node, error) {
	layers := make([]*layer.Index, len(img.Layers))
	for i, l := range img.Layers {
		if l.Index == nil {
			return nil, nil
		}
		layers[i] = l.Index
	}
	return tree.Merge(layers)
}
