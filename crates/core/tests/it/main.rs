//! Integration tests of the core crate.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod published_answers;
