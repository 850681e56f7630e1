//! Settings shared by the sections with a chat endpoint: `[reward.judge]` and `[collect]`.

use super::{Collect, Judge};

/// OpenAI-compatible endpoint of a section; the keys are documented in [`Judge`] and [`Collect`].
#[derive(Debug, Clone, Copy)]
pub(crate) struct ChatEndpoint<'a> {
    pub section: &'static str,
    pub base_url: &'a str,
    pub model: &'a str,
    pub max_tokens: u32,
    pub temperature: f64,
    pub deadline_s: f64,
    pub attempt_s: f64,
    pub tries: u32,
    pub concurrency: usize,
    pub per_minute: f64,
}

/// Implements `endpoint()` for a section with these keys.
macro_rules! endpoint {
    ($config:ident, $section:literal) => {
        impl $config {
            pub(crate) fn endpoint(&self) -> ChatEndpoint<'_> {
                ChatEndpoint {
                    section: $section,
                    base_url: &self.base_url,
                    model: &self.model,
                    max_tokens: self.max_tokens,
                    temperature: self.temperature,
                    deadline_s: self.deadline_s,
                    attempt_s: self.attempt_s,
                    tries: self.tries,
                    concurrency: self.concurrency,
                    per_minute: self.per_minute,
                }
            }
        }
    };
}

endpoint!(Judge, "reward.judge");
endpoint!(Collect, "collect");
