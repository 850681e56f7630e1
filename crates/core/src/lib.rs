//! Domain types shared by every crate: record, task, prompt, box, answer, group, response, reward breakdown, weight version, model family,
//! special tokens, algorithm and options of the loss; box geometry; and the search for mentions of a class.
//!
//! Pure data and pure functions over serde types; the only side effects are atomic file writes and lines on stderr. Must not depend on
//! tokio, tch and tonic.
//!
//! # Examples
//! A record, the answer of a model to it, and the overlap of their boxes:
//! ```
//! use unveil_core::{AnswerReader, BBox, Record, parse_answer};
//!
//! let line = r#"{"id":"ct-7","image":"ct-7.png","image_size":[512,512],"category":"nodule","boxes":[[100,100,200,200]]}"#;
//! let record = Record::parse(line)?;
//! assert!(record.faults(None).is_empty());
//!
//! let response = "<think>A round opacity.</think><answer>[100,100,200,150] nodule</answer>";
//! let answer = AnswerReader::default().read(response, parse_answer);
//! assert_eq!(answer.category, record.category);
//!
//! let predicted = BBox::from(answer.boxes[0].map(|v| v as f32));
//! assert_eq!(predicted.iou(&record.boxes[0]), 0.5);
//! # Ok::<(), unveil_core::RecordError>(())
//! ```

pub mod algorithm;
pub mod answer;
pub mod boxes;
mod compute;
pub mod dtype;
pub mod family;
mod files;
pub mod geometry;
pub mod group;
pub mod limits;
pub mod loss_options;
pub mod mention;
mod parameter_names;
pub mod prompt;
pub mod record;
pub mod reward;
pub mod secret;
pub mod special_tokens;
mod stderr_line;
pub mod task;
pub mod trajectory;
mod url_credentials;

pub use algorithm::Algorithm;
pub use answer::{
    Answer, AnswerForm, AnswerReader, ClassMatch, KnownClass, NO_FINDING, ParseFault, Reasoning, format_answer,
    parse_answer,
};
pub use boxes::{BoxForm, UnknownBoxForm};
pub use compute::Compute;
pub use dtype::Dtype;
pub use family::{Family, UnknownFamily};
pub use files::{FILE_MODE, replace_file, write_atomic};
pub use geometry::{BBox, BoxFault, Grid};
pub use group::{Finish, GroupId, LogprobKind, Response, Sampling, WeightVersion, records_by_pass};
pub use loss_options::{Importance, KlForm, KlGradient, LossReduction, RatioLevel, Surrogate};
pub use mention::MentionFinder;
pub use parameter_names::{selects_layer, selects_parameter};
pub use prompt::{GridThw, InputSettings, Prompt, PromptSettings};
pub use record::{Record, RecordError, RecordFault};
pub use reward::{Attention, Breakdown, Component, LesionScore, MaskReason, rewards_are_equal};
pub use secret::{Secret, redact};
pub use special_tokens::SpecialTokens;
pub use stderr_line::stderr_line;
pub use task::{Task, UnknownTask};
pub use trajectory::{GroupInput, TrainGroup};
pub use url_credentials::find_url_credential;
