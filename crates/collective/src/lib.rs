//! Collective calls among the ranks of a learner: one trait, the same behaviour on CPUs (Gloo), GPUs (NCCL) and alone.
//!
//! - [`open`] brings the ranks together: who is missing at the deadline is named, and a rank with another configuration or binary
//!   is refused with both fingerprints.
//! - A [`Group`] makes calls that start at once and are waited for through a [`Work`], so that reduction overlaps computation.
//! - [`World::mesh`] splits the world into replicas of shards.
//! - No rank hangs: when a call does not end, or a rank dies, stops or falls behind, every other rank gets the same [`Fault`],
//!   which names the call and the ranks that did not come. After that all groups are closed: every call returns the first fault.
//!
//! Must not know: tokio, tonic, what is reduced and why.

mod beat;
mod error;
mod group;
mod proof;
mod rendezvous;
mod setup;
mod transport;
mod verdict;
mod watch;
mod work;
mod world;

pub use error::{CollectiveError, Fault, Result, Why};
pub use group::{Collective, Group};
pub use rendezvous::{open, open_with};
pub use setup::{Backend, Setup, Timing};
pub use work::{Barrier, Work};
pub use world::{Mesh, World};
