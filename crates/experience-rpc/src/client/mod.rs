//! The workers' end of the protocol: calls with retry, held leases and their heartbeats, and the reception of weights.

mod broadcast;
mod checksummer;
mod connection;
mod error;
mod held_leases;
mod receiver;
mod weight_stream;

pub use broadcast::BroadcastMember;
pub use connection::{ExperienceConnection, WeightRejection, WeightsChecked};
pub use error::ClientError;
pub use held_leases::{HeldLeases, Progress};
pub use receiver::WeightReceiver;
pub use weight_stream::WeightUpdate;
