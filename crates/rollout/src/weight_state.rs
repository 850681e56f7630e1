//! The weights that the worker generates with: the version on the device, the version that leases need, and whether the service has
//! rejected them; and the task that fetches newer weights and has the device load them between two tokens.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::{Notify, watch};
use unveil_experience_rpc::{ClientError, WeightReceiver, WeightRejection};
use unveil_proto::v1::HeldWeights;

use crate::device::DeviceThread;
use crate::meter::Meter;
use crate::{Result, RolloutError};

/// Shortest time between two calls without a result.
pub(crate) const POLL_INTERVAL: Duration = Duration::from_millis(20);

/// Consecutive rejections of freshly fetched weights after which the worker gives up.
const MAX_REJECTIONS: u64 = 3;

/// State of the weights on the device, shared by all tasks of the worker.
pub(crate) struct WeightState {
    address: String,
    current: watch::Sender<CurrentWeights>,
    /// Checksum of each version loaded in this generation.
    loaded: Mutex<BTreeMap<u64, u32>>,
    refetch: Notify,
    /// Number of times that the held weights became invalid. Tokens sampled before belong to an earlier generation.
    generation: AtomicU64,
    consecutive_rejections: AtomicU64,
    meter: Meter,
}

#[derive(Debug, Clone, Copy, Default)]
struct CurrentWeights {
    held: Option<HeldWeights>,
    /// Number of times that a different learner, with older or other weights, appeared at the address. Earlier leases belong to an
    /// earlier era.
    era: u64,
    /// Newest version required by a lease of this era.
    needed: u64,
}

impl WeightState {
    /// Creates the state before the first weights; `address` of the experience service is used in messages.
    pub(crate) fn new(address: &str, meter: Meter) -> Self {
        Self {
            address: address.to_owned(),
            current: watch::Sender::new(CurrentWeights::default()),
            loaded: Mutex::default(),
            refetch: Notify::new(),
            generation: AtomicU64::new(0),
            consecutive_rejections: AtomicU64::new(0),
            meter,
        }
    }

    /// Returns the weights on the device; `None` before the first ones and after a rejection.
    pub(crate) fn held(&self) -> Option<HeldWeights> {
        self.current.borrow().held
    }

    /// Returns the current generation: the number of times that the held weights became invalid.
    pub(crate) fn generation(&self) -> u64 {
        self.generation.load(Ordering::SeqCst)
    }

    /// Returns the current era: the number of times that a different learner appeared.
    pub(crate) fn era(&self) -> u64 {
        self.current.borrow().era
    }

    /// Waits until the device has weights.
    ///
    /// # Errors
    /// Returns [`RolloutError::Died`] if the state is dropped.
    pub(crate) async fn wait_for_any(&self) -> Result<()> {
        let mut current = self.current.subscribe();
        current.wait_for(|p| p.held.is_some()).await.map(|_| ()).map_err(|_| RolloutError::Died("weights"))
    }

    /// Waits until the device has `version` or a newer one, as required by a lease of `era`. Returns false if that era has ended, so
    /// that its groups are no longer needed.
    ///
    /// # Errors
    /// Returns [`RolloutError::Died`] if the state is dropped.
    pub(crate) async fn wait_for_version(&self, version: u64, era: u64) -> Result<bool> {
        self.current.send_if_modified(|p| {
            if p.era == era {
                p.needed = p.needed.max(version);
            }
            false
        });
        let mut current = self.current.subscribe();
        let is_decided = |p: &CurrentWeights| p.era != era || p.held.is_some_and(|h| h.version >= version);
        let decided = current.wait_for(is_decided).await.map_err(|_| RolloutError::Died("weights"))?;
        Ok(decided.era == era)
    }

    /// Returns the checksums of the versions that sampled tokens in `generation`; `None` if that generation has ended.
    pub(crate) fn provenance(&self, generation: u64, versions: impl Iterator<Item = u64>) -> Option<Vec<HeldWeights>> {
        let versions: BTreeSet<u64> = versions.collect();
        let loaded = self.lock();
        let held = |version| loaded.get(&version).map(|checksum| HeldWeights { version, checksum: *checksum });
        versions.into_iter().map(held).collect::<Option<Vec<_>>>().filter(|_| self.generation() == generation)
    }

    /// Records that the service accepted a call that reported the held weights.
    pub(crate) fn confirm(&self) {
        self.consecutive_rejections.store(0, Ordering::SeqCst);
    }

    /// Drops the weights of `generation`, which the service rejected, and has them fetched again, unless that has already happened.
    ///
    /// # Errors
    /// Returns [`ClientError::Weights`] if they were damaged several times in a row. Weights of another learner do not count, since the
    /// worker did not damage them.
    pub(crate) fn invalidate(&self, generation: u64, why: WeightRejection) -> Result<()> {
        let mut loaded = self.lock();
        if self.generation.compare_exchange(generation, generation + 1, Ordering::SeqCst, Ordering::SeqCst).is_err() {
            return Ok(());
        }
        let (other_learner, what) = match why {
            WeightRejection::OtherLearner(what) => (true, what),
            WeightRejection::Damaged(what) => (false, what),
        };
        if !other_learner && self.consecutive_rejections.fetch_add(1, Ordering::SeqCst) + 1 >= MAX_REJECTIONS {
            return Err(ClientError::Weights { address: self.address.clone(), what }.into());
        }
        tracing::warn!("weights rejected by the experience service at {}, fetching them again: {what}", self.address);
        loaded.clear();
        self.current.send_modify(|p| {
            let era = p.era + u64::from(other_learner);
            *p = CurrentWeights { held: None, era, needed: if other_learner { 0 } else { p.needed } };
        });
        self.meter.set_held(None, Duration::ZERO);
        self.refetch.notify_one();
        Ok(())
    }

    /// Starts a new era at `version`: the learner has nothing newer although leases required it or the device had it, so it was
    /// restarted at an older version. Earlier leases and tokens no longer count.
    fn restart_from(&self, version: u64) {
        let mut loaded = self.lock();
        self.generation.fetch_add(1, Ordering::SeqCst);
        let held = self.held().filter(|h| h.version == version);
        loaded.clear();
        loaded.extend(held.map(|h| (h.version, h.checksum)));
        let CurrentWeights { needed, .. } = *self.current.borrow();
        tracing::warn!(
            version,
            needed,
            "the learner at {} was restarted at an older version, continuing from there",
            self.address
        );
        self.current.send_modify(|p| *p = CurrentWeights { held, era: p.era + 1, needed: 0 });
        self.meter.reset_newest(version);
    }

    fn needed(&self) -> u64 {
        self.current.borrow().needed
    }

    /// Records that the device has loaded weights requested in `generation`. Returns false if that generation has ended, so that they
    /// must be fetched again.
    fn record_loaded(&self, generation: u64, held: HeldWeights, took: Duration) -> bool {
        let mut loaded = self.lock();
        if self.generation() != generation {
            return false;
        }
        loaded.insert(held.version, held.checksum);
        self.meter.set_held(Some(held.version), took);
        self.current.send_modify(|p| p.held = Some(held));
        true
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<u64, u32>> {
        self.loaded.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Fetches weights as they are published, and has the device load them. Runs until it is dropped or fails.
pub(crate) async fn sync_weights(
    weights: Arc<WeightState>,
    mut receiver: WeightReceiver,
    device: Arc<DeviceThread>,
    wait: Duration,
) -> Result<()> {
    loop {
        let started = Instant::now();
        let needed = weights.needed();
        let mut generation = weights.generation();
        let fetched = tokio::select! {
            fetched = receiver.fetch(wait) => fetched?,
            () = weights.refetch.notified() => {
                receiver.forget();
                continue;
            }
        };
        let Some(update) = fetched else {
            if let Some(h) = weights.held().filter(|h| h.version < needed) {
                weights.restart_from(h.version);
            }
            tokio::time::sleep(POLL_INTERVAL.saturating_sub(started.elapsed())).await;
            continue;
        };
        let version = update.version;
        let fetch_ms = started.elapsed().as_millis();
        let whole = update.whole;
        let arrived = Instant::now();
        match device.load(update).await? {
            Ok(update) => {
                let held = HeldWeights { version, checksum: update.checksum };
                receiver.adopt(update);
                if weights.generation() == generation
                    && (version < needed || weights.held().is_some_and(|h| h.version > version))
                {
                    weights.restart_from(version);
                    generation += 1;
                }
                if !weights.record_loaded(generation, held, arrived.elapsed()) {
                    receiver.forget();
                    continue;
                }
                tracing::debug!(version, whole, fetch_ms, "weights loaded");
            }
            Err(what) => return Err(ClientError::Weights { address: weights.address.clone(), what }.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn held(version: u64, checksum: u32) -> HeldWeights {
        HeldWeights { version, checksum }
    }

    #[test]
    fn repeated_rejections_of_weights_end_in_an_error() {
        let w = WeightState::new("there", Meter::new());
        let damaged = || WeightRejection::Damaged("bad".into());
        assert!(w.record_loaded(0, held(3, 7), Duration::ZERO) && w.record_loaded(0, held(4, 8), Duration::ZERO));
        assert_eq!(w.provenance(0, [4, 3, 4].into_iter()), Some(vec![held(3, 7), held(4, 8)]));
        assert_eq!(w.provenance(0, [3, 5].into_iter()), None, "version 5 was never loaded");
        w.invalidate(0, damaged()).unwrap();
        assert_eq!((w.held(), w.generation(), w.provenance(0, [3].into_iter())), (None, 1, None));
        // A second rejection of the same weights changes nothing.
        w.invalidate(0, damaged()).unwrap();
        assert_eq!(w.generation(), 1);
        assert!(!w.record_loaded(0, held(4, 8), Duration::ZERO), "they were requested before the rejection");
        assert!(w.record_loaded(1, held(4, 9), Duration::ZERO));
        w.confirm();
        w.invalidate(1, damaged()).unwrap();
        w.invalidate(2, damaged()).unwrap();
        let text = w.invalidate(3, WeightRejection::Damaged("worse".into())).unwrap_err().to_string();
        assert!(text.contains("there") && text.contains("worse"), "{text}");
    }

    #[tokio::test]
    async fn older_learner_starts_a_new_era() {
        let w = Arc::new(WeightState::new("there", Meter::new()));
        // Any number of other learners is accepted.
        for generation in 0..10 {
            assert!(w.record_loaded(generation, held(9, 1), Duration::ZERO));
            w.invalidate(generation, WeightRejection::OtherLearner("other".into())).unwrap();
            assert_eq!((w.era(), w.held()), (generation + 1, None));
        }
        // Versions required by leases of the earlier learner are no longer needed.
        assert!(w.record_loaded(10, held(8, 1), Duration::ZERO));
        let wait = |era| {
            let w = w.clone();
            tokio::spawn(async move { w.wait_for_version(9, era).await.unwrap() })
        };
        let waiting = wait(10);
        tokio::task::yield_now().await;
        assert_eq!(w.needed(), 9);
        w.invalidate(10, WeightRejection::OtherLearner("other".into())).unwrap();
        assert!(!waiting.await.unwrap() && w.needed() == 0);
        assert!(w.record_loaded(11, held(8, 1), Duration::ZERO));
        let waiting = wait(11);
        tokio::task::yield_now().await;
        assert_eq!((w.needed(), waiting.is_finished()), (9, false));
        w.restart_from(8);
        assert!(!waiting.await.unwrap(), "the version required by the old lease is not waited for");
        assert_eq!((w.needed(), w.held(), w.era(), w.generation()), (0, Some(held(8, 1)), 12, 12));
        assert_eq!(w.provenance(11, [8].into_iter()), None, "earlier tokens belong to the old learner");
        assert_eq!(w.provenance(12, [8].into_iter()), Some(vec![held(8, 1)]));
        assert!(!w.wait_for_version(9, 11).await.unwrap() && w.needed() == 0);
        assert!(w.wait_for_version(8, 12).await.unwrap());
    }

    #[tokio::test]
    async fn batches_wait_for_their_version() {
        let w = Arc::new(WeightState::new("there", Meter::new()));
        w.record_loaded(0, held(1, 1), Duration::ZERO);
        assert!(w.wait_for_version(1, 0).await.unwrap());
        let later = tokio::spawn({
            let w = w.clone();
            async move { w.wait_for_version(3, 0).await.map(|_| w.held()) }
        });
        tokio::task::yield_now().await;
        assert_eq!(w.needed(), 3);
        w.record_loaded(0, held(2, 1), Duration::ZERO);
        tokio::task::yield_now().await;
        assert!(!later.is_finished());
        w.record_loaded(0, held(4, 5), Duration::ZERO);
        assert_eq!(later.await.unwrap().unwrap(), Some(held(4, 5)));
    }
}
