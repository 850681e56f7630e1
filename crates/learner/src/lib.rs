//! The learner: instruction tuning (stage 1), policy updates (stage 2), and the host of experience that rollout workers talk to.
//!
//! One thread owns the model; everything asynchronous talks to it by shared state and channels. Must not know: tonic inside a
//! step, collective backends, the command line.

mod allowed;
pub mod batch;
mod crew;
mod dataset;
pub mod dump;
mod error;
mod fits;
mod follow;
mod freeze;
mod kept;
mod lora;
mod masked;
mod measure;
mod memory;
mod meter;
pub mod optim;
mod plain;
mod policy;
mod replay;
mod resume;
mod run;
mod saver;
mod serve;
mod settings;
mod setup;
pub mod sft;
mod shard;
mod share;
mod snapshot;
mod stage;
mod state;
pub mod step;
mod sums;
mod targets;

pub use batch::{GroupInput, TrainGroup};
pub use dataset::{Dataset, Item};
pub use error::{LearnerError, Result};
pub use fits::{check_records, limits};
pub use freeze::Freezing;
pub use measure::UpdateReport;
pub use memory::MemoryPlan;
pub use replay::{ReplayModels, replay};
pub use run::{Ready, run_rl, sampling};
pub use serve::{Broadcasting, Host, HostOptions, LeaseSource, Leased, NewWeights, Sent};
pub use settings::{StepSettings, banned_ids};
pub use setup::Models;
pub use sft::{SftBatch, SftReport, SftTrainer, run_sft};
pub use shard::{Ranks, Zero};
pub use snapshot::{Buffers, Copied, Stand};
pub use stage::{Evaluation, Evaluator, EventSink, Outcome, Progress, Silent, Stage};
pub use step::{Learner, Named};
