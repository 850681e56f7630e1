//! The state machine itself.
//!
//! Groups are numbered over all passes and trained strictly in that order, so "which groups are trained" is one number
//! (the frontier), and exactly-once follows from it. Behind the frontier lies a window of slots, one per group that is
//! out, back, or waiting for another worker; nothing beyond the window has been handed out. What happens to leases, to batches and to groups
//! that nobody can make is in the modules beside this one.

use std::collections::{BTreeMap, HashSet};
use std::time::Duration;

use serde::Serialize;
use unveil_core::{GroupId, WeightVersion};

use crate::event::Event;
use crate::hands::{Hands, Slot};
use crate::ledger::Ledger;
use crate::order::Order;
use crate::settings::{ExperienceError, Settings, Snapshot};
use crate::{aside, standing};

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
    /// Groups trained since the start of the run, in the lineage of its checkpoints.
    pub trained: u64,
    /// Groups whose update was skipped, likewise.
    pub skipped: u64,
    /// Groups without any reward, likewise.
    pub wholly_masked: u64,
    /// Groups set aside and never trained, likewise.
    pub dropped: u64,
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
    /// Submissions that were refused for what they hold.
    pub rejected: u64,
    /// Groups that came back because no reward could be had.
    pub unscored: u64,
    /// Groups that a worker could not make.
    pub failed: u64,
}

/// Leases, queue, staleness and accounting over payloads `T` (a group's responses and rewards).
#[derive(Debug)]
pub struct Experience<T> {
    pub(crate) settings: Settings,
    pub(crate) order: Order,
    /// Groups with a smaller number are trained.
    pub(crate) frontier: u64,
    /// The frontier when the current version was published: the window of leases starts here.
    pub(crate) published_at: u64,
    /// The first group that was never handed out. Slots exist for exactly `frontier..cursor`.
    pub(crate) cursor: u64,
    pub(crate) slots: BTreeMap<u64, Slot<T>>,
    /// Groups in training: `frontier..frontier + taken`.
    pub(crate) taken: u64,
    pub(crate) version: WeightVersion,
    pub(crate) leases: u64,
    pub(crate) hands: Hands,
    pub(crate) ledger: Ledger,
    pub(crate) faults: aside::Faults,
    pub(crate) standings: standing::Standings,
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
            faults: aside::Faults::default(),
            standings: standing::Standings::default(),
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
        e.take_aside(&snapshot.aside);
        Ok(e)
    }

    /// Past the last group that may be handed out with the published version.
    pub(crate) fn end(&self) -> u64 {
        self.window_end().min(self.total().unwrap_or(u64::MAX)).max(self.cursor)
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
        self.window_opens();
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

    /// Whether every group of the run is done.
    pub fn finished(&self) -> bool {
        self.total().is_some_and(|n| self.frontier >= n)
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
            if !matches!(slot, Slot::Waiting { .. } | Slot::Aside { .. }) {
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
            aside: self.pending_aside(),
        }
    }

    /// Counts of now.
    pub fn stats(&self) -> Stats {
        let n = self.order.records();
        let [trained, skipped, wholly_masked, dropped] = self.ledger.sums();
        let mut s = Stats {
            trained,
            skipped,
            wholly_masked,
            dropped: dropped + self.aside_in(0..u64::MAX),
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
                Slot::Aside { .. } => {}
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
