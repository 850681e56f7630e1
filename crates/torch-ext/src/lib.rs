//! What tch lacks, as a small C++ shim: graphs and streams of GPU work, kernels for decode steps on the CPU, the memory behind tensors,
//! libtorch's store and Gloo. Each part is a library of its own inside this crate, loaded when it is first asked for, so that one build serves hosts
//! with and without a GPU.
//!
//! Must not know: models, runtimes, what communication is for. Unsafe code of the project that is not a file map or a driver call
//! lives here.

mod buffer;
mod context;
mod cuda;
mod gloo;
mod gpu;
mod graph;
mod host;
mod library;
mod memory;
mod store;
mod stream;

pub use buffer::HostBuffer;
pub use context::{grad_enabled, set_deterministic};
pub use cuda::load_cuda;
pub use gloo::{GlooGroup, GlooWork};
pub use gpu::{Kept, kept_memory, own_gpu};
pub use graph::CudaGraph;
pub use host::{DecodeLayer, DecodeStep, decode, instruction_sets, linear, with_instruction_set};
pub use memory::{drop_grad, memory_size, resize_memory};
pub use store::Store;
pub use stream::{CudaEvent, CudaStream};

/// What can go wrong.
#[derive(Debug, Clone, thiserror::Error)]
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
    /// The store's host did not answer.
    #[error(
        "the store at {address} did not answer to `{what}` within {seconds:.1} s: its host (rank 0) is stopped, gone or cut off"
    )]
    Late {
        /// What was asked.
        what: &'static str,
        /// Where the store is.
        address: String,
        /// How long it was waited for.
        seconds: f64,
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
