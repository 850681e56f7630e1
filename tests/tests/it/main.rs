//! Tests that cross crates: the built programs as real processes, one module per subject.

mod asynchrony;
mod bad_input;
mod broadcast;
mod data;
mod deterministic;
mod evaluation;
mod faults;
mod fence;
mod helm;
mod machines;
mod offline;
mod pages;
mod ranks;
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
