//! Relevance by an external language model: each distinct answer is judged once, all of a group concurrently, under one deadline.

use std::collections::HashMap;
use std::num::NonZeroUsize;
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use lru::LruCache;
use unveil_config::schema;
use unveil_core::{Component, MaskReason, Record, Secret};
use unveil_service::chat::{ChatClient, ChatMessage, ChatOptions, ChatRequest, ChatRole, ChatSpent};

use super::prompt::{Messages, Prompt, parse_score};
use crate::RewardError;

type Key = blake3::Hash;

/// A judge: endpoint, prompt, and cache of its scores.
#[derive(Debug)]
pub struct Judge {
    client: ChatClient,
    prompt: Prompt,
    scale: [f64; 2],
    max_tokens: u32,
    temperature: f64,
    deadline: Duration,
    cache: Option<Mutex<LruCache<Key, f64>>>,
    version: String,
}

impl Judge {
    /// Creates the configured judge, with the key that `judge.key_env` names.
    ///
    /// # Errors
    /// Returns [`RewardError::Io`] if the prompt file cannot be read, and [`RewardError::Named`] if the prompt or the settings of the
    /// endpoint are invalid.
    pub fn new(config: &schema::Judge, key: Option<Secret>) -> Result<Self, RewardError> {
        let named = |what: String, why: String| RewardError::Named { what, why };
        let template = if config.prompt.is_empty() {
            None
        } else {
            let path = Path::new(&config.prompt);
            Some(std::fs::read_to_string(path).map_err(|source| RewardError::Io { path: path.to_owned(), source })?)
        };
        let prompt = Prompt::new(template.as_deref());
        let prompt = prompt.map_err(|why| named(format!("reward.judge.prompt {}", config.prompt), why))?;
        let client = ChatClient::new(ChatOptions {
            base_url: config.base_url.clone(),
            key,
            ca: Some(config.ca.clone()).filter(|p| !p.is_empty()).map(Into::into),
            model: config.model.clone(),
            concurrency: config.concurrency,
            per_minute: config.per_minute,
            attempt: Duration::from_secs_f64(config.attempt_s),
            tries: config.tries,
            hedge: Some(config.hedge).filter(|q| *q > 0.0),
            max_requests: config.max_requests,
            max_tokens: config.max_total_tokens,
            ..ChatOptions::default()
        });
        let client = client.map_err(|e| named("reward.judge".to_owned(), e.to_string()))?;
        let version = format!("judge-1:{}:{}", config.model, prompt.version());
        Ok(Self {
            client,
            prompt,
            scale: config.scale,
            max_tokens: config.max_tokens,
            temperature: config.temperature,
            deadline: Duration::from_secs_f64(config.deadline_s),
            cache: NonZeroUsize::new(config.cache).map(|n| Mutex::new(LruCache::new(n))),
            version,
        })
    }

    /// Returns the version of the judge: model name and hash of the prompt.
    pub fn version(&self) -> &str {
        &self.version
    }

    /// Returns the requests and tokens spent at the endpoint so far.
    pub fn spent(&self) -> ChatSpent {
        self.client.spent()
    }

    /// Returns one component per answer, in order, in `[0, 1]`; `None`, a response without an answer, scores 0. Masked if the judge was
    /// late, failed, or replied without a score. Equal answers are judged once, and scores are cached by content. Never takes longer
    /// than the configured deadline.
    pub async fn score(&self, record: &Record, answers: &[Option<String>]) -> Vec<Component> {
        let mut distinct: Vec<&str> = answers.iter().flatten().map(String::as_str).collect();
        distinct.sort_unstable();
        distinct.dedup();
        let calls = distinct.iter().map(|answer| self.score_answer(record, answer));
        let results = futures::future::join_all(calls).await;
        let scores: HashMap<&str, Result<f64, MaskReason>> = distinct.into_iter().zip(results).collect();
        let component = |answer: &Option<String>| match answer.as_deref().map(|a| scores.get(a)) {
            None => Component::value(0.0).with_detail("no_span", 1.0),
            Some(Some(Ok(value))) => Component::value(*value),
            Some(Some(Err(why))) => Component::masked(why.clone()),
            Some(None) => Component::masked(MaskReason::Failed("was not asked".to_owned())),
        };
        answers.iter().map(component).collect()
    }

    async fn score_answer(&self, record: &Record, answer: &str) -> Result<f64, MaskReason> {
        let messages = self.prompt.fill(record, answer, self.scale).map_err(MaskReason::Failed)?;
        let key = self.cache_key(&messages);
        if let Some(cached) = self.cache.as_ref().and_then(|c| lock(c).get(&key).copied()) {
            return Ok(cached);
        }
        let mut list = Vec::new();
        if !messages.system.is_empty() {
            list.push(ChatMessage::text(ChatRole::System, messages.system));
        }
        list.push(ChatMessage::text(ChatRole::User, messages.user));
        let max_tokens = self.max_tokens;
        let temperature = self.temperature;
        let request = ChatRequest { messages: list, max_tokens, temperature, seed: None, json: true };
        let reply = self.client.chat(&request, self.deadline).await.map_err(|e| {
            let why = format!("the judge: {e}");
            if e.is_unavailable() { MaskReason::Unavailable(why) } else { MaskReason::Failed(why) }
        })?;
        let value = parse_score(&reply.text, self.scale).map_err(MaskReason::Failed)?;
        if let Some(cache) = &self.cache {
            lock(cache).put(key, value);
        }
        Ok(value)
    }

    /// Hashes everything that determines a score, except the endpoint.
    fn cache_key(&self, messages: &Messages) -> Key {
        let mut hash = blake3::Hasher::new();
        for part in [self.client.model(), &messages.system, &messages.user] {
            hash.update(&(part.len() as u64).to_le_bytes()).update(part.as_bytes());
        }
        hash.update(&self.temperature.to_le_bytes()).update(&self.max_tokens.to_le_bytes());
        hash.finalize()
    }
}

fn lock(cache: &Mutex<LruCache<Key, f64>>) -> std::sync::MutexGuard<'_, LruCache<Key, f64>> {
    cache.lock().unwrap_or_else(PoisonError::into_inner)
}
