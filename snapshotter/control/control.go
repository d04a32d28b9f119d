// Package control is how clipctl asks the daemon what it is doing, and has it make room.
//
// The daemon says what it knows: snapshots, layers, and itself. It does not ask
// containerd: which images and containers those are, the asker puts together.
package control

import (
	"context"
	"encoding/json"
	"fmt"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"google.golang.org/grpc"

	"github.com/beam-cloud/containerd-clip/archive"
	"github.com/beam-cloud/containerd-clip/snapshotter/unary"
)

// Version of the documents.
const Version = 1

// Status is what a daemon says of its work.
type Status struct {
	Version   int        `json:"version"`
	Daemon    Daemon     `json:"daemon"`
	Cache     Cache      `json:"cache"`
	Snapshots []Snapshot `json:"snapshots"`
	Layers    []Layer    `json:"layers"` // those that lazy snapshots use
}

// Daemon is the process and what its machine can do.
type Daemon struct {
	PID     int       `json:"pid"`
	Started time.Time `json:"started"`
	Root    string    `json:"root"` // directory of all state
	// Mode is how roots are mounted; NotLazy says why none can be, and Full that
	// it is only because the disk is full.
	Mode    string `json:"mode,omitempty"`
	NotLazy string `json:"notLazy,omitempty"`
	Full    bool   `json:"full,omitempty"`
	// Nested and Remap say what roots cannot do, see root.Ability.
	Nested string `json:"nested,omitempty"`
	Remap  string `json:"remap,omitempty"`
	// Outlived says that containers go on while there is no daemon.
	Outlived bool `json:"outlived"`
	// Reads under way, and for how long the oldest has been.
	InFlight      int     `json:"inFlight"`
	OldestSeconds float64 `json:"oldestSeconds"`
}

// Cache is what fetched layers take on disk, in bytes.
type Cache struct {
	Used int64 `json:"used"`
	Max  int64 `json:"max"`
	// InMemory says that what is fetched cannot be stored.
	InMemory bool `json:"inMemory,omitempty"`
}

// Snapshot is one of the daemon's snapshots.
type Snapshot struct {
	Name   string `json:"name"` // as containerd calls it here: namespace/number/key
	Parent string `json:"parent,omitempty"`
	Kind   string `json:"kind"` // committed, active or view
	// Image is the reference that the layer was pulled by, and ChainID what
	// containerd calls it. Both are empty for what is no layer of an image.
	Image   string        `json:"image,omitempty"`
	ChainID digest.Digest `json:"chainID,omitempty"`
	DiffID  digest.Digest `json:"diffID,omitempty"`
	Lazy    bool          `json:"lazy"`
	NotLazy string        `json:"notLazy,omitempty"` // why an image's layer is not
	// Layers are the diff IDs of a lazy snapshot's root, lowest first, and Mount
	// the mode that it is mounted in; empty if it is not.
	Layers []digest.Digest `json:"layers,omitempty"`
	Mount  string          `json:"mount,omitempty"`
	Size   int64           `json:"size"` // bytes on disk of an ordinary committed one
}

// Layer is one layer in the cache. Sizes are in bytes.
type Layer struct {
	DiffID   digest.Digest `json:"diffID"`
	Size     int64         `json:"size"`    // of the uncompressed stream
	Fetched  int64         `json:"fetched"` // of it, on disk
	BlobSize int64         `json:"blobSize"`
	Disk     int64         `json:"disk"` // all that the layer takes
	Complete bool          `json:"complete"`
	Fill     string        `json:"fill"` // a fill.Phase
	Mounted  bool          `json:"mounted"`
	Used     time.Time     `json:"used,omitzero"` // last read
	// Sources are the references whose repositories hold it, and Host who
	// delivered last.
	Sources []string `json:"sources"`
	Host    string   `json:"host,omitempty"`
	// Error is what last went wrong fetching it, which may be over.
	Error   string    `json:"error,omitempty"`
	ErrorAt time.Time `json:"errorAt,omitzero"`
}

// Fetch is a request to a registry that has ended, see cache.Fetch.
type Fetch struct {
	DiffID digest.Digest `json:"diffID"`
	Off    int64         `json:"off"` // of the uncompressed stream
	Len    int64         `json:"len"`
	Bytes  int64         `json:"bytes"` // compressed
	Reason string        `json:"reason"`
	Host   string        `json:"host"`
	Began  time.Time     `json:"began"`
	Millis float64       `json:"ms"`
	Error  string        `json:"error,omitempty"`
}

// Prune says what to give up.
type Prune struct {
	// All gives up what mounted roots have fetched, too.
	All bool `json:"all"`
}

// Pruned is what was given up.
type Pruned struct {
	Layers int   `json:"layers"`
	Bytes  int64 `json:"bytes"` // of disk
}

// Image is what an archive is looked for, see discover.Image.
type Image struct {
	Ref      string        `json:"ref"`
	Manifest digest.Digest `json:"manifest"`
	Link     digest.Digest `json:"link,omitempty"`
}

// Save says where to write an image's archive.
type Save struct {
	Image Image  `json:"image"`
	Path  string `json:"path"` // absolute, in a directory of this machine that is there
}

// Archive is what the daemon would use for an image.
type Archive struct {
	Layers int `json:"layers,omitempty"`
	// Lazy is how many of them are, from the lowest on, and NotLazy why the next is not.
	Lazy    int    `json:"lazy,omitempty"`
	NotLazy string `json:"notLazy,omitempty"`
	// Upstream is a file that CLIP wrote, of which the archive is still to be
	// made. Nothing else is known then.
	Upstream string `json:"upstream,omitempty"`
}

// ArchiveOf describes an archive.
func ArchiveOf(a *archive.Archive) Archive {
	d := Archive{Layers: len(a.DiffIDs())}
	for ; d.Lazy < d.Layers; d.Lazy++ {
		if d.NotLazy = a.NotLazy(d.Lazy); d.NotLazy != "" {
			break
		}
	}
	return d
}

// Service is what the daemon can be asked.
type Service interface {
	Status(ctx context.Context) (Status, error)
	Prune(ctx context.Context, what Prune) (Pruned, error)
	// Fetches returns the last requests that began after a time.
	Fetches(ctx context.Context, after time.Time) ([]Fetch, error)
	// Find looks for an image's archive where a pull would.
	Find(ctx context.Context, image Image) (Archive, error)
	// Save writes an image's archive, found where a pull would find it, to a file.
	Save(ctx context.Context, what Save) (Archive, error)
}

const serviceName = "containerd.clip.control.v1.Control"

// mostAnswer bounds an answer in bytes: some thousand snapshots.
const mostAnswer = 64 << 20

// Register serves s.
func Register(server grpc.ServiceRegistrar, s Service) {
	server.RegisterService(&grpc.ServiceDesc{
		ServiceName: serviceName,
		HandlerType: (*Service)(nil),
		Methods: []grpc.MethodDesc{
			unary.Method("Status", func(ctx context.Context, s Service, _ string) (any, error) { return s.Status(ctx) }),
			unary.Method("Fetches", func(ctx context.Context, s Service, arg string) (any, error) {
				after, err := time.Parse(time.RFC3339Nano, arg)
				if err != nil {
					return nil, fmt.Errorf("time: %w: %w", err, errdefs.ErrInvalidArgument)
				}
				return s.Fetches(ctx, after)
			}),
			unary.Method("Find", func(ctx context.Context, s Service, arg string) (any, error) {
				var image Image
				if err := json.Unmarshal([]byte(arg), &image); err != nil {
					return nil, fmt.Errorf("image: %w: %w", err, errdefs.ErrInvalidArgument)
				}
				return s.Find(ctx, image)
			}),
			unary.Method("Save", func(ctx context.Context, s Service, arg string) (any, error) {
				var what Save
				if err := json.Unmarshal([]byte(arg), &what); err != nil {
					return nil, fmt.Errorf("what to save: %w: %w", err, errdefs.ErrInvalidArgument)
				}
				return s.Save(ctx, what)
			}),
			unary.Method("Prune", func(ctx context.Context, s Service, arg string) (any, error) {
				var what Prune
				if err := json.Unmarshal([]byte(arg), &what); err != nil {
					return nil, fmt.Errorf("what to prune: %w: %w", err, errdefs.ErrInvalidArgument)
				}
				return s.Prune(ctx, what)
			}),
		},
	}, s)
}

// GetStatus asks a daemon for its status.
func GetStatus(ctx context.Context, conn grpc.ClientConnInterface) (st Status, err error) {
	if err := unary.Call(ctx, conn, serviceName, "Status", "", mostAnswer, &st); err != nil {
		return st, err
	}
	if st.Version != Version {
		return st, fmt.Errorf("the daemon's status is of version %d: %w", st.Version, errdefs.ErrNotImplemented)
	}
	return st, nil
}

// AskPrune has a daemon give something up.
func AskPrune(ctx context.Context, conn grpc.ClientConnInterface, what Prune) (done Pruned, err error) {
	arg, err := json.Marshal(what)
	if err != nil {
		return done, err
	}
	err = unary.Call(ctx, conn, serviceName, "Prune", string(arg), mostAnswer, &done)
	return done, err
}

// FindArchive asks a daemon for the archive that it would use for an image. The
// error is errdefs.ErrNotFound if there is none.
func FindArchive(ctx context.Context, conn grpc.ClientConnInterface, image Image) (found Archive, err error) {
	arg, err := json.Marshal(image)
	if err != nil {
		return found, err
	}
	err = unary.Call(ctx, conn, serviceName, "Find", string(arg), mostAnswer, &found)
	return found, err
}

// SaveArchive has a daemon write the archive that it would use for an image to a
// file. The error is errdefs.ErrNotFound if there is none.
func SaveArchive(ctx context.Context, conn grpc.ClientConnInterface, what Save) (saved Archive, err error) {
	arg, err := json.Marshal(what)
	if err != nil {
		return saved, err
	}
	err = unary.Call(ctx, conn, serviceName, "Save", string(arg), mostAnswer, &saved)
	return saved, err
}

// GetFetches asks a daemon for its last requests that began after a time.
func GetFetches(ctx context.Context, conn grpc.ClientConnInterface, after time.Time) (all []Fetch, err error) {
	err = unary.Call(ctx, conn, serviceName, "Fetches", after.UTC().Format(time.RFC3339Nano), mostAnswer, &all)
	return all, err
}
