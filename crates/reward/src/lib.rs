//! Rewards: scorers as pure functions, their composition over a group, and the stateless service, client and offline
//! command around them.
//!
//! Must not know: tch. Scorers know neither tokio nor tonic.

pub mod assignment;
mod client;
pub mod compose;
mod error;
pub mod form;
pub mod localization;
pub mod mention;
mod model;
mod offline;
mod score;
mod serve;
pub mod vision;
mod wire;

pub use client::{RewardClient, masked_group, score_request};
pub use error::RewardError;
pub use mention::byte_spans;
pub use offline::{GroupLines, read_responses, run_score};
pub use score::{COMPONENTS, GroupInput, ResponseInput, Scoring, score_group};
pub use serve::{reward_routes, run_serve, serve_with};
pub use wire::group_from_request;
