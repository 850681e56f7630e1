# `make help` lists what there is.
SHELL := bash
CONFIG ?= configs/quickstart.toml
BCCD := $(or $(UNVEIL_BCCD),../shared/data/bccd)
# Tests named after BCCD need that data set, those named after Slurm need root; without, they are left out here, and fail when run by hand.
LEFT_OUT := $(if $(wildcard $(BCCD)/Annotations),,bccd) $(if $(filter 0,$(shell id -u)),,slurm_)
NEXTEST_ONLY := $(if $(strip $(LEFT_OUT)),-E 'all()$(foreach name,$(LEFT_OUT), - test($(name)))')
TEST_ONLY := $(if $(strip $(LEFT_OUT)),-- $(foreach name,$(LEFT_OUT),--skip $(name)))
# The interpreter that setup chose.
PYTHON = $$(sed -n 's/^UNVEIL_PYTHON = "\(.*\)"/\1/p' .cargo/config.toml)

# What the soak draws from: SEED=N repeats one.
SEED ?= $(shell date +%s)
FAULTS ?= 200

.PHONY: help setup build train test check chaos test-azure test-ceph test-gpu test-helm test-slurm bench-rollout bench-load bench-learner bench-checkpoint bench-reward bench-gpu fuzz fmt lint doc clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' Makefile | sed -E 's/:.*## /\t/' | expand -t 16

setup: ## Python environment with libtorch, Debian packages, .cargo/config.toml (VENV=DIR reuses one)
	@.ci/setup

build: setup ## both binaries
	cargo build --locked --workspace --bins

train: build ## the main job: stage 1, stage 2, evaluation, report (CONFIG=… ARGS="--set a.b=c")
	target/debug/unveil train --config $(CONFIG) $(ARGS)

# Binaries and tests in one build: what tests depend on has features of its own, with which everything would be compiled twice.
test: ## all tests
	@.ci/setup --tests
	cargo build --locked --workspace --bins --tests --examples
	$(if $(filter bccd,$(LEFT_OUT)),@echo "test: BCCD is not at $(BCCD): its tests are left out (UNVEIL_BCCD=DIR names it)")
	$(if $(filter slurm_,$(LEFT_OUT)),@echo "test: NOT ROOT: the tests on a real Slurm are left out")
	@if cargo nextest --version >/dev/null 2>&1; then set -x; cargo nextest run --locked --workspace $(NEXTEST_ONLY); \
	else set -x; cargo test --locked --workspace $(TEST_ONLY); fi

test-helm: ## the Helm chart, the container's recipe, and roles as pods run them (part of `test`)
	@.ci/setup --tests
	cargo build --locked --workspace --bins
	cargo test --locked -p unveil-tests --test helm

check: setup ## format, clippy, docs, licences, unused dependencies, room boundaries
	cargo fmt --all --check
	cargo clippy --locked --workspace --all-targets --all-features -- -D warnings
	RUSTDOCFLAGS="-D warnings" cargo doc --locked --workspace --no-deps
	.ci/boundaries

chaos: build ## kills, stops, networks and stores that fail, one after another, and a verdict (SEED=… FAULTS=200)
	@.ci/setup --tests
	cargo run --locked -p unveil-tests --example chaos -- $(SEED) $(FAULTS)

test-azure: build ## the tests on object storage against Azurite, which speaks as Azure does (needs npm)
	@.ci/setup --tests
	tests/azure/run

test-ceph: build ## the tests on object storage against Ceph's S3 gateway (installs Debian packages when root)
	@.ci/setup --tests
	tests/ceph/run

test-slurm: setup ## a part of test: runs on a real Slurm of four nodes on this machine; needs root
	@.ci/setup --tests
	cargo build --locked --workspace --bins
	cargo test --locked -p unveil-tests --test slurm -- --nocapture --test-threads 1

test-gpu: setup ## tests of the engine, of collectives and of weight sync on a GPU; they fail where there is none
	cargo test --locked -p unveil-engine --features gpu --test gpu -- --nocapture --test-threads 1
	cargo test --locked -p unveil-collective --features gpu --test gpu -- --nocapture --test-threads 1
	cargo test --locked -p unveil-learner --features gpu --test gpu -- --nocapture --test-threads 1

bench-rollout: bench-build ## rollout against transformers, loading against reading (ARGS="--shapes 6m --rounds 3")
	$(PYTHON) tests/bench/rollout.py --load $(ARGS)

bench-load: bench-build ## loading a 3B model directory against reading its files
	$(PYTHON) tests/bench/load.py $(ARGS)

bench-learner: setup ## policy updates against TRL, sums over ranks, weight sync against plain loopback TCP (ARGS="--rounds 3")
	@.ci/setup --tests
	cargo build --release --locked -p unveil-learner --example learner_bench --example sync_bench
	$(PYTHON) tests/bench/learner.py --ranks --sync $(ARGS)

bench-checkpoint: setup ## saves and loads against the raw rate of the store and torch.distributed.checkpoint (ARGS="--rounds 3")
	@.ci/setup --tests
	cargo build --release --locked -p unveil-checkpoint --example checkpoint_bench -p unveil-learner --example copy_bench
	$(PYTHON) tests/bench/checkpoint.py $(ARGS)

bench-reward: setup ## scoring in process and through gRPC, against numpy and scipy (ARGS="--rounds 3")
	@.ci/setup --tests
	cargo build --release --locked -p unveil-reward --example reward_bench
	$(PYTHON) tests/bench/reward.py $(ARGS)

fuzz: setup ## a million hostile responses through scoring, optimised (UNVEIL_FUZZ=N UNVEIL_SEED=S)
	UNVEIL_FUZZ=$${UNVEIL_FUZZ:-1000000} cargo test --release --locked -p unveil-reward --test hostile -- --nocapture

bench-gpu: bench-build ## rollout against transformers on a GPU, 3B and 7B in bfloat16
	$(PYTHON) tests/bench/rollout.py --name gpu --device cuda --dtype bfloat16 --shapes 3b,7b --bandwidth $(ARGS)

.PHONY: bench-build
bench-build:
	@.ci/setup --tests
	cargo build --release --locked -p unveil-engine --example rollout_bench -p unveil-model --example load

fmt: ## format
	cargo fmt --all

lint: setup ## clippy alone
	cargo clippy --locked --workspace --all-targets --all-features -- -D warnings

doc: setup ## the documentation of all rooms
	cargo doc --locked --workspace --no-deps

clean: ## what was built (not .venv, not runs)
	cargo clean
