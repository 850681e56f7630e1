//! A client of OpenAI-compatible chat endpoints (`POST {base}/chat/completions`): rate and concurrency limits, retries with
//! back-off, one deadline over everything, a hedge for stragglers, and a budget.
//!
//! Source of the format: OpenAI API reference, "Create chat completion"; vLLM, SGLang, llama.cpp and Ollama speak it too.
//! Must not know: what is asked, and what the answers are used for.

mod client;
mod error;
mod limits;
mod wire;

use std::time::Duration;

use unveil_core::Secret;

pub use client::ChatClient;
pub use error::ChatError;

use crate::Backoff;

/// How to reach an endpoint, and what may be spent there.
#[derive(Debug, Clone)]
pub struct ChatOptions {
    /// Everything before `/chat/completions`: `https://host/v1`, `http://127.0.0.1:8000/v1`.
    pub base_url: String,
    /// Sent as bearer token; none = no authorisation header.
    pub key: Option<Secret>,
    /// PEM file of certificate authorities that are trusted beside those of the system.
    pub ca: Option<std::path::PathBuf>,
    /// Name of the model.
    pub model: String,
    /// Requests that may be under way at once, 1 or more.
    pub concurrency: usize,
    /// Requests that may start per minute, evenly spread after a first burst of `concurrency`; 0 = no limit.
    pub per_minute: f64,
    /// A request that takes longer is given up and counts as a failed try.
    pub attempt: Duration,
    /// Tries per call, 1 or more.
    pub tries: u32,
    /// Waits between tries; an answer's `Retry-After` (seconds) takes their place. Each is shortened by up to half at random.
    pub backoff: Backoff,
    /// Quantile in (0, 1) of the latencies seen so far, after which a second request goes out and the first success counts;
    /// none = never. It starts after 20 successes, and only where concurrency, rate and budget allow it at once.
    pub hedge: Option<f64>,
    /// Requests in all, hedges and retries included; 0 = no limit.
    pub max_requests: u64,
    /// Tokens in all, prompts and answers, as the endpoint reports them (bytes / 4 where it does not); 0 = no limit. Checked
    /// before a request is sent: those under way may pass it.
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
            backoff: Backoff { first: Duration::from_millis(250), most: Duration::from_secs(10) },
            hedge: None,
            max_requests: 0,
            max_tokens: 0,
        }
    }
}

/// Who speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ChatRole {
    /// Instructions.
    System,
    /// The asking side.
    User,
    /// The answering side.
    Assistant,
}

/// A piece of a message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ChatPart {
    /// Plain text.
    Text(String),
    /// An image by URL; `data:image/png;base64,…` carries it along.
    ImageUrl(String),
}

/// One message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChatMessage {
    /// Who speaks.
    pub role: ChatRole,
    /// What is said, in order.
    pub parts: Vec<ChatPart>,
}

impl ChatMessage {
    /// A message of text alone.
    pub fn text(role: ChatRole, text: impl Into<String>) -> Self {
        Self { role, parts: vec![ChatPart::Text(text.into())] }
    }
}

/// What is asked.
#[derive(Debug, Clone, PartialEq)]
pub struct ChatRequest {
    /// The conversation so far.
    pub messages: Vec<ChatMessage>,
    /// Length cap of the answer in tokens.
    pub max_tokens: u32,
    /// 0 or more.
    pub temperature: f64,
    /// Sent where the endpoint knows it.
    pub seed: Option<u64>,
    /// Asks for an answer that is one JSON object (`response_format`).
    pub json: bool,
}

/// What came back.
#[derive(Debug, Clone, PartialEq)]
pub struct ChatReply {
    /// Text of the first choice.
    pub text: String,
    /// Why it ended: `stop`, `length`…; empty where the endpoint does not say.
    pub finish: String,
    /// Tokens of the prompt and of the answer, as reported.
    pub usage: Option<[u64; 2]>,
}

/// What a client has spent so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ChatSpent {
    /// Requests sent.
    pub requests: u64,
    /// Tokens of the answers that came back and of their prompts.
    pub tokens: u64,
    /// Requests that were hedges.
    pub hedges: u64,
}
