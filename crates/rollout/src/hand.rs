//! What a worker has in hand: its leases and how far the work on them is, as its heartbeat tells. Must not know: the service.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use unveil_proto::v1;

/// Longest time between two heartbeats.
const PULSE: Duration = Duration::from_secs(2);
/// Shortest time between two heartbeats.
const FASTEST: Duration = Duration::from_millis(10);
/// Heartbeats within the time that a lease lasts.
const BEATS: u32 = 3;

/// A number that grows with each step of the worker's work: a decode step, an arriving part of weights or of an image, a prepared
/// group. Clones share it.
#[derive(Debug, Clone, Default)]
pub(crate) struct Progress(Arc<AtomicU64>);

impl Progress {
    /// The work goes on; gives the new number.
    pub fn step(&self) -> u64 {
        self.0.fetch_add(1, Ordering::Relaxed) + 1
    }

    fn now(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Leases that are neither submitted nor handed back.
pub(crate) struct Hand {
    /// Tells this process from others of its name.
    pub session: u64,
    pub progress: Progress,
    renew: Mutex<Duration>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Lease calls that were begun, and those that are over.
    calls: u64,
    done: u64,
    /// The progress of groups that do not wait for the engine any more; others go on as the worker does.
    leases: HashMap<String, Option<u64>>,
}

impl Hand {
    /// Nothing in hand; leases are taken to last for `lease` until the service says otherwise.
    pub fn new(lease: Duration) -> Self {
        // 0 would say that there are no sessions.
        let session = rand::random::<u64>().max(1);
        Self { session, progress: Progress::default(), renew: Mutex::new(lease), state: Mutex::default() }
    }

    /// Begins a lease call, and gives its number.
    pub fn call(&self) -> u64 {
        let mut state = self.lock();
        state.calls += 1;
        state.calls
    }

    /// A lease call is over, and brought these leases.
    pub fn took(&self, call: u64, leases: impl Iterator<Item = String>) {
        let mut state = self.lock();
        state.done = state.done.max(call);
        state.leases.extend(leases.map(|lease| (lease, None)));
    }

    /// A group has come a step further by itself: from here on what the worker does else is no progress of it.
    pub fn step(&self, lease: &str) {
        let step = self.progress.step();
        if let Some(own) = self.lock().leases.get_mut(lease) {
            *own = Some(step);
        }
    }

    /// Whether the work on a lease still counts.
    pub fn has(&self, lease: &str) -> bool {
        self.lock().leases.contains_key(lease)
    }

    /// A lease is submitted, handed back, or lost.
    pub fn remove(&self, lease: &str) {
        self.lock().leases.remove(lease);
    }

    /// Takes all leases, and ends the calls that are under way.
    pub fn take(&self) -> Vec<String> {
        let mut state = self.lock();
        state.done = state.calls;
        state.leases.drain().map(|(lease, _)| lease).collect()
    }

    /// What the heartbeat tells.
    pub fn told(&self) -> (u64, Vec<v1::InHand>) {
        let (state, now) = (self.lock(), self.progress.now());
        let one =
            |(lease, own): (&String, &Option<u64>)| v1::InHand { lease: lease.clone(), progress: own.unwrap_or(now) };
        (state.done, state.leases.iter().map(one).collect())
    }

    /// A lease lasts for so long.
    pub fn renewed_within(&self, ms: u32) {
        if ms > 0 {
            *self.renew.lock().unwrap_or_else(PoisonError::into_inner) = Duration::from_millis(ms.into());
        }
    }

    /// The time until the next heartbeat: several within the time that a lease lasts, and not all workers at once.
    pub fn pause(&self) -> Duration {
        let renew = *self.renew.lock().unwrap_or_else(PoisonError::into_inner);
        (renew / BEATS).clamp(FASTEST, PULSE).mul_f64(rand::random_range(0.5..=1.0))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(hand: &Hand) -> (u64, Vec<(String, u64)>) {
        let (done, in_hand) = hand.told();
        let mut all: Vec<_> = in_hand.into_iter().map(|h| (h.lease, h.progress)).collect();
        all.sort();
        (done, all)
    }

    #[test]
    fn groups_go_on_with_the_engine_until_they_are_generated() {
        let hand = Hand::new(Duration::from_secs(60));
        let names = |names: &[&str]| names.iter().map(|n| (*n).to_owned()).collect::<Vec<_>>().into_iter();
        assert_eq!(hand.call(), 1);
        assert_eq!(told(&hand), (0, vec![]), "the call is under way");
        hand.took(1, names(&["a", "b"]));
        hand.progress.step();
        assert_eq!(told(&hand), (1, vec![("a".into(), 1), ("b".into(), 1)]));
        hand.step("a");
        hand.progress.step();
        assert_eq!(told(&hand), (1, vec![("a".into(), 2), ("b".into(), 3)]), "only its own steps count for `a`");
        hand.step("a");
        assert_eq!(told(&hand).1[0].1, 4);
        assert_eq!(hand.call(), 2);
        hand.remove("a");
        assert!(hand.has("b") && !hand.has("a"));
        assert_eq!(hand.take(), ["b"]);
        assert_eq!(told(&hand), (2, vec![]), "what the call under way brings is not taken");
    }

    #[test]
    fn heartbeats_come_several_times_within_a_lease() {
        let hand = Hand::new(Duration::from_secs(60));
        assert!(hand.pause() <= PULSE && hand.pause() >= PULSE / 2);
        hand.renewed_within(0);
        assert!(hand.pause() >= PULSE / 2);
        hand.renewed_within(300);
        let pauses: Vec<Duration> = (0..50).map(|_| hand.pause()).collect();
        assert!(pauses.iter().all(|p| (50..=100).contains(&p.as_millis())), "{pauses:?}");
        assert!(pauses.iter().max() != pauses.iter().min(), "not all workers at once");
        hand.renewed_within(1);
        assert!(hand.pause() >= FASTEST / 2);
    }
}
