//! Batches: the next one in group order once it is whole, and what an update made of it. Must not know: workers' names, leases.

use std::time::Duration;

use unveil_core::GroupId;

use crate::event::Event;
use crate::hands::Slot;
use crate::ledger::Fate;
use crate::machine::Experience;
use crate::settings::{ExperienceError, VersionSpan};

impl<T> Experience<T> {
    /// The next batch in group order, once all its groups are in; `None` before, and while a batch is in training.
    ///
    /// Groups that have become too stale (the version grew by more than one per batch) return to the queue instead.
    pub fn next_batch(&mut self, now: Duration) -> Option<Vec<(GroupId, T)>> {
        self.tick(now);
        if self.taken > 0 {
            return None;
        }
        let batch = self.next_range()?;
        let takes = |slot: Option<&Slot<T>>| match slot {
            Some(Slot::Ready { versions, .. }) => !self.lags(*versions),
            Some(Slot::Aside { .. }) => true,
            _ => false,
        };
        if !batch.clone().all(|g| takes(self.slots.get(&g))) {
            self.drop_stale(batch);
            return None;
        }
        self.taken = batch.end - batch.start;
        let mut out = Vec::with_capacity(self.settings.groups_per_step);
        for g in batch {
            if matches!(self.slots.get(&g), Some(Slot::Ready { .. }))
                && let Some(Slot::Ready { payload, .. }) = self.slots.insert(g, Slot::Training)
            {
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

    /// [`Self::settled`] with every group of the batch trained.
    ///
    /// # Errors
    /// As there.
    pub fn trained(&mut self, step: u64, groups: &[GroupId], now: Duration) -> Result<(), ExperienceError> {
        let groups: Vec<_> = groups.iter().map(|g| (g.clone(), Fate::Trained)).collect();
        self.settled(step, &groups, now)
    }

    /// Says what update `step` made of the batch that [`Self::next_batch`] returned.
    ///
    /// # Errors
    /// [`ExperienceError::NotInTraining`] when `groups` is not that batch; nothing changes then.
    pub fn settled(&mut self, step: u64, groups: &[(GroupId, Fate)], now: Duration) -> Result<(), ExperienceError> {
        self.tick(now);
        let range = self.frontier..self.frontier + self.taken;
        let taken: Vec<u64> = range.clone().filter(|g| matches!(self.slots.get(g), Some(Slot::Training))).collect();
        let expected: Vec<GroupId> = taken.into_iter().map(|g| self.order.group(g)).collect();
        if groups.is_empty() || !groups.iter().map(|(g, _)| g).eq(&expected) {
            return Err(ExperienceError::NotInTraining { step, reported: groups.len(), taken: expected.len() });
        }
        for (group, fate) in groups {
            if let Some(row) = self.order.row(group) {
                self.ledger.note(group.pass, row, self.order.records(), *fate);
            }
        }
        self.frontier += self.taken;
        self.taken = 0;
        self.pass_over(range);
        self.slots = self.slots.split_off(&self.frontier);
        self.order.forget_before(self.frontier / self.order.records());
        self.events.push(Event::Trained { ms: self.ms(), step, groups: expected });
        Ok(())
    }
}
