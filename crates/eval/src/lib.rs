//! Held-out evaluation: answers of a model or a file are compared with the truth, measured by suites, and prepared for the report.
//!
//! Must not depend on: tonic (the scorers of the reward crate are used as functions, not through its service).

mod answer;
mod attention;
mod bootstrap;
mod metrics;
mod responses;
mod samples;
mod suite;
mod summary;

pub use answer::{Answer, AnswerContext, EvaluatedAnswer, evaluate_answer};
pub use attention::{AttentionMeasures, LesionAttention};
pub use bootstrap::{Bootstrap, Estimate, SumAndCount};
pub use metrics::{SummaryMetrics, summarize};
pub use responses::{evaluate_responses, rewarded_responses};
pub use samples::{EvalSample, load_samples, load_usable_samples};
pub use suite::{GroundingMetrics, SuiteMetrics, SuiteResult, WithheldGrounding, check_suite, measure_suite};
pub use summary::{EvalSettings, Evaluation, evaluate, evaluate_withheld};

/// Error of an evaluation.
#[derive(Debug, thiserror::Error)]
pub enum EvalError {
    /// The record file cannot be read.
    #[error(transparent)]
    Records(#[from] unveil_data::records::RecordsError),
    /// An image cannot be read.
    #[error(transparent)]
    Image(#[from] unveil_data::image_store::ImageError),
    /// A prompt cannot be created.
    #[error(transparent)]
    Prepare(#[from] unveil_data::preprocessor::PreprocessError),
    /// The prompt of a record cannot be created.
    #[error("record \"{id}\": {source}")]
    Record {
        /// Id of the record.
        id: String,
        /// Cause.
        source: unveil_data::preprocessor::PreprocessError,
    },
    /// Generation failed.
    #[error(transparent)]
    Engine(#[from] unveil_engine::EngineError),
    /// The response file cannot be used.
    #[error(transparent)]
    Responses(#[from] unveil_reward::RewardError),
    /// There is no record or response to evaluate.
    #[error("{file} has no record of split `{split}`: nothing to evaluate")]
    Empty {
        /// The record file.
        file: String,
        /// The requested split.
        split: String,
    },
    /// There is no answer.
    #[error("there is no answer to measure")]
    NoAnswer,
    /// A record without a source, which the suite needs.
    #[error("record \"{id}\" has no `source`: the suite `mau` averages over sources, so every record needs one")]
    NoSource {
        /// Id of the record.
        id: String,
    },
    /// Scores and responses do not match.
    #[error("{file}: {what}")]
    Scores {
        /// The file of scores.
        file: String,
        /// Description of the problem, and what to do.
        what: String,
    },
}
