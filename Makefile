# `make help` lists the targets.
SHELL := bash
CONFIG ?= configs/quickstart.toml
BCCD := $(or $(UNVEIL_BCCD),../shared/data/bccd)
# Tests with `bccd` in their name need that data set, those with `slurm_` need root. Without, they are skipped here and fail when run by hand.
LEFT_OUT := $(if $(wildcard $(BCCD)/Annotations),,bccd) $(if $(filter 0,$(shell id -u)),,slurm_)
NEXTEST_ONLY := $(if $(strip $(LEFT_OUT)),-E 'all()$(foreach name,$(LEFT_OUT), - test($(name)))')
TEST_ONLY := $(if $(strip $(LEFT_OUT)),-- $(foreach name,$(LEFT_OUT),--skip $(name)))
# The interpreter chosen by setup.
PYTHON = $$(sed -n 's/^UNVEIL_PYTHON = "\(.*\)"/\1/p' .cargo/config.toml)

# Seed of the soak; SEED=N repeats one.
SEED ?= $(shell date +%s)
FAULTS ?= 200

.PHONY: help setup build train test check chaos test-azure test-ceph test-gpu test-helm test-slurm bench-rollout bench-load bench-learner bench-checkpoint bench-memory bench-precision bench-reward bench-gpu fuzz fmt lint doc clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' Makefile | sed -E 's/:.*## /\t/' | expand -t 16

setup: ## Python environment with libtorch, Debian packages, .cargo/config.toml (VENV=DIR reuses an environment)
	@.ci/setup

build: setup ## both binaries
	cargo build --locked $(PACKAGES) --bins

train: build ## a complete run: stage 1, stage 2, evaluation, report (CONFIG=… ARGS="--set a.b=c")
	target/debug/unveil train --config $(CONFIG) $(ARGS)

# Features and examples as in clippy's call: dependencies are checked once for both.
DOC := cargo doc --locked --workspace --no-deps --lib --bins --examples --all-features

# Everything but the programs of the benchmarks.
PACKAGES := --workspace --exclude unveil-bench

# Binaries and tests in one build: test dependencies enable other features, and separate builds would compile everything twice.
# The examples in the documentation run last: nextest does not run them.
test: ## all tests
	@.ci/setup --tests
	cargo build --locked $(PACKAGES) --bins --tests --examples
	$(if $(filter bccd,$(LEFT_OUT)),@echo "test: BCCD is not at $(BCCD): skipping its tests (set UNVEIL_BCCD=DIR)")
	$(if $(filter slurm_,$(LEFT_OUT)),@echo "test: NOT ROOT: skipping the tests on a real Slurm")
	@if cargo nextest --version >/dev/null 2>&1; then set -x; cargo nextest run --locked $(PACKAGES) $(NEXTEST_ONLY); \
	else set -x; cargo test --locked $(PACKAGES) --tests $(TEST_ONLY); fi
	cargo test --locked $(PACKAGES) --doc

test-helm: ## tests of the Helm chart, the container, and roles as in pods (part of `test`)
	@.ci/setup --tests
	cargo build --locked $(PACKAGES) --bins
	cargo test --locked -p unveil-tests --test it helm::

check: setup ## format, clippy, docs, licences, unused dependencies, crate boundaries, module circles, language
	cargo fmt --all --check
	cargo clippy --locked --workspace --all-targets --all-features -- -D warnings
	RUSTDOCFLAGS="-D warnings" $(DOC)
	.ci/boundaries
	@if cargo deny --version >/dev/null 2>&1; then set -x; cargo deny --locked check licenses bans sources; \
	else echo "check: cargo-deny is not installed (cargo install --locked cargo-deny): duplicates and sources of dependencies are not checked"; fi
	@if cargo machete --version >/dev/null 2>&1; then set -x; cargo machete --with-metadata; \
	else echo "check: cargo-machete is not installed (cargo install --locked cargo-machete): .ci/boundaries alone looks for unused dependencies"; fi
	.ci/circles
	.ci/tics

chaos: build ## soak under kills, pauses, network and store faults, with a verdict (SEED=… FAULTS=200)
	@.ci/setup --tests
	cargo run --locked -p unveil-tests --example chaos -- $(SEED) $(FAULTS)

test-azure: build ## object storage tests against Azurite, an emulator of Azure (needs npm)
	@.ci/setup --tests
	tests/azure/run

test-ceph: build ## object storage tests against Ceph's S3 gateway (installs Debian packages when root)
	@.ci/setup --tests
	tests/ceph/run

test-slurm: setup ## tests on a real Slurm of four nodes on this machine (part of `test`; needs root)
	@.ci/setup --tests
	cargo build --locked $(PACKAGES) --bins
	cargo test --locked -p unveil-tests --test it slurm:: -- --nocapture --test-threads 1

test-gpu: setup ## GPU tests of engine, updates, collectives and weight sync; they fail without a GPU
	cargo test --locked -p unveil-engine --features gpu --test gpu -- --nocapture --test-threads 1
	cargo test --locked -p unveil-trainer --features gpu --test gpu -- --nocapture --test-threads 1
	cargo test --locked -p unveil-collective --features gpu --test gpu -- --nocapture --test-threads 1
	cargo test --locked -p unveil-experience-rpc --features gpu --test gpu -- --nocapture --test-threads 1

bench-rollout: bench-build ## rollout against transformers, model loading against file reading (ARGS="--shapes 6m --rounds 3")
	$(PYTHON) tests/bench/rollout.py --load $(ARGS)

bench-load: bench-build ## loading a 3B model directory against reading its files
	$(PYTHON) tests/bench/load.py $(ARGS)

bench-learner: setup ## policy updates against TRL, all-reduce, weight sync against plain loopback TCP (ARGS="--rounds 3")
	@.ci/setup --tests
	cargo build --release --locked -p unveil-bench --bin learner_bench --bin sync_bench
	$(PYTHON) tests/bench/learner.py --ranks --sync $(ARGS)

bench-memory: setup ## peak memory of updates against the plan of `unveil plan` (ARGS="--shapes 100m")
	@.ci/setup --tests
	cargo build --release --locked -p unveil-bench --bin memory_bench
	$(PYTHON) tests/bench/memory.py $(ARGS)

bench-precision: setup ## errors of the precision modes: decoding against teacher forcing, updates of stage 1 (ARGS="--shape 6m --steps 20")
	@.ci/setup --tests
	cargo build --release --locked -p unveil-bench --bin precision_bench
	$(PYTHON) tests/bench/precision.py $(ARGS)

bench-checkpoint: setup ## saves and loads against the raw store throughput and torch.distributed.checkpoint (ARGS="--rounds 3")
	@.ci/setup --tests
	cargo build --release --locked -p unveil-bench --bin checkpoint_bench --bin copy_bench
	$(PYTHON) tests/bench/checkpoint.py $(ARGS)

bench-reward: setup ## scoring in process and over gRPC, against numpy and scipy (ARGS="--rounds 3")
	@.ci/setup --tests
	cargo build --release --locked -p unveil-bench --bin reward_bench
	$(PYTHON) tests/bench/reward.py $(ARGS)

fuzz: setup ## scoring of a million hostile responses, release build (UNVEIL_FUZZ=N UNVEIL_SEED=S)
	UNVEIL_FUZZ=$${UNVEIL_FUZZ:-1000000} cargo test --release --locked -p unveil-reward --test it hostile:: -- --nocapture

bench-gpu: bench-build ## rollout against transformers on a GPU, 3B and 7B in bfloat16
	$(PYTHON) tests/bench/rollout.py --name gpu --device cuda --dtype bfloat16 --shapes 3b,7b --bandwidth $(ARGS)

.PHONY: bench-build
bench-build:
	@.ci/setup --tests
	cargo build --release --locked -p unveil-bench --bin rollout_bench --bin load_bench

fmt: ## format all code
	cargo fmt --all

lint: setup ## clippy only
	cargo clippy --locked --workspace --all-targets --all-features -- -D warnings

doc: setup ## documentation of all crates
	$(DOC)

clean: ## remove build outputs (not .venv, not runs)
	cargo clean
