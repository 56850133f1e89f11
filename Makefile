# Every task of this repository: `make` lists them.
#
# lint, test and e2e share one target directory, one profile and one set of features, which is why they all say
# --workspace and then choose targets: nothing is compiled twice. The demo and the benches use release builds.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

CARGO := cargo
# In CI the lock file is the truth; at a desk a changed Cargo.toml may change it.
LOCKED := $(if $(CI),--locked)
CACHE := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/penstock
# Where cargo puts what it builds, whoever decided that.
TARGET = $(or $(TARGET_DIR),$(eval TARGET_DIR := $$(shell $$(CARGO) metadata --no-deps --format-version 1 | sed 's/.*"target_directory":"\([^"]*\)".*/\1/'))$(TARGET_DIR))

# The mesh: the command line, control, the sidecar, and the model server that the demo and the tests ask.
MESH := penstock penstock-control penstock-proxy penstock-modelserver

# Integration tests by their names: tests/tests holds those of the whole system, every other crate its own.
names = $(foreach f,$(1),$(if $(filter main.rs,$(notdir $f)),$(notdir $(patsubst %/,%,$(dir $f))),$(basename $(notdir $f))))
ALL_TESTS := $(wildcard */tests/*.rs */tests/*/main.rs */*/tests/*.rs */*/tests/*/main.rs)
# What needs `make tools`, wherever it is: the tests of the system, and pipelines against Pillow and OpenCV.
TOOLED := tests/tests/% proxy/prepare/tests/libraries/%
# Hours are for `make soak`, and faults have a line of their own.
SYSTEM_TESTS := $(filter-out soak faults,$(call names,$(filter $(TOOLED),$(ALL_TESTS))))
CRATE_TESTS := $(call names,$(filter-out $(TOOLED),$(ALL_TESTS)))

.PHONY: help
help: ## this list
	@echo "Penstock: a sidecar service mesh for GPU inference. README.md says more."; echo
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-16s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

.PHONY: demo
demo: ## the whole mesh on this machine, in a minute; ARGS=--stay keeps it running
	@[ -x "$(TARGET)/release/penstock" ] || echo "The first build compiles 377 crates with optimisation and takes about 18 minutes on two cores."
	$(CARGO) build $(LOCKED) --release $(addprefix --bin ,$(MESH))
	"$(TARGET)/release/penstock" demo $(ARGS)

.PHONY: test
test: ## unit, property, integration and doc tests of every crate
	$(CARGO) test $(LOCKED) --workspace --lib --bins $(addprefix --test ,$(CRATE_TESTS))
	$(CARGO) test $(LOCKED) --workspace --doc
	@$(MAKE) loom

.PHONY: loom
loom: ## every interleaving of what workers share without a lock
	# A configuration of its own, so a directory of its own.
	RUSTFLAGS="--cfg loom" $(CARGO) test $(LOCKED) -p penstock-balance --lib --release --target-dir "$(TARGET)/loom" loom

.PHONY: tools
tools: ## install the real model servers and clients and libraries of the tests, once: 2.1 GB, some minutes
	python3 tests/tests/servers/install.py

.PHONY: e2e
e2e: tools ## the real programs together: the system tests, the demo's promises, a real Kubernetes, and some fuzzing
	$(CARGO) build $(LOCKED) --workspace --bins --tests
	# PENSTOCK_LONG: control stays away for a minute instead of some seconds.
	PENSTOCK_LONG=1 $(CARGO) test $(LOCKED) --workspace $(addprefix --test ,$(SYSTEM_TESTS))
	"$(TARGET)/debug/penstock" check --source dir:manifests/examples/digits
	"$(TARGET)/debug/penstock" check --source dir:manifests/examples/gpu
	"$(TARGET)/debug/penstock" check --source dir:manifests/examples/canary
	"$(TARGET)/debug/penstock" demo --json --seconds 40 --rate 1000 > "$(TARGET)/demo.json" \
	  || { cat "$(TARGET)/demo.json"; exit 1; }
	python3 .ci/demo.py "$(TARGET)/demo.json"
	# One fault at a time: one of them takes the cores away. They leave most of both to compiling what comes next, which gives way to them.
	# With the programs that were built above: without tests, cargo would choose other features, and compile everything anew. Fuzzing has what
	# the cluster leaves of the cores, which mostly waits; so its limit of time is wide. Both have groups of their own, which end with this.
	set -m; nice -n 19 $(MAKE) fuzz-build > "$(TARGET)/fuzz-build.log" 2>&1 & groups="-$$!"; set +m; \
	  trap 'kill -- $$groups 2> /dev/null || true' EXIT; \
	  $(CARGO) test $(LOCKED) --workspace --test faults -- --test-threads=1; \
	  set -m; nice -n 10 $(MAKE) fuzz OTHERS=10 FUZZ_CORPUS=none FUZZ_TIMEOUT=20 > "$(TARGET)/fuzz.log" 2>&1 & fuzz=$$!; set +m; \
	  groups="$$groups -$$fuzz"; \
	  $(MAKE) e2e-cluster BUILT=1; \
	  $(MAKE) conformance BUILT=1 CONFORMANCE_OUT="$(TARGET)/conformance"; \
	  status=0; wait "$$fuzz" || status=$$?; cat "$(TARGET)/fuzz.log"; exit "$$status"

CLUSTER := python3 tests/cluster/cluster.py

.PHONY: cluster
cluster: ## a Kubernetes of one node on this machine, from real parts, with this build's images; needs root
	$(CARGO) build $(LOCKED) --workspace --bins
	$(CLUSTER) up
	$(CLUSTER) images --bins "$(TARGET)/debug"
	$(CLUSTER) status
	@echo 'export PATH="$(TARGET)/debug:$$PATH"   # for penstock'

.PHONY: cluster-down
cluster-down: ## end it; nothing is left behind
	$(CLUSTER) down

.PHONY: e2e-cluster
e2e-cluster: ## Penstock on that Kubernetes, from its installation to its end, under load; brings one up, takes it away
ifeq ($(PENSTOCK_NO_CLUSTER),1)
	@echo "PENSTOCK_NO_CLUSTER=1: nothing is tried on Kubernetes"
else
	$(if $(BUILT),,$(CARGO) build $(LOCKED) --workspace --bins)
	$(CLUSTER) --name e2e up
	status=0; { python3 tests/cluster/smoke.py --name e2e && $(CLUSTER) --name e2e images --bins "$(TARGET)/debug" \
	  && python3 tests/cluster/mesh.py --name e2e --bins "$(TARGET)/debug"; } || status=$$?; $(CLUSTER) --name e2e down; exit $$status
endif

.PHONY: e2e-flagger
e2e-flagger: ## a real Flagger and a real Prometheus on that Kubernetes: a canary that succeeds, one that is taken back; 4 minutes
	$(CARGO) build $(LOCKED) --workspace --bins
	$(CLUSTER) --name flag up
	status=0; { $(CLUSTER) --name flag images --bins "$(TARGET)/debug" \
	  && python3 tests/cluster/mesh.py --tale flagger --name flag --bins "$(TARGET)/debug"; } || status=$$?; $(CLUSTER) --name flag down; exit $$status

# Where the report goes: its place in the documentation. The gate leaves that alone.
CONFORMANCE_OUT ?= docs/conformance

.PHONY: conformance
conformance: ## the Gateway API's own tests of a mesh, on that Kubernetes; writes docs/conformance; brings one up, takes it away
ifeq ($(PENSTOCK_NO_CLUSTER),1)
	@echo "PENSTOCK_NO_CLUSTER=1: the conformance suite is not tried"
else
	$(if $(BUILT),,$(CARGO) build $(LOCKED) --workspace --bins)
	$(CLUSTER) --name conf up
	status=0; { $(CLUSTER) --name conf images --bins "$(TARGET)/debug" && python3 tests/conformance/conformance.py --name conf \
	  --bins "$(TARGET)/debug" --out "$(CONFORMANCE_OUT)"; } || status=$$?; $(CLUSTER) --name conf down; exit $$status
endif

FUZZ_VERSION := 0.13.1
FUZZ := $(CACHE)/tools-cargo-fuzz-$(FUZZ_VERSION)/bin/cargo-fuzz
FUZZ_TARGETS := $(basename $(notdir $(wildcard fuzz/fuzz_targets/*.rs)))
# What libFuzzer watches. An input of 64 KiB in two seconds, with everything checked and counted, is far from what a
# reader needs that is linear, and far from enough for one that is not.
FUZZ_TIMEOUT ?= 2
FUZZ_LIMITS := -max_len=65536 -timeout=$(FUZZ_TIMEOUT) -rss_limit_mb=1024 -malloc_limit_mb=64

# What it found worth keeping stays outside of the checkout, and the next run begins with it. A gate says the same twice: with
# FUZZ_CORPUS=none it makes up the same inputs each time, from the seeds alone.
FUZZ_CORPUS ?= $(CACHE)/fuzz

# What reads what anybody sends, or an operator writes: with OTHERS=10 all others run so many seconds only.
FUZZ_LONG := first_bytes http1_entry http2_entry xds_resources annotations yaml orca oip_rest oip_grpc oip_prefix

.PHONY: fuzz-build
fuzz-build: $(FUZZ)
	cd fuzz && env CARGO_TARGET_DIR="$(TARGET)/fuzz" $(CARGO) test $(LOCKED) --lib --no-run
	cd fuzz && $(FUZZ) build -s none $(if $(FEATURE),--features $(FEATURE)) --target-dir "$(TARGET)/fuzz"

.PHONY: fuzz
fuzz: fuzz-build ## malformed bytes for every reader, made up by libFuzzer, two readers at a time: SECONDS=60 for each; FEATURE=turbojpeg
	cd fuzz && env CARGO_TARGET_DIR="$(TARGET)/fuzz" $(CARGO) test $(LOCKED) --lib
	cd fuzz && python3 ../.ci/fuzz.py --cargo-fuzz $(FUZZ) --target-dir "$(TARGET)/fuzz" --corpus "$(FUZZ_CORPUS)" \
	  --seconds $(or $(SECONDS),60) $(if $(OTHERS),--others $(OTHERS)) --long "$(FUZZ_LONG)" $(if $(FEATURE),--features $(FEATURE)) \
	  $(FUZZ_TARGETS) -- $(FUZZ_LIMITS)

# Stable Rust will do: without sanitizers, libFuzzer needs only the coverage that rustc has.
$(FUZZ):
	@echo "cargo-fuzz $(FUZZ_VERSION) is built once, into $(CACHE): about a minute"
	env -u CARGO_TARGET_DIR $(CARGO) install --locked --debug --version $(FUZZ_VERSION) \
	  --root $(CACHE)/tools-cargo-fuzz-$(FUZZ_VERSION) cargo-fuzz

.PHONY: faults
faults: ## what breaks and what users see of it, one fault after the other; writes the table of docs/RELIABILITY.md; 4 minutes
	$(CARGO) build $(LOCKED) --workspace --bins --test faults
	UPDATE_DOCS=1 $(CARGO) test $(LOCKED) --workspace --test faults -- --test-threads=1

.PHONY: soak
soak: tools ## an hour of changes in four minutes, then 100,000 photographs: certificates, weights, endpoints, memory
	$(CARGO) build $(LOCKED) --workspace --bins --tests
	$(CARGO) test $(LOCKED) --workspace --test soak --test soak_prepare -- --ignored --nocapture

.PHONY: bench
bench: ## the cost of the proxy, beside Envoy, HAProxy and nginx (benches/README.md)
	$(CARGO) build $(LOCKED) --release -p penstock-control -p penstock-proxy -p penstock-benches
	"$(TARGET)/release/penstock-bench" proxy $(ARGS)

.PHONY: bench-control
bench-control: ## how soon a pushed weight is in force everywhere; what 10,000 endpoints and Services cost
	$(CARGO) build $(LOCKED) --release -p penstock-control -p penstock-proxy -p penstock-benches
	"$(TARGET)/release/penstock-bench" control $(ARGS)

.PHONY: bench-mesh
bench-mesh: ## who balances best over simulated GPUs, beside Envoy, HAProxy, nginx and LLM routers
	$(CARGO) build $(LOCKED) --release -p penstock-control -p penstock-proxy -p penstock-benches
	"$(TARGET)/release/penstock-bench" mesh $(ARGS)

.PHONY: bench-batch
bench-batch: tools ## what batching saves in front of real model servers, beside their own and KServe's
	$(CARGO) build $(LOCKED) --release -p penstock-control -p penstock-proxy -p penstock-benches
	"$(TARGET)/release/penstock-bench" batch $(ARGS)

.PHONY: bench-balance
bench-balance: ## balancing policies on simulated GPUs, beside the peers' (docs/BALANCING.md)
	$(CARGO) build $(LOCKED) --release -p penstock-simulator
	"$(TARGET)/release/penstock-bench-balance" $(ARGS)

# libjpeg-turbo with its SIMD code, as in the container image, where cmake and nasm are; its plain twin elsewhere, and the
# bed says which. FEATURES= chooses the twin.
FEATURES ?= $(if $(and $(shell command -v cmake),$(shell command -v nasm)),turbojpeg)

.PHONY: bench-prepare
bench-prepare: tools ## what preprocessing costs, beside Pillow, OpenCV, simplejpeg and DALI, and from client to Triton
	# One build, so that the sidecar decodes with what the bench decodes with.
	$(CARGO) build $(LOCKED) --release -p penstock-control -p penstock-proxy -p penstock-bench-prepare \
	  $(if $(FEATURES),--features $(addprefix penstock-bench-prepare/,$(FEATURES)))
	"$(TARGET)/release/penstock-bench-prepare" $(ARGS)

.PHONY: test-turbojpeg
test-turbojpeg: ## the tests of preprocessing with libjpeg-turbo; needs cmake and nasm
	$(CARGO) test $(LOCKED) -p penstock-prepare --features turbojpeg --lib --test images --test declarations --test libraries

.PHONY: tools-cuda
tools-cuda: ## install NVRTC, which compiles kernels without a GPU, once: 320 MB
	python3 tests/tests/servers/install.py nvrtc nvrtcold

.PHONY: cubins
cubins: tools-cuda ## compile kernels/cuda for every GPU, into kernels/cubin, which is committed
	python3 kernels/cuda/compile.py

.PHONY: check-cubins
check-cubins: tools-cuda ## the same without writing: registers, spills, and that kernels/cubin is what the sources give
	python3 kernels/cuda/compile.py --check

.PHONY: test-gpu
test-gpu: ## kernels, copies and IPC on this machine's GPU, and their rates; skipped where there is none
	$(CARGO) build $(LOCKED) --release -p penstock-kernels --bin penstock-gpu-test
	"$(TARGET)/release/penstock-gpu-test" $(ARGS)

.PHONY: test-gpu-triton
test-gpu-triton: tools ## a GPU and the real Triton: the sidecar's way through its memory, and what each way costs; skipped where there is none
	$(CARGO) build $(LOCKED) --release -p penstock-proxy -p penstock-control --bins
	$(CARGO) test $(LOCKED) --release -p penstock-tests --test gpu_triton -- --nocapture --test-threads=1

.PHONY: test-gpu-standin
test-gpu-standin: ## the same program on the STAND-IN driver, which runs kernels on the CPU: says nothing of a GPU
	$(CARGO) build $(LOCKED) -p penstock-kernels -p penstock-standin-driver
	"$(TARGET)/debug/penstock-gpu-test" --driver "$(TARGET)/debug/libpenstock_standin_driver.so" \
	  --nvjpeg "$(TARGET)/debug/libpenstock_standin_driver.so" $(ARGS)

DENY_VERSION := 0.20.2
DENY := $(CACHE)/tools-cargo-deny-$(DENY_VERSION)/bin/cargo-deny

.PHONY: lint
lint: $(DENY) ## format, clippy, documentation, dependencies, length of files, links
	$(CARGO) fmt --all --check
	cd fuzz && $(CARGO) fmt --check
	.ci/files
	$(CARGO) clippy $(LOCKED) --workspace --all-targets -- -D warnings
	# --examples, of which there are none, makes cargo choose the features that clippy chose. Programs are named, since
	# two of them share their name with their library.
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc $(LOCKED) --workspace --no-deps --document-private-items \
	  --lib --examples --bin penstock --bin penstock-bench --bin penstock-counted --bin penstock-simgpu --bin penstock-modelserver --bin penstock-gpu-test
	$(DENY) --locked check bans licenses sources

# Built once, without the features that fetch advisories; a debug build checks in seconds all the same.
$(DENY):
	@echo "cargo-deny $(DENY_VERSION) is built once, into $(CACHE): about two minutes"
	env -u CARGO_TARGET_DIR $(CARGO) install --locked --debug --no-default-features \
	  --version $(DENY_VERSION) --root $(CACHE)/tools-cargo-deny-$(DENY_VERSION) cargo-deny

.PHONY: docs
docs: ## write docs/OPERATIONS.md anew from the code
	UPDATE_DOCS=1 $(CARGO) test $(LOCKED) --workspace --test operations

.PHONY: clean
clean: ## remove what was built
	$(CARGO) clean
