//! Generation for groups: each image is encoded once, each prompt prefilled once, and n responses are sampled from it.
//!
//! Owns the memory plan, admission, sampling, random numbers, stop conditions, cancellation, attention rows, teacher-forced scoring
//! and weight swaps between steps. Its interface consists of token ids, pixel patches and host vectors.
//!
//! A response's random numbers are a function of (seed, group key, index, position) alone ([`random`]), so the rest of the batch
//! affects a response only by rounding.
//!
//! Must not depend on: tonic, collective, tokenizers, rewards.

mod batch;
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
