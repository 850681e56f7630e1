//! The leases that a worker holds, and the progress of its work on them as reported by heartbeats.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use unveil_proto::v1;

/// Longest time between two heartbeats.
const MAX_HEARTBEAT_INTERVAL: Duration = Duration::from_secs(2);
/// Shortest time between two heartbeats.
const MIN_HEARTBEAT_INTERVAL: Duration = Duration::from_millis(10);
/// Heartbeats sent within the duration of a lease.
const HEARTBEATS_PER_LEASE: u32 = 3;

/// A number that grows with each step of the worker's work: a decode step, a chunk of weights or of an image, a prepared group. Clones
/// share it.
#[derive(Debug, Clone, Default)]
pub struct Progress(Arc<AtomicU64>);

impl Progress {
    /// Counts one step and returns the new number.
    pub fn advance(&self) -> u64 {
        self.0.fetch_add(1, Ordering::Relaxed) + 1
    }

    fn current(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Leases that are neither submitted nor released.
#[derive(Debug)]
pub struct HeldLeases {
    /// Random number that distinguishes this process from others with the same worker name.
    pub session: u64,
    /// Progress of the worker.
    pub progress: Progress,
    lease_duration: Mutex<Duration>,
    table: Mutex<LeaseTable>,
}

#[derive(Default, Debug)]
struct LeaseTable {
    /// Number of the last lease call that was begun.
    calls_begun: u64,
    /// Lease calls up to this number are complete.
    calls_done: u64,
    /// Progress of each group that has left the engine; `None`: the group progresses with the worker.
    leases: HashMap<String, Option<u64>>,
}

impl HeldLeases {
    /// Creates an empty set; leases are assumed to last for `lease` until the service reports another duration.
    pub fn new(lease: Duration) -> Self {
        // 0 means that the session is unknown.
        let session = rand::random::<u64>().max(1);
        Self { session, progress: Progress::default(), lease_duration: Mutex::new(lease), table: Mutex::default() }
    }

    /// Begins a lease call and returns its number.
    pub fn begin_call(&self) -> u64 {
        let mut table = self.lock();
        table.calls_begun += 1;
        table.calls_begun
    }

    /// Completes a lease call that returned `leases`.
    pub fn finish_call(&self, call: u64, leases: impl Iterator<Item = String>) {
        let mut table = self.lock();
        table.calls_done = table.calls_done.max(call);
        table.leases.extend(leases.map(|lease| (lease, None)));
    }

    /// Counts a step of one group; from now on, other work of the worker is not progress of this group.
    pub fn advance(&self, lease: &str) {
        let step = self.progress.advance();
        if let Some(progress) = self.lock().leases.get_mut(lease) {
            *progress = Some(step);
        }
    }

    /// Whether the worker still holds a lease, so that work on it counts.
    pub fn contains(&self, lease: &str) -> bool {
        self.lock().leases.contains_key(lease)
    }

    /// Removes a lease that was submitted, released, or lost.
    pub fn remove(&self, lease: &str) {
        self.lock().leases.remove(lease);
    }

    /// Removes and returns all leases, and completes the lease calls in flight.
    pub fn drain(&self) -> Vec<String> {
        let mut table = self.lock();
        table.calls_done = table.calls_begun;
        table.leases.drain().map(|(lease, _)| lease).collect()
    }

    /// Returns the content of a heartbeat: the number of completed lease calls, and the progress of every held lease.
    pub fn heartbeat_entries(&self) -> (u64, Vec<v1::InHand>) {
        let table = self.lock();
        let current = self.progress.current();
        let entry = |(lease, progress): (&String, &Option<u64>)| v1::InHand {
            lease: lease.clone(),
            progress: progress.unwrap_or(current),
        };
        (table.calls_done, table.leases.iter().map(entry).collect())
    }

    /// Sets the duration of a lease in milliseconds; 0 leaves it unchanged.
    pub fn set_lease_duration(&self, ms: u32) {
        if ms > 0 {
            *self.lease_duration.lock().unwrap_or_else(PoisonError::into_inner) = Duration::from_millis(ms.into());
        }
    }

    /// Returns the time until the next heartbeat: several fit into a lease, and jitter keeps workers from sending simultaneously.
    pub fn heartbeat_pause(&self) -> Duration {
        let lease_duration = *self.lease_duration.lock().unwrap_or_else(PoisonError::into_inner);
        let interval = (lease_duration / HEARTBEATS_PER_LEASE).clamp(MIN_HEARTBEAT_INTERVAL, MAX_HEARTBEAT_INTERVAL);
        interval.mul_f64(rand::random_range(0.5..=1.0))
    }

    fn lock(&self) -> MutexGuard<'_, LeaseTable> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entries(leases: &HeldLeases) -> (u64, Vec<(String, u64)>) {
        let (done, in_hand) = leases.heartbeat_entries();
        let mut all: Vec<_> = in_hand.into_iter().map(|h| (h.lease, h.progress)).collect();
        all.sort();
        (done, all)
    }

    #[test]
    fn groups_progress_with_the_engine_until_generated() {
        let leases = HeldLeases::new(Duration::from_secs(60));
        let names = |names: &[&str]| names.iter().map(|n| (*n).to_owned()).collect::<Vec<_>>().into_iter();
        assert_eq!(leases.begin_call(), 1);
        assert_eq!(entries(&leases), (0, vec![]), "the call is in flight");
        leases.finish_call(1, names(&["a", "b"]));
        leases.progress.advance();
        assert_eq!(entries(&leases), (1, vec![("a".into(), 1), ("b".into(), 1)]));
        leases.advance("a");
        leases.progress.advance();
        assert_eq!(entries(&leases), (1, vec![("a".into(), 2), ("b".into(), 3)]), "only its own steps count for `a`");
        leases.advance("a");
        assert_eq!(entries(&leases).1[0].1, 4);
        assert_eq!(leases.begin_call(), 2);
        leases.remove("a");
        assert!(leases.contains("b") && !leases.contains("a"));
        assert_eq!(leases.drain(), ["b"]);
        assert_eq!(entries(&leases), (2, vec![]), "the call in flight is complete");
    }

    #[test]
    fn several_heartbeats_fit_into_a_lease() {
        let leases = HeldLeases::new(Duration::from_secs(60));
        assert!(
            leases.heartbeat_pause() <= MAX_HEARTBEAT_INTERVAL
                && leases.heartbeat_pause() >= MAX_HEARTBEAT_INTERVAL / 2
        );
        leases.set_lease_duration(0);
        assert!(leases.heartbeat_pause() >= MAX_HEARTBEAT_INTERVAL / 2);
        leases.set_lease_duration(300);
        let pauses: Vec<Duration> = (0..50).map(|_| leases.heartbeat_pause()).collect();
        assert!(pauses.iter().all(|p| (50..=100).contains(&p.as_millis())), "{pauses:?}");
        assert!(pauses.iter().max() != pauses.iter().min(), "heartbeats are jittered");
        leases.set_lease_duration(1);
        assert!(leases.heartbeat_pause() >= MIN_HEARTBEAT_INTERVAL / 2);
    }
}
