//! A client of OpenAI-compatible chat endpoints (`POST {base}/chat/completions`): rate and concurrency limits, retries with
//! back-off, one deadline per call, hedged requests for stragglers, and a budget.
//!
//! Source of the format: OpenAI API reference, "Create chat completion"; vLLM, SGLang, llama.cpp and Ollama support it as well.

mod client;
mod error;
mod limits;
mod wire;

use std::time::Duration;

use unveil_core::Secret;

pub use client::ChatClient;
pub use error::ChatError;

use crate::Backoff;

/// Address, limits and budget of an endpoint.
#[derive(Debug, Clone)]
pub struct ChatOptions {
    /// URL up to `/chat/completions`: `https://host/v1`, `http://127.0.0.1:8000/v1`.
    pub base_url: String,
    /// Bearer token; `None`: no authorisation header.
    pub key: Option<Secret>,
    /// PEM file of authorities trusted in addition to the system's.
    pub ca: Option<std::path::PathBuf>,
    /// Name of the model.
    pub model: String,
    /// Maximum number of concurrent requests, at least 1.
    pub concurrency: usize,
    /// Maximum number of requests started per minute, evenly spread after a first burst of `concurrency`; 0 means no limit.
    pub per_minute: f64,
    /// Time limit per request; a slower one counts as a failed attempt.
    pub attempt: Duration,
    /// Maximum number of attempts per call, at least 1.
    pub tries: u32,
    /// Delays between attempts, each shortened by up to half at random. `Retry-After` (seconds) in a response takes precedence.
    pub backoff: Backoff,
    /// Quantile in (0, 1) of observed latencies after which a second request is sent and the first success counts; `None` disables hedging.
    /// It needs 20 successes, and concurrency, rate and budget must allow the request immediately.
    pub hedge: Option<f64>,
    /// Maximum number of requests in total, including hedges and retries; 0 means no limit.
    pub max_requests: u64,
    /// Maximum number of tokens in total, prompts and answers, as reported by the endpoint (otherwise bytes / 4); 0 means no limit. Checked
    /// before each request, so concurrent requests may exceed it.
    pub max_tokens: u64,
}

impl Default for ChatOptions {
    fn default() -> Self {
        Self {
            base_url: String::new(),
            key: None,
            ca: None,
            model: String::new(),
            concurrency: 8,
            per_minute: 0.0,
            attempt: Duration::from_secs(30),
            tries: 4,
            backoff: Backoff { initial: Duration::from_millis(250), max: Duration::from_secs(10) },
            hedge: None,
            max_requests: 0,
            max_tokens: 0,
        }
    }
}

/// Author of a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ChatRole {
    /// Instructions to the model.
    System,
    /// The user.
    User,
    /// The model.
    Assistant,
}

/// Part of a message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ChatPart {
    /// Plain text.
    Text(String),
    /// An image by URL, which may be a `data:image/png;base64,…` URL.
    ImageUrl(String),
}

/// Message of a conversation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChatMessage {
    /// Author of the message.
    pub role: ChatRole,
    /// Parts of the message in order.
    pub parts: Vec<ChatPart>,
}

impl ChatMessage {
    /// Creates a message with a single text part.
    pub fn text(role: ChatRole, text: impl Into<String>) -> Self {
        Self { role, parts: vec![ChatPart::Text(text.into())] }
    }
}

/// Request for a chat completion.
#[derive(Debug, Clone, PartialEq)]
pub struct ChatRequest {
    /// The conversation so far.
    pub messages: Vec<ChatMessage>,
    /// Maximum length of the answer in tokens.
    pub max_tokens: u32,
    /// Sampling temperature, at least 0.
    pub temperature: f64,
    /// Sampling seed; endpoints may ignore it.
    pub seed: Option<u64>,
    /// Whether to request a JSON object as answer (`response_format`).
    pub json: bool,
}

/// Reply of the model.
#[derive(Debug, Clone, PartialEq)]
pub struct ChatReply {
    /// Text of the first choice.
    pub text: String,
    /// Reason for the end (`stop`, `length`, …); empty if not reported.
    pub finish: String,
    /// Numbers of prompt and answer tokens, if reported.
    pub usage: Option<[u64; 2]>,
}

/// Usage of a client so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ChatSpent {
    /// Number of requests sent.
    pub requests: u64,
    /// Number of tokens in answered prompts and their answers.
    pub tokens: u64,
    /// Number of hedged requests among them.
    pub hedges: u64,
}
