// Package images makes the images that tests and demo run, as OCI image layouts.
//
// Small images are made in milliseconds from a static busybox, and hold one of everything that a layer can say. The
// demo image is a real one, Debian with python3 and numpy in three layers; it takes minutes and is therefore kept in a
// cache, under a name that carries its recipe's version.
//
// Layers are compressed as builders do it: Go's gzip at its default level, one member.
package images
