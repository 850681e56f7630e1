//! The rollout worker: leases prompt groups, generates, asks the reward service, submits whole groups, takes new weights
//! between two tokens. Also `unveil generate` and `unveil score`, which run the same engine over a record file.
//!
//! Owns the thread that owns the model; asynchronous code talks to it by messages and never waits for it on a runtime
//! thread. Must not know: the learner. Nothing is lost when a worker dies: what it leased goes to another one.

mod broadcast;
mod crc;
mod device;
mod engine;
mod error;
mod experience;
mod fit;
mod groups;
mod hand;
mod heads;
mod keeper;
mod meter;
mod offline;
mod ready;
mod rewards;
pub mod sync;
mod text;
mod weights;
mod worker;

#[cfg(test)]
mod broadcast_tests;
#[cfg(test)]
mod fixture;
#[cfg(test)]
mod offline_tests;
#[cfg(test)]
mod tests;

pub use engine::{engine_options, open_engine};
pub use error::RolloutError;
pub use offline::{GenerateOptions, OfflineModel, ScoreOptions, generate_cli, score_cli};
pub use unveil_service::CancellationToken;
pub use worker::{WorkerOptions, WorkerReport, run};

/// Result of this crate.
pub type Result<T, E = RolloutError> = std::result::Result<T, E>;
