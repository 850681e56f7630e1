//! Domain types that every room shares: sample, box, group, response, trajectory, reward breakdown, weight version; and geometry.
//!
//! Must not know: tokio, tch, tonic. Pure data and pure functions; serde is the only format it speaks.

pub mod answer;
pub mod boxes;
pub mod geometry;
pub mod group;
mod locator;
pub mod record;
pub mod reward;
pub mod secret;
mod tell;

pub use answer::{Answer, NO_FINDING, ParseFault, format_answer, parse_answer};
pub use boxes::{BoxForm, UnknownBoxForm};
pub use geometry::{BBox, BoxFault, Grid};
pub use group::{Finish, GroupId, Logprobs, Response, Sampling, WeightVersion};
pub use locator::url_credential;
pub use record::{Record, RecordFault};
pub use reward::{Attention, Breakdown, Component, LesionScore, MaskReason};
pub use secret::{Secret, redact};
pub use tell::tell;
