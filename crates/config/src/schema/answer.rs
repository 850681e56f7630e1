//! Section `[answer]`: parsing of answers, shared by rewards, gradients, evaluation and pages.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use unveil_core::answer::NO_FINDING_PHRASES;
use unveil_core::{AnswerReader, ClassMatch};

use super::Config;

/// Parsing of answers; the same in every role.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Answer {
    /// Name of the tag that encloses an answer: `answer` for `<answer>…</answer>`. The last closed pair counts; a response without one has
    /// no answer. Empty: the whole response, or the last `<answer>` pair if there is one.
    pub span: String,
    /// Phrases that mean "no finding", in addition to "no finding" itself; compared without case, emphasis and punctuation.
    pub no_finding: Vec<String>,
    /// Rule for comparing the category of an answer with the class: `equal` (it is the class or a synonym) or `contains` (the answer
    /// contains one as whole words, not negated, and no other class listed in `data.synonyms`).
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
    /// Returns the opening and closing mark around an answer, from `answer.span` or its alias `reward.relevance.span`; `None` if neither is
    /// set.
    pub fn answer_marks(&self) -> Option<[String; 2]> {
        match (self.answer.span.as_str(), self.reward.relevance.span.as_slice()) {
            ("", [open, close]) => Some([open.clone(), close.clone()]),
            ("", _) => None,
            (tag, _) => Some([format!("<{tag}>"), format!("</{tag}>")]),
        }
    }

    /// Returns the configured parser of answers, the same in every role.
    pub fn answer_reader(&self) -> AnswerReader {
        AnswerReader::new(self.answer_marks(), &self.answer.no_finding, self.answer.matching)
    }
}
