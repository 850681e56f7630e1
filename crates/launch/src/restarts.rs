//! How often a role may be started again, and when: after waits that double, and only so often within a window of time, so that a
//! fault that comes once a day ends no run and one that comes at once does. Must not know: processes.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// Restarts of a role within [`WINDOW`]; the next death ends the run.
const MAX_RESTARTS: usize = 8;
/// Deaths that are longer ago do not count.
const WINDOW: Duration = Duration::from_secs(600);
/// Wait before the first restart within the window, doubled for each further one.
const FIRST_WAIT: Duration = Duration::from_millis(100);
/// Longest wait.
const MAX_WAIT: Duration = Duration::from_secs(10);

/// The deaths of one role.
#[derive(Debug, Default)]
pub(crate) struct Restarts {
    deaths: VecDeque<Instant>,
    due: Option<Instant>,
}

impl Restarts {
    /// Notes a death and returns how long to wait before the restart; none where there were too many.
    pub fn died(&mut self, now: Instant) -> Option<Duration> {
        while self.deaths.front().is_some_and(|at| now.saturating_duration_since(*at) >= WINDOW) {
            self.deaths.pop_front();
        }
        let before = self.deaths.len();
        if before >= MAX_RESTARTS {
            return None;
        }
        self.deaths.push_back(now);
        let wait = (FIRST_WAIT * 2u32.saturating_pow(before as u32)).min(MAX_WAIT);
        self.due = Some(now + wait);
        Some(wait)
    }

    /// Whether the restart that [`Restarts::died`] granted is due; it is granted once.
    pub fn due(&mut self, now: Instant) -> bool {
        self.due.take_if(|at| now >= *at).is_some()
    }
}

/// Why a role is not started again, for messages.
pub(crate) fn too_often() -> String {
    format!("it was started again {MAX_RESTARTS} times within {} minutes", WINDOW.as_secs() / 60)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_death_a_day_never_ends_a_run_and_deaths_in_a_row_do() {
        let begin = Instant::now();
        let mut daily = Restarts::default();
        for day in 0..100 {
            assert_eq!(daily.died(begin + Duration::from_secs(86_400 * day)), Some(FIRST_WAIT), "day {day}");
        }
        let mut at_once = Restarts::default();
        let mut now = begin;
        let mut waits = Vec::new();
        while let Some(wait) = at_once.died(now) {
            assert!(!at_once.due(now + wait / 2) && at_once.due(now + wait) && !at_once.due(now + wait));
            waits.push(wait.as_millis());
            now += wait;
        }
        assert_eq!(waits, [100, 200, 400, 800, 1600, 3200, 6400, 10_000]);
        assert_eq!(at_once.died(begin + WINDOW), Some(MAX_WAIT), "the first of them is long ago");
    }
}
