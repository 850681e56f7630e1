//! Which weights the worker generates with: a task beside generation fetches what is newer and has it taken over between two
//! tokens; here is known what is held, what leases need, and whether the service still trusts it.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::{Notify, watch};
use unveil_proto::v1::HeldWeights;

use crate::device::DeviceThread;
use crate::meter::Meter;
use crate::sync::WeightReceiver;
use crate::worker::IDLE;
use crate::{Result, RolloutError};

/// How often in a row the service may refuse the weights that were just fetched from it.
const TRIES: u64 = 3;

/// The weights on the device, as everything but the device sees them.
pub(crate) struct Weights {
    address: String,
    present: watch::Sender<Option<HeldWeights>>,
    /// Checksum of each version that was taken over, since the last distrust.
    taken: Mutex<BTreeMap<u64, u32>>,
    /// Newest version that a lease asked for.
    needed: AtomicU64,
    forget: Notify,
    /// Times that the service did not trust what is held. What was made before belongs to another epoch.
    epoch: AtomicU64,
    refused_in_a_row: AtomicU64,
    meter: Meter,
}

impl Weights {
    /// None yet; `address` is the experience service, for messages.
    pub fn new(address: &str, meter: Meter) -> Self {
        Self {
            address: address.to_owned(),
            present: watch::Sender::new(None),
            taken: Mutex::default(),
            needed: AtomicU64::new(0),
            forget: Notify::new(),
            epoch: AtomicU64::new(0),
            refused_in_a_row: AtomicU64::new(0),
            meter,
        }
    }

    /// What the device generates with; none before the first weights and after a distrust.
    pub fn present(&self) -> Option<HeldWeights> {
        *self.present.borrow()
    }

    /// Number of distrusts so far.
    pub fn epoch(&self) -> u64 {
        self.epoch.load(Ordering::SeqCst)
    }

    /// Waits until the device has `version` or a newer one. Ends with the keeper's error where that never happens.
    pub async fn at_least(&self, version: u64) -> Result<()> {
        self.needed.fetch_max(version, Ordering::SeqCst);
        let mut present = self.present.subscribe();
        let there = present.wait_for(|held| held.is_some_and(|h| h.version >= version)).await;
        there.map(|_| ()).map_err(|_| RolloutError::Died("weights"))
    }

    /// Checksums of the versions that made some tokens.
    pub fn told(&self, versions: impl Iterator<Item = u64>) -> Vec<HeldWeights> {
        let versions: std::collections::BTreeSet<u64> = versions.collect();
        let taken = self.lock();
        let known = |version| taken.get(&version).map(|checksum| HeldWeights { version, checksum: *checksum });
        versions.into_iter().filter_map(known).collect()
    }

    /// The service has taken a call that told it what is held.
    pub fn trusted(&self) {
        self.refused_in_a_row.store(0, Ordering::SeqCst);
    }

    /// The service refuses what was held in `epoch`: it is forgotten and fetched again, unless that happened meanwhile.
    ///
    /// # Errors
    /// It was refused several times in a row.
    pub fn distrust(&self, epoch: u64, what: String) -> Result<()> {
        if self.epoch.compare_exchange(epoch, epoch + 1, Ordering::SeqCst, Ordering::SeqCst).is_err() {
            return Ok(());
        }
        if self.refused_in_a_row.fetch_add(1, Ordering::SeqCst) + 1 >= TRIES {
            return Err(RolloutError::Weights { address: self.address.clone(), what });
        }
        tracing::warn!("the experience service at {} does not trust this worker's weights: {what}", self.address);
        self.lock().clear();
        self.needed.store(0, Ordering::SeqCst);
        self.present.send_replace(None);
        self.meter.holds(None, Duration::ZERO);
        self.forget.notify_one();
        Ok(())
    }

    fn take(&self, held: HeldWeights, took: Duration) {
        self.lock().insert(held.version, held.checksum);
        self.meter.holds(Some(held.version), took);
        self.present.send_replace(Some(held));
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<u64, u32>> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Fetches weights as they are published, and has them taken over. Runs until it is dropped, or fails.
pub(crate) async fn keep(
    weights: Arc<Weights>,
    mut receiver: WeightReceiver,
    device: Arc<DeviceThread>,
    wait: Duration,
) -> Result<()> {
    loop {
        let (started, needed) = (Instant::now(), weights.needed.load(Ordering::SeqCst));
        let found = tokio::select! {
            found = receiver.fetch(wait) => found?,
            () = weights.forget.notified() => {
                receiver.forget();
                continue;
            }
        };
        let Some(update) = found else {
            if let Some(h) = weights.present().filter(|h| h.version < needed) {
                let what = format!("leases groups for weights of version {needed} and sends version {}", h.version);
                return Err(RolloutError::Protocol { address: weights.address.clone(), what });
            }
            tokio::time::sleep(IDLE.saturating_sub(started.elapsed())).await;
            continue;
        };
        let (version, fetch_ms, whole) = (update.version, started.elapsed().as_millis(), update.whole);
        let arrived = Instant::now();
        match device.load(update).await? {
            Ok(update) => {
                let held = HeldWeights { version, checksum: update.checksum };
                receiver.taken(update);
                weights.take(held, arrived.elapsed());
                tracing::debug!(version, whole, fetch_ms, "new weights");
            }
            Err(what) => return Err(RolloutError::Weights { address: weights.address.clone(), what }),
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
    fn what_is_refused_is_forgotten_once_and_not_for_ever() {
        let w = Weights::new("there", Meter::new());
        w.take(held(3, 7), Duration::ZERO);
        w.take(held(4, 8), Duration::ZERO);
        assert_eq!(w.told([4, 3, 4].into_iter()), [held(3, 7), held(4, 8)]);
        w.distrust(0, "bad".into()).unwrap();
        assert_eq!((w.present(), w.epoch(), w.told([3].into_iter()).len()), (None, 1, 0));
        // A second call that was made with the same weights says nothing new.
        w.distrust(0, "bad".into()).unwrap();
        assert_eq!(w.epoch(), 1);
        w.take(held(4, 9), Duration::ZERO);
        w.trusted();
        w.distrust(1, "bad".into()).unwrap();
        w.distrust(2, "bad".into()).unwrap();
        let text = w.distrust(3, "worse".into()).unwrap_err().to_string();
        assert!(text.contains("there") && text.contains("worse"), "{text}");
    }

    #[tokio::test]
    async fn a_batch_waits_for_its_version() {
        let w = Arc::new(Weights::new("there", Meter::new()));
        w.take(held(1, 1), Duration::ZERO);
        w.at_least(1).await.unwrap();
        let later = tokio::spawn({
            let w = w.clone();
            async move { w.at_least(3).await.map(|()| w.present()) }
        });
        tokio::task::yield_now().await;
        assert_eq!(w.needed.load(Ordering::SeqCst), 3);
        w.take(held(2, 1), Duration::ZERO);
        tokio::task::yield_now().await;
        assert!(!later.is_finished());
        w.take(held(4, 5), Duration::ZERO);
        assert_eq!(later.await.unwrap().unwrap(), Some(held(4, 5)));
    }
}
