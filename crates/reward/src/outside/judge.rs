//! Relevance by an external language model: each answer once, all of a group at the same time, under one deadline.

use std::collections::HashMap;
use std::num::NonZeroUsize;
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use lru::LruCache;
use unveil_config::schema;
use unveil_core::{Component, MaskReason, Record, Secret};
use unveil_service::chat::{ChatClient, ChatMessage, ChatOptions, ChatRequest, ChatRole, ChatSpent};

use super::prompt::{Messages, Prompt, read_score};
use crate::RewardError;

type Key = blake3::Hash;

/// A judge: endpoint, prompt, and what it said before.
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
    /// A judge as configured, with the key that `judge.key_env` names.
    ///
    /// # Errors
    /// The prompt cannot be read or used, or the endpoint's settings cannot work.
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

    /// Model and prompt, by name and content.
    pub fn version(&self) -> &str {
        &self.version
    }

    /// What was spent at the endpoint so far.
    pub fn spent(&self) -> ChatSpent {
        self.client.spent()
    }

    /// One component per answer, in order, in `[0, 1]`; none = there is no answer to look at, which scores 0. Masked where the judge
    /// did not say in time, failed, or said something that is no score. Equal answers are asked about once, and what was said
    /// before is remembered by content. Never takes longer than the configured deadline.
    pub async fn score(&self, record: &Record, answers: &[Option<String>]) -> Vec<Component> {
        let mut open: Vec<&str> = answers.iter().flatten().map(String::as_str).collect();
        open.sort_unstable();
        open.dedup();
        let calls = open.iter().map(|answer| self.ask(record, answer));
        let said = futures::future::join_all(calls).await;
        let asked: HashMap<&str, Result<f64, MaskReason>> = open.into_iter().zip(said).collect();
        let component = |answer: &Option<String>| match answer.as_deref().map(|a| asked.get(a)) {
            None => Component::value(0.0).with("no_span", 1.0),
            Some(Some(Ok(value))) => Component::value(*value),
            Some(Some(Err(why))) => Component::masked(why.clone()),
            Some(None) => Component::masked(MaskReason::Failed("was not asked".to_owned())),
        };
        answers.iter().map(component).collect()
    }

    async fn ask(&self, record: &Record, answer: &str) -> Result<f64, MaskReason> {
        let messages = self.prompt.fill(record, answer, self.scale).map_err(MaskReason::Failed)?;
        let key = self.key(&messages);
        if let Some(known) = self.cache.as_ref().and_then(|c| lock(c).get(&key).copied()) {
            return Ok(known);
        }
        let mut list = Vec::new();
        if !messages.system.is_empty() {
            list.push(ChatMessage::text(ChatRole::System, messages.system));
        }
        list.push(ChatMessage::text(ChatRole::User, messages.user));
        let (max_tokens, temperature) = (self.max_tokens, self.temperature);
        let request = ChatRequest { messages: list, max_tokens, temperature, seed: None, json: true };
        let reply = self.client.chat(&request, self.deadline).await.map_err(|e| {
            let why = format!("the judge: {e}");
            if e.is_away() { MaskReason::Unavailable(why) } else { MaskReason::Failed(why) }
        })?;
        let value = read_score(&reply.text, self.scale).map_err(MaskReason::Failed)?;
        if let Some(cache) = &self.cache {
            lock(cache).put(key, value);
        }
        Ok(value)
    }

    /// Everything that the score follows from, apart from the endpoint.
    fn key(&self, messages: &Messages) -> Key {
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
