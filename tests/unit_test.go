package tests

import (
	"os"
	"slices"
	"strconv"
	"testing"

	"github.com/coreos/go-systemd/v22/unit"
	"github.com/stretchr/testify/require"
)

// TestUnit reads the systemd unit for what keeps containers going while the
// daemon is killed, restarted and upgraded.
func TestUnit(t *testing.T) {
	f, err := os.Open("../containerd-clip-grpc.service")
	require.NoError(t, err)
	defer f.Close()
	options, err := unit.DeserializeOptions(f)
	require.NoError(t, err)
	got := map[string]string{}
	for _, o := range options {
		key := o.Section + "." + o.Name
		require.NotContains(t, got, key, "it is there once")
		got[key] = o.Value
	}
	for key, want := range map[string]string{
		"Service.Type":                        "notify",
		"Service.NotifyAccess":                "main", // the store takes descriptors from the daemon
		"Service.KillMode":                    "process",
		"Service.WatchdogSec":                 "1min",
		"Service.Restart":                     "always",
		"Unit.StartLimitIntervalSec":          "0",
		"Unit.Before":                         "containerd.service",
		"Service.FileDescriptorStorePreserve": "yes",
		"Install.WantedBy":                    "multi-user.target",
	} {
		require.Equal(t, want, got[key], key)
	}
	number := func(key string) int {
		n, err := strconv.Atoi(got[key])
		require.NoError(t, err, key)
		return n
	}
	require.GreaterOrEqual(t, number("Service.FileDescriptorStoreMax"), 1024, "two for each root")
	require.GreaterOrEqual(t, number("Service.LimitNOFILE"), 1<<16, "several for each layer")
	require.Less(t, number("Service.OOMScoreAdjust"), -900)
	require.Contains(t, got["Service.ExecStart"], "/containerd-clip-grpc")
	for key := range got {
		// It must start without the network and containerd, and end without
		// taking containers with it.
		require.NotContains(t, []string{"Unit.Requires", "Unit.BindsTo", "Unit.PartOf", "Unit.Wants"}, key)
		// These give the daemon a mount namespace of its own: containers would not see its roots.
		require.False(t, slices.Contains([]string{"Service.PrivateMounts", "Service.PrivateTmp", "Service.PrivateDevices",
			"Service.ProtectSystem", "Service.ProtectHome", "Service.ReadWritePaths", "Service.ReadOnlyPaths", "Service.MountFlags",
			"Service.RootDirectory", "Service.DynamicUser"}, key), key)
	}
	require.NotContains(t, got["Unit.After"], "network")
	require.NotContains(t, got["Unit.After"], "containerd")
}
