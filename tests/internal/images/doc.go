// Package images makes the images that tests, demo and benchmarks run, as OCI image layouts.
//
// Small images are made in milliseconds from a static busybox, and hold one of everything that a layer can say. The
// images of the demo and of the benchmarks are real ones, layers of Debian packages; they take minutes and are therefore
// kept in a cache, under a name that carries the recipe's version.
//
// Layers are compressed as builders do it: Go's gzip at its default level, one member.
package images
