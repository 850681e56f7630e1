//! Integration tests of the engine crate.

mod examples;
