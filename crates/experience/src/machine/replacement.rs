//! Groups that teach nothing (dynamic sampling): each is replaced by a further group, up to a limit per batch.
//!
//! A replaced group was generated and looked at: it counts in the ledger as replaced, is never trained, and is not leased again in its pass.
//! The decision follows from the order of the groups and from what they hold, never from the order of submissions: of the groups of a
//! batch that teach nothing, the first ones up to the limit are replaced, and all later ones are trained. A group that is not known yet
//! is taken for one that teaches something. Once it turns out otherwise, a batch only ever grows, so that a lease granted for a
//! replacement is never one too many.

use crate::event::Event;
use crate::lease_index::GroupSlot;
use crate::ledger::GroupOutcome;
use crate::machine::Experience;

/// The rule by which groups are replaced.
#[derive(Debug)]
pub(crate) struct Replacement<T> {
    /// Most replaced groups of a batch; 0 disables replacement.
    limit: usize,
    /// Returns whether a group teaches nothing.
    teaches_nothing: fn(&T) -> bool,
    /// Whether further groups are leased only once all groups before them are known.
    in_rounds: bool,
    /// Replaced groups that the frontier has passed since the current version was published.
    passed_in_window: u64,
}

impl<T> Default for Replacement<T> {
    fn default() -> Self {
        Self { limit: 0, teaches_nothing: |_| false, in_rounds: false, passed_in_window: 0 }
    }
}

impl<T> Replacement<T> {
    /// Returns whether a group that was submitted teaches nothing and may be replaced.
    pub(crate) fn is_candidate(&self, payload: &T) -> bool {
        self.limit > 0 && (self.teaches_nothing)(payload)
    }
}

impl<T> Experience<T> {
    /// Replaces up to `limit` groups per batch for which `teaches_nothing` holds; 0 disables this. With `in_rounds`, further groups are
    /// leased only once all groups before them are known, so that the leases do not depend on the order of submissions either.
    pub fn with_replacement(mut self, limit: usize, teaches_nothing: fn(&T) -> bool, in_rounds: bool) -> Self {
        self.replacement = Replacement { limit, teaches_nothing, in_rounds, passed_in_window: 0 };
        self
    }

    /// Returns the groups that were replaced in the batch in training, in order.
    pub fn replaced_in_training(&mut self) -> Vec<unveil_core::GroupId> {
        let is_replaced = |(g, slot): (&u64, &GroupSlot<T>)| matches!(slot, GroupSlot::Replaced).then_some(*g);
        let replaced: Vec<u64> = self.slots.iter().filter_map(is_replaced).collect();
        replaced.into_iter().map(|g| self.order.group(g)).collect()
    }

    /// Returns the groups after the frontier that are replaced as far as they are known, in order.
    pub(crate) fn replaced_groups(&self) -> Vec<u64> {
        let mut out = Vec::new();
        if self.replacement.limit == 0 {
            return out;
        }
        let batch_start = self.frontier + self.in_training;
        let mut size = 0;
        let mut replaced = 0;
        for (g, slot) in &self.slots {
            match slot {
                GroupSlot::Replaced => out.push(*g),
                GroupSlot::SetAside { .. } => {}
                _ if *g < batch_start => {}
                GroupSlot::Ready { teaches_nothing: true, .. } if replaced < self.replacement.limit => {
                    replaced += 1;
                    out.push(*g);
                }
                _ => size += 1,
            }
            if size == self.settings.groups_per_step {
                size = 0;
                replaced = 0;
            }
        }
        out
    }

    /// Returns the number of groups before `g` that are replaced since the current version was published.
    pub(crate) fn replaced_before(&self, g: u64) -> u64 {
        self.replacement.passed_in_window + self.replaced_groups().iter().filter(|r| **r < g).count() as u64
    }

    /// Returns the end (exclusive) of the lease window, which ends at `end` without replacements.
    pub(crate) fn extended_window_end(&self, end: u64) -> u64 {
        let replaced = self.replaced_groups();
        if !self.replacement.in_rounds {
            return end.saturating_add(self.replacement.passed_in_window + replaced.len() as u64);
        }
        let is_known = |g: u64| {
            let slot = self.slots.get(&g);
            slot.is_some_and(|slot| !matches!(slot, GroupSlot::Waiting { .. } | GroupSlot::Leased { .. }))
        };
        let end = end.saturating_add(self.replacement.passed_in_window);
        let mut round_end = end;
        while (self.frontier..round_end).all(is_known) {
            let extended = end.saturating_add(replaced.iter().filter(|g| **g < round_end).count() as u64);
            if extended == round_end {
                break;
            }
            round_end = extended;
        }
        round_end
    }

    /// Removes the replaced groups from a batch that is about to be trained, which is `range`.
    pub(crate) fn drop_replaced(&mut self, range: std::ops::Range<u64>) {
        for g in self.replaced_groups().into_iter().filter(|g| range.contains(g)) {
            if let Some(GroupSlot::Ready { versions, worker, lease, .. }) = self.slots.insert(g, GroupSlot::Replaced) {
                let event = Event::Replaced {
                    ms: self.now_ms(),
                    worker,
                    lease,
                    group: self.order.group(g),
                    oldest: versions.oldest,
                };
                self.events.push(event);
            }
        }
    }

    /// Counts the replaced groups in `range`, which the frontier has passed.
    pub(crate) fn count_passed_replaced(&mut self, range: std::ops::Range<u64>) {
        let is_replaced = |(g, slot): (&u64, &GroupSlot<T>)| matches!(slot, GroupSlot::Replaced).then_some(*g);
        let passed: Vec<u64> = self.slots.range(range).filter_map(is_replaced).collect();
        for g in passed {
            let group = self.order.group(g);
            self.replacement.passed_in_window += 1;
            if let Some(row) = self.order.row(&group) {
                self.ledger.record(group.pass, row, self.order.records(), GroupOutcome::Replaced);
            }
        }
    }

    /// Starts a new window after a version was published.
    pub(crate) fn reset_replaced_window(&mut self) {
        self.replacement.passed_in_window = 0;
    }
}
