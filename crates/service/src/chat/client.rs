//! The client: admission, retries and hedged requests under one deadline.

use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, sleep, timeout, timeout_at};

use super::limits::{Budget, Latencies, RateLimiter};
use super::{ChatError, ChatOptions, ChatReply, ChatRequest, ChatSpent, wire};
use crate::http::HttpClient;

/// Client for one endpoint and model. Cheap to clone; clones share connections, limits and budget.
#[derive(Debug, Clone)]
pub struct ChatClient {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    options: ChatOptions,
    http: HttpClient,
    slots: Arc<Semaphore>,
    rate_limiter: RateLimiter,
    budget: Budget,
    latencies: Latencies,
}

impl ChatClient {
    /// Creates a client without sending anything.
    ///
    /// # Errors
    /// Returns [`ChatError::Options`] for invalid options.
    pub fn new(options: ChatOptions) -> Result<Self, ChatError> {
        let invalid = |what: String| ChatError::Options { url: options.base_url.clone(), what };
        if options.concurrency == 0 || options.tries == 0 {
            return Err(invalid("concurrency and tries must be at least 1".to_owned()));
        }
        if !(options.per_minute >= 0.0 && options.per_minute.is_finite()) {
            return Err(invalid(format!("per_minute is {}: use 0 (no limit) or more", options.per_minute)));
        }
        if options.hedge.is_some_and(|q| !(q > 0.0 && q < 1.0)) {
            return Err(invalid("hedge must be between 0 and 1".to_owned()));
        }
        let url = format!("{}/chat/completions", options.base_url.trim_end_matches('/'));
        let http = HttpClient::new(&url, options.key.clone(), options.ca.as_deref()).map_err(invalid)?;
        Ok(Self {
            inner: Arc::new(Inner {
                http,
                slots: Arc::new(Semaphore::new(options.concurrency.min(Semaphore::MAX_PERMITS))),
                rate_limiter: RateLimiter::new(options.per_minute, options.concurrency),
                budget: Budget::new(options.max_requests, options.max_tokens),
                latencies: Latencies::default(),
                options,
            }),
        })
    }

    /// Sends a request, retrying after transient failures, and always returns before `deadline`. Time spent waiting for a free slot and for
    /// the rate limit counts. Dropping the future cancels the requests in progress.
    ///
    /// # Errors
    /// Returns [`ChatError::Deadline`] when time is up, [`ChatError::Budget`] if the budget is exhausted, and otherwise the error of the last
    /// attempt.
    pub async fn chat(&self, request: &ChatRequest, deadline: Duration) -> Result<ChatReply, ChatError> {
        let body = wire::body(&self.inner.options.model, request);
        let start = Instant::now();
        let end = start + deadline;
        let mut bound = self.inner.options.backoff.initial;
        let mut last = "no answer".to_owned();
        for attempts_left in (0..self.inner.options.tries).rev() {
            let error = match timeout_at(end, self.inner.attempt(&body, end)).await {
                Ok(Ok(reply)) => return Ok(reply),
                Ok(Err(e)) if !e.is_retryable() || attempts_left == 0 => return Err(e),
                Ok(Err(e)) => e,
                Err(_) => break,
            };
            let delay = error.retry_after().unwrap_or_else(|| bound.mul_f64(rand::random_range(0.5..=1.0)));
            last = error.to_string();
            tracing::debug!(delay_s = delay.as_secs_f64(), "retrying chat request: {last}");
            if Instant::now() + delay >= end {
                break;
            }
            sleep(delay).await;
            bound = (bound * 2).min(self.inner.options.backoff.max);
        }
        Err(ChatError::Deadline { waited: start.elapsed(), last })
    }

    /// Returns the usage so far.
    pub fn spent(&self) -> ChatSpent {
        self.inner.budget.spent()
    }

    /// Returns the name of the model.
    pub fn model(&self) -> &str {
        &self.inner.options.model
    }
}

impl Inner {
    /// Makes one attempt: waits for admission, sends the request, and hedges it if the response is late.
    async fn attempt(&self, body: &str, end: Instant) -> Result<ChatReply, ChatError> {
        let closed = |_| ChatError::Transport("the client is closed".to_owned());
        let _slot = Arc::clone(&self.slots).acquire_owned().await.map_err(closed)?;
        let time_left = end.saturating_duration_since(Instant::now());
        let Some(delay) = self.rate_limiter.reserve(time_left) else {
            return Err(ChatError::Transport(format!(
                "the rate limit of {} requests per minute leaves no slot before the deadline",
                self.options.per_minute
            )));
        };
        sleep(delay).await;
        self.budget.take_request()?;
        let mut first = pin!(self.send(body));
        let hedge_delay = self.options.hedge.and_then(|q| self.latencies.quantile(q));
        let Some(hedge_delay) = hedge_delay else {
            return first.await;
        };
        if let Ok(answer) = timeout(hedge_delay, first.as_mut()).await {
            return answer;
        }
        let Some(_hedge_slot) = self.try_hedge_slot() else {
            return first.await;
        };
        self.budget.count_hedge();
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

    /// Acquires a slot, a start and a request for a hedge, if all are available immediately.
    fn try_hedge_slot(&self) -> Option<OwnedSemaphorePermit> {
        let slot = Arc::clone(&self.slots).try_acquire_owned().ok()?;
        self.rate_limiter.reserve(Duration::ZERO)?;
        self.budget.take_request().ok()?;
        Some(slot)
    }

    async fn send(&self, body: &str) -> Result<ChatReply, ChatError> {
        let start = Instant::now();
        let answer = timeout(self.options.attempt, self.http.post(body.to_owned())).await;
        let timed_out =
            || ChatError::Transport(format!("no answer within {:.1} s", self.options.attempt.as_secs_f64()));
        let answer = answer.map_err(|_| timed_out())?.map_err(ChatError::Transport)?;
        if !(200..300).contains(&answer.code) {
            let body = self.http.excerpt(&answer.body);
            return Err(ChatError::Status { code: answer.code, body, retry_after: answer.retry_after });
        }
        let reply = wire::reply(&answer.body);
        let estimate = ((body.len() + answer.body.len()) / 4) as u64;
        let usage = reply.as_ref().ok().and_then(|r| r.usage);
        self.budget.add_tokens(usage.map_or(estimate, |[prompt, answer]| prompt.saturating_add(answer)));
        if reply.is_ok() {
            self.latencies.add(start.elapsed());
        }
        reply
    }
}
