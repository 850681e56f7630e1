//! The section `[answer]`: how answers are read, by rewards, gradients, evaluation and pages alike.

use serde::{Deserialize, Serialize};
use unveil_core::answer::NO_FINDING_PHRASES;
use unveil_core::{ClassMatch, Reading};

use super::Config;

/// How answers are read.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Answer {
    /// Name of the tag that an answer has to stand in: `answer` for `<answer>…</answer>`. The last closed pair counts, a response without
    /// one holds no answer. Empty = the whole response, or a pair of `<answer>` where there is one.
    pub span: String,
    /// Phrases by which an answer says that nothing is there, besides "no finding"; case, emphasis and punctuation do not count.
    pub no_finding: Vec<String>,
    /// How the category of an answer is compared with the class: `equal` (it is the class or a synonym), `contains` (it holds one as whole
    /// words, not denied, and no other class that `data.synonyms` knows beside it).
    #[serde(rename = "match")]
    pub matching: ClassMatch,
}

impl Default for Answer {
    fn default() -> Self {
        Self {
            span: String::new(),
            no_finding: NO_FINDING_PHRASES.map(str::to_owned).to_vec(),
            matching: ClassMatch::Equal,
        }
    }
}

impl Config {
    /// The marks that an answer has to stand between: those of `answer.span`, or of its alias `reward.relevance.span`.
    pub fn answer_marks(&self) -> Option<[String; 2]> {
        match (self.answer.span.as_str(), self.reward.relevance.span.as_slice()) {
            ("", [open, close]) => Some([open.clone(), close.clone()]),
            ("", _) => None,
            (tag, _) => Some([format!("<{tag}>"), format!("</{tag}>")]),
        }
    }

    /// The reading of answers that this configuration asks for, the same in every role.
    pub fn reading(&self) -> Reading {
        Reading::new(self.answer_marks(), &self.answer.no_finding, self.answer.matching)
    }
}
