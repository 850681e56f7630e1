//! Runs handed to the scheduler of a cluster. Must not know: what the roles do.

pub mod kubernetes;
