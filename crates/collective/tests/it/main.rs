//! Integration tests of collective calls on CPUs.

mod gloo;
mod suite;

/// The body of one rank, for which the other tests start this binary again.
#[test]
#[ignore = "one rank, started by the other tests"]
fn rank() {
    suite::harness::rank();
}
