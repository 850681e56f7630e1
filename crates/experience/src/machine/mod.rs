//! The state machine itself.
//!
//! Groups are numbered across all passes and trained strictly in that order, so the set of trained groups is described by one number (the
//! frontier), which implies exactly-once. After the frontier follows a window of slots, one per group that is leased, submitted, or waiting
//! for another worker; no group beyond the window has been leased. Leases, batches and groups that cannot be generated are handled in
//! separate modules.

mod quarantine;
mod replacement;
mod set_aside;

use std::collections::{BTreeMap, HashSet};
use std::time::Duration;

use serde::Serialize;
use unveil_core::{GroupId, WeightVersion};

use crate::data_order::DataOrder;
use crate::event::Event;
use crate::lease_index::{GroupSlot, LeaseIndex};
use crate::ledger::{ExperienceSnapshot, Ledger};
use crate::settings::{ExperienceError, Settings};

pub use set_aside::ReturnReason;

/// Counts for metrics and the progress display.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct Stats {
    /// Groups that returned to the queue and are waiting for a worker.
    pub waiting: usize,
    /// Groups under a lease.
    pub leased: usize,
    /// Groups submitted but not yet in training.
    pub ready: usize,
    /// Groups in the batch in training.
    pub training: usize,
    /// Groups trained since the start of the run, in the lineage of its checkpoints.
    pub trained: u64,
    /// Groups whose update was skipped, in that lineage.
    pub skipped: u64,
    /// Groups without any reward, in that lineage.
    pub wholly_masked: u64,
    /// Groups set aside and never trained, in that lineage.
    pub dropped: u64,
    /// Groups that were looked at and replaced because their responses teach nothing, in that lineage.
    pub replaced: u64,
    /// Groups whose responses were all left out of the loss by the overlong filter, in that lineage.
    pub filtered: u64,
    /// Pass of the next group to train.
    pub pass: u64,
    /// Position of the next group in that pass.
    pub position: u64,
    /// Published weight version.
    pub version: WeightVersion,
    /// Duplicate submissions since this process started, which were not counted.
    pub duplicates: u64,
    /// Submitted groups discarded because they were too stale.
    pub stale: u64,
    /// Expired leases.
    pub expired: u64,
    /// Submissions under invalid leases.
    pub refused: u64,
    /// Submissions rejected because of their content.
    pub rejected: u64,
    /// Groups returned because no reward was available.
    pub unscored: u64,
    /// Groups that a worker could not generate.
    pub failed: u64,
}

/// Leases, queue, staleness and accounting for groups with payloads `T` (their responses and rewards).
#[derive(Debug)]
pub struct Experience<T> {
    pub(crate) settings: Settings,
    pub(crate) order: DataOrder,
    /// Number of the first group that is not trained.
    pub(crate) frontier: u64,
    /// The frontier at publication of the current version, where the lease window starts.
    pub(crate) window_start: u64,
    /// Number of the first group that was never leased. Slots exist for exactly `frontier..cursor`.
    pub(crate) cursor: u64,
    pub(crate) slots: BTreeMap<u64, GroupSlot<T>>,
    /// Length of the range in training, `frontier..frontier + in_training`.
    pub(crate) in_training: u64,
    pub(crate) version: WeightVersion,
    pub(crate) lease_count: u64,
    pub(crate) lease_index: LeaseIndex,
    pub(crate) ledger: Ledger,
    pub(crate) losses: set_aside::LossTracker,
    pub(crate) quarantine: quarantine::Quarantine,
    pub(crate) replacement: replacement::Replacement<T>,
    pub(crate) now: Duration,
    pub(crate) counts: Stats,
    pub(crate) events: Vec<Event>,
}

impl<T> Experience<T> {
    /// Creates the state of a new run at version 0. `ids` are the record ids in the order of the data set.
    ///
    /// # Errors
    /// Returns [`ExperienceError::Setting`] for a setting out of range, [`ExperienceError::NoRecords`] for an empty data set, and
    /// [`ExperienceError::DuplicateId`] for a repeated id.
    pub fn new(settings: Settings, ids: Vec<String>) -> Result<Self, ExperienceError> {
        settings.check()?;
        if ids.is_empty() || u32::try_from(ids.len()).is_err() {
            return Err(ExperienceError::NoRecords);
        }
        let mut seen = HashSet::with_capacity(ids.len());
        if let Some(id) = ids.iter().find(|id| !seen.insert(id.as_str())) {
            return Err(ExperienceError::DuplicateId(id.clone()));
        }
        let order = DataOrder::new(ids, settings.seed);
        Ok(Self {
            settings,
            order,
            frontier: 0,
            window_start: 0,
            cursor: 0,
            slots: BTreeMap::new(),
            in_training: 0,
            version: 0,
            lease_count: 0,
            lease_index: LeaseIndex::default(),
            ledger: Ledger::default(),
            losses: set_aside::LossTracker::default(),
            quarantine: quarantine::Quarantine::default(),
            replacement: replacement::Replacement::default(),
            now: Duration::ZERO,
            counts: Stats::default(),
            events: Vec::new(),
        })
    }

    /// Restores the state of a run from its checkpoint: trained groups stay trained, all others are leased again.
    ///
    /// # Errors
    /// See [`Self::new`]; also returns [`ExperienceError::RunMismatch`] if the data or the seed differ.
    pub fn restore(
        settings: Settings,
        ids: Vec<String>,
        snapshot: &ExperienceSnapshot,
    ) -> Result<Self, ExperienceError> {
        let mut e = Self::new(settings, ids)?;
        let mismatch = |what, was: String, now: String| Err(ExperienceError::RunMismatch { what, was, now });
        if snapshot.records != e.order.records() {
            return mismatch("data set", format!("{} records", snapshot.records), format!("{}", e.order.records()));
        }
        let data = e.order.fingerprint();
        if snapshot.data != data {
            return mismatch("data set", format!("ids {}", shorten(&snapshot.data)), shorten(&data).to_string());
        }
        if snapshot.seed != e.settings.seed {
            return mismatch("seed", snapshot.seed.to_string(), e.settings.seed.to_string());
        }
        e.frontier = snapshot.trained;
        e.window_start = snapshot.trained;
        e.cursor = snapshot.trained;
        e.version = snapshot.version;
        e.ledger = snapshot.ledger.clone();
        e.restore_set_aside(&snapshot.aside);
        Ok(e)
    }

    /// Returns the end (exclusive) of the groups that may be leased at the published version.
    pub(crate) fn lease_end(&self) -> u64 {
        self.window_end().min(self.total_groups().unwrap_or(u64::MAX)).max(self.cursor)
    }

    /// Records that workers get weights `version` from now on; call it before they can fetch them. Publishing the current version again only
    /// advances the lease window.
    ///
    /// # Errors
    /// Returns [`ExperienceError::VersionRegression`] if the version is older than the current one.
    pub fn publish(&mut self, version: WeightVersion) -> Result<(), ExperienceError> {
        if version < self.version {
            return Err(ExperienceError::VersionRegression { version, current: self.version });
        }
        self.version = version;
        self.window_start = self.frontier;
        self.reset_window();
        Ok(())
    }

    /// Returns the settings of the run.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// Returns the published weight version.
    pub fn version(&self) -> WeightVersion {
        self.version
    }

    /// Returns whether every group of the run is done.
    pub fn is_finished(&self) -> bool {
        self.total_groups().is_some_and(|n| self.frontier >= n)
    }

    /// Returns the index into `ids` of the record of a leased group, unless the group was trained long ago.
    pub fn record_index(&self, group: &GroupId) -> Option<usize> {
        self.order.row(group)
    }

    /// Returns the position in the data for a checkpoint. A batch in training counts as not trained.
    pub fn snapshot(&self) -> ExperienceSnapshot {
        let n = self.order.records();
        let mut in_flight = Vec::new();
        for (g, slot) in &self.slots {
            if !matches!(slot, GroupSlot::Waiting { .. } | GroupSlot::SetAside { .. }) {
                in_flight.extend(self.order.started_group(*g));
            }
        }
        ExperienceSnapshot {
            trained: self.frontier,
            pass: self.frontier / n,
            position: self.frontier % n,
            version: self.version,
            seed: self.settings.seed,
            records: n,
            data: self.order.fingerprint(),
            in_flight,
            ledger: self.ledger.clone(),
            aside: self.pending_set_aside(),
        }
    }

    /// Returns the current counts.
    pub fn stats(&self) -> Stats {
        let n = self.order.records();
        let sums = self.ledger.sums();
        let replaced = self.replaced_groups();
        let mut s = Stats {
            trained: sums.trained,
            skipped: sums.skipped,
            wholly_masked: sums.wholly_masked,
            dropped: sums.dropped + self.set_aside_in(0..u64::MAX),
            replaced: sums.replaced + replaced.len() as u64,
            filtered: sums.filtered,
            pass: self.frontier / n,
            position: self.frontier % n,
            version: self.version,
            ..self.counts
        };
        for (g, slot) in &self.slots {
            match slot {
                GroupSlot::Waiting { .. } => s.waiting += 1,
                GroupSlot::Leased { .. } => s.leased += 1,
                GroupSlot::Ready { .. } if replaced.binary_search(g).is_ok() => {}
                GroupSlot::Ready { .. } => s.ready += 1,
                GroupSlot::Training => s.training += 1,
                GroupSlot::Replaced | GroupSlot::SetAside { .. } => {}
            }
        }
        s
    }

    /// Returns the events since the last call, oldest first. They accumulate until drained, so drain regularly.
    pub fn drain_events(&mut self) -> Vec<Event> {
        std::mem::take(&mut self.events)
    }

    pub(crate) fn now_ms(&self) -> u64 {
        u64::try_from(self.now.as_millis()).unwrap_or(u64::MAX)
    }

    /// Advances the clock, which never goes back even if the caller's clock does.
    pub(crate) fn advance_clock(&mut self, now: Duration) {
        self.now = self.now.max(now);
    }
}

fn shorten(hash: &str) -> &str {
    hash.get(..12).unwrap_or(hash)
}
