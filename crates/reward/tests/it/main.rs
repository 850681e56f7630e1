//! Integration tests of the reward crate.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test may panic, and prints what it measured")]
#![allow(clippy::disallowed_methods, reason = "a test reads its seed, paths and tasks from the environment")]

mod answers;
mod bccd;
mod examples;
mod gaming;
mod golden;
mod grpc;
mod hostile;
mod judge;
mod limits;
mod offline;
mod readiness;
