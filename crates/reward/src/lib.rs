//! Rewards: scorers as pure functions, their composition over a group, and the stateless service, the client and the
//! offline command around them.
//!
//! Must not depend on: tch. Scorers depend on neither tokio nor tonic.

pub mod assignment;
pub mod calibrate;
mod check_records;
mod client;
pub mod compose;
pub mod embed;
mod error;
pub mod external;
pub mod format;
mod labels;
pub mod localization;
pub mod mention;
mod meter;
mod model_files;
mod offline;
mod relevance;
mod rows;
mod score;
mod scorers;
mod scoring;
mod serve;
pub mod sinks;
pub mod symbolic;
pub mod text;
pub mod text_quality;
pub mod vision;
mod wire;

pub use check_records::check_records;
pub use client::{RewardClient, Unscored, masked_group, score_request, unavailable_reason};
pub use error::RewardError;
pub use mention::byte_spans;
pub use offline::{GroupLines, read_responses, run_score};
pub use score::{
    COMPONENTS, Components, GroupInput, REGION_COMPONENTS, ResponseInput, compose_breakdowns, compute_components,
    score_group,
};
pub use scorers::Scorers;
pub use scoring::{Resources, Scoring};
pub use serve::{run_serve, serve_with};
pub use wire::group_from_request;
