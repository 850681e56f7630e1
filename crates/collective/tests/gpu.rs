//! The conformance suite over NCCL: one rank, and two ranks that share a GPU. Run by `make test-gpu`; every test fails without a GPU.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test may panic, and prints what it measured")]
#![allow(clippy::disallowed_methods, reason = "a test reads its seed, paths and tasks from the environment")]

#[path = "it/suite/mod.rs"]
mod suite;

use suite::{FailureMode, TestBackend, fail};

const NCCL: TestBackend = TestBackend::Nccl;

/// The body of one rank, for which the other tests start this binary again.
#[test]
#[ignore = "one rank, started by the other tests"]
fn rank() {
    suite::harness::rank();
}

#[test]
fn one_rank_conforms() {
    suite::harness::check_calls(1, NCCL);
}

#[test]
fn two_ranks_on_one_gpu_conform() {
    suite::harness::check_calls(2, NCCL);
}

#[test]
fn rank_killed_before_a_call_is_named() {
    fail::check_all(NCCL, FailureMode::KillBefore);
}

#[test]
fn rank_stopped_before_a_call_is_named() {
    fail::check_all(NCCL, FailureMode::StopBefore);
}

#[test]
fn rank_killed_inside_a_call_is_named() {
    fail::check_all(NCCL, FailureMode::KillInside);
}
