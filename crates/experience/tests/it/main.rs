//! Tests of the state machine through its public interface, in one binary.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test may panic, and prints what it measured")]

mod batches;
mod fixtures;
mod leases;
mod properties;
mod quarantine;
mod replacement;
mod set_aside;
mod simulation;
