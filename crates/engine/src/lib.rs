//! Generation for groups: one image encoded once, one prompt prefilled once, n responses sampled from it.
//!
//! Owns the memory plan, admission, sampling, the random numbers of a response, its end, cancelling, attention rows,
//! teacher-forced scoring and the swap of weights between steps. Speaks token ids, pixel patches and host vectors. Must not know:
//! tonic, collective, tokenizers, rewards.
//!
//! A response's random numbers are a function of (seed, group key, index, position) alone ([`random`]), so what else is
//! in the batch decides nothing but rounding.

mod batch;
mod engine;
mod error;
mod generate;
mod heads;
mod images;
mod plan;
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

pub use engine::{Engine, EngineOptions, Stats, Ticket};
pub use error::EngineError;
pub use heads::HeadRows;
pub use plan::{Longest, MemoryPlan};
pub use request::{AttentionRows, GroupInput, GroupOutput, GroupRequest, RawResponse, ScoreRequest, Scored, StopRule};

/// Result of this crate.
pub type Result<T, E = EngineError> = std::result::Result<T, E>;
