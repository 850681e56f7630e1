//! Rewards: scorers as pure functions, their composition over a group, and the stateless service, client and offline
//! command around them.
//!
//! Must not know: tch. Scorers know neither tokio nor tonic.

pub mod assignment;
pub mod calibrate;
mod client;
pub mod compose;
pub mod embed;
mod error;
pub mod form;
mod labels;
pub mod localization;
pub mod mention;
mod meter;
mod model;
mod offline;
pub mod outside;
mod relevance;
mod require;
mod rows;
mod score;
mod scorers;
mod serve;
pub mod sinks;
pub mod style;
pub mod symbolic;
pub mod text;
pub mod vision;
mod wire;

pub use client::{RewardClient, Unscored, masked_group, out_of_reach, score_request};
pub use error::RewardError;
pub use mention::byte_spans;
pub use offline::{GroupLines, read_responses, run_score};
pub use require::require;
pub use score::{
    COMPONENTS, Components, GroupInput, OF_REGIONS, Resources, ResponseInput, Scoring, components, finish, score_group,
};
pub use scorers::Scorers;
pub use serve::{run_serve, serve_with};
pub use wire::group_from_request;
