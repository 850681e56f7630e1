//! What the sections that name a chat endpoint have in common: `[reward.judge]` and `[collect]`.

use super::{Collect, Judge};

/// An OpenAI-compatible endpoint as a section names it; the keys are described there.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Endpoint<'a> {
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

/// The view of a section whose keys have these names.
macro_rules! endpoint {
    ($config:ident, $section:literal) => {
        impl $config {
            pub(crate) fn endpoint(&self) -> Endpoint<'_> {
                Endpoint {
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
