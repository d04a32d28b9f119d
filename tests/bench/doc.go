// Package bench measures this project against its peers, on one image and in one run.
//
// A contest is a piece of work that several contestants do: this project's code and that of others. They take turns,
// round by round, so that a ratio holds on a machine that has other work too; a figure in seconds holds for the machine
// alone. docs/benchmarks.md has the method, the figures and what is asked of them; `make bench-index` writes them.
//
// The package is a module of its own: what the peers depend on is not what the product depends on.
package bench
