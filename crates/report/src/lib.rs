//! What a person sees of a run: the event log, TensorBoard files, the progress line, and the report page.
//!
//! Reads and writes files of a run directory only. Must not know: tch, tonic.

mod chart;
pub mod events;
mod figure;
mod images;
mod page;
pub mod progress;
mod sample_page;
mod shown;
mod suites;
mod templates;
pub mod tensorboard;
mod thumbnail;

pub use events::{EventLog, lineage, read_events};
pub use figure::Prediction;
pub use images::ImageFolders;
pub use page::{ReportError, write_report};
pub use progress::StageProgress;
pub use sample_page::write_samples;
pub use shown::{Shown, run_samples};
pub use tensorboard::TensorBoard;
