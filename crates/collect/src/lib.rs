//! Collection of answers for records from a vision model, and their review by a user.
//!
//! There are two prompts, as for the MAU data (arXiv 2501.01377): the first asks for a diagnosis, given image, class and region; the second
//! lets the model rewrite it as detect, localise, recognise. Every request and answer is recorded in a journal, so a run that was killed
//! continues without repeating requests. HTML pages show the answers for review; the decisions made there determine the final records.
//!
//! Must not depend on: tch, how models are trained on the records.
//!
//! # Examples
//! Prompts from a file of the user are checked when they are loaded:
//! ```
//! use unveil_collect::{CollectError, Prompts};
//!
//! # let dir = tempfile::tempdir()?;
//! # let file = dir.path().join("diagnosis.txt");
//! # let path = file.to_str().expect("a path in UTF-8");
//! std::fs::write(path, "You are a radiologist.\n===\nDescribe the {{ category }}.")?;
//! Prompts::load([path, ""])?;
//!
//! std::fs::write(path, "Describe the {{ organ }}.")?;
//! let error = Prompts::load([path, ""]).unwrap_err();
//! assert!(matches!(error, CollectError::Prompt { .. }));
//! assert!(error.to_string().contains("diagnosis.txt"));
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

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
