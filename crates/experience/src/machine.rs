//! The state machine itself.
//!
//! Groups are numbered over all passes and trained strictly in that order, so "which groups are trained" is one number
//! (the frontier), and exactly-once follows from it. Behind the frontier lies a window of slots, one per group that is
//! out, back, or waiting for another worker; nothing beyond the window has been handed out. What happens to leases is in the
//! module beside this one.

use std::collections::{BTreeMap, HashSet};
use std::time::Duration;

use serde::Serialize;
use unveil_core::{GroupId, WeightVersion};

use crate::event::Event;
use crate::hands::{Hands, Slot};
use crate::ledger::Ledger;
use crate::order::Order;
use crate::settings::{ExperienceError, Settings, Snapshot, VersionSpan};

/// Counts for metrics and the progress display.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct Stats {
    /// Groups that returned to the queue and wait for a worker.
    pub waiting: usize,
    /// Groups with workers.
    pub leased: usize,
    /// Groups back, not trained.
    pub ready: usize,
    /// Groups in the batch being trained.
    pub training: usize,
    /// Groups trained since the start of the run.
    pub trained: u64,
    /// Pass of the next group to train.
    pub pass: u64,
    /// Its position in that pass.
    pub position: u64,
    /// Published weight version.
    pub version: WeightVersion,
    /// Submissions that were not counted because the group was in already, since this process started.
    pub duplicates: u64,
    /// Groups thrown away as too stale.
    pub stale: u64,
    /// Leases that ran out.
    pub expired: u64,
    /// Submissions under leases that do not hold.
    pub refused: u64,
}

/// Leases, queue, staleness and accounting over payloads `T` (a group's responses and rewards).
#[derive(Debug)]
pub struct Experience<T> {
    pub(crate) settings: Settings,
    pub(crate) order: Order,
    /// Groups with a smaller number are trained.
    frontier: u64,
    /// The frontier when the current version was published: the window of leases starts here.
    pub(crate) published_at: u64,
    /// The first group that was never handed out. Slots exist for exactly `frontier..cursor`.
    pub(crate) cursor: u64,
    pub(crate) slots: BTreeMap<u64, Slot<T>>,
    /// Groups in training: `frontier..frontier + taken`.
    taken: u64,
    pub(crate) version: WeightVersion,
    pub(crate) leases: u64,
    pub(crate) hands: Hands,
    ledger: Ledger,
    pub(crate) now: Duration,
    pub(crate) counts: Stats,
    pub(crate) events: Vec<Event>,
}

impl<T> Experience<T> {
    /// A run at its start, version 0. `ids` are the record ids in the data set's order.
    ///
    /// # Errors
    /// A setting out of range, no records, or an id twice.
    pub fn new(settings: Settings, ids: Vec<String>) -> Result<Self, ExperienceError> {
        settings.check()?;
        if ids.is_empty() || u32::try_from(ids.len()).is_err() {
            return Err(ExperienceError::NoRecords);
        }
        let mut seen = HashSet::with_capacity(ids.len());
        if let Some(id) = ids.iter().find(|id| !seen.insert(id.as_str())) {
            return Err(ExperienceError::DoubleId(id.clone()));
        }
        let order = Order::new(ids, settings.seed);
        Ok(Self {
            settings,
            order,
            frontier: 0,
            published_at: 0,
            cursor: 0,
            slots: BTreeMap::new(),
            taken: 0,
            version: 0,
            leases: 0,
            hands: Hands::default(),
            ledger: Ledger::default(),
            now: Duration::ZERO,
            counts: Stats::default(),
            events: Vec::new(),
        })
    }

    /// A run as its checkpoint left it: trained groups stay trained, all others are handed out again.
    ///
    /// # Errors
    /// As [`Self::new`], and [`ExperienceError::OtherRun`] when the data or the seed differ.
    pub fn restore(settings: Settings, ids: Vec<String>, snapshot: &Snapshot) -> Result<Self, ExperienceError> {
        let mut e = Self::new(settings, ids)?;
        let other = |what, was: String, now: String| Err(ExperienceError::OtherRun { what, was, now });
        if snapshot.records != e.order.records() {
            let (was, now) = (snapshot.records, e.order.records());
            return other("data set", format!("{was} records"), format!("{now}"));
        }
        let data = e.order.fingerprint();
        if snapshot.data != data {
            return other("data set", format!("ids {}", short(&snapshot.data)), short(&data).to_string());
        }
        if snapshot.seed != e.settings.seed {
            return other("seed", snapshot.seed.to_string(), e.settings.seed.to_string());
        }
        (e.frontier, e.published_at, e.cursor) = (snapshot.trained, snapshot.trained, snapshot.trained);
        e.version = snapshot.version;
        e.ledger = snapshot.ledger.clone();
        Ok(e)
    }

    /// Past the last group that may be handed out with the published version.
    pub(crate) fn end(&self) -> u64 {
        let window = (self.settings.max_staleness + 1).saturating_mul(self.settings.groups_per_step as u64);
        let end = self.published_at.saturating_add(window).min(self.settings.total_groups.unwrap_or(u64::MAX));
        end.max(self.cursor)
    }

    /// The next batch in group order, once all its groups are in; `None` before, and while a batch is in training.
    ///
    /// Groups that have become too stale (the version grew by more than one per batch) return to the queue instead.
    pub fn next_batch(&mut self, now: Duration) -> Option<Vec<(GroupId, T)>> {
        self.tick(now);
        let left = self.settings.total_groups.map_or(u64::MAX, |n| n.saturating_sub(self.frontier));
        let size = (self.settings.groups_per_step as u64).min(left);
        if self.taken > 0 || size == 0 {
            return None;
        }
        let batch = self.frontier..self.frontier + size;
        let mut whole = true;
        for g in batch.clone() {
            whole &= matches!(self.slots.get(&g), Some(Slot::Ready { versions, .. }) if !self.lags(*versions));
        }
        if !whole {
            self.drop_stale(batch);
            return None;
        }
        self.taken = size;
        let mut out = Vec::with_capacity(size as usize);
        for g in batch {
            if let Some(Slot::Ready { payload, .. }) = self.slots.insert(g, Slot::Training) {
                out.push((self.order.group(g), payload));
            }
        }
        Some(out)
    }

    fn lags(&self, versions: VersionSpan) -> bool {
        versions.oldest.saturating_add(self.settings.max_staleness) < self.version
    }

    fn drop_stale(&mut self, batch: std::ops::Range<u64>) {
        for g in batch {
            let Some(Slot::Ready { versions, worker, lease, .. }) = self.slots.get(&g) else {
                continue;
            };
            if !self.lags(*versions) {
                continue;
            }
            let (worker, lease, oldest) = (worker.clone(), lease.clone(), versions.oldest);
            let (ms, group) = (self.ms(), self.order.group(g));
            self.counts.stale += 1;
            self.events.push(Event::Stale { ms, worker, lease, group, oldest, version: self.version });
            self.put(g, Slot::waiting());
        }
    }

    /// Marks the batch that [`Self::next_batch`] returned as trained.
    ///
    /// # Errors
    /// [`ExperienceError::NotInTraining`] when `groups` is not that batch; nothing changes then.
    pub fn trained(&mut self, step: u64, groups: &[GroupId], now: Duration) -> Result<(), ExperienceError> {
        self.tick(now);
        let expected: Vec<GroupId> = (self.frontier..self.frontier + self.taken).map(|g| self.order.group(g)).collect();
        if groups.is_empty() || groups != expected {
            return Err(ExperienceError::NotInTraining { step, reported: groups.len(), taken: expected.len() });
        }
        for group in &expected {
            if let Some(row) = self.order.row(group) {
                self.ledger.note(group.pass, row, self.order.records());
            }
        }
        self.frontier += self.taken;
        self.taken = 0;
        self.slots = self.slots.split_off(&self.frontier);
        self.order.forget_before(self.frontier / self.order.records());
        self.events.push(Event::Trained { ms: self.ms(), step, groups: expected });
        Ok(())
    }

    /// Tells that weights `version` are what workers get from now on; call it before they can fetch them. Publishing
    /// the current version again changes nothing but opens the window.
    ///
    /// # Errors
    /// [`ExperienceError::VersionBack`] when the version is older than the current one.
    pub fn published(&mut self, version: WeightVersion) -> Result<(), ExperienceError> {
        if version < self.version {
            return Err(ExperienceError::VersionBack { version, current: self.version });
        }
        self.version = version;
        self.published_at = self.frontier;
        Ok(())
    }

    /// The settings of the run.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// The published weight version.
    pub fn version(&self) -> WeightVersion {
        self.version
    }

    /// Whether every group of the run is trained.
    pub fn finished(&self) -> bool {
        self.settings.total_groups.is_some_and(|n| self.frontier >= n)
    }

    /// Index into the `ids` of a group that was handed out and is not long trained.
    pub fn index_of(&self, group: &GroupId) -> Option<usize> {
        self.order.row(group)
    }

    /// The position in the data, for the checkpoint. A batch that is in training counts as not trained.
    pub fn snapshot(&self) -> Snapshot {
        let n = self.order.records();
        let mut in_flight = Vec::new();
        for (g, slot) in &self.slots {
            if !matches!(slot, Slot::Waiting { .. }) {
                in_flight.extend(self.order.known(*g));
            }
        }
        Snapshot {
            trained: self.frontier,
            pass: self.frontier / n,
            position: self.frontier % n,
            version: self.version,
            seed: self.settings.seed,
            records: n,
            data: self.order.fingerprint(),
            in_flight,
            ledger: self.ledger.clone(),
        }
    }

    /// Counts of now.
    pub fn stats(&self) -> Stats {
        let n = self.order.records();
        let mut s = Stats {
            trained: self.frontier,
            pass: self.frontier / n,
            position: self.frontier % n,
            version: self.version,
            ..self.counts
        };
        for slot in self.slots.values() {
            match slot {
                Slot::Waiting { .. } => s.waiting += 1,
                Slot::Leased { .. } => s.leased += 1,
                Slot::Ready { .. } => s.ready += 1,
                Slot::Training => s.training += 1,
            }
        }
        s
    }

    /// Events since the last call, oldest first. They are kept until drained: drain regularly.
    pub fn drain_events(&mut self) -> Vec<Event> {
        std::mem::take(&mut self.events)
    }

    pub(crate) fn ms(&self) -> u64 {
        u64::try_from(self.now.as_millis()).unwrap_or(u64::MAX)
    }

    /// Time never goes back here, whatever the caller's clock does.
    pub(crate) fn tick(&mut self, now: Duration) {
        self.now = self.now.max(now);
    }
}

fn short(hash: &str) -> &str {
    hash.get(..12).unwrap_or(hash)
}
