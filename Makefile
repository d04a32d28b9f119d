# containerd-clip: build, test and show. `make` alone lists the targets.

GO       ?= go
PREFIX   ?= /usr/local
DESTDIR  ?=
FUZZTIME ?= 30s
SOAK     ?= 10m
BENCH    ?= .
ROUNDS   ?=

BIN    := bin
CACHE  := .cache
PARTS  := $(CACHE)/bin
UNIT    = $(shell $(GO) list ./... | grep -v -e /tests/e2e -e /tests/demo)

.DEFAULT_GOAL := help
.PHONY: help build deps parts images test unit e2e soak lint vuln bench bench-index bench-read fuzz demo install clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

build: ## static binaries in bin/
	CGO_ENABLED=0 $(GO) build -trimpath -ldflags='-s -w' -o $(BIN)/ ./cmd/clipctl ./cmd/containerd-clip-grpc

deps: ## Debian packages that tests and demo need, installed when missing (root)
	@tests/parts/deps

parts: ## containerd, BuildKit, registry, S3 server and linters that the tests use, in .cache/bin
	@tests/parts/build $(PARTS)

images: deps ## the demo's image, in .cache/images (root)
	$(GO) run ./tests/demo -prepare

test: deps parts lint unit e2e ## everything: lint, unit tests with -race, end-to-end tests (root)

# The inflater starts no goroutines: the race detector would only make its tests 20 times slower.
INFLATE = %/archive/inflate

unit: deps ## unit tests, with the race detector
	$(GO) test -timeout 15m $(filter $(INFLATE),$(UNIT))
	CI=1 $(GO) test -race -timeout 15m $(filter-out $(INFLATE),$(UNIT))

e2e: deps parts build ## end-to-end tests on real parts (root)
	CI=1 $(GO) test -count=1 -timeout 40m -v ./tests/e2e

soak: deps parts build ## containers read for SOAK (10m) while everything around them is killed, cut or full (root)
	CI=1 $(GO) test -count=1 -timeout 0 -v -run '^(TestSoak|TestManyContainers)$$' ./tests/e2e -soak $(SOAK)

lint: deps parts ## gofmt, go vet, staticcheck, govulncheck
	@unformatted=$$(gofmt -l $$(git ls-files -co --exclude-standard '*.go')); \
		[ -z "$$unformatted" ] || { echo "gofmt would change: $$unformatted"; exit 1; }
	$(GO) vet ./...
	$(PARTS)/staticcheck ./...
	cd examples/containerd && $(GO) vet ./...
	cd tests/bench && $(GO) vet ./... && ../../$(PARTS)/staticcheck ./...
	@$(MAKE) --no-print-directory vuln

# Exit code 3 is govulncheck's word for vulnerabilities found; with any other it could not look.
vuln: parts
	@code=0; report=$$($(PARTS)/govulncheck ./... 2>&1) || code=$$?; \
	if [ $$code -eq 0 ]; then echo "govulncheck: nothing found"; \
	elif [ $$code -eq 3 ]; then echo "$$report"; exit 1; \
	else echo "govulncheck could not look for vulnerabilities, going on without: $$(echo "$$report" | tail -n 1)"; fi

bench: ## benchmarks
	$(GO) test -run '^$$' -bench '$(BENCH)' -benchmem $(UNIT)

bench-index: deps parts ## indexing against its peers in ROUNDS (5); figures to docs/benchmarks.md (root)
	cd tests/bench && CGO_ENABLED=1 $(GO) test -run '^$$' -bench . -benchtime $(or $(ROUNDS),5)x -timeout 3h . -report ../../docs/benchmarks.md

bench-read: deps parts build ## pulling and reading against overlayfs in ROUNDS (3); figures to docs/benchmarks.md (root)
	cd tests/bench && CGO_ENABLED=0 $(GO) run ./read -rounds $(or $(ROUNDS),3) -report ../../docs/benchmarks.md

fuzz: ## every fuzz target for FUZZTIME (30s)
	@set -e; for package in $(UNIT); do \
		for target in $$($(GO) test -list '^Fuzz' $$package | grep '^Fuzz' || true); do \
			$(GO) test -run '^$$' -fuzz "^$$target$$" -fuzztime $(FUZZTIME) $$package; \
		done; \
	done

demo: deps parts build ## an image indexed, pushed and run lazily, next to a full pull (root)
	@$(GO) run ./tests/demo

install: build ## binaries, systemd's unit, containerd's settings, below $(DESTDIR)$(PREFIX)
	install -d $(DESTDIR)$(PREFIX)/bin $(DESTDIR)$(PREFIX)/lib/systemd/system $(DESTDIR)$(PREFIX)/share/containerd-clip
	sed 's|/usr/local|$(PREFIX)|' containerd-clip-grpc.service >$(DESTDIR)$(PREFIX)/lib/systemd/system/containerd-clip-grpc.service
	install -m 755 $(BIN)/clipctl $(BIN)/containerd-clip-grpc $(DESTDIR)$(PREFIX)/bin
	install -m 644 config.toml.example $(DESTDIR)$(PREFIX)/share/containerd-clip

clean: ## what was built; .cache/images stays
	rm -rf $(BIN) $(PARTS)
