// Package command is the command line of clipctl.
package command

import (
	"context"
	"fmt"
	"os"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/defaults"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/spf13/cobra"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
)

// defaultHostsDirs are where containerd's <host>/hosts.toml files are.
var defaultHostsDirs = []string{"/etc/containerd/certs.d", "/etc/docker/certs.d"}

// globals are the flags that all commands share.
type globals struct {
	address     string
	namespace   string
	clipAddress string
}

// New returns clipctl's root command.
func New() *cobra.Command {
	g := &globals{}
	cmd := &cobra.Command{
		Use:           "clipctl",
		Short:         "Index container images so that they start before they are downloaded",
		SilenceUsage:  true,
		SilenceErrors: true,
	}
	f := cmd.PersistentFlags()
	f.StringVarP(&g.address, "address", "a", env("CONTAINERD_ADDRESS", defaults.DefaultAddress), "containerd's socket [$CONTAINERD_ADDRESS]")
	f.StringVarP(&g.namespace, "namespace", "n", env("CONTAINERD_NAMESPACE", namespaces.Default), "containerd namespace [$CONTAINERD_NAMESPACE]")
	f.StringVar(&g.clipAddress, "clip-address", env("CLIP_ADDRESS", "/run/containerd-clip-grpc/containerd-clip-grpc.sock"), "the snapshotter daemon's socket [$CLIP_ADDRESS]")
	cmd.AddCommand(newIndexCommand(g), newExportCommand(g), newContentCommand(g), newLoadCommand(g), newPushCommand(g), newPullArchiveCommand(g),
		newConvertCommand(g), newRecordCommand(g), newStatusCommand(g), newDoctorCommand(g), newPullCommand(g), newCacheCommand(g), newCheckCommand(g), newSetupCommand(g),
		newInspectCommand(), newListCommand(), newCatCommand(), newMountCommand())
	for _, sub := range cmd.Commands() {
		completeArgs(g, sub)
	}
	return cmd
}

// newGroup returns a command that has only commands below it.
func newGroup(use, short string) *cobra.Command {
	return &cobra.Command{Use: use, Short: short, Args: cobra.NoArgs, RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() }}
}

func env(name, otherwise string) string {
	if v := os.Getenv(name); v != "" {
		return v
	}
	return otherwise
}

// connect dials containerd. The context it returns carries the namespace.
func (g *globals) connect(ctx context.Context) (context.Context, *containerd.Client, error) {
	if _, err := os.Stat(g.address); err != nil {
		return ctx, nil, fmt.Errorf("containerd's socket (is containerd running? name another with --address): %w", err)
	}
	client, err := containerd.New(g.address)
	if err != nil {
		return ctx, nil, fmt.Errorf("connecting to containerd at %s: %w", g.address, err)
	}
	return namespaces.WithNamespace(ctx, g.namespace), client, nil
}

// connectDaemon dials the snapshotter daemon. The caller closes the connection.
func (g *globals) connectDaemon() (*grpc.ClientConn, error) {
	if _, err := os.Stat(g.clipAddress); err != nil {
		return nil, fmt.Errorf("the daemon's socket (is containerd-clip-grpc running? name another with --clip-address): %w", err)
	}
	return grpc.NewClient("unix://"+g.clipAddress, grpc.WithTransportCredentials(insecure.NewCredentials()))
}
