//! A small C++ shim for functions that tch lacks: CUDA graphs and streams, CPU kernels for decode steps, attention of packed sequences and
//! products of bf16 operands with their gradients, control over the memory behind tensors, libtorch's key-value store and Gloo. Each C++
//! file becomes a shared library that is embedded in this crate and loaded on first use, so that one build serves hosts with and without a
//! GPU. The free memory of a device is read here, too.
//!
//! Must not depend on: models, async runtimes, what communication is for. The project's unsafe code is here, apart from file maps and
//! the bindings to NCCL.
//!
//! # Examples
//! A tensor is copied to host memory, stored there in another dtype, and copied back:
//! ```
//! use tch::{Device, Kind, Tensor};
//! use unveil_torch_ext::HostBuffer;
//!
//! let weights = Tensor::from_slice(&[1.0f32, 2.0, -0.5]);
//! let mut buffer = HostBuffer::new(6, Device::Cpu)?;
//! buffer.copy_in(0, &weights, Kind::BFloat16)?;
//!
//! let restored = Tensor::zeros([3], (Kind::Float, Device::Cpu));
//! buffer.copy_out(0, Kind::BFloat16, &restored)?;
//! assert_eq!(Vec::<f32>::try_from(&restored)?, [1.0f32, 2.0, -0.5]);
//! assert_eq!(buffer.size(), 6);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

#![expect(unsafe_code, reason = "this crate is the boundary to C++; every unsafe block states why it is sound")]

mod autograd;
mod buffer;
mod context;
mod cpu_kernels;
mod cuda;
mod device_memory;
mod gloo;
mod gpu;
mod graph;
mod library;
mod memory;
mod operations;
mod packed_attention;
mod precision;
mod store;
mod stream;

pub use autograd::backward;
pub use buffer::HostBuffer;
pub use context::{allow_tf32, grad_enabled, set_deterministic};
pub use cpu_kernels::{DecodeLayer, DecodeStep, decode, instruction_sets, linear, with_instruction_set};
pub use cuda::load_cuda;
pub use device_memory::{GpuMemory, free_memory, gpu_memory};
pub use gloo::{GlooGroup, GlooWork};
pub use gpu::{AllocatorMemory, allocator_memory, select_gpu};
pub use graph::{CudaGraph, GraphPool};
pub use memory::{drop_grad, memory_size, resize_memory};
pub use operations::{OperationCounts, count_operations};
pub use packed_attention::{PackedLayout, packed_attention};
pub use precision::{MatrixSet, Operands, keep_wide_gradient, mixed_linear, round_through};
pub use store::Store;
pub use stream::{CudaEvent, CudaStream};

/// Errors of this crate.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ExtError {
    /// One of the embedded libraries cannot be used.
    #[error("the {library} library of this build cannot be used: {reason}")]
    Unavailable {
        /// Name of the library.
        library: &'static str,
        /// Why it cannot be used.
        reason: String,
    },
    /// A tensor has a dtype, shape or layout that a kernel does not support.
    #[error("{what}: {found} where a contiguous fp32 tensor {expected:?} on the CPU is needed")]
    Tensor {
        /// Role of the tensor.
        what: &'static str,
        /// The tensor as given.
        found: String,
        /// Shape that is needed.
        expected: Vec<i64>,
    },
    /// A number is out of range.
    #[error("{what}: {value} does not fit {limit}")]
    Index {
        /// Counted quantity.
        what: &'static str,
        /// The number.
        value: i64,
        /// The bound that it violates.
        limit: i64,
    },
    /// The host of the store did not answer in time.
    #[error(
        "the store at {address} did not answer `{what}` within {seconds:.1} s: its host (rank 0) is stopped, has failed or cannot be reached"
    )]
    Timeout {
        /// Name of the request.
        what: &'static str,
        /// Address of the store.
        address: String,
        /// Timeout in seconds.
        seconds: f64,
    },
    /// libtorch or the driver refused a call.
    #[error("{what}: {message}")]
    Refused {
        /// Attempted operation.
        what: &'static str,
        /// Message of libtorch or the driver.
        message: String,
    },
}

/// Result of this crate.
pub type Result<T, E = ExtError> = std::result::Result<T, E>;
