//! The rollout worker: leases prompt groups, generates responses, has them scored by the reward service, submits whole groups, and
//! loads new weights between two tokens. Also `unveil generate` and `unveil score`, which run the same engine over a record file.
//!
//! Owns the thread that owns the model; asynchronous code sends it messages and never blocks a runtime thread on it. Nothing is lost
//! when a worker dies: its leases go to other workers.
//!
//! Must not depend on: the learner, the trainer.

mod attention_budget;
mod batch;
mod device;
mod engine;
mod error;
mod groups;
mod head_file;
mod meter;
mod offline;
mod readiness;
mod reward_connection;
mod text;
mod weight_state;
mod worker;

#[cfg(test)]
mod fixture;
#[cfg(test)]
mod tests;

pub use device::load_update;
pub use engine::{engine_options, open_engine};
pub use error::RolloutError;
pub use offline::{GenerateOptions, OfflineModel, ScoreOptions, generate_cli, score_cli};
pub use unveil_service::CancellationToken;
pub use worker::{WorkerOptions, WorkerReport, run};

/// Result of this crate.
pub type Result<T, E = RolloutError> = std::result::Result<T, E>;
