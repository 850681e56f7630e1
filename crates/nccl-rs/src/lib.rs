//! Bindings to NCCL, the library of collective calls among NVIDIA GPUs. The library is found at run time, so that one build serves
//! hosts with and without a GPU. No call waits without end: communicators are not blocking, and every wait has a deadline.
//!
//! Device memory and streams are opaque pointers here. Must not know: tch, runtimes, what is communicated.
//!
//! Source: NVIDIA's `nccl.h` 2.28 and the NCCL user guide, "Fault tolerance" and "Group calls".

mod comm;
mod error;
mod library;

pub use comm::{Calls, Communicator, DataType};
pub use error::{NcclError, Result, Version};
pub use library::{NEEDED, Nccl, UniqueId};
