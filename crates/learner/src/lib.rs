//! The learner: instruction tuning (stage 1), policy updates (stage 2), and the host of experience that rollout workers talk to.
//!
//! One thread owns the model; everything asynchronous talks to it by shared state and channels. Must not know: tonic inside a
//! step, collective backends, the command line.

pub mod batch;
pub mod codec;
mod dataset;
pub mod dump;
mod error;
mod kept;
mod measure;
pub mod optim;
mod policy;
mod replay;
mod run;
mod serve;
mod settings;
pub mod sft;
mod stage;
mod state;
pub mod step;
mod targets;

pub use batch::{GroupInput, TrainGroup};
pub use dataset::{Dataset, Item};
pub use error::{LearnerError, Result};
pub use measure::UpdateReport;
pub use replay::replay;
pub use run::{run_rl, sampling};
pub use serve::{Host, HostOptions, LeaseSource, Leased, NewWeights};
pub use settings::{StepSettings, TOKEN_BUDGET, banned_ids};
pub use sft::{SftBatch, SftReport, SftTrainer, run_sft};
pub use stage::{Evaluation, Evaluator, EventSink, Outcome, Progress, Silent, Stage};
pub use step::Learner;
