//! The typed configuration. Unknown keys are refused; every key has a default or is checked when the configuration is loaded.
//!
//! The doc comments of sections and keys are the text of the configuration reference.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use unveil_core::{Compute, Dtype};

mod access;
mod answer;
mod collect;
mod data;
mod endpoint;
mod health;
mod launch;
mod learner;
mod lora;
mod model;
mod parallel;
mod prompt;
mod reward;
mod reward_service;
mod rollout;
mod schedule;
mod sft;
mod telemetry;

pub use access::{Auth, Tls};
pub use answer::{Answer, AnswerFormChoice};
pub use collect::Collect;
pub use data::{Augment, Data, DataKind, Synth};
pub(crate) use endpoint::ChatEndpoint;
pub use health::Health;
pub use launch::Launch;
pub use learner::{Critic, Freeze, KlPlacement, Learner, RatioBase, Whiten};
pub use lora::{Lora, SftLora};
pub use model::Model;
pub use parallel::Parallel;
pub use prompt::Prompt;
pub use reward::{
    Abstention, ComponentConfig, Custom, Gate, Length, Localization, Normalise, Overlap, Overlong, Relevance,
    RelevanceKind, Repetition, Reward, Symbolic, VisionMode, VisionRelevance,
};
pub use reward_service::{Judge, RewardService};
pub use rollout::{Rollout, WeightSync};
pub use schedule::{ParameterGroup, Schedule};
pub use sft::{Sft, SftPhase};
pub use telemetry::{LogFormat, Telemetry};

/// Complete configuration of a run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema, Default)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Run directory, seed, device and precision.
    pub run: Run,
    /// Initial model.
    pub model: Model,
    /// Text of prompts.
    pub prompt: Prompt,
    /// Parsing of answers.
    pub answer: Answer,
    /// Training and held-out data.
    pub data: Data,
    /// Stage 1: supervised fine-tuning.
    pub sft: Sft,
    /// Sampling and rollout workers in stage 2.
    pub rollout: Rollout,
    /// Reward components and the reward service.
    pub reward: Reward,
    /// Stage 2: reinforcement learning.
    pub learner: Learner,
    /// Evaluation on held-out data.
    pub eval: Eval,
    /// Checkpoint location and retention.
    pub checkpoint: Checkpoint,
    /// Placement of the processes on one machine.
    pub launch: Launch,
    /// Collection of answers from a vision model.
    pub collect: Collect,
    /// Health endpoint for probes.
    pub health: Health,
    /// Logs and traces.
    pub telemetry: Telemetry,
    /// TLS between the roles.
    pub tls: Tls,
    /// Token shared by the roles.
    pub auth: Auth,
}

/// Run directory, seed, device and precision.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Run {
    /// Local directory of the run; created if missing.
    pub dir: String,
    /// Seed of all random numbers of the run.
    pub seed: u64,
    /// Checkpoint to resume from: `auto` (the newest valid checkpoint, or a fresh start if there is none), `never` (a fresh start), or a
    /// step number.
    pub resume: String,
    /// Directory for dumps of the stage 2 batches: each batch is written to `step-N` before its update. Empty: no dumps.
    pub dump_batch: String,
    /// CPU threads of stage 1 and of the evaluations before and after stage 2; 0 uses all cores.
    pub threads: usize,
    /// Device: `cpu`, `cuda` (the first GPU), `cuda:N` (GPU N, from 0), or `auto` (a GPU if one is available, else the CPU).
    pub device: String,
    /// Makes a run repeatable bit for bit on machines of the same kind: libtorch uses deterministic algorithms only, and every lease holds
    /// exactly `rollout.groups_per_lease` groups, each generated separately. Requires `rollout.max_staleness = 0` and a
    /// `rollout.groups_per_lease` that divides `learner.groups`.
    pub deterministic: bool,
    /// Data type of the weights in computation: `float32` or `bfloat16`. Activations are always fp32, training keeps fp32 master weights
    /// in both stages.
    pub dtype: Dtype,
    /// Precision of matrix products, attention and KV caches, in training and generation: `exact` (fp32; a GPU multiplies bf16 weights with
    /// inputs of 16 bits or more), `fast` (bf16 operands with fp32 sums, and a bf16 KV cache: for large models on a GPU, which multiplies
    /// bf16 numbers many times as fast as fp32 ones; on the CPU it is slower than `exact`), or `tf32` (GPU only). Residual stream, norms,
    /// softmax and log-probabilities are fp32 in every mode. `learner.agreement_limit` follows the mode.
    pub compute: Compute,
}

impl Default for Run {
    fn default() -> Self {
        Self {
            dir: "runs/run".into(),
            seed: 0,
            resume: "auto".into(),
            dump_batch: String::new(),
            threads: 0,
            device: "auto".into(),
            deterministic: false,
            dtype: Dtype::default(),
            compute: Compute::default(),
        }
    }
}

/// AdamW and its learning rate schedule.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Optimizer {
    /// Peak learning rate, above 0. The default suits models of a few million parameters; for models above 500 million parameters it must
    /// be set explicitly.
    #[schemars(extend("exclusiveMinimum" = 0.0))]
    pub lr: f64,
    /// Confirms a learning rate above 5e-5 for full training of a model above 500 million parameters, which is otherwise refused.
    pub allow_high_lr: bool,
    /// Course of the learning rate after the warm-up: `linear`, `cosine` or `constant`, which ignores `decay` and `lr_end`.
    pub schedule: Schedule,
    /// Number of updates of linear warm-up; afterwards the rate is constant until it decays.
    pub warmup: u64,
    /// Fraction of all updates, at the end, over which the rate falls to `lr * lr_end`, 0 to 1; 0 keeps the rate constant.
    #[schemars(range(min = 0.0, max = 1.0))]
    pub decay: f64,
    /// Final learning rate as a fraction of `lr`, 0 to 1.
    #[schemars(range(min = 0.0, max = 1.0))]
    pub lr_end: f64,
    /// Decay rates of Adam's first and second moment, each from 0 up to below 1.
    pub betas: [f64; 2],
    /// Adam's epsilon.
    pub eps: f64,
    /// Decoupled weight decay; applied to matrices only (parameters with two or more dimensions).
    pub weight_decay: f64,
    /// Maximum global norm of the gradient; larger gradients are scaled down. 0 disables clipping.
    pub clip_norm: f64,
    /// Groups of parameters with other learning rates.
    pub groups: Vec<ParameterGroup>,
}

impl Default for Optimizer {
    fn default() -> Self {
        Self {
            lr: 1e-3,
            allow_high_lr: false,
            schedule: Schedule::default(),
            warmup: 20,
            decay: 0.3,
            lr_end: 0.05,
            betas: [0.9, 0.95],
            eps: 1e-8,
            weight_decay: 0.01,
            clip_norm: 1.0,
            groups: Vec::new(),
        }
    }
}

/// Evaluation on held-out data.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Eval {
    /// Number of validation images evaluated during training; 0 uses all.
    pub val_limit: usize,
    /// Images per batch.
    pub batch: usize,
    /// Number of held-out images shown in the report.
    pub report_images: usize,
    /// Additional metric suites of the validation during training: `grounding`, `mau`. Their results are in the `eval` events and in the
    /// report. `grounding` answers every image a second time, with the image withheld. Empty: the summary metrics only.
    pub suites: Vec<Suite>,
    /// Metric of the validation whose highest value selects the model that a stage exports: the name of a summary metric (`mean_iou`), or
    /// suite and metric (`grounding.acc50`). Empty: stage 2 exports the model with the highest mean of `mean_iou` and `soft_f1`, and stage 1
    /// its last one.
    pub best: String,
}

impl Default for Eval {
    fn default() -> Self {
        Self { val_limit: 0, batch: 32, report_images: 8, suites: Vec::new(), best: String::new() }
    }
}

/// Suite of held-out metrics in addition to the summary.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Suite {
    /// Quality of boxes and attention, with the image and with the image withheld.
    Grounding,
    /// Accuracy per data source, and averaged over the sources.
    Mau,
}

impl Suite {
    /// All suites.
    pub const ALL: [Self; 2] = [Self::Grounding, Self::Mau];

    /// Returns the name used in configurations and on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Grounding => "grounding",
            Self::Mau => "mau",
        }
    }
}

/// Checkpoint location and retention.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Checkpoint {
    /// Path or URL (`s3://bucket/prefix`) for `log/` and `checkpoints/`. Empty: the run directory.
    pub url: String,
    /// Number of newest checkpoints to keep; the best checkpoint is kept in addition.
    pub keep: usize,
    /// Keeps, in addition, every checkpoint whose step is a multiple of this; 0 keeps none in addition.
    pub keep_every: u64,
    /// Number of consecutive failed saves, at least 1, that ends the run; until then training continues and the previous checkpoint
    /// remains. A failed save at the end of a run, or a second learner writing to the same location, ends it immediately.
    #[schemars(range(min = 1))]
    pub max_failures: u32,
}

impl Default for Checkpoint {
    fn default() -> Self {
        Self { url: String::new(), keep: 2, keep_every: 0, max_failures: 3 }
    }
}
