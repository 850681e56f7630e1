//! Integration tests of the collect crate.

mod endpoint;
