package archive

import (
	"bytes"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/beam-cloud/containerd-clip/archive/imports"
	"github.com/beam-cloud/containerd-clip/archive/internal/testimage"
)

// pythonImage has three layers, of which the second has no sources.
func pythonImage(tb testing.TB) *testImage {
	return newImage(tb,
		testimage.Tar(tb, testimage.Reg("app/a.py", "import b\nfrom c import d\n"), testimage.Reg("app/b.py", "from . import a\n")),
		testimage.Tar(tb, testimage.Reg("noise", testimage.Content(1, 5000))),
		testimage.Tar(tb, testimage.Reg("x", "x"), testimage.Reg("main.py", "import app.a\n")))
}

// pythonSources are what is in each layer of pythonImage.
var pythonSources = [][]imports.Source{
	{
		{Entry: 0, Imports: []imports.Import{{Module: "b"}, {Module: "c", Names: []string{"d"}}}},
		{Entry: 1, Imports: []imports.Import{{Level: 1, Names: []string{"a"}}}},
	},
	nil,
	{{Entry: 1, Imports: []imports.Import{{Module: "app.a"}}}},
}

func TestImports(t *testing.T) {
	img := pythonImage(t)
	b := write(t, &img.Image)
	a, err := open(b)
	require.NoError(t, err)
	for i, want := range pythonSources {
		l, err := a.Imports(i)
		require.NoError(t, err)
		var got []imports.Source
		for k := range l.Len() {
			got = append(got, imports.Source{Entry: l.Entry(k), Imports: l.Source(k).Imports})
		}
		require.Equal(t, want, got)
		x, err := a.Layer(i)
		require.NoError(t, err)
		require.Equal(t, img.Layers[i].Index, x)
	}
	require.Equal(t, []int{0, 2}, layersOf(a, kindImports))

	again, err := a.Image()
	require.NoError(t, err)
	require.True(t, bytes.Equal(b, write(t, again)), "an archive is written again as it was")
}

// layersOf returns the layers that have a section of a kind.
func layersOf(a *Archive, kind uint32) (layers []int) {
	for _, rec := range a.s.table {
		if rec.Kind == kind {
			layers = append(layers, int(rec.Layer))
		}
	}
	return layers
}

// An archive of an earlier program has no section, and is the same archive else.
func TestImportsMissing(t *testing.T) {
	img := pythonImage(t)
	a, err := open(forge(t, img.sections(t), nil))
	require.NoError(t, err)
	for i, l := range img.Layers {
		list, err := a.Imports(i)
		require.NoError(t, err)
		require.Zero(t, list.Len())
		x, err := a.Layer(i)
		require.NoError(t, err)
		require.Empty(t, x.Imports)
		require.Equal(t, l.Index.Entries, x.Entries)
	}
}

func TestImportsEncoded(t *testing.T) {
	img := pythonImage(t)
	want := write(t, &img.Image)
	for i, l := range img.Layers {
		b := encoded(t, l)
		e, err := ReadIndex(bytes.NewReader(b), int64(len(b)))
		require.NoError(t, err)
		require.Equal(t, l.Index, e.Index())
		img.Layers[i] = e.Layer()
	}
	require.True(t, bytes.Equal(want, write(t, &img.Image)))
}

func TestImportsCorrupt(t *testing.T) {
	img := pythonImage(t)
	sections := func(list []byte) []section { return append(img.sections(t), section{kindImports, 2, list}) }
	good := img.Layers[2].Index.Imports
	require.NotEmpty(t, good)
	ofImports := func(alter func(*record)) func([]record) {
		return func(table []record) { alter(&table[len(table)-1]) }
	}
	altered := write(t, &img.Image)
	a, err := open(altered)
	require.NoError(t, err)
	for _, rec := range a.s.table {
		if rec.Kind == kindImports && rec.Layer == 2 {
			altered[rec.Offset+rec.Stored-1] ^= 1
		}
	}
	for name, b := range map[string][]byte{
		"malformed":                 forge(t, sections(good[:len(good)-1]), nil),
		"altered":                   altered,
		"another length":            forge(t, sections(good), ofImports(func(rec *record) { rec.Raw++ })),
		"more than a list may have": forge(t, sections(good), ofImports(func(rec *record) { rec.Raw = imports.MaxList + 1 })),
		"beyond the end":            forge(t, sections(good), ofImports(func(rec *record) { rec.Offset = 1 << 40 })),
	} {
		a, err := open(b)
		require.NoError(t, err, name)
		_, err = a.Imports(2)
		require.ErrorIs(t, err, ErrCorrupt, name)
		require.ErrorContains(t, err, "layer 2: ", name)
		_, err = a.Layer(2)
		require.ErrorIs(t, err, ErrCorrupt, name)
		require.ErrorIs(t, a.check(2), ErrCorrupt, name)
		_, err = a.Image()
		require.ErrorIs(t, err, ErrCorrupt, name)
		_, err = a.Imports(0)
		require.NoError(t, err, name)
		_, err = a.Entries(2)
		require.NoError(t, err, "%s: who asks for something else is not refused", name)
	}
	x := img.Layers[0].Index
	b := forge(t, []section{{kindSpans, 0, x.AppendSpans(nil)}, {kindEntries, 0, x.AppendEntries(nil)}, {kindImports, 0, good[:1]}}, nil)
	_, err = ReadIndex(bytes.NewReader(b), int64(len(b)))
	require.ErrorIs(t, err, ErrCorrupt)
	require.ErrorIs(t, err, imports.ErrFormat)
}
