//! Section `[answer]`: parsing of answers, shared by rewards, gradients, evaluation and pages.

use std::path::Path;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use unveil_core::answer::NO_FINDING_PHRASES;
use unveil_core::{AnswerForm, AnswerReader, ClassMatch, Family, Reasoning};

use super::Config;

/// Parsing of answers; the same in every role.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Answer {
    /// Form that stage 1 teaches and that `reward.format` expects; every form is read. `native`: the notation of `model.boxes` with the
    /// class beside it, or "no finding". `json`: a list of objects such as `{"bbox_2d": [x1, y1, x2, y2], "label": "class"}`, bare or in a
    /// fenced block; an empty list if there is no finding. `auto`: `native` if stage 1 runs (`sft.steps` above 0), otherwise the form in
    /// which the model's family was published to answer.
    pub form: AnswerFormChoice,
    /// Name of the tag that encloses an answer: `answer` for `<answer>…</answer>`. The last closed pair counts; a response without one has
    /// no answer. Stage 1 encloses its answers. Empty: the whole response, or the last `<answer>` pair if there is one.
    pub span: String,
    /// Reasoning in `<think>…</think>` before the answer, for `reward.format`: `none`, `optional` or `required`. Reasoning is never read
    /// as an answer. With `required`, stage 1 needs records whose `answer` contains it.
    pub reasoning: Reasoning,
    /// Phrases that mean "no finding", in addition to "no finding" itself; compared without case, emphasis and punctuation.
    pub no_finding: Vec<String>,
    /// Rule for comparing the category of an answer with the class: `equal` (it is the class or a synonym) or `contains` (the answer
    /// contains one as whole words, not negated, and no other class listed in `data.synonyms`).
    #[serde(rename = "match")]
    pub matching: ClassMatch,
}

/// Expected form of answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum AnswerFormChoice {
    /// Notation of the model family.
    Native,
    /// JSON as published models write it.
    Json,
    /// Native after stage 1, otherwise the form of the published model.
    #[default]
    Auto,
}

impl Default for Answer {
    fn default() -> Self {
        Self {
            form: AnswerFormChoice::Auto,
            span: String::new(),
            reasoning: Reasoning::None,
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

    /// Returns the expected form of answers.
    pub fn answer_form(&self) -> AnswerForm {
        match self.answer.form {
            AnswerFormChoice::Native => AnswerForm::Native,
            AnswerFormChoice::Json => AnswerForm::Json,
            AnswerFormChoice::Auto if self.sft.steps > 0 => AnswerForm::Native,
            AnswerFormChoice::Auto => self.family().map_or(AnswerForm::Json, Family::published_answer_form),
        }
    }

    /// Returns the family of the initial model; `None` if it is not a supported one or its directory cannot be read, which is reported
    /// where the model is loaded.
    fn family(&self) -> Option<Family> {
        let name = match self.model.dir.as_str() {
            "" => self.model.family.clone(),
            dir => {
                let text = std::fs::read_to_string(Path::new(dir).join("config.json")).ok()?;
                let config: serde_json::Value = serde_json::from_str(&text).ok()?;
                config.get("model_type")?.as_str()?.to_owned()
            }
        };
        name.parse().ok()
    }

    /// Returns the configured parser of answers, the same in every role.
    pub fn answer_reader(&self) -> AnswerReader {
        AnswerReader::new(self.answer_marks(), &self.answer.no_finding, self.answer.matching)
            .with_form(self.answer_form())
            .with_reasoning(self.answer.reasoning)
    }
}
