//! Rate limit, budget and latencies, which decide when a request may be sent. No I/O.

use std::collections::VecDeque;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::time::Instant;

use super::{ChatError, ChatSpent};

/// Number of latencies over which quantiles are computed.
const LATENCY_WINDOW: usize = 256;
/// Minimum number of latencies for a quantile.
const MIN_LATENCIES: usize = 20;

/// Rate limiter by the generic cell rate algorithm (ITU-T I.371): `per_minute` starts, up to `burst` of them simultaneously.
#[derive(Debug)]
pub(crate) struct RateLimiter {
    interval: Duration,
    burst: u32,
    /// Time of the next start if all were evenly spaced.
    next_start: Mutex<Option<Instant>>,
}

impl RateLimiter {
    pub(crate) fn new(per_minute: f64, burst: usize) -> Self {
        let interval = if per_minute > 0.0 { Duration::from_secs_f64(60.0 / per_minute) } else { Duration::ZERO };
        Self { interval, burst: u32::try_from(burst).unwrap_or(u32::MAX).max(1), next_start: Mutex::new(None) }
    }

    /// Reserves a start and returns the delay until then. Returns `None` and reserves nothing if the delay exceeds `max_delay`.
    pub(crate) fn reserve(&self, max_delay: Duration) -> Option<Duration> {
        let now = Instant::now();
        let mut next_start = self.next_start.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let start = next_start.unwrap_or(now).max(now);
        let tolerance = self.interval.saturating_mul(self.burst - 1);
        let delay = start.saturating_duration_since(now).saturating_sub(tolerance);
        (delay <= max_delay).then(|| {
            *next_start = Some(start + self.interval);
            delay
        })
    }
}

/// Limits and usage of requests and tokens.
#[derive(Debug, Default)]
pub(crate) struct Budget {
    pub(crate) max_requests: u64,
    pub(crate) max_tokens: u64,
    requests: AtomicU64,
    tokens: AtomicU64,
    hedges: AtomicU64,
}

impl Budget {
    pub(crate) fn new(max_requests: u64, max_tokens: u64) -> Self {
        Self { max_requests, max_tokens, ..Self::default() }
    }

    /// Counts one request, unless the budget is exhausted.
    pub(crate) fn take_request(&self) -> Result<(), ChatError> {
        if self.max_tokens > 0 && self.tokens.load(Ordering::Relaxed) >= self.max_tokens {
            return Err(ChatError::Budget { what: "tokens", limit: self.max_tokens });
        }
        let more = |n: u64| (self.max_requests == 0 || n < self.max_requests).then_some(n + 1);
        match self.requests.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more) {
            Ok(_) => Ok(()),
            Err(_) => Err(ChatError::Budget { what: "requests", limit: self.max_requests }),
        }
    }

    pub(crate) fn add_tokens(&self, tokens: u64) {
        self.tokens.fetch_add(tokens, Ordering::Relaxed);
    }

    pub(crate) fn count_hedge(&self) {
        self.hedges.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn spent(&self) -> ChatSpent {
        ChatSpent {
            requests: self.requests.load(Ordering::Relaxed),
            tokens: self.tokens.load(Ordering::Relaxed),
            hedges: self.hedges.load(Ordering::Relaxed),
        }
    }
}

/// Latencies of the latest successful requests.
#[derive(Debug, Default)]
pub(crate) struct Latencies(Mutex<VecDeque<Duration>>);

impl Latencies {
    pub(crate) fn add(&self, latency: Duration) {
        let mut latencies = self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if latencies.len() == LATENCY_WINDOW {
            latencies.pop_front();
        }
        latencies.push_back(latency);
    }

    /// Returns the `q` quantile (nearest rank), or `None` if there are too few latencies.
    pub(crate) fn quantile(&self, q: f64) -> Option<Duration> {
        let latencies = self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if latencies.len() < MIN_LATENCIES {
            return None;
        }
        let mut sorted: Vec<Duration> = latencies.iter().copied().collect();
        sorted.sort_unstable();
        let rank = (q * sorted.len() as f64).ceil() as usize;
        sorted.get(rank.clamp(1, sorted.len()) - 1).copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn burst_is_followed_by_an_even_rate() {
        let limiter = RateLimiter::new(60.0, 3);
        let day = Duration::from_secs(86_400);
        let waits: Vec<u64> = (0..6).filter_map(|_| limiter.reserve(day)).map(|w| w.as_millis() as u64).collect();
        assert_eq!(waits, [0, 0, 0, 1000, 2000, 3000]);
        assert_eq!(limiter.reserve(Duration::from_secs(3)), None, "a delay above the limit reserves nothing");
        tokio::time::advance(Duration::from_secs(4)).await;
        assert_eq!(limiter.reserve(Duration::ZERO), Some(Duration::ZERO));
        let free = RateLimiter::new(0.0, 1);
        assert!((0..1000).all(|_| free.reserve(Duration::ZERO) == Some(Duration::ZERO)));
    }

    #[test]
    fn budget_is_enforced() {
        let b = Budget::new(2, 100);
        assert!(b.take_request().is_ok());
        b.add_tokens(100);
        assert_eq!(b.take_request(), Err(ChatError::Budget { what: "tokens", limit: 100 }));
        let b = Budget::new(1, 0);
        assert!(b.take_request().is_ok());
        assert_eq!(b.take_request(), Err(ChatError::Budget { what: "requests", limit: 1 }));
        assert_eq!(b.spent().requests, 1);
    }

    #[test]
    fn quantiles_need_enough_latencies() {
        let l = Latencies::default();
        for ms in 1..=19 {
            l.add(Duration::from_millis(ms));
        }
        assert_eq!(l.quantile(0.5), None);
        l.add(Duration::from_millis(20));
        assert_eq!(l.quantile(0.5), Some(Duration::from_millis(10)));
        assert_eq!(l.quantile(0.99), Some(Duration::from_millis(20)));
        for _ in 0..LATENCY_WINDOW {
            l.add(Duration::from_millis(7));
        }
        assert_eq!(l.quantile(0.01), Some(Duration::from_millis(7)), "old latencies are dropped");
    }
}
