//! Integration tests of the evaluation crate.

mod golden;
mod responses;
