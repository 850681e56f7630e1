//! Groups that cannot be generated: counts the workers that died while working on a group or gave it up, and sets its record aside so that
//! a single record cannot end a run.
//!
//! A worker that dies loses many groups, of which at most one is the cause. Therefore a group that is one loss short of the limit is leased
//! alone from then on, to a worker without other groups, and only a loss of which it is certainly the cause sets it aside.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::Duration;

use unveil_core::GroupId;

use crate::event::Event;
use crate::lease_index::{GroupSlot, LeaseHolder, WorkerLeases};
use crate::machine::Experience;

/// Losses of groups that have not been submitted since.
#[derive(Debug, Default)]
pub(crate) struct LossTracker {
    /// Number of losses that sets a group aside; 0 disables this.
    limit: u32,
    /// Losses by group number.
    groups: BTreeMap<u64, GroupLosses>,
    /// Groups lost by silent workers; their losses are withdrawn if the worker reappears.
    silent: HashMap<String, Vec<u64>>,
    /// Rows of the data set whose groups are no longer leased, with the reason.
    rows: BTreeMap<usize, String>,
    /// Groups set aside according to the checkpoint that have not been reached yet.
    restored: BTreeMap<u64, String>,
    /// Groups set aside that the frontier has passed since the current version was published.
    passed_in_window: u64,
}

#[derive(Debug, Default)]
struct GroupLosses {
    count: u32,
    /// Workers whose submission of the group was rejected; each counts once.
    rejected: BTreeSet<String>,
}

/// Why groups were returned unfinished.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReturnReason {
    /// The worker is stopping, or its weights are invalid.
    Released,
    /// No reward was available.
    Unscored,
    /// The group could not be generated.
    Failed,
}

impl<T> Experience<T> {
    /// Sets the number of losses after which a group is set aside, i.e. never trained and counted as dropped; 0 disables this.
    pub fn with_max_losses(mut self, losses: u32) -> Self {
        self.losses.limit = losses;
        self
    }

    /// Returns leases unfinished for a reason; the result is the number of them that were valid.
    pub fn return_leases(
        &mut self,
        worker: &str,
        leases: &[String],
        cause: ReturnReason,
        why: &str,
        now: Duration,
    ) -> usize {
        if cause == ReturnReason::Released {
            return self.release(worker, leases, now);
        }
        self.touch_worker(worker, now);
        let mut valid = Vec::new();
        let mut expired = Vec::new();
        for g in self.lease_index.entry(worker).groups() {
            let is_returned = |h: &&LeaseHolder| h.worker == worker && leases.contains(&h.lease);
            let Some(slot) = self.slots.get(&g) else { continue };
            valid.extend(slot.holder().filter(is_returned).map(|h| (g, h.lease.clone())));
            expired.extend(slot.past().iter().filter(is_returned).map(|h| (g, h.lease.clone())));
        }
        // The worker no longer works on groups with returned expired leases.
        for (g, lease) in &expired {
            self.remove_holders(*g, |h| h.is(worker, lease), false);
        }
        // A single failed group is certainly the cause; among several, the cause is unknown.
        let is_certain = valid.len() == 1;
        for (g, lease) in &valid {
            self.take_back(*g, worker, lease);
            let ms = self.now_ms();
            let worker = worker.to_owned();
            let lease = lease.clone();
            let why = why.to_owned();
            let group = self.order.group(*g);
            if cause == ReturnReason::Unscored {
                self.counts.unscored += 1;
                self.events.push(Event::Unscored { ms, worker, lease, group, why });
            } else {
                self.counts.failed += 1;
                self.events.push(Event::Failed { ms, worker, lease, group, why: why.clone() });
                self.count_loss(*g, is_certain, &why);
            }
        }
        valid.len()
    }

    /// Counts the loss of a worker with valid leases on `groups`. `is_only_group`: the worker had a single group, which is then certainly the
    /// cause. `silent`: the worker may reappear.
    pub(crate) fn count_worker_loss(&mut self, worker: &str, groups: &[u64], is_only_group: bool, silent: bool) {
        if self.losses.limit == 0 || groups.is_empty() {
            return;
        }
        if silent {
            self.losses.silent.entry(worker.to_owned()).or_default().extend(groups);
        }
        let why = format!(
            "worker `{worker}` {}",
            if silent { "fell silent while working on it" } else { "ended while working on it" }
        );
        for g in groups {
            self.count_loss(*g, is_only_group, &why);
        }
    }

    /// Withdraws the losses of a silent worker that has reappeared.
    pub(crate) fn clear_silence(&mut self, worker: &str) {
        for g in self.losses.silent.remove(worker).unwrap_or_default() {
            if let Some(losses) = self.losses.groups.get_mut(&g) {
                losses.count = losses.count.saturating_sub(1);
            }
        }
    }

    /// Makes the losses of a silent worker permanent.
    pub(crate) fn confirm_loss(&mut self, worker: &str) {
        self.losses.silent.remove(worker);
    }

    /// Clears the losses of a group that was submitted.
    pub(crate) fn clear_losses(&mut self, g: u64) {
        self.losses.groups.remove(&g);
    }

    /// Counts a rejected submission of a group. Each worker counts once, so that a single broken worker cannot set groups aside.
    pub(crate) fn count_rejection(&mut self, g: u64, worker: &str, why: &str) {
        if self.losses.limit > 0 && self.losses.groups.entry(g).or_default().rejected.insert(worker.to_owned()) {
            self.count_loss(g, true, why);
        }
    }

    fn count_loss(&mut self, g: u64, is_certain: bool, why: &str) {
        if self.losses.limit == 0 {
            return;
        }
        let losses = self.losses.groups.entry(g).or_default();
        losses.count += 1;
        let count = losses.count;
        // Unless it is waiting, another worker may be about to submit it.
        let is_waiting = matches!(self.slots.get(&g), Some(GroupSlot::Waiting { .. }));
        if count < self.losses.limit || !is_certain || !is_waiting {
            return;
        }
        let group = self.order.group(g);
        let why = format!("lost {count} times, most recently because {why}");
        tracing::error!(record = group.record, pass = group.pass, why, "record set aside and excluded from training");
        if let Some(row) = self.order.row(&group) {
            self.losses.rows.insert(row, why.clone());
        }
        self.losses.groups.remove(&g);
        self.set_aside(g, why);
    }

    fn set_aside(&mut self, g: u64, why: String) {
        let group = self.order.group(g);
        self.events.push(Event::Dropped { ms: self.now_ms(), group, why: why.clone() });
        self.losses.restored.remove(&g);
        self.set_slot(g, GroupSlot::SetAside { why });
    }

    /// Returns whether one more loss may set a group aside, so that it must be leased alone.
    fn is_suspect(&self, g: u64) -> bool {
        let threshold = self.losses.limit.saturating_sub(1).max(1);
        self.losses.limit > 0 && self.losses.groups.get(&g).is_some_and(|losses| losses.count >= threshold)
    }

    /// Selects up to `max` groups for `worker`: returned groups first, then new ones in order, but none on which it may still be working and
    /// none at all if it is quarantined. A suspect group is leased alone to a worker without other groups.
    pub(crate) fn select_groups(&mut self, worker: &str, max: usize) -> Vec<u64> {
        let held = self.lease_index.0.get(worker).map(WorkerLeases::groups).unwrap_or_default();
        if max == 0 || self.quarantine_reason(worker).is_some() || held.iter().any(|g| self.is_suspect(*g)) {
            return Vec::new();
        }
        let waiting: Vec<u64> = self.slots.iter().filter(|(_, s)| s.is_free_for(worker)).map(|(g, _)| *g).collect();
        let suspect = waiting.iter().copied().find(|g| self.is_suspect(*g));
        if let Some(g) = suspect.filter(|_| held.is_empty()) {
            return vec![g];
        }
        let mut out: Vec<u64> = waiting.into_iter().filter(|g| !self.is_suspect(*g)).take(max).collect();
        let mut next = self.cursor;
        while out.len() < max && next < self.lease_end() {
            match self.set_aside_reason(next) {
                None => out.push(next),
                // A group set aside makes room for another one.
                Some(why) if next == self.cursor => {
                    self.cursor += 1;
                    self.set_aside(next, why);
                }
                Some(_) => break,
            }
            next += 1;
        }
        out
    }

    /// Returns why a group that was never leased must not be leased, or `None` if it may be leased or no other records are left.
    fn set_aside_reason(&mut self, g: u64) -> Option<String> {
        if self.all_set_aside() {
            return None;
        }
        if let Some(why) = self.losses.restored.get(&g) {
            return Some(why.clone());
        }
        if self.losses.rows.is_empty() {
            return None;
        }
        let group = self.order.group(g);
        let row = self.order.row(&group)?;
        self.losses.rows.get(&row).cloned()
    }

    /// Returns whether every record is set aside, so that nothing can be trained any more.
    pub fn all_set_aside(&self) -> bool {
        self.losses.rows.len() as u64 >= self.order.records()
    }

    /// Returns the number of groups set aside in `range`.
    pub(crate) fn set_aside_in(&self, range: std::ops::Range<u64>) -> u64 {
        if range.is_empty() {
            return 0;
        }
        self.slots.range(range).filter(|(_, s)| matches!(s, GroupSlot::SetAside { .. })).count() as u64
    }

    /// Returns the number of groups of the whole run, increased by those set aside and those that teach nothing, which are replaced.
    pub(crate) fn total_groups(&self) -> Option<u64> {
        let set_aside = self.ledger.dropped() + self.set_aside_in(0..u64::MAX);
        let replaced = self.ledger.replaced() + self.replaced_groups().len() as u64;
        self.settings.total_groups.map(|n| n.saturating_add(set_aside + replaced))
    }

    /// Returns the end (exclusive) of the lease window of the published version.
    pub(crate) fn window_end(&self) -> u64 {
        let window = (self.settings.max_staleness + 1).saturating_mul(self.settings.groups_per_step as u64);
        let set_aside = self.losses.passed_in_window + self.set_aside_in(self.frontier..u64::MAX);
        self.extended_window_end(self.window_start.saturating_add(window).saturating_add(set_aside))
    }

    /// Returns the number of groups between the window's start and `g` that will be trained.
    pub(crate) fn trainable_before(&self, g: u64) -> u64 {
        let set_aside = self.losses.passed_in_window + self.set_aside_in(self.frontier..g.max(self.frontier));
        g.saturating_sub(self.window_start).saturating_sub(set_aside).saturating_sub(self.replaced_before(g))
    }

    /// Returns the range of groups in the next batch, including those set aside or replaced, or `None` if too few groups have been leased.
    pub(crate) fn next_range(&self) -> Option<std::ops::Range<u64>> {
        let end = self.total_groups().unwrap_or(u64::MAX);
        let replaced = self.replaced_groups();
        let mut batch_end = self.frontier;
        let mut size = 0;
        while batch_end < end && size < self.settings.groups_per_step {
            match self.slots.get(&batch_end) {
                None => return None,
                Some(GroupSlot::SetAside { .. }) => {}
                Some(_) if replaced.binary_search(&batch_end).is_ok() => {}
                Some(_) => size += 1,
            }
            batch_end += 1;
        }
        (size > 0).then_some(self.frontier..batch_end)
    }

    /// Counts the groups set aside in `range`, which the frontier has passed, as dropped.
    pub(crate) fn count_passed_set_aside(&mut self, range: std::ops::Range<u64>) {
        let passed: Vec<(u64, String)> = self
            .slots
            .range(range)
            .filter_map(|(g, slot)| match slot {
                GroupSlot::SetAside { why } => Some((*g, why.clone())),
                _ => None,
            })
            .collect();
        for (g, why) in passed {
            let group = self.order.group(g);
            self.losses.passed_in_window += 1;
            if let Some(row) = self.order.row(&group) {
                self.ledger.drop_group(&group, row, self.order.records(), why);
            }
        }
        let frontier = self.frontier;
        self.losses.groups.retain(|g, _| *g >= frontier);
        self.losses.silent.retain(|_, groups| groups.iter().any(|g| *g >= frontier));
    }

    /// Starts a new window after a version was published.
    pub(crate) fn reset_window(&mut self) {
        self.losses.passed_in_window = 0;
        self.reset_replaced_window();
    }

    /// Returns the groups set aside that the frontier has not passed, with the reasons.
    pub(crate) fn pending_set_aside(&self) -> Vec<(GroupId, String)> {
        let set_aside = |(g, slot): (&u64, &GroupSlot<T>)| match slot {
            GroupSlot::SetAside { why } => Some((self.order.started_group(*g)?, why.clone())),
            _ => None,
        };
        self.slots.iter().filter_map(set_aside).collect()
    }

    /// Restores the groups set aside in a checkpoint.
    pub(crate) fn restore_set_aside(&mut self, aside: &[(GroupId, String)]) {
        let records = self.order.records();
        self.losses.restored = aside
            .iter()
            .map(|(g, why)| (g.pass.saturating_mul(records).saturating_add(g.position), why.clone()))
            .collect();
    }
}
