//! The lease clock, which stops while the process is paused: after a pause, calls that workers sent in the meantime are
//! read before their leases expire.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Interval at which the clock is read at least.
pub(super) const TICK: Duration = Duration::from_millis(250);
/// A longer time between two reads is a pause.
const MIN_PAUSE: Duration = Duration::from_secs(2);

/// Measures the time since the start without pauses.
#[derive(Debug)]
pub(super) struct Clock {
    started: Instant,
    reading: Mutex<LastReading>,
}

#[derive(Default, Debug)]
struct LastReading {
    last: Duration,
    paused: Duration,
}

impl Clock {
    pub(super) fn start() -> Self {
        Self { started: Instant::now(), reading: Mutex::default() }
    }

    pub(super) fn now(&self) -> Duration {
        self.read_at(self.started.elapsed())
    }

    fn read_at(&self, elapsed: Duration) -> Duration {
        let mut reading = self.reading.lock().unwrap_or_else(PoisonError::into_inner);
        let gap = elapsed.saturating_sub(reading.last);
        if gap > MIN_PAUSE {
            reading.paused += gap;
            tracing::warn!("the process was paused for {:.1} s, leases are extended by that time", gap.as_secs_f64());
        }
        reading.last = reading.last.max(elapsed);
        elapsed.saturating_sub(reading.paused)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_clock_stops_during_pauses() {
        let clock = Clock::start();
        let read_ms = |ms: u64| clock.read_at(Duration::from_millis(ms)).as_millis();
        assert_eq!((read_ms(100), read_ms(1500), read_ms(3400)), (100, 1500, 3400));
        // Twenty seconds under SIGSTOP.
        assert_eq!((read_ms(23_400), read_ms(23_650), read_ms(25_000)), (3400, 3650, 5000));
        // Two threads may read the clock in another order than they update it.
        assert_eq!((read_ms(24_900), read_ms(25_250)), (4900, 5250));
    }
}
