//! Domain types shared by every crate: record, task, box, answer, group, response, reward breakdown, weight version; and box geometry.
//!
//! Pure data and pure functions over serde types; the only side effects are atomic file writes and lines on stderr. Must not depend on
//! tokio, tch and tonic.

pub mod answer;
pub mod boxes;
mod files;
pub mod geometry;
pub mod group;
pub mod limits;
pub mod record;
pub mod reward;
pub mod secret;
mod stderr_line;
pub mod task;
mod url_credentials;

pub use answer::{Answer, AnswerReader, ClassMatch, KnownClass, NO_FINDING, ParseFault, format_answer, parse_answer};
pub use boxes::{BoxForm, UnknownBoxForm};
pub use files::{FILE_MODE, replace_file, write_atomic};
pub use geometry::{BBox, BoxFault, Grid};
pub use group::{Finish, GroupId, LogprobKind, Response, Sampling, WeightVersion};
pub use record::{Record, RecordError, RecordFault};
pub use reward::{Attention, Breakdown, Component, LesionScore, MaskReason};
pub use secret::{Secret, redact};
pub use stderr_line::stderr_line;
pub use task::{Task, UnknownTask};
pub use url_credentials::find_url_credential;
