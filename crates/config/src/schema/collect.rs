//! Section `[collect]`: vision model, prompts and budget of `unveil data collect`.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::endpoint::chat_section;

chat_section! {
    "collect",
    /// Vision model behind an OpenAI-compatible chat endpoint, prompts and budget of `unveil data collect`.
    pub struct Collect {
        connection,
        /// File of the first prompt, a minijinja template; text above a line `===` is the system message. Empty: the built-in prompt.
        pub diagnosis_prompt: String,
        /// File of the second prompt, which rewrites the diagnosis as detect, localise, recognise; same form as `diagnosis_prompt`. Empty:
        /// the built-in prompt.
        pub reflection_prompt: String,
        /// Longer side of the image that is sent, in pixels, 64 to 8192; larger images are scaled down.
        #[schemars(range(min = 64, max = 8192))]
        pub max_side: u32,
        requests:
        /// Maximum length of an answer in tokens.
        max_tokens,
        /// Sampling temperature, 0 to 2.
        temperature,
        /// Seconds for one answer, including all retries and waits for the rate limit.
        deadline_s,
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
