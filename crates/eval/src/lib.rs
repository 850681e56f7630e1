//! Held-out evaluation: greedy answers, their metrics, and the predictions that the report shows.
//!
//! Must not know: tonic (it uses the scorers of the reward room as functions, never its service).

mod metrics;
mod samples;
mod summary;

pub use metrics::{Metrics, metrics};
pub use samples::{Sample, load_samples};
pub use summary::{Evaluation, Settings, evaluate};

/// Why an evaluation failed.
#[derive(Debug, thiserror::Error)]
pub enum EvalError {
    /// The record file cannot be read.
    #[error(transparent)]
    Records(#[from] unveil_data::records::RecordsError),
    /// An image cannot be read.
    #[error(transparent)]
    Image(#[from] unveil_data::store::ImageError),
    /// A prompt cannot be made.
    #[error(transparent)]
    Prepare(#[from] unveil_data::prepare::PrepareError),
    /// Generation failed.
    #[error(transparent)]
    Engine(#[from] unveil_engine::EngineError),
    /// Nothing to evaluate.
    #[error("{file} has no record of split `{split}`: nothing to evaluate")]
    Empty {
        /// The record file.
        file: String,
        /// The split that was asked for.
        split: String,
    },
}
