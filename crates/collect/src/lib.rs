//! Collection of answers for records from a vision model, and their review by a user.
//!
//! There are two prompts, as for the MAU data (arXiv 2501.01377): the first asks for a diagnosis, given image, class and region; the second
//! lets the model rewrite it as detect, localise, recognise. Every request and answer is recorded in a journal, so a run that was killed
//! continues without repeating requests. HTML pages show the answers for review; the decisions made there determine the final records.
//!
//! Must not depend on: tch, how models are trained on the records.

mod answer;
mod budget;
mod context;
mod decisions;
mod error;
mod files;
mod journal;
mod marks;
mod page;
mod prompts;
mod run;

pub use decisions::{ReviewSummary, review};
pub use error::CollectError;
pub use files::{COLLECTED, JOURNAL};
pub use page::write_pages;
pub use prompts::Prompts;
pub use run::{CollectSummary, FailedRecord, StopReason, collect};
