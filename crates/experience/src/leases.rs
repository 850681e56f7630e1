//! The life cycle of a lease: granted, renewed by heartbeats while its group makes progress, then submitted, returned or expired.

use std::collections::HashMap;
use std::time::Duration;

use unveil_core::{GroupId, WeightVersion};

use crate::event::Event;
use crate::lease_index::{GroupSlot, LeaseHolder};
use crate::machine::Experience;
use crate::settings::{Heartbeat, Lease, LeaseCall, Submission, Verdict};

impl<T> Experience<T> {
    /// Returns the number of groups that [`Self::lease`] could lease now to a worker without leases.
    pub fn leasable(&self) -> usize {
        let waiting = self.slots.values().filter(|s| matches!(s, GroupSlot::Waiting { .. })).count();
        waiting.saturating_add(usize::try_from(self.lease_end() - self.cursor).unwrap_or(usize::MAX))
    }

    /// Returns the number of valid leases of a worker.
    pub fn leased_by(&self, worker: &str) -> usize {
        self.lease_index.0.get(worker).map_or(0, |leases| leases.current.len())
    }

    /// Returns the group of a valid lease.
    pub fn group_of(&self, worker: &str, lease: &str) -> Option<GroupId> {
        let current = &self.lease_index.0.get(worker)?.current;
        let has_lease = |g: &&u64| self.slots.get(g).and_then(GroupSlot::holder).is_some_and(|h| h.lease == lease);
        self.order.started_group(*current.iter().find(has_lease)?)
    }

    /// Records that a worker is alive. Every call by a worker implies this.
    pub fn touch_worker(&mut self, worker: &str, now: Duration) {
        self.advance_clock(now);
        self.lease_index.entry(worker).last_seen = self.now;
        self.clear_silence(worker);
    }

    /// Returns the first groups, at most `max`, that [`Self::lease`] would lease to a worker, so that they can be prepared.
    pub fn candidates(&mut self, worker: &str, max: usize) -> Vec<GroupId> {
        let numbers = self.select_groups(worker, max);
        numbers.into_iter().map(|g| self.order.group(g)).collect()
    }

    /// Leases those of the next `call.max` groups that are `ready`: returned groups first, then new ones in order. A repeated call number
    /// gets the same leases again as far as they are valid.
    ///
    /// A group is leased only if it belongs to one of the next `max_staleness + 1` batches from the published version on, and never to a
    /// worker that may still be working on it under an expired lease; the result may be empty. Old leases are expired first.
    pub fn lease(&mut self, call: LeaseCall<'_>, now: Duration, ready: impl Fn(&GroupId) -> bool) -> Vec<Lease> {
        self.touch_worker(call.worker, now);
        self.expire(now);
        let repeated = self.leases_of_call(call.worker, call.call);
        if !repeated.is_empty() {
            return repeated;
        }
        let numbers = self.select_groups(call.worker, call.max);
        let mut out = Vec::with_capacity(numbers.len());
        for g in numbers {
            if ready(&self.order.group(g)) {
                out.push(self.grant(g, call));
            }
        }
        out
    }

    /// Returns the valid leases that were granted to call `call` of a worker.
    pub fn leases_of_call(&mut self, worker: &str, call: u64) -> Vec<Lease> {
        let Some(worker_leases) = self.lease_index.0.get(worker).filter(|_| call != 0) else { return Vec::new() };
        let mut out = Vec::new();
        for g in &worker_leases.current {
            if let Some(h) = self.slots.get(g).and_then(GroupSlot::holder).filter(|h| h.call == call) {
                out.push(Lease {
                    id: h.lease.clone(),
                    group: self.order.group(*g),
                    min_version: h.min_version,
                    deadline: h.deadline,
                });
            }
        }
        out
    }

    fn grant(&mut self, g: u64, call: LeaseCall<'_>) -> Lease {
        for skipped in self.cursor..g {
            self.set_slot(skipped, GroupSlot::waiting());
        }
        self.cursor = self.cursor.max(g + 1);
        self.lease_count += 1;
        let lease = Lease {
            id: format!("{}-{}", self.settings.term, self.lease_count),
            group: self.order.group(g),
            min_version: self.training_version(g).saturating_sub(self.settings.max_staleness),
            deadline: self.deadline(),
        };
        self.events.push(Event::Leased {
            ms: self.now_ms(),
            worker: call.worker.to_string(),
            lease: lease.id.clone(),
            group: lease.group.clone(),
            min_version: lease.min_version,
        });
        let holder = LeaseHolder {
            worker: call.worker.to_string(),
            lease: lease.id.clone(),
            call: call.call,
            min_version: lease.min_version,
            deadline: lease.deadline,
            progress: 0,
            progressed_at: self.now,
        };
        let past = self.slots.get(&g).map_or_else(Vec::new, |s| s.past().to_vec());
        self.set_slot(g, GroupSlot::Leased { holder, past });
        lease
    }

    fn deadline(&self) -> Duration {
        self.now.saturating_add(Duration::from_secs_f64(self.settings.lease_s))
    }

    /// Returns the version at which group `g` will be trained if each batch publishes one version.
    fn training_version(&self, g: u64) -> WeightVersion {
        self.version.saturating_add(self.trainable_before(g) / self.settings.groups_per_step as u64)
    }

    /// Processes a heartbeat. Leases whose groups make progress are renewed, including expired ones unless another worker has the group.
    /// Leases that the worker does not know, although it has received the answers to its calls up to `heartbeat.answered_calls`, return to
    /// the queue. Returns the leases in `heartbeat.held` that the worker has lost, whose work is no longer needed.
    pub fn heartbeat(&mut self, heartbeat: &Heartbeat<'_>, now: Duration) -> Vec<String> {
        self.touch_worker(heartbeat.worker, now);
        let reported: HashMap<&str, u64> = heartbeat.held.iter().map(|h| (h.lease.as_str(), h.progress)).collect();
        let mut kept: Vec<String> = Vec::new();
        for g in self.lease_index.entry(heartbeat.worker).groups() {
            let Some(slot) = self.slots.remove(&g) else { continue };
            self.lease_index.remove(g, &slot);
            let slot = match slot {
                GroupSlot::Leased { mut holder, past } if holder.worker == heartbeat.worker => {
                    if let Some(progress) = reported.get(holder.lease.as_str()) {
                        self.renew(&mut holder, *progress);
                        kept.push(holder.lease.clone());
                        GroupSlot::Leased { holder, past }
                    } else if holder.is_unknown_after(heartbeat.answered_calls) {
                        self.log_release(g, &holder, false);
                        GroupSlot::Waiting { past }
                    } else {
                        GroupSlot::Leased { holder, past }
                    }
                }
                GroupSlot::Leased { holder, mut past } => {
                    past.retain(|h| {
                        h.worker != heartbeat.worker
                            || reported.contains_key(h.lease.as_str())
                            || !h.is_unknown_after(heartbeat.answered_calls)
                    });
                    GroupSlot::Leased { holder, past }
                }
                GroupSlot::Waiting { past } => {
                    let (mut expired, mut past): (Vec<_>, Vec<_>) =
                        past.into_iter().partition(|h| h.worker == heartbeat.worker);
                    expired.retain(|h| {
                        reported.contains_key(h.lease.as_str()) || !h.is_unknown_after(heartbeat.answered_calls)
                    });
                    kept.extend(expired.iter().map(|h| h.lease.clone()));
                    let makes_progress = |s: &Self, h: &mut LeaseHolder| {
                        reported.get(h.lease.as_str()).is_some_and(|progress| s.renew(h, *progress))
                    };
                    match expired.iter_mut().position(|h| makes_progress(self, h)) {
                        Some(index) => {
                            let holder = expired.swap_remove(index);
                            past.extend(expired);
                            self.events.push(Event::Renewed {
                                ms: self.now_ms(),
                                worker: holder.worker.clone(),
                                lease: holder.lease.clone(),
                                group: self.order.group(g),
                            });
                            GroupSlot::Leased { holder, past }
                        }
                        None => {
                            past.extend(expired);
                            GroupSlot::Waiting { past }
                        }
                    }
                }
                other => other,
            };
            self.set_slot(g, slot);
        }
        let lost = |h: &&crate::HeldLease| !kept.contains(&h.lease);
        heartbeat.held.iter().filter(lost).map(|h| h.lease.clone()).collect()
    }

    /// Renews a lease unless its group has stalled; returns whether it was renewed.
    fn renew(&self, holder: &mut LeaseHolder, progress: u64) -> bool {
        if progress > holder.progress {
            holder.progress = progress;
            holder.progressed_at = self.now;
        }
        let renewed = !self.is_stalled(holder);
        if renewed {
            holder.deadline = self.deadline();
        }
        renewed
    }

    fn is_stalled(&self, holder: &LeaseHolder) -> bool {
        self.now.saturating_sub(holder.progressed_at) >= Duration::from_secs_f64(self.settings.stall_s)
    }

    /// Accepts a complete group, or returns why it does not count. An expired lease is still accepted unless another worker has the group.
    pub fn submit(&mut self, s: &Submission<'_>, payload: T, now: Duration) -> Verdict {
        self.touch_worker(s.worker, now);
        let ms = self.now_ms();
        let worker = s.worker.to_string();
        let lease = s.lease.to_string();
        let group = s.group.clone();
        let Some(g) = self.order.number(s.group).filter(|g| *g < self.cursor) else {
            self.counts.refused += 1;
            self.events.push(Event::Refused { ms, worker, lease, group });
            return Verdict::Expired;
        };
        let late = match self.slots.get(&g) {
            None | Some(GroupSlot::Ready { .. } | GroupSlot::Training | GroupSlot::Replaced) => {
                self.counts.duplicates += 1;
                self.events.push(Event::Duplicate { ms, worker, lease, group });
                return Verdict::Duplicate;
            }
            Some(GroupSlot::Leased { holder, .. }) if holder.is(s.worker, s.lease) => self.now >= holder.deadline,
            Some(GroupSlot::Waiting { past }) if past.iter().any(|h| h.is(s.worker, s.lease)) => true,
            Some(_) => {
                self.counts.refused += 1;
                self.events.push(Event::Refused { ms, worker, lease, group });
                self.remove_holders(g, |h| h.is(s.worker, s.lease), false);
                return Verdict::Expired;
            }
        };
        let oldest = s.versions.oldest;
        let is_stale = oldest.saturating_add(self.settings.max_staleness) < self.training_version(g);
        if is_stale || s.versions.newest > self.version || oldest > s.versions.newest {
            self.counts.stale += 1;
            self.take_back(g, s.worker, s.lease);
            self.events.push(Event::Stale { ms, worker, lease, group, oldest, version: self.version });
            return Verdict::Stale;
        }
        self.clear_losses(g);
        self.quarantine.reset(s.worker);
        let teaches_nothing = self.replacement.is_candidate(&payload);
        let versions = s.versions;
        let slot =
            GroupSlot::Ready { payload, teaches_nothing, versions, worker: worker.clone(), lease: lease.clone() };
        self.set_slot(g, slot);
        self.events.push(Event::Submitted { ms, worker, lease, group, oldest, late });
        Verdict::Accepted
    }

    /// Returns leases unfinished; the result is the number of them that were valid.
    pub fn release(&mut self, worker: &str, leases: &[String], now: Duration) -> usize {
        self.touch_worker(worker, now);
        let groups = self.lease_index.entry(worker).groups();
        let is_returned = |h: &LeaseHolder| h.worker == worker && leases.contains(&h.lease);
        groups.into_iter().filter(|g| self.remove_holders(*g, is_returned, false)).count()
    }

    /// Returns all groups of a lost worker to the queue; the result is the number of its valid leases.
    pub fn worker_lost(&mut self, worker: &str, now: Duration) -> usize {
        self.advance_clock(now);
        self.confirm_loss(worker);
        self.quarantine.forget(worker);
        let groups = self.lease_index.entry(worker).groups();
        let is_only_group = groups.len() == 1;
        let held: Vec<u64> =
            groups.into_iter().filter(|g| self.remove_holders(*g, |h| h.worker == worker, true)).collect();
        self.lease_index.0.remove(worker);
        self.count_worker_loss(worker, &held, is_only_group, false);
        held.len()
    }

    /// Returns a group to the queue on behalf of a worker that could still submit it under that lease; returns whether it could. Other
    /// workers with expired leases on it may still submit it.
    pub(crate) fn take_back(&mut self, g: u64, worker: &str, lease: &str) -> bool {
        let Some(slot) = self.slots.get(&g) else { return false };
        let could_submit = match slot {
            GroupSlot::Leased { holder, .. } => holder.is(worker, lease),
            GroupSlot::Waiting { past } => past.iter().any(|h| h.is(worker, lease)),
            _ => false,
        };
        if could_submit {
            let past = slot.past().iter().filter(|h| !h.is(worker, lease)).cloned().collect();
            self.set_slot(g, GroupSlot::Waiting { past });
        }
        could_submit
    }

    /// Removes the holders selected by `is_selected` from a group; returns whether one of them had its valid lease.
    pub(crate) fn remove_holders(&mut self, g: u64, is_selected: impl Fn(&LeaseHolder) -> bool, lost: bool) -> bool {
        let Some(slot) = self.slots.remove(&g) else { return false };
        self.lease_index.remove(g, &slot);
        let (slot, held) = match slot {
            GroupSlot::Waiting { mut past } => {
                past.retain(|h| !is_selected(h));
                (GroupSlot::Waiting { past }, false)
            }
            GroupSlot::Leased { holder, mut past } => {
                past.retain(|h| !is_selected(h));
                let held = is_selected(&holder);
                if held {
                    self.log_release(g, &holder, lost);
                }
                (if held { GroupSlot::Waiting { past } } else { GroupSlot::Leased { holder, past } }, held)
            }
            other => (other, false),
        };
        self.set_slot(g, slot);
        held
    }

    fn log_release(&mut self, g: u64, holder: &LeaseHolder, lost: bool) {
        self.events.push(Event::Released {
            ms: self.now_ms(),
            worker: holder.worker.clone(),
            lease: holder.lease.clone(),
            group: self.order.group(g),
            lost,
        });
    }

    /// Returns groups to the queue whose leases have expired, whose workers are silent, or that have stalled; the result is their number.
    /// [`Self::lease`] calls this as well. A worker that was only slow or disconnected may still submit its group unless another worker has
    /// it.
    pub fn expire(&mut self, now: Duration) -> usize {
        self.advance_clock(now);
        let silence = Duration::from_secs_f64(self.settings.silence_s);
        let mut expired = Vec::new();
        let mut silent_workers: Vec<(String, Vec<u64>, bool)> = Vec::new();
        for (worker, leases) in &self.lease_index.0 {
            let silent = self.now.saturating_sub(leases.last_seen) >= silence;
            for g in &leases.current {
                let Some(h) = self.slots.get(g).and_then(GroupSlot::holder) else { continue };
                let stalled = self.is_stalled(h);
                if silent || stalled || self.now >= h.deadline {
                    expired.push((*g, silent, stalled));
                }
            }
            if silent && !leases.current.is_empty() {
                let is_only_group = leases.groups().len() == 1;
                silent_workers.push((worker.clone(), leases.current.iter().copied().collect(), is_only_group));
            }
        }
        expired.sort_unstable();
        for (g, silent, stalled) in &expired {
            let Some(slot) = self.slots.remove(g) else { continue };
            self.lease_index.remove(*g, &slot);
            let slot = match slot {
                GroupSlot::Leased { holder, mut past } => {
                    let worker = holder.worker.clone();
                    let lease = holder.lease.clone();
                    tracing::warn!(worker, lease, silent, stalled, "lease expired, returning its group to the queue");
                    self.events.push(Event::Expired {
                        ms: self.now_ms(),
                        worker,
                        lease,
                        group: self.order.group(*g),
                        silent: *silent,
                        stalled: *stalled,
                    });
                    past.push(holder);
                    GroupSlot::Waiting { past }
                }
                other => other,
            };
            self.set_slot(*g, slot);
        }
        for (worker, groups, is_only_group) in &silent_workers {
            self.count_worker_loss(worker, groups, *is_only_group, true);
        }
        self.counts.expired += expired.len() as u64;
        expired.len()
    }

    /// Sets the state of a group and updates the lease index.
    pub(crate) fn set_slot(&mut self, g: u64, slot: GroupSlot<T>) {
        if let Some(previous) = self.slots.get(&g) {
            self.lease_index.remove(g, previous);
        }
        self.lease_index.add(g, &slot);
        self.slots.insert(g, slot);
    }
}
