//! The section `[collect]`: the vision model that `unveil data collect` asks, the prompts, and what it may cost.

use serde::{Deserialize, Serialize};

/// A vision model behind an OpenAI-compatible chat endpoint, and how it is asked.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Collect {
    /// Everything before `/chat/completions`, e.g. `https://host/v1`.
    pub base_url: String,
    /// Name of the environment variable that holds the key; empty = no key is sent.
    pub key_env: String,
    /// PEM file of certificate authorities trusted beside the system's; empty = none.
    pub ca: String,
    /// Name of the model.
    pub model: String,
    /// File of the first prompt (a minijinja template; what stands above a line `===` is the system message); empty = the built-in one.
    pub diagnosis_prompt: String,
    /// The same of the second prompt, which rewrites the diagnosis as detect, localise, recognise.
    pub reflection_prompt: String,
    /// Longer side of the image that is sent, in pixels; larger images are shrunk.
    pub max_side: u32,
    /// Length cap of an answer in tokens.
    pub max_tokens: u32,
    /// Sampling temperature.
    pub temperature: f64,
    /// Seconds for one answer, all tries and waits for the rate included.
    pub deadline_s: f64,
    /// Seconds for one request; then it is tried again.
    pub attempt_s: f64,
    /// Tries per answer.
    pub tries: u32,
    /// Requests at once.
    pub concurrency: usize,
    /// Requests per minute; 0 = no limit.
    pub per_minute: f64,
    /// Price of a million prompt tokens, in the currency of `budget`.
    pub price_prompt: f64,
    /// Price of a million answer tokens.
    pub price_answer: f64,
    /// What all runs on one journal may cost; 0 = no limit.
    pub budget: f64,
    /// Answers on one review page.
    pub page_size: usize,
}

impl Default for Collect {
    fn default() -> Self {
        Self {
            base_url: String::new(),
            key_env: String::new(),
            ca: String::new(),
            model: String::new(),
            diagnosis_prompt: String::new(),
            reflection_prompt: String::new(),
            max_side: 1024,
            max_tokens: 500,
            temperature: 0.2,
            deadline_s: 300.0,
            attempt_s: 90.0,
            tries: 5,
            concurrency: 8,
            per_minute: 0.0,
            price_prompt: 0.0,
            price_answer: 0.0,
            budget: 0.0,
            page_size: 100,
        }
    }
}
