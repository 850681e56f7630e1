//! The soak, shared by the tests that cross crates (in `tests/`, next to this directory) and the examples.
//!
//! This crate serves tests only; its panics say what to do.

#![allow(clippy::unwrap_used, reason = "fixtures of tests may panic")]

pub mod chaos;
