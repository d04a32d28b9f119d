// Package harness runs the real parts that the tests and the demo need: containerd, a registry that counts, and the
// daemon under test.
//
// # Vocabulary
//
// A lab is a directory in which everything lives that one test starts: roots, sockets, logs, mounts. A part is a
// program that the project does not make (containerd, ctr, the registry); parts are built by tests/parts/build. The
// product is clipctl and containerd-clip-grpc.
//
// # Ownership
//
// Every process that a lab starts carries the lab's directory in its environment (labEnv). Shims and whatever else they
// start inherit it, and a container's own processes are descendants of a shim; so what belongs to a lab is known
// without keeping books, also after a crash of the test. Lab.Close stops what was started in the reverse order, ends
// what is left, takes every mount below the directory away, and fails when something cannot be removed. A lab whose
// owner died without Close is swept when the next lab is made.
//
// A test that hangs loses its lab (guard.go): its FUSE connections are aborted and its processes killed, so that what it
// waits for ends. If all of the test's process hangs, one beside it does that; therefore TestMain calls Main.
//
// Servers listen on loopback or on sockets in the lab's directory only.
//
// # What this package does not do
//
// It knows nothing about archives or snapshots, and decides nothing about a test: it starts, runs, counts and cleans.
package harness
