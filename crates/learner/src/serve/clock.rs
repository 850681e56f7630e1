//! The clock of leases. It stands while the process does: after a pause, what workers sent meanwhile is read before their leases run
//! out. Must not know: leases.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How often it is looked at.
pub(super) const TICK: Duration = Duration::from_millis(250);
/// A longer time between two looks is a pause.
const PAUSE: Duration = Duration::from_secs(2);

/// Time since the start, without pauses.
pub(super) struct Clock {
    started: Instant,
    seen: Mutex<Seen>,
}

#[derive(Default)]
struct Seen {
    last: Duration,
    paused: Duration,
}

impl Clock {
    pub fn start() -> Self {
        Self { started: Instant::now(), seen: Mutex::default() }
    }

    pub fn now(&self) -> Duration {
        self.at(self.started.elapsed())
    }

    fn at(&self, elapsed: Duration) -> Duration {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let gap = elapsed.saturating_sub(seen.last);
        if gap > PAUSE {
            seen.paused += gap;
            tracing::warn!("the learner stood still for {:.1} s: leases last for so much longer", gap.as_secs_f64());
        }
        seen.last = seen.last.max(elapsed);
        elapsed.saturating_sub(seen.paused)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_stands_while_nobody_looks() {
        let clock = Clock::start();
        let at = |ms: u64| clock.at(Duration::from_millis(ms)).as_millis();
        assert_eq!((at(100), at(1500), at(3400)), (100, 1500, 3400));
        // Twenty seconds under SIGSTOP.
        assert_eq!((at(23_400), at(23_650), at(25_000)), (3400, 3650, 5000));
        // Two threads may come in another order than they looked.
        assert_eq!((at(24_900), at(25_250)), (4900, 5250));
    }
}
