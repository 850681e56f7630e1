//! What tch lacks, as a small C++ shim: graphs of GPU work, kernels for decode steps on the CPU. Each part is a library of its own
//! inside this crate, loaded when it is first asked for, so that one build serves hosts with and without a GPU.
//!
//! Must not know: models, runtimes, communication. Unsafe code of the project that is not a file map or a driver call lives here.

mod graph;
mod host;
mod library;

pub use graph::CudaGraph;
pub use host::{DecodeLayer, DecodeStep, decode, linear};

/// What can go wrong.
#[derive(Debug, thiserror::Error)]
pub enum ExtError {
    /// A part cannot be used.
    #[error("the {part} part of this build cannot be used: {reason}")]
    Unavailable {
        /// Which part.
        part: &'static str,
        /// Why.
        reason: String,
    },
    /// A tensor is not what a kernel takes.
    #[error("{what}: {found} where a contiguous fp32 tensor {expected:?} on the CPU is needed")]
    Tensor {
        /// Which tensor.
        what: &'static str,
        /// What it is.
        found: String,
        /// The shape that is needed.
        expected: Vec<i64>,
    },
    /// A number is out of its range.
    #[error("{what}: {value} does not fit {limit}")]
    Index {
        /// What it counts.
        what: &'static str,
        /// The number.
        value: i64,
        /// What it must fit.
        limit: i64,
    },
    /// libtorch or the driver refused.
    #[error("{what}: {message}")]
    Refused {
        /// What was tried.
        what: &'static str,
        /// What libtorch said.
        message: String,
    },
}

/// Result of this crate.
pub type Result<T, E = ExtError> = std::result::Result<T, E>;
