//! Section `[prompt]`: the text of prompts, the same in every role.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use unveil_core::{InputSettings, PromptSettings};

use super::Config;

/// Text of prompts; the same in every role (stage 1, learner, rollout, evaluation, `generate`, `score`), and fixed for a run.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Prompt {
    /// System message. Empty: none, except the one that the model's chat template writes itself.
    pub system: String,
    /// minijinja template of the user message over the fields of the record: `{{ question }}`, `{{ modality }}` and any further key. A
    /// field that the record lacks is an error unless the template provides for it (`{% if modality %}`, the filter `default`). The image
    /// always stands before the text and is not part of the template; `answer`, `boxes` and `labels` are not available. Empty: the
    /// question.
    pub template: String,
    /// Text after the template's, appended unchanged: begin it with a space or a line break.
    pub suffix: String,
}

impl Config {
    /// Returns the settings that turn records into model input and responses into answers, the same in every role.
    pub fn input_settings(&self) -> InputSettings {
        let limit = |pixels: u64| Some(pixels).filter(|p| *p > 0);
        InputSettings {
            boxes: self.model.boxes,
            min_pixels: limit(self.model.min_pixels),
            max_pixels: limit(self.model.max_pixels),
            prompt: PromptSettings {
                system: self.prompt.system.clone(),
                template: self.prompt.template.clone(),
                suffix: self.prompt.suffix.clone(),
                question: self.data.question.clone(),
            },
            reader: self.answer_reader(),
        }
    }
}
