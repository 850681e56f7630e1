//! Safe bindings to NCCL, NVIDIA's library of collective calls among GPUs.
//!
//! The library is found at run time, so that one build serves hosts with and without a GPU. No call blocks indefinitely:
//! communicators are non-blocking, and every wait has a deadline. Device memory and streams are opaque pointers here.
//!
//! Must not depend on: tch, async runtimes, the meaning of the data.
//!
//! Source: NVIDIA's `nccl.h` 2.28 and the NCCL user guide, "Fault tolerance" and "Group calls".

#![expect(unsafe_code, reason = "NCCL is a C library, called through function pointers")]

mod comm;
mod error;
mod library;

pub use comm::{Communicator, DataType, GroupCalls};
pub use error::{NcclError, Result, Version};
pub use library::{MIN_VERSION, Nccl, UniqueId};
