//! The trainer of both stages: packs groups, shards state over ranks, computes losses and gradients, and takes optimizer steps. It
//! also dumps batches and replays their updates, and attaches and exports adapters.
//!
//! A trainer belongs to the thread that owns its device, and depends on nothing but its inputs and its state. Must not depend on tokio,
//! tonic, unveil-service and unveil-reward.
//!
//! # Examples
//! A tiny model with random weights learns one answer:
//! ```
//! use std::sync::Arc;
//! use unveil_config::schema::Optimizer;
//! use unveil_core::{Grid, GroupInput, Prompt};
//! use unveil_trainer::{SftBatch, SftTrainer};
//! # use unveil_model::Vlm;
//! # let dir = tempfile::tempdir()?;
//! # unveil_testkit_model::write_model(dir.path(), 7);
//! let vlm = Vlm::load(dir.path(), tch::Device::Cpu, tch::Kind::Float)?;
//! let options = Optimizer { lr: 3e-3, warmup: 0, ..Optimizer::default() };
//! let mut trainer = SftTrainer::new(vlm, &options, 20)?;
//!
//! let input = GroupInput {
//!     record: serde_json::from_str(r#"{"id": "ct-7"}"#)?,
//!     image_size: (0, 0),
//!     prompt: Prompt { tokens: vec![10, 11, 12], grids: Vec::new() },
//!     patches: Vec::new(),
//!     merged: Grid { rows: 0, cols: 0 },
//!     encoded: Default::default(),
//! };
//! let batch = SftBatch { inputs: vec![Arc::new(input)], targets: vec![vec![20, 21, 1]], pass: 0 };
//! let first = trainer.update(&batch)?;
//! for _ in 0..9 {
//!     trainer.update(&batch)?;
//! }
//! assert_eq!((first.tokens, trainer.step(), trainer.skipped()), (3, 10, 0));
//! assert!(trainer.update(&batch)?.loss < first.loss);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod batch;
pub mod dump;
mod error;
mod forward_pass;
mod freeze;
mod learning_rate;
mod load;
pub mod lora;
mod loss_accumulator;
mod memory_estimate;
mod memory_plan;
mod micro_batch;
pub mod optim;
mod out_of_memory;
mod partition;
mod policy;
mod replay;
mod settings;
mod sft;
mod shard;
mod sharded_model;
mod state;
mod step;
mod targets;
mod update_report;
pub mod wire;

pub use error::{Result, TrainerError};
pub use freeze::{CRITIC_PREFIX, Freezing};
pub use learning_rate::lr_at;
pub use load::{device_of_rank, load_model, rank_device, wire_kind};
pub use memory_plan::MemoryPlan;
pub use replay::{ReplayModels, replay};
pub use settings::StepSettings;
pub use sft::{SftBatch, SftReport, SftSettings, SftTrainer};
pub use shard::{ParameterSlice, Ranks, ZeroStage};
pub use sharded_model::ParameterReader;
pub use state::{LocalState, StateSlice, TrainerProgress};
pub use step::{Counters, Models, NamedTensors, PolicyTrainer, SKIP_LIMIT, ValuesByGroup};
pub use update_report::{UpdateReport, staleness};
