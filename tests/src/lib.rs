//! Tests that cross crates live in `tests/`, next to this folder; here is what they share with the examples: the soak.
//!
//! Panics say what to do: this crate serves tests only.

pub mod chaos;
