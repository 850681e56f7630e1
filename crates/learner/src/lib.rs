//! The learner: instruction tuning (stage 1), policy updates (stage 2), and the experience server for rollout workers.
//!
//! One thread owns the model; asynchronous code communicates with it through shared state and channels. Must not depend on:
//! tonic inside an update, collective backends, the command line.

pub mod batch;
mod checkpoint_meta;
mod dataset;
pub mod dump;
mod error;
mod follower;
mod freeze;
mod lora;
mod loss_accumulator;
mod masked_rewards;
mod memory_plan;
mod metrics;
pub mod optim;
mod partition;
mod policy;
mod rank_control;
mod record_check;
mod replay;
mod resume;
mod rollout_log;
mod run;
mod saver;
mod serve;
mod settings;
pub mod sft;
mod shard;
mod snapshot;
mod stage;
pub mod step;
mod targets;
mod trainer_start;
mod update_report;
mod wire;

pub use batch::{GroupInput, TrainGroup};
pub use dataset::{Dataset, Item};
pub use error::{LearnerError, Result};
pub use freeze::Freezing;
pub use memory_plan::MemoryPlan;
pub use record_check::{check_records, training_limits};
pub use replay::{ReplayModels, replay};
pub use run::{Ready, run_rl, sampling};
pub use serve::{
    BroadcastOptions, BroadcastReport, ExperienceServer, ExperienceServerOptions, GroupSource, NewWeights,
    PreparedGroup,
};
pub use settings::{StepSettings, banned_ids};
pub use sft::{SftBatch, SftReport, SftTrainer, run_sft};
pub use shard::{Ranks, ZeroStage};
pub use snapshot::{HostBufferPool, HostCopy, TrainerProgress};
pub use stage::{Evaluation, Evaluator, EventSink, Outcome, Progress, SilentProgress, Stage};
pub use step::{Models, NamedTensors, PolicyTrainer};
pub use update_report::UpdateReport;
