//! Pace, budget and latencies: what decides when a request may go out. No I/O.

use std::collections::VecDeque;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::time::Instant;

use super::{ChatError, ChatSpent};

/// Latencies that a quantile is taken over.
const WINDOW: usize = 256;
/// Fewer successes say nothing about stragglers.
const ENOUGH: usize = 20;

/// The generic cell rate algorithm (ITU-T I.371): `per_minute` starts, `burst` of them at once.
#[derive(Debug)]
pub(crate) struct Pace {
    interval: Duration,
    burst: u32,
    /// When the next start would be due if all came evenly.
    due: Mutex<Option<Instant>>,
}

impl Pace {
    pub(crate) fn new(per_minute: f64, burst: usize) -> Self {
        let interval = if per_minute > 0.0 { Duration::from_secs_f64(60.0 / per_minute) } else { Duration::ZERO };
        Self { interval, burst: u32::try_from(burst).unwrap_or(u32::MAX).max(1), due: Mutex::new(None) }
    }

    /// Reserves a start; how long to wait for it. None, and nothing is reserved, when that is longer than `patience`.
    pub(crate) fn reserve(&self, patience: Duration) -> Option<Duration> {
        let now = Instant::now();
        let mut due = self.due.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let from = due.unwrap_or(now).max(now);
        let tolerance = self.interval.saturating_mul(self.burst - 1);
        let wait = from.saturating_duration_since(now).saturating_sub(tolerance);
        (wait <= patience).then(|| {
            *due = Some(from + self.interval);
            wait
        })
    }
}

/// What may be spent, and what is.
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

    /// Takes one request.
    pub(crate) fn take(&self) -> Result<(), ChatError> {
        if self.max_tokens > 0 && self.tokens.load(Ordering::Relaxed) >= self.max_tokens {
            return Err(ChatError::Budget { what: "tokens", limit: self.max_tokens });
        }
        let more = |n: u64| (self.max_requests == 0 || n < self.max_requests).then_some(n + 1);
        match self.requests.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more) {
            Ok(_) => Ok(()),
            Err(_) => Err(ChatError::Budget { what: "requests", limit: self.max_requests }),
        }
    }

    pub(crate) fn spend(&self, tokens: u64) {
        self.tokens.fetch_add(tokens, Ordering::Relaxed);
    }

    pub(crate) fn hedged(&self) {
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

/// The newest latencies of successful requests.
#[derive(Debug, Default)]
pub(crate) struct Latencies(Mutex<VecDeque<Duration>>);

impl Latencies {
    pub(crate) fn add(&self, latency: Duration) {
        let mut seen = self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if seen.len() == WINDOW {
            seen.pop_front();
        }
        seen.push_back(latency);
    }

    /// The `q` quantile (nearest rank) once there are enough.
    pub(crate) fn quantile(&self, q: f64) -> Option<Duration> {
        let seen = self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if seen.len() < ENOUGH {
            return None;
        }
        let mut sorted: Vec<Duration> = seen.iter().copied().collect();
        sorted.sort_unstable();
        let rank = (q * sorted.len() as f64).ceil() as usize;
        sorted.get(rank.clamp(1, sorted.len()) - 1).copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_burst_then_an_even_pace() {
        let pace = Pace::new(60.0, 3);
        let day = Duration::from_secs(86_400);
        let waits: Vec<u64> = (0..6).filter_map(|_| pace.reserve(day)).map(|w| w.as_millis() as u64).collect();
        assert_eq!(waits, [0, 0, 0, 1000, 2000, 3000]);
        assert_eq!(pace.reserve(Duration::from_secs(3)), None, "a wait that is too long reserves nothing");
        tokio::time::advance(Duration::from_secs(4)).await;
        assert_eq!(pace.reserve(Duration::ZERO), Some(Duration::ZERO));
        let free = Pace::new(0.0, 1);
        assert!((0..1000).all(|_| free.reserve(Duration::ZERO) == Some(Duration::ZERO)));
    }

    #[test]
    fn the_budget_is_kept() {
        let b = Budget::new(2, 100);
        assert!(b.take().is_ok());
        b.spend(100);
        assert_eq!(b.take(), Err(ChatError::Budget { what: "tokens", limit: 100 }));
        let b = Budget::new(1, 0);
        assert!(b.take().is_ok());
        assert_eq!(b.take(), Err(ChatError::Budget { what: "requests", limit: 1 }));
        assert_eq!(b.spent().requests, 1);
    }

    #[test]
    fn quantiles_need_enough() {
        let l = Latencies::default();
        for ms in 1..=19 {
            l.add(Duration::from_millis(ms));
        }
        assert_eq!(l.quantile(0.5), None);
        l.add(Duration::from_millis(20));
        assert_eq!(l.quantile(0.5), Some(Duration::from_millis(10)));
        assert_eq!(l.quantile(0.99), Some(Duration::from_millis(20)));
        for _ in 0..WINDOW {
            l.add(Duration::from_millis(7));
        }
        assert_eq!(l.quantile(0.01), Some(Duration::from_millis(7)), "old ones are forgotten");
    }
}
