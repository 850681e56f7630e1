//! The learner: instruction tuning (stage 1), policy updates (stage 2) with the experience server.
//!
//! One thread owns the model; asynchronous code communicates with it through shared state and channels. Must not depend on:
//! tonic inside an update, collective backends, the command line.

mod checkpoint_meta;
mod dataset;
mod dynamic_sampling;
mod error;
mod follower;
mod group_outcomes;
mod masked_rewards;
mod metrics;
mod parallel;
mod rank_batch;
mod rank_control;
mod record_check;
mod resume;
mod rollout_log;
mod run;
mod saver;
mod sft;
mod sft_batch;
mod sft_phase;
mod sft_phases;
mod snapshot;
mod stage;
mod stage_loop;
mod stage_plan;
mod stage_trainer;
mod threads;
mod trainer_start;

pub use dataset::{Dataset, Item};
pub use error::{LearnerError, Result};
pub use record_check::{check_records, training_limits};
pub use run::{Ready, run_rl, sampling};
pub use sft_phases::run_sft;
pub use snapshot::{HostBufferPool, HostCopy, copy_to_host, read_state};
pub use stage::{Evaluator, EvaluatorError, EventSink, Outcome, Progress, SilentProgress, Stage, ValidationResult};
