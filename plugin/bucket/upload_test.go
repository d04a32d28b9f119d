package bucket

import (
	"bytes"
	"context"
	"encoding/json"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"mime"
	"mime/multipart"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/iotest"

	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/beam-cloud/containerd-clip/internal/testutil/need"
)

// provider is the part of a provider's protocol that the drivers upload and read by. An object is there when the last
// request of its upload has arrived as a whole.
type provider struct {
	t   *testing.T
	url string

	serving sync.RWMutex // is read-locked by requests, comes before mu

	mu      sync.Mutex // guards the fields below
	objects map[string][]byte
	pieces  map[string][]byte                                          // of uploads that are under way
	puts    int                                                        // requests that brought data
	fault   func(put int, w http.ResponseWriter, r *http.Request) bool // answers a request that brings data in place of the provider
}

func newProvider(t *testing.T, serve func(*provider, http.ResponseWriter, *http.Request)) *provider {
	p := &provider{t: t, objects: map[string][]byte{}, pieces: map[string][]byte{}}
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		p.serving.RLock()
		defer p.serving.RUnlock()
		serve(p, w, r)
	}))
	t.Cleanup(server.Close)
	p.url = server.URL
	return p
}

// data reads what a request brings. It is false if a fault has answered, or if the request broke off.
func (p *provider) data(w http.ResponseWriter, r *http.Request) ([]byte, bool) {
	b, err := io.ReadAll(r.Body)
	p.mu.Lock()
	p.puts++
	put, fault := p.puts, p.fault
	p.mu.Unlock()
	if fault != nil && fault(put, w, r) {
		return nil, false
	}
	return b, err == nil
}

// expect has requests counted anew, and those that bring data answered by a fault; nil is none. It waits for those
// that nobody waits for any more.
func (p *provider) expect(fault func(int, http.ResponseWriter, *http.Request) bool) {
	p.serving.Lock()
	defer p.serving.Unlock()
	p.mu.Lock()
	defer p.mu.Unlock()
	p.puts, p.fault = 0, fault
}

func (p *provider) get(w http.ResponseWriter, name string) {
	p.mu.Lock()
	b, ok := p.objects[name]
	p.mu.Unlock()
	if !ok {
		w.WriteHeader(http.StatusNotFound)
		return
	}
	w.Header().Set("Content-Length", fmt.Sprint(len(b)))
	w.Header().Set("Last-Modified", "Mon, 02 Jan 2006 15:04:05 GMT")
	w.Header().Set("ETag", `"1"`)
	_, _ = w.Write(b)
}

func (p *provider) store(name string, b []byte) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.objects[name] = b
}

// serveGCS is Google's: a small object comes in one request, beside its name; a large one piece by piece to a URL that
// is asked for first.
func serveGCS(p *provider, w http.ResponseWriter, r *http.Request) {
	name := func(b []byte) string {
		var object struct{ Bucket, Name string }
		if err := json.Unmarshal(b, &object); err != nil {
			p.t.Errorf("%s: %v", r.URL, err)
		}
		return object.Bucket + "/" + object.Name
	}
	const session = "/session/"
	switch kind := r.URL.Query().Get("uploadType"); {
	case r.Method == http.MethodGet:
		p.get(w, strings.TrimPrefix(r.URL.Path, "/"))
	case kind == "resumable":
		b, _ := io.ReadAll(r.Body)
		p.mu.Lock()
		delete(p.pieces, name(b))
		p.mu.Unlock()
		w.Header().Set("Location", p.url+session+name(b))
	case kind == "multipart":
		b, ok := p.data(w, r)
		if !ok {
			return
		}
		_, params, _ := mime.ParseMediaType(r.Header.Get("Content-Type"))
		parts := multipart.NewReader(bytes.NewReader(b), params["boundary"])
		var read [2][]byte
		for i := range read {
			part, err := parts.NextPart()
			if err != nil {
				p.t.Errorf("part %d: %v", i, err)
				return
			}
			read[i], _ = io.ReadAll(part)
		}
		p.store(name(read[0]), read[1])
		fmt.Fprint(w, "{}")
	case strings.HasPrefix(r.URL.Path, session):
		b, ok := p.data(w, r)
		if !ok {
			return
		}
		name := strings.TrimPrefix(r.URL.Path, session)
		p.mu.Lock()
		off := len(p.pieces[name])
		p.pieces[name] = append(p.pieces[name], b...)
		all := p.pieces[name]
		p.mu.Unlock()
		switch r.Header.Get("Content-Range") {
		case fmt.Sprintf("bytes %d-%d/*", off, len(all)-1):
			w.Header().Set("X-Http-Status-Code-Override", "308") // go on
		case fmt.Sprintf("bytes %d-%d/%d", off, len(all)-1, len(all)):
			p.store(name, all)
			fmt.Fprint(w, "{}")
		default:
			p.t.Errorf("range %q behind %d bytes", r.Header.Get("Content-Range"), off)
		}
	default:
		p.t.Errorf("%s %s", r.Method, r.URL)
	}
}

// serveAzure is Microsoft's: a small object comes in one request, a large one in blocks, in any order, and then a list
// of them.
func serveAzure(p *provider, w http.ResponseWriter, r *http.Request) {
	name := strings.TrimPrefix(r.URL.Path, "/account/")
	if r.Method == http.MethodGet {
		p.get(w, name)
		return
	}
	comp := r.URL.Query().Get("comp")
	if comp == "blocklist" {
		var list struct{ Latest []string }
		if err := xml.NewDecoder(r.Body).Decode(&list); err != nil {
			p.t.Errorf("%s: %v", r.URL, err)
		}
		var all []byte
		p.mu.Lock()
		for _, id := range list.Latest {
			all = append(all, p.pieces[name+id]...)
		}
		p.mu.Unlock()
		p.store(name, all)
		w.WriteHeader(http.StatusCreated)
		return
	}
	b, ok := p.data(w, r)
	if !ok {
		return
	}
	switch {
	case comp == "block":
		p.mu.Lock()
		p.pieces[name+r.URL.Query().Get("blockid")] = b
		p.mu.Unlock()
	case comp == "" && r.Header.Get("X-Ms-Blob-Type") == "BlockBlob":
		p.store(name, b)
	default:
		p.t.Errorf("%s %s", r.Method, r.URL)
	}
	w.WriteHeader(http.StatusCreated)
}

// TestUpload has archives of one request and of several go to providers, and uploads end before they are done: what
// readers find is a whole archive, the old one, or none.
func TestUpload(t *testing.T) {
	const large = 20 << 20 // more than one of the drivers' pieces, which have 8 and 16 MiB
	for name, serve := range map[string]func(*provider, http.ResponseWriter, *http.Request){"gs": serveGCS, "azblob": serveAzure} {
		t.Run(name, func(t *testing.T) {
			p := newProvider(t, serve)
			host := strings.TrimPrefix(p.url, "http://")
			t.Setenv("STORAGE_EMULATOR_HOST", host)
			t.Setenv("AZURE_STORAGE_ACCOUNT", "account")
			t.Setenv("AZURE_STORAGE_KEY", "a2V5")
			l := location(t, map[string]string{"gs": "gs://b/a/{{.Tag}}.clip", "azblob": "azblob://b/a/{{.Tag}}.clip?protocol=http&localemu=true&domain=" + host}[name])
			file := filepath.Join(t.TempDir(), "a.clip")
			put := func(ctx context.Context, b []byte) error {
				require.NoError(t, os.WriteFile(file, b, 0o600))
				_, err := l.Put(ctx, file, ref, manifest)
				return err
			}
			content := func(n int, of string) []byte { return []byte(strings.Repeat(of, n/len(of)+1)[:n]) }

			// Uploads that do not get to their end, the first into an empty bucket.
			interruptions := map[string]func(*testing.T) error{
				"refused": func(t *testing.T) error {
					p.expect(refuse(2))
					err := put(t.Context(), content(large, "refused"))
					require.ErrorContains(t, err, "403")
					return err
				},
				"refused at once": func(t *testing.T) error {
					p.expect(refuse(1))
					return put(t.Context(), content(100, "refused"))
				},
				"cancelled": func(t *testing.T) error {
					ctx, cancel := context.WithCancel(t.Context())
					defer cancel()
					p.expect(func(n int, _ http.ResponseWriter, r *http.Request) bool {
						if n >= 2 {
							cancel()
							<-r.Context().Done()
						}
						return n >= 2
					})
					err := put(ctx, content(large, "cancelled"))
					require.ErrorIs(t, err, context.Canceled)
					return err
				},
				"not readable": func(t *testing.T) error {
					b, err := l.open(t.Context())
					require.NoError(t, err)
					broken := errors.New("the disk is broken")
					for _, n := range []int{0, 100, large} {
						err := upload(t.Context(), b, "a/1.clip", io.MultiReader(bytes.NewReader(content(n, "broken")), iotest.ErrReader(broken)))
						require.ErrorIs(t, err, broken, n)
					}
					return broken
				},
			}
			interrupt := func(check func(what string)) {
				for what, interrupted := range interruptions {
					require.Error(t, interrupted(t), what)
					p.expect(nil)
					check(what)
				}
			}
			interrupt(func(what string) {
				_, err := l.Open(t.Context(), ref, manifest)
				require.ErrorIs(t, err, errdefs.ErrNotFound, what)
			})
			for n, several := range map[int]bool{100: false, large: true} {
				p.expect(nil)
				require.NoError(t, put(t.Context(), content(n, "archive")))
				p.mu.Lock()
				puts := p.puts
				p.mu.Unlock()
				require.Equal(t, several, puts > 1, "%d requests", puts)
				require.True(t, string(content(n, "archive")) == read(t, l), "what was put is what is there")
			}
			require.NoError(t, put(t.Context(), []byte("archive")))
			interrupt(func(what string) { require.Equal(t, "archive", read(t, l), what) })
		})
	}
}

// refuse refuses requests that bring data from the nth on.
func refuse(nth int) func(int, http.ResponseWriter, *http.Request) bool {
	return func(n int, w http.ResponseWriter, _ *http.Request) bool {
		if n >= nth {
			w.WriteHeader(http.StatusForbidden)
		}
		return n >= nth
	}
}

// TestFullDisk puts an archive into a directory that has no room for it.
func TestFullDisk(t *testing.T) {
	need.Root(t)
	dir, file := t.TempDir(), filepath.Join(t.TempDir(), "a.clip")
	require.NoError(t, unix.Mount("tmpfs", dir, "tmpfs", 0, "size=64k"))
	t.Cleanup(func() { require.NoError(t, unix.Unmount(dir, 0)) })
	l := location(t, "file://"+dir+"/{{.Tag}}.clip")
	for _, c := range []struct {
		n   int
		err error
	}{{1 << 20, unix.ENOSPC}, {100, nil}, {1 << 20, unix.ENOSPC}} {
		require.NoError(t, os.WriteFile(file, make([]byte, c.n), 0o600))
		_, err := l.Put(t.Context(), file, ref, manifest)
		require.ErrorIs(t, err, c.err)
		left, err := os.ReadDir(dir)
		require.NoError(t, err)
		if len(left) > 0 {
			require.Len(t, read(t, l), 100)
		}
		require.LessOrEqual(t, len(left), 1, "nothing but the archive")
	}
}
