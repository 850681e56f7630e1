//! The soak, shared by the tests that cross crates (in `tests/`, next to this directory) and the examples.
//!
//! This crate serves tests only; its panics say what to do.

pub mod chaos;
