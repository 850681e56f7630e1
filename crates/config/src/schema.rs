//! The typed configuration. Unknown keys are refused; every key has a default or is checked when the configuration is loaded.
//!
//! The doc comments of sections and keys are the text of the configuration reference.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use unveil_core::{BoxForm, LogprobKind};

mod access;
mod answer;
mod collect;
mod endpoint;
mod health;
mod launch;
mod learner;
mod lora;
mod parallel;
mod reward;
mod reward_service;
mod telemetry;

pub use access::{Auth, Tls};
pub use answer::Answer;
pub use collect::Collect;
pub(crate) use endpoint::ChatEndpoint;
pub use health::Health;
pub use launch::Launch;
pub use learner::{
    Algorithm, Critic, Freeze, Importance, KlForm, KlGradient, KlPlacement, Learner, LossReduction, RatioBase,
    RatioLevel, Whiten,
};
pub use lora::Lora;
pub use parallel::Parallel;
pub use reward::{
    Abstention, ComponentConfig, Custom, Gate, Length, Localization, Normalise, Overlap, Relevance, RelevanceKind,
    Repetition, Reward, Symbolic, VisionMode, VisionRelevance,
};
pub use reward_service::{Judge, RewardService};
pub use telemetry::{LogFormat, Telemetry};

/// Complete configuration of a run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema, Default)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Run directory, seed, device and precision.
    pub run: Run,
    /// Initial model.
    pub model: Model,
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
    /// Data type of the weights in computation: `float32` or `bfloat16`. Activations are always fp32, the stage 2 learner keeps fp32 master
    /// weights, and stage 1 runs entirely in fp32.
    pub dtype: Dtype,
}

/// Data type of weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Dtype {
    /// 32-bit floating point (4 bytes per weight).
    #[default]
    Float32,
    /// bfloat16 (2 bytes per weight).
    Bfloat16,
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
        }
    }
}

/// Initial model: a model directory, or a preset that is initialised with random weights.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Model {
    /// Model directory in Hugging Face layout. Empty: a model with random weights is created from `family` and `preset`.
    pub dir: String,
    /// Model family of a model created from scratch; ignored if `dir` is set.
    pub family: String,
    /// Size preset of the family for a model created from scratch; ignored if `dir` is set.
    pub preset: String,
    /// Notation of boxes in answers: `auto` (the notation of the model family), `absolute` (pixels of the resized image), `per_mille`
    /// (thousandths of the image sides), `qwen2_vl` (thousandths between box tokens), or `llava` (fractions with three decimals).
    #[serde(with = "crate::box_form")]
    #[schemars(with = "String")]
    pub boxes: Option<BoxForm>,
}

impl Default for Model {
    fn default() -> Self {
        Self { dir: String::new(), family: "qwen2_5_vl".into(), preset: "tiny".into(), boxes: None }
    }
}

/// Source of the training data.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum DataKind {
    /// Synthetic images, generated as by `unveil data synth`.
    Synth,
    /// Pascal VOC directory `data.root`.
    Voc,
    /// Record file `data.root` (JSON lines).
    Jsonl,
}

/// Training and held-out data.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Data {
    /// Source: `synth` (generated images), `voc` (a Pascal VOC directory) or `jsonl` (a record file).
    pub kind: DataKind,
    /// Path of the data: a directory for `voc`, a file for `jsonl`; not used for `synth`.
    pub root: String,
    /// Class name in the VOC annotations whose objects are the findings; required for `voc`.
    pub class: String,
    /// Category written in questions and answers for that VOC class.
    pub category: String,
    /// Allows images outside the directory of the record file: absolute paths, `..`, and symbolic links that lead out of it.
    pub outside: bool,
    /// Question for records without one.
    pub question: String,
    /// Synthetic data; used if `kind = "synth"`.
    pub synth: Synth,
    /// Name of the split to train on.
    pub train_split: String,
    /// Name of the split for evaluation during training and for choosing the best checkpoint; must differ from `train_split`.
    pub val_split: String,
    /// Name of the split reported in summary.json; evaluated once before and once after stage 2; must differ from `train_split`.
    pub test_split: String,
    /// Random augmentation of training images.
    pub augment: Augment,
    /// Known categories with the synonyms that count as naming them: `{"nodule" = ["nodules"]}`.
    pub synonyms: std::collections::BTreeMap<String, Vec<String>>,
}

impl Default for Data {
    fn default() -> Self {
        Self {
            kind: DataKind::Synth,
            root: String::new(),
            class: String::new(),
            category: String::new(),
            outside: false,
            question: "What is abnormal, and where?".into(),
            synth: Synth::default(),
            train_split: "train".into(),
            val_split: "val".into(),
            test_split: "test".into(),
            augment: Augment::default(),
            synonyms: Default::default(),
        }
    }
}

/// Size and seed of the synthetic data.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Synth {
    /// Number of training images.
    pub train: usize,
    /// Number of validation images.
    pub val: usize,
    /// Number of test images.
    pub test: usize,
    /// Seed of the data, independent of `run.seed`.
    pub seed: u64,
    /// Side length of the images in pixels; a multiple of 16 from 48 to 448.
    #[schemars(range(min = 48, max = 448))]
    pub size: u32,
}

impl Default for Synth {
    fn default() -> Self {
        Self { train: 6000, val: 128, test: 256, seed: 7, size: 96 }
    }
}

/// Random augmentation of training images.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Augment {
    /// Smallest side of a random crop, as a fraction of the image side, above 0 up to 1; 1 disables cropping.
    #[schemars(range(max = 1.0), extend("exclusiveMinimum" = 0.0))]
    pub crop_min: f32,
    /// Mirrors images left to right with probability 1/2.
    pub flip_horizontal: bool,
    /// Mirrors images top to bottom with probability 1/2.
    pub flip_vertical: bool,
    /// Maximum relative change of brightness and contrast, from 0 up to below 1; 0 disables it.
    #[schemars(range(min = 0.0), extend("exclusiveMaximum" = 1.0))]
    pub jitter: f32,
}

impl Default for Augment {
    fn default() -> Self {
        Self { crop_min: 1.0, flip_horizontal: false, flip_vertical: false, jitter: 0.0 }
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
    /// Number of updates of linear warm-up; afterwards the rate is constant until it decays.
    pub warmup: u64,
    /// Fraction of all updates, at the end, over which the rate falls linearly to `lr * lr_end`, 0 to 1; 0 keeps the rate constant.
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
}

impl Default for Optimizer {
    fn default() -> Self {
        Self {
            lr: 1e-3,
            allow_high_lr: false,
            warmup: 20,
            decay: 0.3,
            lr_end: 0.05,
            betas: [0.9, 0.95],
            eps: 1e-8,
            weight_decay: 0.01,
            clip_norm: 1.0,
        }
    }
}

/// Stage 1: supervised fine-tuning by cross-entropy on the reference answers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Sft {
    /// Number of updates; 0 skips stage 1.
    pub steps: u64,
    /// Images per update.
    #[schemars(range(min = 1))]
    pub batch: usize,
    /// Optimiser of stage 1.
    pub optimizer: Optimizer,
    /// Updates between evaluations on the validation split; 0 evaluates at the end only.
    pub eval_every: u64,
    /// Updates between checkpoints; 0 saves at the end only.
    pub checkpoint_every: u64,
}

impl Default for Sft {
    fn default() -> Self {
        Self { steps: 400, batch: 16, optimizer: Optimizer::default(), eval_every: 0, checkpoint_every: 0 }
    }
}

/// Sampling and rollout workers in stage 2.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Rollout {
    /// Responses per group (prompt), 1 to 1024; algorithms that compare responses need at least 2.
    #[schemars(range(min = 1))]
    pub n: usize,
    /// Sampling temperature, above 0.
    #[schemars(extend("exclusiveMinimum" = 0.0))]
    pub temperature: f64,
    /// Samples from the k most probable tokens only; 0 disables the filter.
    pub top_k: usize,
    /// Samples from the smallest set of most probable tokens that reaches this probability, above 0 up to 1; 1 disables the filter.
    #[schemars(range(max = 1.0), extend("exclusiveMinimum" = 0.0))]
    pub top_p: f64,
    /// Samples only tokens with at least this fraction of the most probable token's probability, 0 to 1; 0 disables the filter.
    #[schemars(range(min = 0.0, max = 1.0))]
    pub min_p: f64,
    /// Distribution of the log-probabilities in rollout and learner: `tempered` (the distribution at `temperature`, before the three
    /// filters) or `untempered` (at temperature 1).
    pub logprobs: LogprobKind,
    /// Strings that end a response, in addition to the end token. Empty: the end token only.
    pub stop: Vec<String>,
    /// Maximum length of a response in tokens.
    #[schemars(range(min = 1))]
    pub max_new_tokens: usize,
    /// Groups that a worker leases and generates at a time, 1 to 4096.
    #[schemars(range(min = 1))]
    pub groups_per_lease: usize,
    /// Maximum age of the oldest token of a response, in weight versions behind the learner; 0 to 1000 and at most `learner.steps`. With 0,
    /// training is strictly on-policy: generation and training alternate, and the result does not depend on timing. Above 0, workers
    /// generate while the learner trains, and receive new weights in the middle of responses.
    #[schemars(range(min = 0, max = 1000))]
    pub max_staleness: u64,
    /// Seconds after the last heartbeat at which a lease expires and its groups are leased to another worker. Heartbeats renew a lease
    /// during work, so it may be shorter than the work takes.
    #[schemars(range(max = 1e8), extend("exclusiveMinimum" = 0.0))]
    pub lease_s: f64,
    /// Seconds without progress after which the groups of a live worker are leased to others. Progress is a decode step, a received part of
    /// weights or of an image, or a scored group. Must be above `reward.deadline_s` and longer than the prefill of a whole lease.
    #[schemars(range(max = 1e8), extend("exclusiveMinimum" = 0.0))]
    pub stall_s: f64,
    /// Seconds that a worker retries to reach the learner before it exits.
    #[schemars(range(max = 1e8), extend("exclusiveMinimum" = 0.0))]
    pub patience_s: f64,
    /// Failed attempts at a group (workers lost while holding it, or unable to generate it) after which the group is set aside and its
    /// record reported; 0 retries without limit.
    pub max_losses: u32,
    /// CPU threads of each rollout worker; 0 uses all cores.
    pub threads: usize,
    /// Number of rollout workers that `unveil train` starts.
    #[schemars(range(min = 1))]
    pub workers: usize,
    /// Maximum number of responses that a worker decodes in parallel; at least `n`.
    #[schemars(range(min = 1))]
    pub max_rows: usize,
    /// Memory limit of a worker for KV cache and activations, in GiB; 0 uses the memory that is free at start.
    #[schemars(range(min = 0.0))]
    pub memory_gib: f64,
    /// Transport of new weights to the workers: `grpc` (each worker fetches them) or `broadcast` (the learner broadcasts them over NCCL or
    /// Gloo).
    pub weight_sync: WeightSync,
    /// Timeout in seconds (1 to 600) for workers to join a broadcast, and for each of its collective calls; a worker that is late fetches
    /// the weights over gRPC. If a worker dies, the others wait this long for it.
    #[schemars(range(min = 1.0, max = 600.0))]
    pub broadcast_s: f64,
    /// Listen address `host:port` of a worker's Prometheus page (`/metrics`); workers on one machine need different ports. Empty: no page.
    pub metrics_listen: String,
}

/// Transport of new weights to the workers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum WeightSync {
    /// Each worker fetches the weights over gRPC.
    Grpc,
    /// The learner broadcasts the weights to all subscribed workers: over NCCL if its device is a GPU, over Gloo on CPUs. Other workers,
    /// and those whose broadcast fails, fetch them over gRPC. On GPUs both ends keep a second copy of the sent weights in device memory; if
    /// it does not fit, they go through host memory.
    Broadcast,
}

impl Default for Rollout {
    fn default() -> Self {
        Self {
            n: 8,
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            logprobs: LogprobKind::Tempered,
            stop: Vec::new(),
            max_new_tokens: 40,
            groups_per_lease: 16,
            max_staleness: 0,
            lease_s: 60.0,
            stall_s: 300.0,
            patience_s: 60.0,
            max_losses: 3,
            threads: 0,
            workers: 1,
            max_rows: 256,
            memory_gib: 0.0,
            weight_sync: WeightSync::Grpc,
            broadcast_s: 10.0,
            metrics_listen: String::new(),
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
}

impl Default for Eval {
    fn default() -> Self {
        Self { val_limit: 0, batch: 32, report_images: 8, suites: Vec::new() }
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
