//! Collective calls among the ranks of a learner: one trait, with the same behaviour on CPUs (Gloo), on GPUs (NCCL) and on a
//! single rank.
//!
//! - [`open`] is the rendezvous: it names the ranks that are missing at the deadline, and refuses a rank with another configuration
//!   or binary, showing both fingerprints.
//! - A [`Group`] starts calls without blocking and returns a [`Work`] to wait for, so that reduction overlaps computation.
//! - [`World::mesh`] splits the world into replicas of shards.
//! - No rank hangs: when a call does not complete, or a rank dies, stops or falls behind, every other rank gets the same [`Fault`],
//!   which names the call and the missing ranks. From then on all groups are closed: every call returns the first fault.
//!
//! Must not depend on: tokio, tonic, what is reduced and why.
//!
//! # Examples
//! A world of one rank; more ranks call the same with `Backend::Gloo` or `Backend::Nccl` and the address of rank 0:
//! ```
//! use std::time::Instant;
//! use tch::Tensor;
//! use unveil_collective::{Backend, Collective, Setup, Timeouts, open};
//!
//! let setup = Setup {
//!     rank: 0,
//!     world: 1,
//!     address: "127.0.0.1:0".to_owned(),
//!     local_address: None,
//!     backend: Backend::Solo,
//!     fingerprint: "seed = 7".to_owned(),
//!     token: None,
//!     timeouts: Timeouts::default(),
//! };
//! let world = open(&setup)?;
//! let group = world.group();
//! let work = group.start_all_reduce(Tensor::from_slice(&[1.0f32, 2.0]))?;
//! // Other work of this rank overlaps the reduction here.
//! let sum = work.wait(Instant::now() + group.timeout())?;
//! assert_eq!(Vec::<f32>::try_from(&sum)?, [1.0f32, 2.0]);
//! assert!(world.fault().is_none());
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod diagnose;
mod error;
mod failure_detector;
mod group;
mod heartbeat;
mod proof;
mod rendezvous;
mod setup;
mod shared;
mod transport;
mod work;
mod world;

pub use error::{CollectiveError, Fault, FaultKind, Result};
pub use group::{Collective, Group};
pub use rendezvous::{open, open_reporting_address};
pub use setup::{Backend, Setup, Timeouts};
pub use work::{Barrier, Joined, Work};
pub use world::{Mesh, World};
