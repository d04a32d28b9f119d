# containerd-clip: build, test and show. `make` alone lists the targets.

GO       ?= go
PREFIX   ?= /usr/local
DESTDIR  ?=
DOCKER   ?= docker
VERSION  ?= 0.0~git$(shell git log -1 --format=%cd.%h --date=format:%Y%m%d 2>/dev/null || echo 0)
ARCH     ?= $(shell $(GO) env GOARCH)
FUZZTIME ?= 30s
SOAK     ?= 10m
BENCH    ?= .
ROUNDS   ?=
STACKS   ?= 10000
SEED     ?= $(shell date +%N)

BIN    := bin
BUILT  ?= $(BIN)
CACHE  := .cache
PARTS  := $(CACHE)/bin
PEERS  := tests/bench/peers/daemons
UNIT    = $(shell $(GO) list ./... | grep -v -e /tests/e2e -e /tests/demo)

.DEFAULT_GOAL := help
.PHONY: help build deps parts images test unit stacks e2e soak lint vuln bench bench-index bench-read bench-build bench-peers fuzz demo man install install-files deb image image-files clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# The tag leaves out a transport of the client for gs:// that takes 13 MB and is not used.
STATIC := -tags disable_grpc_modules -trimpath -ldflags='-s -w'

build: ## static binaries in bin/
	CGO_ENABLED=0 $(GO) build $(STATIC) -o $(BIN)/ ./cmd/clipctl ./cmd/containerd-clip-grpc

deps: ## Debian packages that tests and demo need, installed when missing (root)
	@tests/parts/deps

parts: ## containerd, BuildKit, registry, S3 server, crane and linters that the tests use, in .cache/bin
	@tests/parts/build $(PARTS)

images: deps ## the demo's image, in .cache/images (root)
	$(GO) run ./tests/demo -prepare

test: deps parts lint unit e2e ## everything: lint, unit tests with -race, end-to-end tests (root)

# Nothing in these starts goroutines: the race detector would only make their tests up to 20 times slower.
SINGLE = %/archive/inflate %/archive/erofs

# The line that make shows has the seed of the random stacks.
unit: deps ## unit tests, with the race detector
	CI=1 $(GO) test -timeout 30m $(filter $(SINGLE),$(UNIT))
	CI=1 CLIP_TEST_SEED=$(SEED) $(GO) test -race -timeout 30m $(filter-out $(SINGLE),$(UNIT))
	cd tests/kubernetes && $(GO) test .
	cd tests/bench && $(GO) test ./peers ./report

stacks: ## random stacks of layers, STACKS (10000) of them from SEED, against containerd's own unpack (root)
	CI=1 CLIP_TEST_STACKS=$(STACKS) CLIP_TEST_SEED=$(SEED) $(GO) test -count=1 -timeout 0 -run '^TestRandomStacks$$' ./archive/tree

e2e: deps parts build ## end-to-end tests on real parts (root)
	CI=1 $(GO) test -count=1 -timeout 40m -parallel 4 -v ./tests/e2e

soak: deps parts build ## containers read for SOAK (10m) while everything around them is killed, cut or full (root)
	CI=1 $(GO) test -count=1 -timeout 0 -v -run '^TestSoak$$' ./tests/e2e -soak $(SOAK)

lint: deps parts ## gofmt, go vet (arm64 too), staticcheck, govulncheck
	@unformatted=$$(gofmt -l $$(git ls-files -co --exclude-standard '*.go')); \
		[ -z "$$unformatted" ] || { echo "gofmt would change: $$unformatted"; exit 1; }
	$(GO) vet ./...
	CGO_ENABLED=0 GOARCH=arm64 $(GO) vet ./cmd/...
	$(PARTS)/staticcheck ./...
	cd examples/containerd && $(GO) vet ./...
	cd tests/kubernetes && $(GO) vet ./...
	cd tests/bench && $(GO) vet ./... && ../../$(PARTS)/staticcheck ./...
	cd $(PEERS) && $(GO) vet ./... && ../../../../$(PARTS)/staticcheck ./...
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

bench-build: deps parts build ## building, pushing and indexing 2 GB against upstream CLIP in ROUNDS (3); figures to docs/benchmarks.md (root)
	cd tests/bench && CGO_ENABLED=0 $(GO) run ./build -rounds $(or $(ROUNDS),3) -report ../../docs/benchmarks.md

# A peer that cannot be built is not there, or is the one in PATH.
bench-peers: deps parts build ## against other snapshotters in ROUNDS (5); figures and plots to docs/ (root)
	@for program in $(notdir $(wildcard $(PEERS)/*-*)); do \
		(cd $(PEERS) && CGO_ENABLED=1 $(GO) build -trimpath -ldflags='-s -w' -o $(abspath $(PARTS))/ ./$$program) || \
		{ rm -f $(PARTS)/$$program; echo "going on without $$program"; }; \
	done
	cd tests/bench && CGO_ENABLED=0 $(GO) run ./peers -rounds $(or $(ROUNDS),5) -report ../../docs/benchmarks.md

# Else most of the time goes into making inputs smaller, which finds nothing.
fuzz: ## every fuzz target for FUZZTIME (30s)
	@set -e; for package in $(UNIT); do \
		for target in $$($(GO) test -list '^Fuzz' $$package | grep '^Fuzz' || true); do \
			$(GO) test -run '^$$' -fuzz "^$$target$$" -fuzztime $(FUZZTIME) -fuzzminimizetime 1s $$package; \
		done; \
	done

demo: deps parts build ## an image indexed, pushed and run lazily, next to a full pull (root)
	@$(GO) run ./tests/demo

man: ## manual pages below bin/man
	rm -rf $(BIN)/man
	CGO_ENABLED=0 $(GO) run $(STATIC) ./cmd/internal/man $(BIN)/man

install: build install-files ## binaries, manual pages, shell completion, systemd's unit, containerd's settings, below $(DESTDIR)$(PREFIX)

# Where the shells look, below share. Debian's packages have a place of their own for zsh.
BASH_COMPLETION := bash-completion/completions/clipctl
ZSH_COMPLETION  ?= zsh/site-functions/_clipctl
FISH_COMPLETION := fish/vendor_completions.d/clipctl.fish

# The programs are those in BUILT, which may be for another architecture. Nothing is written but below DESTDIR: several
# may run at once.
install-files:
	umask 022 && CGO_ENABLED=0 $(GO) run $(STATIC) ./cmd/internal/man $(DESTDIR)$(PREFIX)/share/man
	install -d $(dir $(addprefix $(DESTDIR)$(PREFIX)/share/,$(BASH_COMPLETION) $(ZSH_COMPLETION) $(FISH_COMPLETION)))
	$(BIN)/clipctl completion bash >$(DESTDIR)$(PREFIX)/share/$(BASH_COMPLETION)
	$(BIN)/clipctl completion zsh >$(DESTDIR)$(PREFIX)/share/$(ZSH_COMPLETION)
	$(BIN)/clipctl completion fish >$(DESTDIR)$(PREFIX)/share/$(FISH_COMPLETION)
	install -d $(DESTDIR)$(PREFIX)/bin $(DESTDIR)$(PREFIX)/lib/systemd/system $(DESTDIR)$(PREFIX)/share/containerd-clip
	sed 's|/usr/local|$(PREFIX)|' containerd-clip-grpc.service >$(DESTDIR)$(PREFIX)/lib/systemd/system/containerd-clip-grpc.service
	install -m 755 $(BUILT)/clipctl $(BUILT)/containerd-clip-grpc $(DESTDIR)$(PREFIX)/bin
	install -m 644 config.toml.example $(DESTDIR)$(PREFIX)/share/containerd-clip

deb: build ## a Debian package for ARCH (this machine's; amd64 or arm64) in bin/
	CGO_ENABLED=0 GOOS=linux GOARCH=$(ARCH) $(GO) build $(STATIC) -o $(BIN)/linux-$(ARCH)/ ./cmd/clipctl ./cmd/containerd-clip-grpc
	@packaging/deb $(BIN)/linux-$(ARCH) $(ARCH) $(VERSION) $(BIN)/containerd-clip_$(VERSION)_$(ARCH).deb

image: build image-files ## the installer of deploy/daemonset.yaml, with $(DOCKER) build
	$(DOCKER) build -t containerd-clip-installer:dev -f packaging/Dockerfile $(BIN)/image

# What the installer's image is made of, in IMAGE.
IMAGE ?= $(BIN)/image

image-files:
	rm -rf $(IMAGE)
	$(MAKE) --no-print-directory -s install-files DESTDIR=$(IMAGE)/payload PREFIX=/usr/local
	install -D -m 755 packaging/node-uninstall $(IMAGE)/payload/usr/local/sbin/containerd-clip-uninstall
	install -D -m 755 packaging/node-install $(IMAGE)/usr/local/bin/node-install

clean: ## what was built; .cache/images stays
	rm -rf $(BIN) $(PARTS)
