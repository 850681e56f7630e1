//! Integration tests of the data crate.

mod images;
