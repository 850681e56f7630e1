//! Generation for groups: each image is encoded once, each prompt prefilled once, and n responses are sampled from it.
//!
//! Owns the memory plan, admission, sampling, random numbers, stop conditions, cancellation, attention rows, teacher-forced scoring
//! and weight swaps between steps. Its interface consists of token ids, pixel patches and host vectors.
//!
//! A response's random numbers are a function of (seed, group key, index, position) alone ([`random`]), so the rest of the batch
//! affects a response only by rounding.
//!
//! Must not depend on: tonic, collective, tokenizers, rewards.
//!
//! # Examples
//! Four responses to one prompt, which a tiny model with random weights generates:
//! ```
//! use std::sync::Arc;
//! use unveil_core::{Prompt, Sampling};
//! use unveil_engine::{Engine, EngineOptions, GroupRequest, PromptInput, random::group_key};
//! # use unveil_model::Vlm;
//! # let dir = tempfile::tempdir()?;
//! # unveil_testkit_model::write_model(dir.path(), 7);
//! let vlm = Vlm::load(dir.path(), tch::Device::Cpu, tch::Kind::Float)?;
//! let mut engine = Engine::new(vlm, EngineOptions::default())?;
//!
//! let prompt = Prompt { tokens: vec![10, 11, 12], grids: Vec::new() };
//! let input = PromptInput { id: "ct-7".to_owned(), prompt, patches: Arc::new(Vec::new()), hashes: Vec::new() };
//! let sampling = Sampling { n: 4, max_new_tokens: 8, seed: 5, ..Sampling::default() };
//! let request = GroupRequest { input, key: group_key(&["ct-7".as_bytes()]), sampling, stop: None };
//! let group = engine.generate(&[request], None)?.remove(0);
//!
//! assert_eq!(group.responses.len(), 4);
//! assert!(group.responses.iter().all(|r| (1..=8).contains(&r.tokens.len()) && r.logprobs.len() == r.tokens.len()));
//! // The prompt is prefilled once for all responses.
//! assert_eq!(engine.stats().prompts_prefilled, 1);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod batch;
mod cache_reuse;
mod engine;
mod error;
mod generate;
mod heads;
mod queue;
pub mod random;
mod request;
mod sample;
mod score;

#[cfg(test)]
mod fixture;
#[cfg(test)]
mod stream_tests;
#[cfg(test)]
mod tests;

pub use engine::{CachePlan, Engine, EngineOptions, EngineStats, MaxSizes};
pub use error::EngineError;
pub use heads::HeadRows;
pub use queue::Ticket;
pub use request::{
    AttentionRows, GroupOutput, GroupRequest, PromptInput, RawResponse, ScoreRequest, ScoredResponse, StopRule,
};

/// Result of this crate.
pub type Result<T, E = EngineError> = std::result::Result<T, E>;
