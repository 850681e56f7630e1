//! The client: admission, tries, hedges, all under one deadline.

use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, sleep, timeout, timeout_at};

use super::limits::{Budget, Latencies, Pace};
use super::{ChatError, ChatOptions, ChatReply, ChatRequest, ChatSpent, wire};
use crate::http::HttpClient;

/// A client of one endpoint and model. Cheap to clone; clones share connections, limits and budget.
#[derive(Debug, Clone)]
pub struct ChatClient {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    options: ChatOptions,
    http: HttpClient,
    slots: Arc<Semaphore>,
    pace: Pace,
    budget: Budget,
    latencies: Latencies,
}

impl ChatClient {
    /// A client; nothing is sent yet.
    ///
    /// # Errors
    /// [`ChatError::Options`] says what cannot work.
    pub fn new(options: ChatOptions) -> Result<Self, ChatError> {
        let bad = |what: String| ChatError::Options { url: options.base_url.clone(), what };
        if options.concurrency == 0 || options.tries == 0 {
            return Err(bad("concurrency and tries must be 1 or more".to_owned()));
        }
        if !(options.per_minute >= 0.0 && options.per_minute.is_finite()) {
            return Err(bad(format!("per_minute is {}: use 0 (no limit) or more", options.per_minute)));
        }
        if options.hedge.is_some_and(|q| !(q > 0.0 && q < 1.0)) {
            return Err(bad("hedge must lie between 0 and 1".to_owned()));
        }
        let url = format!("{}/chat/completions", options.base_url.trim_end_matches('/'));
        let http = HttpClient::new(&url, options.key.clone(), options.ca.as_deref()).map_err(bad)?;
        Ok(Self {
            inner: Arc::new(Inner {
                http,
                slots: Arc::new(Semaphore::new(options.concurrency.min(Semaphore::MAX_PERMITS))),
                pace: Pace::new(options.per_minute, options.concurrency),
                budget: Budget::new(options.max_requests, options.max_tokens),
                latencies: Latencies::default(),
                options,
            }),
        })
    }

    /// Asks, trying again after failures that may pass, and comes back before `deadline` whatever the endpoint does. Waiting
    /// for a free slot and for the rate counts. Dropping the future gives up what is under way.
    ///
    /// # Errors
    /// The last failure, [`ChatError::Deadline`] when time is up, [`ChatError::Budget`] when nothing may be spent any more.
    pub async fn chat(&self, request: &ChatRequest, deadline: Duration) -> Result<ChatReply, ChatError> {
        let body = wire::body(&self.inner.options.model, request);
        let start = Instant::now();
        let end = start + deadline;
        let mut wait = self.inner.options.backoff.first;
        let mut last = "no answer".to_owned();
        for left in (0..self.inner.options.tries).rev() {
            let error = match timeout_at(end, self.inner.once(&body, end)).await {
                Ok(Ok(reply)) => return Ok(reply),
                Ok(Err(e)) if !e.is_retryable() || left == 0 => return Err(e),
                Ok(Err(e)) => e,
                Err(_) => break,
            };
            let pause = error.retry_after().unwrap_or_else(|| wait.mul_f64(rand::random_range(0.5..=1.0)));
            last = error.to_string();
            tracing::debug!("asked again in {:.2} s: {last}", pause.as_secs_f64());
            if Instant::now() + pause >= end {
                break;
            }
            sleep(pause).await;
            wait = (wait * 2).min(self.inner.options.backoff.most);
        }
        Err(ChatError::Deadline { waited: start.elapsed(), last })
    }

    /// What was spent so far.
    pub fn spent(&self) -> ChatSpent {
        self.inner.budget.spent()
    }

    /// Name of the model that is asked.
    pub fn model(&self) -> &str {
        &self.inner.options.model
    }
}

impl Inner {
    /// One try: admitted, sent, and sent once more where the first answer is late.
    async fn once(&self, body: &str, end: Instant) -> Result<ChatReply, ChatError> {
        let closed = |_| ChatError::Transport("the client is closed".to_owned());
        let _slot = Arc::clone(&self.slots).acquire_owned().await.map_err(closed)?;
        let patience = end.saturating_duration_since(Instant::now());
        let Some(wait) = self.pace.reserve(patience) else {
            return Err(ChatError::Transport(format!(
                "the rate of {} requests per minute is used up",
                self.options.per_minute
            )));
        };
        sleep(wait).await;
        self.budget.take()?;
        let mut first = pin!(self.send(body));
        let after = self.options.hedge.and_then(|q| self.latencies.quantile(q));
        let Some(after) = after else {
            return first.await;
        };
        if let Ok(answer) = timeout(after, first.as_mut()).await {
            return answer;
        }
        let Some(_spare) = self.spare() else {
            return first.await;
        };
        self.budget.hedged();
        let mut second = pin!(self.send(body));
        let (answer, first_ended) = tokio::select! {
            answer = first.as_mut() => (answer, true),
            answer = second.as_mut() => (answer, false),
        };
        match answer {
            Ok(reply) => Ok(reply),
            Err(_) if first_ended => second.await,
            Err(_) => first.await,
        }
    }

    /// A slot, a start and a request for a hedge, where they are free at once.
    fn spare(&self) -> Option<OwnedSemaphorePermit> {
        let slot = Arc::clone(&self.slots).try_acquire_owned().ok()?;
        self.pace.reserve(Duration::ZERO)?;
        self.budget.take().ok()?;
        Some(slot)
    }

    async fn send(&self, body: &str) -> Result<ChatReply, ChatError> {
        let start = Instant::now();
        let answer = timeout(self.options.attempt, self.http.post(body.to_owned())).await;
        let late = || ChatError::Transport(format!("no answer within {:.1} s", self.options.attempt.as_secs_f64()));
        let answer = answer.map_err(|_| late())?.map_err(ChatError::Transport)?;
        if !(200..300).contains(&answer.code) {
            let body = self.http.excerpt(&answer.body);
            return Err(ChatError::Status { code: answer.code, body, retry_after: answer.retry_after });
        }
        let reply = wire::reply(&answer.body);
        let guess = ((body.len() + answer.body.len()) / 4) as u64;
        let usage = reply.as_ref().ok().and_then(|r| r.usage);
        self.budget.spend(usage.map_or(guess, |[prompt, answer]| prompt.saturating_add(answer)));
        if reply.is_ok() {
            self.latencies.add(start.elapsed());
        }
        reply
    }
}
