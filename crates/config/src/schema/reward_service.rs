//! `[reward.judge]` and `[reward.service]`: the external judge, and the limits of the service.

use serde::{Deserialize, Serialize};

/// A language model behind an OpenAI-compatible chat endpoint.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Judge {
    /// Everything before `/chat/completions`, e.g. `https://host/v1`.
    pub base_url: String,
    /// Name of the environment variable that holds the key; empty = no key is sent.
    pub key_env: String,
    /// PEM file of certificate authorities trusted beside the system's; empty = none.
    pub ca: String,
    /// Name of the model.
    pub model: String,
    /// File of the prompt (a minijinja template; what stands above a line `===` is the system message); empty = the built-in one.
    pub prompt: String,
    /// `[lowest, highest]` score that the prompt asks for; mapped to 0 and 1.
    pub scale: [f64; 2],
    /// Length cap of the judge's answer in tokens.
    pub max_tokens: u32,
    /// Sampling temperature of the judge.
    pub temperature: f64,
    /// Seconds in all for the answers of one group; what is missing then is masked.
    pub deadline_s: f64,
    /// Seconds for one request; then it is tried again.
    pub attempt_s: f64,
    /// Tries per answer.
    pub tries: u32,
    /// Requests at once.
    pub concurrency: usize,
    /// Requests per minute; 0 = no limit.
    pub per_minute: f64,
    /// Quantile of the latencies after which a second request goes out; 0 = never.
    pub hedge: f64,
    /// Requests in all while the service runs; 0 = no limit.
    pub max_requests: u64,
    /// Tokens in all while the service runs; 0 = no limit.
    pub max_total_tokens: u64,
    /// Scores that are remembered by content; 0 = none.
    pub cache: usize,
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
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RewardService {
    /// Calls at once; more are refused with RESOURCE_EXHAUSTED. Times `max_message_mib`, this bounds the memory for requests.
    pub max_in_flight: usize,
    /// Largest message in MiB.
    pub max_message_mib: usize,
    /// Seconds that a call, or the wait for a stream's next message, may take; then DEADLINE_EXCEEDED.
    pub call_s: f64,
    /// Seconds that running calls may take to finish after shutdown was asked for.
    pub drain_s: f64,
    /// Listen address of the Prometheus page (`/metrics`); empty = none.
    pub metrics_listen: String,
}

impl Default for RewardService {
    fn default() -> Self {
        Self { max_in_flight: 64, max_message_mib: 32, call_s: 60.0, drain_s: 5.0, metrics_listen: String::new() }
    }
}
