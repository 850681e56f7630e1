//! Restart limit and exponential back-off of a role. Restarts are limited within a time window, so that a failure once a day does not end
//! a run, but repeated immediate failures do.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// Maximum number of restarts of a role within [`WINDOW`]; the next exit ends the run.
const MAX_RESTARTS: usize = 8;
/// Older exits do not count.
const WINDOW: Duration = Duration::from_secs(600);
/// Delay of the first restart within the window, doubled for each further one.
const MIN_DELAY: Duration = Duration::from_millis(100);
/// Longest delay of a restart.
const MAX_DELAY: Duration = Duration::from_secs(10);

/// Unexpected exits of one role.
#[derive(Debug, Default)]
pub(crate) struct RestartBackoff {
    exits: VecDeque<Instant>,
    due: Option<Instant>,
}

impl RestartBackoff {
    /// Records an exit and returns the delay of the restart; `None` if there were too many.
    pub(crate) fn record_exit(&mut self, now: Instant) -> Option<Duration> {
        while self.exits.front().is_some_and(|exit| now.saturating_duration_since(*exit) >= WINDOW) {
            self.exits.pop_front();
        }
        let restarts = self.exits.len();
        if restarts >= MAX_RESTARTS {
            return None;
        }
        self.exits.push_back(now);
        let delay = (MIN_DELAY * 2u32.saturating_pow(restarts as u32)).min(MAX_DELAY);
        self.due = Some(now + delay);
        Some(delay)
    }

    /// Returns true once, when the restart granted by [`RestartBackoff::record_exit`] is due.
    pub(crate) fn take_due(&mut self, now: Instant) -> bool {
        self.due.take_if(|due| now >= *due).is_some()
    }
}

/// Describes why a role is not restarted.
pub(crate) fn limit_reached() -> String {
    format!("it was restarted {MAX_RESTARTS} times within {} minutes", WINDOW.as_secs() / 60)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rare_exits_are_unlimited_and_frequent_ones_are_not() {
        let begin = Instant::now();
        let mut daily = RestartBackoff::default();
        for day in 0..100 {
            assert_eq!(daily.record_exit(begin + Duration::from_secs(86_400 * day)), Some(MIN_DELAY), "day {day}");
        }
        let mut frequent = RestartBackoff::default();
        let mut now = begin;
        let mut delays = Vec::new();
        while let Some(delay) = frequent.record_exit(now) {
            assert!(!frequent.take_due(now + delay / 2));
            assert!(frequent.take_due(now + delay) && !frequent.take_due(now + delay));
            delays.push(delay.as_millis());
            now += delay;
        }
        assert_eq!(delays, [100, 200, 400, 800, 1600, 3200, 6400, 10_000]);
        assert_eq!(frequent.record_exit(begin + WINDOW), Some(MAX_DELAY), "the first exit has left the window");
    }
}
