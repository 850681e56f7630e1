//! Integration tests of the preprocess crate.

mod golden;
