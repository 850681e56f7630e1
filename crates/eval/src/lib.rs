//! Held-out evaluation: answers of a model or of a file compared with the truth, the suites that count them, and what the report
//! shows of them.
//!
//! Must not know: tonic (it uses the scorers of the reward room as functions, never its service).

mod bootstrap;
mod judge;
mod look;
mod metrics;
mod responses;
mod samples;
mod suite;
mod summary;

pub use bootstrap::{Bootstrap, Estimate, Sums};
pub use judge::{Answer, Judged, Subject, judge};
pub use look::{Look, Rows};
pub use metrics::{Metrics, metrics};
pub use responses::{judge_responses, shown_responses};
pub use samples::{Sample, load_samples, load_usable};
pub use suite::{Found, Grounding, SuiteResult, Withheld, check, measure};
pub use summary::{Evaluation, Settings, evaluate, evaluate_withheld};

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
    /// A record's prompt cannot be made.
    #[error("record \"{id}\": {source}")]
    Record {
        /// The record.
        id: String,
        /// Why.
        source: unveil_data::prepare::PrepareError,
    },
    /// Generation failed.
    #[error(transparent)]
    Engine(#[from] unveil_engine::EngineError),
    /// The response file cannot be used.
    #[error(transparent)]
    Responses(#[from] unveil_reward::RewardError),
    /// Nothing to evaluate.
    #[error("{file} has no record of split `{split}`: nothing to evaluate")]
    Empty {
        /// The record file.
        file: String,
        /// The split that was asked for.
        split: String,
    },
    /// Nothing was answered.
    #[error("there is no answer to measure")]
    NoAnswer,
    /// A suite by source needs one.
    #[error("record \"{id}\" names no `source`: the suite `mau` averages over sources, give every record one")]
    NoSource {
        /// The record.
        id: String,
    },
    /// Scores and responses do not go together.
    #[error("{file}: {what}")]
    Scores {
        /// The file of scores.
        file: String,
        /// What is wrong and what to do.
        what: String,
    },
}
