// Package testbed is what benchmarks of the run side are held on: a registry with images behind a link of a rate and a
// latency, and sites that pull from it, each with a containerd and a snapshotter of its own.
//
// Everything is real (package harness). A site is made before the clock starts, and what it has goes when it is closed,
// so that every cold run finds the machine as the one before did.
package testbed
