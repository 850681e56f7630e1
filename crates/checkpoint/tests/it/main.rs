//! Integration tests of checkpoints, through the public interface.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test may panic, and prints what it measured")]
#![allow(clippy::disallowed_methods, reason = "a test reads its seed, paths and tasks from the environment")]

mod common;
mod examples;
mod faults;
mod killed;
mod local;
mod uploads;
