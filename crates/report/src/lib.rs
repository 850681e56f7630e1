//! Reports on a run for its user: the event log, TensorBoard files, the progress line, and the HTML pages.
//!
//! The crate reads and writes files of a run directory only. Must not depend on: tch, tonic.

mod chart;
mod error;
pub mod events;
mod image_folders;
mod page;
mod prediction;
pub mod progress;
mod rewarded_response;
mod sample_page;
mod suites;
mod templates;
pub mod tensorboard;
mod thumbnail;

pub use error::ReportError;
pub use events::{EventLog, lineage, read_events};
pub use image_folders::ImageFolders;
pub use page::write_report;
pub use prediction::Prediction;
pub use progress::StageProgress;
pub use rewarded_response::{RewardedResponse, load_rewarded_responses};
pub use sample_page::write_samples;
pub use tensorboard::TensorBoard;
