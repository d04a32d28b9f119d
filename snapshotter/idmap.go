package snapshotter

import (
	"fmt"
	"math"
	"strconv"
	"strings"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
)

// idmap says which IDs of the host the IDs of a container's user namespace
// are, as containerd's labels do it: container:host:size, several with commas.
// The zero value is a container without a user namespace.
type idmap struct{ uids, gids string }

// idmapOf reads a snapshot's labels.
func idmapOf(labels map[string]string) (idmap, error) {
	m := idmap{labels[snapshots.LabelSnapshotUIDMapping], labels[snapshots.LabelSnapshotGIDMapping]}
	if (m.uids == "") != (m.gids == "") {
		// containerd would map nothing, and say nothing.
		return idmap{}, fmt.Errorf("labels map user IDs %q and group IDs %q, but both must be mapped: %w", m.uids, m.gids, errdefs.ErrInvalidArgument)
	}
	return m, nil
}

func (m idmap) empty() bool { return m == idmap{} }

// options makes containerd map the owners of what it mounts.
func (m idmap) options() []string {
	if m.empty() {
		return nil
	}
	return []string{"uidmap=" + m.uids, "gidmap=" + m.gids}
}

// root is who the container's root is on the host.
func (m idmap) root() (uid, gid int, err error) {
	if uid, err = hostRoot(m.uids); err != nil {
		return 0, 0, err
	}
	gid, err = hostRoot(m.gids)
	return uid, gid, err
}

// hostRoot returns what the ID 0 is mapped to.
func hostRoot(mappings string) (int, error) {
	for one := range strings.SplitSeq(mappings, ",") {
		fields := strings.Split(one, ":")
		if len(fields) != 3 {
			return 0, fmt.Errorf("ID mapping %q is not container:host:size: %w", one, errdefs.ErrInvalidArgument)
		}
		var n [3]uint64
		for i, f := range fields {
			var err error
			// The largest ID means "no ID" to the kernel.
			if n[i], err = strconv.ParseUint(f, 10, 32); err != nil || n[i] == math.MaxUint32 {
				return 0, fmt.Errorf("ID mapping %q: %q is not an ID: %w", one, f, errdefs.ErrInvalidArgument)
			}
		}
		if n[0] == 0 && n[2] > 0 {
			return int(n[1]), nil
		}
	}
	return 0, fmt.Errorf("ID mapping %q does not map the ID 0: %w", mappings, errdefs.ErrInvalidArgument)
}
