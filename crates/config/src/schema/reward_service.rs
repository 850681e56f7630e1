//! Sections `[reward.judge]` and `[reward.service]`: the external judge, and the limits of the service.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::endpoint::chat_section;

chat_section! {
    "reward.judge",
    /// Language model behind an OpenAI-compatible chat endpoint that scores relevance.
    pub struct Judge {
        connection,
        /// File of the prompt, a minijinja template; text above a line `===` is the system message. Empty: the built-in prompt.
        pub prompt: String,
        /// `[lowest, highest]` score that the prompt asks for; mapped linearly to 0 and 1.
        pub scale: [f64; 2],
        requests:
        /// Maximum length of the judge's answer in tokens.
        max_tokens,
        /// Sampling temperature of the judge, 0 to 2.
        temperature,
        /// Seconds for all answers of one group; missing ones are masked.
        deadline_s,
        /// Hedging of slow requests: a second request is sent once the first takes longer than this quantile of the recent latencies, 0 up
        /// to below 1; 0 disables hedging.
        #[schemars(range(min = 0.0), extend("exclusiveMaximum" = 1.0))]
        pub hedge: f64,
        /// Maximum number of requests in the lifetime of the service; 0 sets no limit.
        pub max_requests: u64,
        /// Maximum number of tokens in the lifetime of the service; 0 sets no limit.
        pub max_total_tokens: u64,
        /// Number of scores cached by content; 0 disables the cache.
        pub cache: usize,
    }
}

impl Default for Judge {
    fn default() -> Self {
        Self {
            base_url: String::new(),
            key_env: String::new(),
            ca: String::new(),
            model: String::new(),
            prompt: String::new(),
            scale: [0.0, 10.0],
            max_tokens: 64,
            temperature: 0.0,
            deadline_s: 20.0,
            attempt_s: 10.0,
            tries: 3,
            concurrency: 16,
            per_minute: 0.0,
            hedge: 0.0,
            max_requests: 0,
            max_total_tokens: 0,
            cache: 65_536,
        }
    }
}

/// Limits of the reward service.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct RewardService {
    /// Maximum number of concurrent calls, at least 1; further calls are rejected with RESOURCE_EXHAUSTED. Together with `max_message_mib`
    /// it bounds the memory for requests.
    #[schemars(range(min = 1))]
    pub max_in_flight: usize,
    /// Maximum message size in MiB, 1 to 1024.
    #[schemars(range(min = 1, max = 1024))]
    pub max_message_mib: usize,
    /// Timeout in seconds of a call, and of the wait for the next message of a stream; exceeding it fails with DEADLINE_EXCEEDED.
    #[schemars(extend("exclusiveMinimum" = 0.0, "exclusiveMaximum" = 1e6))]
    pub call_s: f64,
    /// Seconds after a shutdown request for running calls to finish.
    #[schemars(range(min = 0.0), extend("exclusiveMaximum" = 1e6))]
    pub drain_s: f64,
    /// Listen address `host:port` of the Prometheus page (`/metrics`). Empty: no page.
    pub metrics_listen: String,
}

impl Default for RewardService {
    fn default() -> Self {
        Self { max_in_flight: 64, max_message_mib: 32, call_s: 60.0, drain_s: 5.0, metrics_listen: String::new() }
    }
}
