//! Integration tests of the importers.

mod import;
