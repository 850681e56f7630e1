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
pub use work::{Barrier, Work};
pub use world::{Mesh, World};
