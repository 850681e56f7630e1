//! Reports on a run for its user: the event log, TensorBoard files, the progress line, and the HTML pages.
//!
//! The crate reads and writes files of a run directory only. Must not depend on: tch, tonic.
//!
//! # Examples
//! A role writes events, and the report shows them:
//! ```
//! use serde_json::json;
//! use unveil_report::{EventLog, ImageFolders, read_events, write_report};
//!
//! # let dir = tempfile::tempdir()?;
//! # let run = dir.path();
//! let mut log = EventLog::open(run, "learner")?;
//! for step in 1..=3 {
//!     let reward = json!({"total": 0.1 * f64::from(step)});
//!     log.append(&json!({"kind": "train", "step": step, "reward": reward, "kl": 0.0}))?;
//! }
//! assert_eq!(read_events(run)?.len(), 3);
//!
//! let page = write_report(run, 4, 0, &ImageFolders::default())?;
//! assert!(std::fs::read_to_string(page)?.contains("reward by component"));
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

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
