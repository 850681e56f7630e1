# `make help` lists what there is.
SHELL := bash
CONFIG ?= configs/quickstart.toml
TEST := $(shell cargo nextest --version >/dev/null 2>&1 && echo "cargo nextest run" || echo "cargo test")

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
	$(TEST) --locked --workspace

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
