//! What tch lacks, as a small C++ shim: graphs of GPU work. The CUDA part is a library of its own inside this crate, loaded when
//! it is first asked for, so that one build serves hosts with and without a GPU.
//!
//! Must not know: models, runtimes, communication. Unsafe code of the project that is not a file map or a driver call lives here.

mod graph;
mod library;

pub use graph::CudaGraph;

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
