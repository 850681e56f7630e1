//! Memory and time of a run, computed from the sizes of its model and its configuration before anything is loaded.
//!
//! Owns the formulas of activations, state, KV caches and step time, which `trainer` and `engine` use at run time too, and the table of
//! GPUs. Pure functions: it reads no file and no device. Must not depend on tch and tonic.
//!
//! # Examples
//! A learner of a tiny decoder on one GPU:
//! ```
//! use unveil_config::Config;
//! use unveil_plan::{Device, ModelShape, ParameterShape, PlanInput, VisionShape, plan};
//!
//! let vision = VisionShape {
//!     depth: 2, hidden: 64, intermediate: 128, gated: true, patch_values: 384, patches_per_token: 4, pixels_per_token: 256, deepstack: 0,
//! };
//! let parameter = |name: &str, dimensions: &[u64]| ParameterShape { name: name.into(), dimensions: dimensions.to_vec() };
//! let shape = ModelShape {
//!     layers: 1, hidden: 128, intermediate: 384, heads: 8, kv_heads: 4, head_dim: 16, vocab: 512, vision,
//!     parameters: vec![
//!         parameter("model.embed_tokens.weight", &[512, 128]),
//!         parameter("model.layers.0.mlp.down_proj.weight", &[128, 384]),
//!     ],
//! };
//! let config = Config::default();
//! let device = Device::gpu("RTX-4090")?;
//! let plan = plan(&PlanInput { config: &config, shape: &shape, device, gpus: Some(2), nodes: 1, max_pixels: None })?;
//! assert!(plan.fits() && plan.step_s > 0.0);
//! assert_eq!(plan.roles.iter().map(|r| r.role).collect::<Vec<_>>(), ["sft", "learner", "rollout"]);
//! # Ok::<(), unveil_plan::PlanError>(())
//! ```

mod activations;
mod advice;
mod error;
#[cfg(test)]
mod fixture;
mod generation;
mod gpu;
mod roles;
mod run;
#[cfg(test)]
mod run_tests;
mod settings;
mod shape;
mod time;
mod training;
mod workload;

pub use activations::{Activations, HEAD_ROWS, Numerics, PassSize, TrainedParts};
pub use error::PlanError;
pub use generation::{GenerationMemory, GroupSize, USABLE_FRACTION, kv_bytes};
pub use gpu::{Device, GIB, GPUS};
pub use roles::{PlanInput, RolePlan};
pub use run::{RunPlan, plan};
pub use shape::{Counts, ModelShape, ParameterShape, VisionShape};
pub use training::{Sharding, TrainingCase, TrainingMemory};
