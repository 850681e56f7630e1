//! Held-out evaluation: answers of a model or a file are compared with the truth, measured by suites, and prepared for the report.
//!
//! Must not depend on: tonic (the scorers of the reward crate are used as functions, not through its service).
//!
//! # Examples
//! Metrics of two answers to one record:
//! ```
//! use unveil_core::{BoxForm, Record};
//! use unveil_eval::{Answer, AnswerContext, evaluate_answer, summarize};
//! use unveil_preprocess::codec::Sizes;
//! use unveil_reward::Scoring;
//!
//! let line = r#"{"id":"ct-7","image_size":[100,80],"category":"nodule","boxes":[[10,20,50,60]]}"#;
//! let record = Record::parse(line)?;
//! let sizes = Sizes { original: (100, 80), resized: (100, 80) };
//! let context = AnswerContext { record: &record, image: "ct-7.png", sizes: &sizes, boxes: BoxForm::Absolute };
//! let evaluated = ["[10,20,50,60] nodule", "no finding"].map(|text| {
//!     let answer = Answer { text: text.to_owned(), ..Answer::default() };
//!     evaluate_answer(&context, answer, &Scoring::default())
//! });
//!
//! let metrics = summarize(&evaluated.each_ref().map(|e| &e.prediction));
//! assert_eq!((metrics.n, metrics.accuracy, metrics.mean_iou), (2, 0.5, 0.5));
//! # Ok::<(), unveil_core::RecordError>(())
//! ```

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
    Prepare(#[from] unveil_preprocess::preprocessor::PreprocessError),
    /// The prompt of a record cannot be created.
    #[error("record \"{id}\": {source}")]
    Record {
        /// Id of the record.
        id: String,
        /// Cause.
        source: unveil_preprocess::preprocessor::PreprocessError,
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
