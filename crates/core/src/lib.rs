//! Domain types that every room shares: sample, box, group, response, trajectory, reward breakdown, weight version; and geometry.
//!
//! Must not know: tokio, tch, tonic. Pure data and pure functions; serde is the only format it speaks. The one thing it does to files
//! is to write them whole.

pub mod answer;
pub mod boxes;
mod files;
pub mod geometry;
pub mod group;
pub mod limits;
mod locator;
pub mod record;
pub mod reward;
pub mod secret;
pub mod task;
mod tell;

pub use answer::{Answer, ClassMatch, KnownClass, NO_FINDING, ParseFault, Reading, format_answer, parse_answer};
pub use boxes::{BoxForm, UnknownBoxForm};
pub use files::{FILE_MODE, replace_file, write_atomic};
pub use geometry::{BBox, BoxFault, Grid};
pub use group::{Finish, GroupId, Logprobs, Response, Sampling, WeightVersion};
pub use locator::url_credential;
pub use record::{Record, RecordError, RecordFault};
pub use reward::{Attention, Breakdown, Component, LesionScore, MaskReason};
pub use secret::{Secret, redact};
pub use task::{Task, UnknownTask};
pub use tell::tell;
