//! Which weights the worker generates with: a task beside generation fetches what is newer and has it taken over between two
//! tokens; here is known what is held, what leases need, and whether the service still trusts it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::{Notify, watch};
use unveil_proto::v1::HeldWeights;

use crate::device::DeviceThread;
use crate::experience::Distrust;
use crate::meter::Meter;
use crate::sync::WeightReceiver;
use crate::worker::IDLE;
use crate::{Result, RolloutError};

/// How often in a row the service may refuse the weights that were just fetched from it.
const TRIES: u64 = 3;

/// The weights on the device, as everything but the device sees them.
pub(crate) struct Weights {
    address: String,
    present: watch::Sender<Present>,
    /// Checksum of each version that was taken over, since the last distrust.
    taken: Mutex<BTreeMap<u64, u32>>,
    forget: Notify,
    /// Times that the service did not trust what is held. What was made before belongs to another epoch.
    epoch: AtomicU64,
    refused_in_a_row: AtomicU64,
    meter: Meter,
}

#[derive(Debug, Clone, Copy, Default)]
struct Present {
    held: Option<HeldWeights>,
    /// Times that another learner was found behind the address, with older or other weights. What was leased before is of another era.
    era: u64,
    /// Newest version that a lease of this era asked for.
    needed: u64,
}

impl Weights {
    /// None yet; `address` is the experience service, for messages.
    pub fn new(address: &str, meter: Meter) -> Self {
        Self {
            address: address.to_owned(),
            present: watch::Sender::new(Present::default()),
            taken: Mutex::default(),
            forget: Notify::new(),
            epoch: AtomicU64::new(0),
            refused_in_a_row: AtomicU64::new(0),
            meter,
        }
    }

    /// What the device generates with; none before the first weights and after a distrust.
    pub fn present(&self) -> Option<HeldWeights> {
        self.present.borrow().held
    }

    /// Number of distrusts so far.
    pub fn epoch(&self) -> u64 {
        self.epoch.load(Ordering::SeqCst)
    }

    /// Number of times so far that another learner was found.
    pub fn era(&self) -> u64 {
        self.present.borrow().era
    }

    /// Waits until the device has weights. Ends with the keeper's error where that never happens.
    pub async fn any(&self) -> Result<()> {
        let mut present = self.present.subscribe();
        present.wait_for(|p| p.held.is_some()).await.map(|_| ()).map_err(|_| RolloutError::Died("weights"))
    }

    /// Waits until the device has `version` or a newer one, which a lease of `era` asks for; false where that era is over: nobody
    /// waits for its groups. Ends with the keeper's error where neither ever happens.
    pub async fn at_least(&self, version: u64, era: u64) -> Result<bool> {
        self.present.send_if_modified(|p| {
            if p.era == era {
                p.needed = p.needed.max(version);
            }
            false
        });
        let mut present = self.present.subscribe();
        let there = |p: &Present| p.era != era || p.held.is_some_and(|h| h.version >= version);
        let there = present.wait_for(there).await.map_err(|_| RolloutError::Died("weights"))?;
        Ok(there.era == era)
    }

    /// Checksums of the versions that made some tokens in `epoch`; none where it is over.
    pub fn told(&self, epoch: u64, versions: impl Iterator<Item = u64>) -> Option<Vec<HeldWeights>> {
        let versions: BTreeSet<u64> = versions.collect();
        let taken = self.lock();
        let known = |version| taken.get(&version).map(|checksum| HeldWeights { version, checksum: *checksum });
        versions.into_iter().map(known).collect::<Option<Vec<_>>>().filter(|_| self.epoch() == epoch)
    }

    /// The service has taken a call that told it what is held.
    pub fn trusted(&self) {
        self.refused_in_a_row.store(0, Ordering::SeqCst);
    }

    /// The service refuses what was held in `epoch`: it is forgotten and fetched again, unless that happened meanwhile.
    ///
    /// # Errors
    /// It was damaged several times in a row. Weights of another learner are none of the worker's fault, however often.
    pub fn distrust(&self, epoch: u64, why: Distrust) -> Result<()> {
        let mut taken = self.lock();
        if self.epoch.compare_exchange(epoch, epoch + 1, Ordering::SeqCst, Ordering::SeqCst).is_err() {
            return Ok(());
        }
        let (foreign, what) = match why {
            Distrust::Foreign(what) => (true, what),
            Distrust::Damaged(what) => (false, what),
        };
        if !foreign && self.refused_in_a_row.fetch_add(1, Ordering::SeqCst) + 1 >= TRIES {
            return Err(RolloutError::Weights { address: self.address.clone(), what });
        }
        tracing::warn!("the experience service at {} does not trust this worker's weights: {what}", self.address);
        taken.clear();
        self.present.send_modify(|p| {
            *p = Present { held: None, era: p.era + u64::from(foreign), needed: if foreign { 0 } else { p.needed } };
        });
        self.meter.holds(None, Duration::ZERO);
        self.forget.notify_one();
        Ok(())
    }

    /// The learner behind the address has nothing newer than `version`, though leases asked for more, or the device had more: it was
    /// started again at an older version. What was leased and made before does not count any more.
    fn start_over(&self, version: u64) {
        let mut taken = self.lock();
        self.epoch.fetch_add(1, Ordering::SeqCst);
        let held = self.present().filter(|h| h.version == version);
        taken.clear();
        taken.extend(held.map(|h| (h.version, h.checksum)));
        let Present { needed, .. } = *self.present.borrow();
        tracing::warn!(
            version,
            needed,
            "the learner at {} has gone back to an older version: this worker starts over from there",
            self.address
        );
        self.present.send_modify(|p| *p = Present { held, era: p.era + 1, needed: 0 });
        self.meter.back_to(version);
    }

    fn needed(&self) -> u64 {
        self.present.borrow().needed
    }

    /// The device has weights that were asked for in `epoch`; false where that is over: they are fetched again.
    fn take(&self, epoch: u64, held: HeldWeights, took: Duration) -> bool {
        let mut taken = self.lock();
        if self.epoch() != epoch {
            return false;
        }
        taken.insert(held.version, held.checksum);
        self.meter.holds(Some(held.version), took);
        self.present.send_modify(|p| p.held = Some(held));
        true
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
        let (started, needed, mut epoch) = (Instant::now(), weights.needed(), weights.epoch());
        let found = tokio::select! {
            found = receiver.fetch(wait) => found?,
            () = weights.forget.notified() => {
                receiver.forget();
                continue;
            }
        };
        let Some(update) = found else {
            if let Some(h) = weights.present().filter(|h| h.version < needed) {
                weights.start_over(h.version);
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
                if weights.epoch() == epoch
                    && (version < needed || weights.present().is_some_and(|h| h.version > version))
                {
                    weights.start_over(version);
                    epoch += 1;
                }
                if !weights.take(epoch, held, arrived.elapsed()) {
                    receiver.forget();
                    continue;
                }
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
        let bad = || Distrust::Damaged("bad".into());
        assert!(w.take(0, held(3, 7), Duration::ZERO) && w.take(0, held(4, 8), Duration::ZERO));
        assert_eq!(w.told(0, [4, 3, 4].into_iter()), Some(vec![held(3, 7), held(4, 8)]));
        assert_eq!(w.told(0, [3, 5].into_iter()), None, "nobody knows what made the token of version 5");
        w.distrust(0, bad()).unwrap();
        assert_eq!((w.present(), w.epoch(), w.told(0, [3].into_iter())), (None, 1, None));
        // A second call that was made with the same weights says nothing new.
        w.distrust(0, bad()).unwrap();
        assert_eq!(w.epoch(), 1);
        assert!(!w.take(0, held(4, 8), Duration::ZERO), "they were under way before");
        assert!(w.take(1, held(4, 9), Duration::ZERO));
        w.trusted();
        w.distrust(1, bad()).unwrap();
        w.distrust(2, bad()).unwrap();
        let text = w.distrust(3, Distrust::Damaged("worse".into())).unwrap_err().to_string();
        assert!(text.contains("there") && text.contains("worse"), "{text}");
    }

    #[tokio::test]
    async fn a_learner_that_went_back_ends_an_era_and_never_the_worker() {
        let w = Arc::new(Weights::new("there", Meter::new()));
        // However often another learner is found.
        for epoch in 0..10 {
            assert!(w.take(epoch, held(9, 1), Duration::ZERO));
            w.distrust(epoch, Distrust::Foreign("other".into())).unwrap();
            assert_eq!((w.era(), w.present()), (epoch + 1, None));
        }
        // What leases of the one before asked for is asked for no more.
        assert!(w.take(10, held(8, 1), Duration::ZERO));
        let waits = |era| {
            let w = w.clone();
            tokio::spawn(async move { w.at_least(9, era).await.unwrap() })
        };
        let waiting = waits(10);
        tokio::task::yield_now().await;
        assert_eq!(w.needed(), 9);
        w.distrust(10, Distrust::Foreign("other".into())).unwrap();
        assert!(!waiting.await.unwrap() && w.needed() == 0);
        assert!(w.take(11, held(8, 1), Duration::ZERO));
        let waiting = waits(11);
        tokio::task::yield_now().await;
        assert_eq!((w.needed(), waiting.is_finished()), (9, false));
        w.start_over(8);
        assert!(!waiting.await.unwrap(), "nobody waits for what the old lease asked for");
        assert_eq!((w.needed(), w.present(), w.era(), w.epoch()), (0, Some(held(8, 1)), 12, 12));
        assert_eq!(w.told(11, [8].into_iter()), None, "what was made before belongs to the old learner");
        assert_eq!(w.told(12, [8].into_iter()), Some(vec![held(8, 1)]));
        assert!(!w.at_least(9, 11).await.unwrap() && w.needed() == 0);
        assert!(w.at_least(8, 12).await.unwrap());
    }

    #[tokio::test]
    async fn a_batch_waits_for_its_version() {
        let w = Arc::new(Weights::new("there", Meter::new()));
        w.take(0, held(1, 1), Duration::ZERO);
        assert!(w.at_least(1, 0).await.unwrap());
        let later = tokio::spawn({
            let w = w.clone();
            async move { w.at_least(3, 0).await.map(|_| w.present()) }
        });
        tokio::task::yield_now().await;
        assert_eq!(w.needed(), 3);
        w.take(0, held(2, 1), Duration::ZERO);
        tokio::task::yield_now().await;
        assert!(!later.is_finished());
        w.take(0, held(4, 5), Duration::ZERO);
        assert_eq!(later.await.unwrap().unwrap(), Some(held(4, 5)));
    }
}
