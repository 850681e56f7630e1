//! Section `[collect]`: vision model, prompts and budget of `unveil data collect`.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Vision model behind an OpenAI-compatible chat endpoint, prompts and budget of `unveil data collect`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Collect {
    /// URL of the endpoint without `/chat/completions`, for example `https://host/v1`.
    pub base_url: String,
    /// Environment variable that holds the API key. Empty: no key is sent.
    pub key_env: String,
    /// PEM file of certificate authorities to trust in addition to the system's. Empty: the system's only.
    pub ca: String,
    /// Model name sent to the endpoint.
    pub model: String,
    /// File of the first prompt, a minijinja template; text above a line `===` is the system message. Empty: the built-in prompt.
    pub diagnosis_prompt: String,
    /// File of the second prompt, which rewrites the diagnosis as detect, localise, recognise; same form as `diagnosis_prompt`. Empty: the
    /// built-in prompt.
    pub reflection_prompt: String,
    /// Longer side of the image that is sent, in pixels, 64 to 8192; larger images are scaled down.
    #[schemars(range(min = 64, max = 8192))]
    pub max_side: u32,
    /// Maximum length of an answer in tokens.
    #[schemars(range(min = 1))]
    pub max_tokens: u32,
    /// Sampling temperature, 0 to 2.
    #[schemars(range(min = 0.0, max = 2.0))]
    pub temperature: f64,
    /// Seconds for one answer, including all retries and waits for the rate limit.
    #[schemars(extend("exclusiveMinimum" = 0.0, "exclusiveMaximum" = 1e6))]
    pub deadline_s: f64,
    /// Timeout of one request in seconds; afterwards it is retried.
    #[schemars(extend("exclusiveMinimum" = 0.0, "exclusiveMaximum" = 1e6))]
    pub attempt_s: f64,
    /// Maximum number of requests per answer, at least 1.
    #[schemars(range(min = 1))]
    pub tries: u32,
    /// Maximum number of concurrent requests, at least 1.
    #[schemars(range(min = 1))]
    pub concurrency: usize,
    /// Maximum number of requests per minute; 0 sets no limit.
    #[schemars(range(min = 0.0))]
    pub per_minute: f64,
    /// Price of one million prompt tokens, in the currency of `budget`.
    #[schemars(range(min = 0.0))]
    pub price_prompt: f64,
    /// Price of one million answer tokens, in the currency of `budget`.
    #[schemars(range(min = 0.0))]
    pub price_answer: f64,
    /// Maximum total cost of all runs on one journal; needs a price. 0 sets no limit.
    #[schemars(range(min = 0.0))]
    pub budget: f64,
    /// Answers per review page, at least 1.
    #[schemars(range(min = 1))]
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
