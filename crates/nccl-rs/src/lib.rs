//! Safe bindings to NCCL, NVIDIA's library of collective calls among GPUs.
//!
//! The library is found at run time, so that one build serves hosts with and without a GPU. No call blocks indefinitely:
//! communicators are non-blocking, and every wait has a deadline. Device memory and streams are opaque pointers here.
//!
//! Must not depend on: tch, async runtimes, the meaning of the data.
//!
//! Source: NVIDIA's `nccl.h` 2.28 and the NCCL user guide, "Fault tolerance" and "Group calls".
//!
//! # Examples
//! A communicator of one rank, which needs a GPU:
//! ```no_run
//! use std::time::{Duration, Instant};
//! use nccl_rs::{Communicator, MIN_VERSION, Nccl};
//!
//! let nccl = Nccl::load(&[])?;
//! assert!(nccl.version() >= MIN_VERSION);
//! // The other ranks of a larger communicator are sent this id.
//! let id = nccl.unique_id()?;
//! let deadline = Instant::now() + Duration::from_secs(60);
//! let communicator = Communicator::init(&nccl, (0, 1), &id, deadline, || false)?;
//! communicator.check("init")?;
//! # Ok::<(), nccl_rs::NcclError>(())
//! ```

#![expect(unsafe_code, reason = "NCCL is a C library, called through function pointers")]

mod comm;
mod error;
mod library;

pub use comm::{Communicator, DataType, GroupCalls, Transfer};
pub use error::{NcclError, Result, Version};
pub use library::{MIN_VERSION, Nccl, UniqueId};
