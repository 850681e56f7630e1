//! Rewards: scorers as pure functions, their composition over a group, and the stateless service, the client and the
//! offline command around them.
//!
//! Must not depend on: tch. Scorers depend on neither tokio nor tonic.
//!
//! # Examples
//! Two responses to one record, scored offline:
//! ```
//! use unveil_core::{BoxForm, Record};
//! use unveil_preprocess::codec::Sizes;
//! use unveil_reward::{GroupInput, ResponseInput, Scoring, score_group};
//!
//! let line = r#"{"id":"ct-7","image_size":[96,96],"category":"nodule","boxes":[[16,16,32,32]]}"#;
//! let texts = ["[16,16,32,32] nodule", "[0,0,96,96] mass"];
//! let response = |index: usize| ResponseInput { index, text: texts[index].to_owned(), ..ResponseInput::default() };
//! let group = GroupInput {
//!     record: Record::parse(line)?,
//!     sizes: Sizes { original: (96, 96), resized: (96, 96) },
//!     boxes: BoxForm::Absolute,
//!     responses: vec![response(0), response(1)],
//! };
//!
//! let breakdowns = score_group(&Scoring::default(), &group);
//! assert_eq!(breakdowns[0].components["localization"].value, Some(1.0));
//! assert!(breakdowns[0].total > breakdowns[1].total);
//! // Vision relevance cannot be computed without attention rows, so it is masked.
//! assert!(breakdowns[0].components["vision_relevance"].masked);
//! # Ok::<(), unveil_core::RecordError>(())
//! ```

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
mod meter;
mod model_files;
mod offline;
pub mod overlong;
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
pub use offline::{GroupLines, read_responses, run_score};
pub use score::{
    COMPONENTS, Components, GroupInput, REGION_COMPONENTS, ResponseInput, compose_breakdowns, compute_components,
    score_group,
};
pub use scorers::Scorers;
pub use scoring::{Resources, Scoring};
pub use serve::{run_serve, serve_with};
pub use wire::group_from_request;
