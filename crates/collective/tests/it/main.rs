//! Integration tests of collective calls on CPUs.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test may panic, and prints what it measured")]
#![allow(clippy::disallowed_methods, reason = "a test reads its seed, paths and tasks from the environment")]

mod gloo;
mod suite;

/// The body of one rank, for which the other tests start this binary again.
#[test]
#[ignore = "one rank, started by the other tests"]
fn rank() {
    suite::harness::rank();
}
