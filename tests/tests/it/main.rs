//! Tests that cross crates: the built programs as real processes, one module per subject.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test may panic, and prints what it measured")]
#![allow(clippy::disallowed_methods, reason = "a test reads its seed, paths and tasks from the environment")]

mod asynchrony;
mod bad_input;
mod broadcast;
mod data;
mod deterministic;
mod dynamic_sampling;
mod evaluation;
mod faults;
mod fence;
mod helm;
mod machines;
mod offline;
mod pages;
mod prompts;
mod ranks;
mod real_size;
mod resume;
mod reward;
mod s3;
mod secrets;
mod setup;
mod slurm;
mod soak;
mod tools;
mod train;
mod troubleshooting;
