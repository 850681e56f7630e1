# `make help` lists what there is.
SHELL := bash
CONFIG ?= configs/quickstart.toml
BCCD := $(or $(UNVEIL_BCCD),../shared/data/bccd)
# Tests named after BCCD need that data set; without it they are left out here, and fail when run by hand.
ifneq ($(wildcard $(BCCD)/Annotations),)
NEXTEST_ONLY :=
TEST_ONLY :=
else
NEXTEST_ONLY := -E 'not test(bccd)'
TEST_ONLY := -- --skip bccd
endif

.PHONY: help setup build train test check fmt lint doc clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' Makefile | sed -E 's/:.*## /\t/' | expand -t 12

setup: ## Python environment with libtorch, Debian packages, .cargo/config.toml (VENV=DIR reuses one)
	@.ci/setup

build: setup ## both binaries
	cargo build --locked --workspace --bins

train: build ## the main job: stage 1, stage 2, evaluation, report (CONFIG=… ARGS="--set a.b=c")
	target/debug/unveil train --config $(CONFIG) $(ARGS)

test: ## all tests
	@.ci/setup --tests
	cargo build --locked --workspace --bins
	$(if $(NEXTEST_ONLY),@echo "test: BCCD is not at $(BCCD): its tests are left out (UNVEIL_BCCD=DIR names it)")
	@if cargo nextest --version >/dev/null 2>&1; then set -x; cargo nextest run --locked --workspace $(NEXTEST_ONLY); \
	else set -x; cargo test --locked --workspace $(TEST_ONLY); fi

check: setup ## format, clippy, docs, licences, unused dependencies, room boundaries
	cargo fmt --all --check
	cargo clippy --locked --workspace --all-targets -- -D warnings
	RUSTDOCFLAGS="-D warnings" cargo doc --locked --workspace --no-deps
	.ci/boundaries

fmt: ## format
	cargo fmt --all

lint: setup ## clippy alone
	cargo clippy --locked --workspace --all-targets -- -D warnings

doc: setup ## the documentation of all rooms
	cargo doc --locked --workspace --no-deps

clean: ## what was built (not .venv, not runs)
	cargo clean
