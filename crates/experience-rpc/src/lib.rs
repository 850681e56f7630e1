//! Both ends of the experience protocol: the server beside the learner, and the client of rollout workers. Leases and submissions of
//! prompt groups, and weights by stream or broadcast, with checksums.
//!
//! The server wraps the state machine of the experience crate and knows records only as a [`GroupSource`] prepares them. The client
//! assembles weights into tensors; its caller loads them into an engine.
//!
//! Must not depend on: the trainer, the learner, the engine.
//!
//! # Examples
//! A chunk of weights carries its checksum, and checksums of parts combine without reading their bytes again:
//! ```
//! use unveil_experience_rpc::checksum::{Checksum, chunk, verify};
//!
//! let chunk = chunk(vec![7u8; 1000].into());
//! assert_eq!(verify(&chunk), Ok(Checksum::of(&[7; 1000])));
//! let (head, tail) = chunk.data.split_at(300);
//! assert_eq!(Checksum::of(head).concat(Checksum::of(tail)), Checksum::of(&chunk.data));
//! ```

pub mod checksum;
mod client;
mod server;
mod wire_dtype;

pub use client::{
    BroadcastMember, ClientError, ExperienceConnection, HeldLeases, Progress, WeightReceiver, WeightRejection,
    WeightUpdate, WeightsChecked,
};
pub use server::{
    BroadcastOptions, BroadcastReport, ExperienceServer, ExperienceServerOptions, GroupSource, NewWeights,
    PreparedGroup, RecordFailure, ServerError, WORKER_TIMEOUT,
};
