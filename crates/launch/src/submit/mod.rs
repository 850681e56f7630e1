//! Submission of a run to a cluster: turns command-line options and the configuration into input for the cluster's own tools.

pub mod kubernetes;
mod quote;
pub mod slurm;

pub use quote::QuoteError;
