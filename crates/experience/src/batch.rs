//! Batches: assembly of the next batch in group order, and the outcome of its update.

use std::time::Duration;

use unveil_core::GroupId;

use crate::event::Event;
use crate::lease_index::GroupSlot;
use crate::ledger::GroupOutcome;
use crate::machine::Experience;
use crate::settings::{ExperienceError, VersionSpan};

impl<T> Experience<T> {
    /// Returns the next batch in group order once all its groups are submitted, or `None` before that and while a batch is in training.
    ///
    /// Groups that have become too stale (because the version grew by more than one per batch) return to the queue instead.
    pub fn next_batch(&mut self, now: Duration) -> Option<Vec<(GroupId, T)>> {
        self.advance_clock(now);
        if self.in_training > 0 {
            return None;
        }
        let batch = self.next_range()?;
        let replaced = self.replaced_groups();
        let is_usable = |slot: Option<&GroupSlot<T>>| match slot {
            Some(GroupSlot::Ready { versions, .. }) => !self.is_stale(*versions),
            Some(GroupSlot::SetAside { .. }) => true,
            _ => false,
        };
        // A replaced group is not trained, however old its weights are.
        let is_replaced = |g: &u64| replaced.binary_search(g).is_ok();
        if !batch.clone().all(|g| is_replaced(&g) || is_usable(self.slots.get(&g))) {
            self.drop_stale(batch.filter(|g| !is_replaced(g)));
            return None;
        }
        self.drop_replaced(batch.clone());
        self.in_training = batch.end - batch.start;
        let mut out = Vec::with_capacity(self.settings.groups_per_step);
        for g in batch {
            if matches!(self.slots.get(&g), Some(GroupSlot::Ready { .. }))
                && let Some(GroupSlot::Ready { payload, .. }) = self.slots.insert(g, GroupSlot::Training)
            {
                out.push((self.order.group(g), payload));
            }
        }
        Some(out)
    }

    fn is_stale(&self, versions: VersionSpan) -> bool {
        versions.oldest.saturating_add(self.settings.max_staleness) < self.version
    }

    fn drop_stale(&mut self, batch: impl Iterator<Item = u64>) {
        for g in batch {
            let Some(GroupSlot::Ready { versions, worker, lease, .. }) = self.slots.get(&g) else {
                continue;
            };
            if !self.is_stale(*versions) {
                continue;
            }
            self.counts.stale += 1;
            self.events.push(Event::Stale {
                ms: self.now_ms(),
                worker: worker.clone(),
                lease: lease.clone(),
                group: self.order.group(g),
                oldest: versions.oldest,
                version: self.version,
            });
            self.set_slot(g, GroupSlot::waiting());
        }
    }

    /// Records that update `step` trained every group of the batch.
    ///
    /// # Errors
    /// See [`Self::record_outcomes`].
    pub fn record_trained(&mut self, step: u64, groups: &[GroupId], now: Duration) -> Result<(), ExperienceError> {
        let groups: Vec<_> = groups.iter().map(|g| (g.clone(), GroupOutcome::Trained)).collect();
        self.record_outcomes(step, &groups, now)
    }

    /// Records the outcomes of update `step` for the batch that [`Self::next_batch`] returned.
    ///
    /// # Errors
    /// Returns [`ExperienceError::NotInTraining`] and changes nothing if `groups` is not that batch.
    pub fn record_outcomes(
        &mut self,
        step: u64,
        groups: &[(GroupId, GroupOutcome)],
        now: Duration,
    ) -> Result<(), ExperienceError> {
        self.advance_clock(now);
        let range = self.frontier..self.frontier + self.in_training;
        let in_training: Vec<u64> =
            range.clone().filter(|g| matches!(self.slots.get(g), Some(GroupSlot::Training))).collect();
        let expected: Vec<GroupId> = in_training.into_iter().map(|g| self.order.group(g)).collect();
        if groups.is_empty() || !groups.iter().map(|(g, _)| g).eq(&expected) {
            return Err(ExperienceError::NotInTraining { step, reported: groups.len(), in_training: expected.len() });
        }
        for (group, outcome) in groups {
            if let Some(row) = self.order.row(group) {
                self.ledger.record(group.pass, row, self.order.records(), *outcome);
            }
        }
        self.frontier += self.in_training;
        self.in_training = 0;
        self.count_passed_set_aside(range.clone());
        self.count_passed_replaced(range);
        self.slots = self.slots.split_off(&self.frontier);
        self.order.forget_before(self.frontier / self.order.records());
        self.events.push(Event::Trained { ms: self.now_ms(), step, groups: expected });
        Ok(())
    }
}
