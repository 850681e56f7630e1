//! The life of a lease: handed out, renewed by its worker's heartbeat while its group makes progress, brought in, given back, run out.

use std::collections::HashMap;
use std::time::Duration;

use unveil_core::{GroupId, WeightVersion};

use crate::event::Event;
use crate::hands::{Holder, Slot};
use crate::machine::Experience;
use crate::settings::{Ask, Heartbeat, Lease, Submission, Verdict};

impl<T> Experience<T> {
    /// Groups that [`Self::lease`] could hand out now to a worker that has nothing in hand.
    pub fn leasable(&self) -> usize {
        let waiting = self.slots.values().filter(|s| matches!(s, Slot::Waiting { .. })).count();
        waiting.saturating_add(usize::try_from(self.end() - self.cursor).unwrap_or(usize::MAX))
    }

    /// Groups that a worker has leases of.
    pub fn leased_by(&self, worker: &str) -> usize {
        self.hands.0.get(worker).map_or(0, |hand| hand.holds.len())
    }

    /// The group of a lease that holds.
    pub fn group_of(&self, worker: &str, lease: &str) -> Option<GroupId> {
        let holds = &self.hands.0.get(worker)?.holds;
        let is = |g: &&u64| self.slots.get(g).and_then(Slot::holder).is_some_and(|h| h.lease == lease);
        self.order.known(*holds.iter().find(is)?)
    }

    /// Notes a sign of life of a worker. Every call of it is one.
    pub fn hear(&mut self, worker: &str, now: Duration) {
        self.tick(now);
        self.hands.of(worker).heard = self.now;
        self.alive(worker);
    }

    /// The first groups that [`Self::lease`] would hand out to a worker, at most `max`: what may be prepared for it.
    pub fn candidates(&mut self, worker: &str, max: usize) -> Vec<GroupId> {
        let numbers = self.chosen(worker, max);
        numbers.into_iter().map(|g| self.order.group(g)).collect()
    }

    /// Hands out those of the first `ask.max` groups that are `ready`: what came back first, then new ones in order. A call with a number
    /// that was answered already gets the same leases again, as far as they hold.
    ///
    /// Empty when all that may be out is out: a group is handed out only if it belongs to one of the next
    /// `max_staleness + 1` batches from the published version on, and never to a worker that still has it in hand under a lease that
    /// ran out. Expires old leases first.
    pub fn lease(&mut self, ask: Ask<'_>, now: Duration, ready: impl Fn(&GroupId) -> bool) -> Vec<Lease> {
        self.hear(ask.worker, now);
        self.expire(now);
        let again = self.answered(ask.worker, ask.call);
        if !again.is_empty() {
            return again;
        }
        let numbers = self.chosen(ask.worker, ask.max);
        let mut out = Vec::with_capacity(numbers.len());
        for g in numbers {
            if ready(&self.order.group(g)) {
                out.push(self.hand_out(g, ask));
            }
        }
        out
    }

    /// Leases that call `call` of a worker was answered with, and that hold.
    pub fn answered(&mut self, worker: &str, call: u64) -> Vec<Lease> {
        let Some(hand) = self.hands.0.get(worker).filter(|_| call != 0) else { return Vec::new() };
        let mut out = Vec::new();
        for g in &hand.holds {
            if let Some(h) = self.slots.get(g).and_then(Slot::holder).filter(|h| h.call == call) {
                let (group, min_version) = (self.order.group(*g), h.min_version);
                out.push(Lease { id: h.lease.clone(), group, min_version, deadline: h.deadline });
            }
        }
        out
    }

    fn hand_out(&mut self, g: u64, ask: Ask<'_>) -> Lease {
        for skipped in self.cursor..g {
            self.put(skipped, Slot::waiting());
        }
        self.cursor = self.cursor.max(g + 1);
        self.leases += 1;
        let lease = Lease {
            id: format!("{}-{}", self.settings.term, self.leases),
            group: self.order.group(g),
            min_version: self.trained_at(g).saturating_sub(self.settings.max_staleness),
            deadline: self.deadline(),
        };
        self.events.push(Event::Leased {
            ms: self.ms(),
            worker: ask.worker.to_string(),
            lease: lease.id.clone(),
            group: lease.group.clone(),
            min_version: lease.min_version,
        });
        let holder = Holder {
            worker: ask.worker.to_string(),
            lease: lease.id.clone(),
            call: ask.call,
            min_version: lease.min_version,
            deadline: lease.deadline,
            progress: 0,
            moved: self.now,
        };
        let past = self.slots.get(&g).map_or_else(Vec::new, |s| s.past().to_vec());
        self.put(g, Slot::Leased { holder, past });
        lease
    }

    fn deadline(&self) -> Duration {
        self.now.saturating_add(Duration::from_secs_f64(self.settings.lease_s))
    }

    /// The version that will train group `g`, if each batch publishes one version.
    fn trained_at(&self, g: u64) -> WeightVersion {
        self.version.saturating_add(self.ahead_of(g) / self.settings.groups_per_step as u64)
    }

    /// Hears what a worker has in hand. Leases whose groups make progress are renewed, also those that ran out while nobody else has
    /// the group; those that it does not know of, though it has every answer to calls up to `beat.done`, return to the queue. Returns
    /// those among `beat.in_hand` that are not its any more: nobody waits for its work on them.
    pub fn heartbeat(&mut self, beat: &Heartbeat<'_>, now: Duration) -> Vec<String> {
        self.hear(beat.worker, now);
        let told: HashMap<&str, u64> = beat.in_hand.iter().map(|h| (h.lease.as_str(), h.progress)).collect();
        let mut kept: Vec<String> = Vec::new();
        for g in self.hands.of(beat.worker).groups() {
            let Some(slot) = self.slots.remove(&g) else { continue };
            self.hands.remove(g, &slot);
            let slot = match slot {
                Slot::Leased { mut holder, past } if holder.worker == beat.worker => {
                    if let Some(progress) = told.get(holder.lease.as_str()) {
                        self.renew(&mut holder, *progress);
                        kept.push(holder.lease.clone());
                        Slot::Leased { holder, past }
                    } else if holder.unknown(beat.done) {
                        self.released(g, &holder, false);
                        Slot::Waiting { past }
                    } else {
                        Slot::Leased { holder, past }
                    }
                }
                Slot::Leased { holder, mut past } => {
                    past.retain(|h| {
                        h.worker != beat.worker || told.contains_key(h.lease.as_str()) || !h.unknown(beat.done)
                    });
                    Slot::Leased { holder, past }
                }
                Slot::Waiting { past } => {
                    let (mut own, mut past): (Vec<_>, Vec<_>) = past.into_iter().partition(|h| h.worker == beat.worker);
                    own.retain(|h| told.contains_key(h.lease.as_str()) || !h.unknown(beat.done));
                    kept.extend(own.iter().map(|h| h.lease.clone()));
                    let moves = |s: &Self, h: &mut Holder| {
                        told.get(h.lease.as_str()).is_some_and(|progress| s.renew(h, *progress))
                    };
                    match own.iter_mut().position(|h| moves(self, h)) {
                        Some(at) => {
                            let holder = own.swap_remove(at);
                            past.extend(own);
                            let (ms, worker, lease) = (self.ms(), holder.worker.clone(), holder.lease.clone());
                            self.events.push(Event::Renewed { ms, worker, lease, group: self.order.group(g) });
                            Slot::Leased { holder, past }
                        }
                        None => {
                            past.extend(own);
                            Slot::Waiting { past }
                        }
                    }
                }
                other => other,
            };
            self.put(g, slot);
        }
        let lost = |h: &&crate::InHand| !kept.contains(&h.lease);
        beat.in_hand.iter().filter(lost).map(|h| h.lease.clone()).collect()
    }

    /// Renews a lease, unless its group stands still.
    fn renew(&self, holder: &mut Holder, progress: u64) -> bool {
        if progress > holder.progress {
            (holder.progress, holder.moved) = (progress, self.now);
        }
        let moves = !self.stalled(holder);
        if moves {
            holder.deadline = self.deadline();
        }
        moves
    }

    fn stalled(&self, holder: &Holder) -> bool {
        self.now.saturating_sub(holder.moved) >= Duration::from_secs_f64(self.settings.stall_s)
    }

    /// Takes a whole group back, or says why it does not count. A lease that ran out still holds while nobody else has
    /// the group.
    pub fn submit(&mut self, s: &Submission<'_>, payload: T, now: Duration) -> Verdict {
        self.hear(s.worker, now);
        let (ms, worker, lease, group) = (self.ms(), s.worker.to_string(), s.lease.to_string(), s.group.clone());
        let Some(g) = self.order.number(s.group).filter(|g| *g < self.cursor) else {
            self.counts.refused += 1;
            self.events.push(Event::Refused { ms, worker, lease, group });
            return Verdict::Expired;
        };
        let late = match self.slots.get(&g) {
            None | Some(Slot::Ready { .. } | Slot::Training) => {
                self.counts.duplicates += 1;
                self.events.push(Event::Duplicate { ms, worker, lease, group });
                return Verdict::Duplicate;
            }
            Some(Slot::Leased { holder, .. }) if holder.is(s.worker, s.lease) => self.now >= holder.deadline,
            Some(Slot::Waiting { past }) if past.iter().any(|h| h.is(s.worker, s.lease)) => true,
            Some(_) => {
                self.counts.refused += 1;
                self.events.push(Event::Refused { ms, worker, lease, group });
                self.let_go(g, |h| h.is(s.worker, s.lease), false);
                return Verdict::Expired;
            }
        };
        let oldest = s.versions.oldest;
        let lags = oldest.saturating_add(self.settings.max_staleness) < self.trained_at(g);
        if lags || s.versions.newest > self.version || oldest > s.versions.newest {
            self.counts.stale += 1;
            self.taken_back(g, s.worker, s.lease);
            self.events.push(Event::Stale { ms, worker, lease, group, oldest, version: self.version });
            return Verdict::Stale;
        }
        self.came_right(g);
        self.standings.did_well(s.worker);
        let slot = Slot::Ready { payload, versions: s.versions, worker: worker.clone(), lease: lease.clone() };
        self.put(g, slot);
        self.events.push(Event::Submitted { ms, worker, lease, group, oldest, late });
        Verdict::Accepted
    }

    /// Gives leases back unfinished; returns how many held.
    pub fn release(&mut self, worker: &str, leases: &[String], now: Duration) -> usize {
        self.hear(worker, now);
        let groups = self.hands.of(worker).groups();
        let of = |h: &Holder| h.worker == worker && leases.contains(&h.lease);
        groups.into_iter().filter(|g| self.let_go(*g, of, false)).count()
    }

    /// Returns all groups of a worker that is gone to the queue; returns how many it held.
    pub fn worker_lost(&mut self, worker: &str, now: Duration) -> usize {
        self.tick(now);
        self.gone(worker);
        self.standings.forget(worker);
        let groups = self.hands.of(worker).groups();
        let alone = groups.len() == 1;
        let held: Vec<u64> = groups.into_iter().filter(|g| self.let_go(*g, |h| h.worker == worker, true)).collect();
        self.hands.0.remove(worker);
        self.died(worker, &held, alone, false);
        held.len()
    }

    /// A group comes back from a worker that can still bring it in, under that lease; tells whether it could. Others that have it in
    /// hand still may.
    pub(crate) fn taken_back(&mut self, g: u64, worker: &str, lease: &str) -> bool {
        let Some(slot) = self.slots.get(&g) else { return false };
        let holds = match slot {
            Slot::Leased { holder, .. } => holder.is(worker, lease),
            Slot::Waiting { past } => past.iter().any(|h| h.is(worker, lease)),
            _ => false,
        };
        if holds {
            let past = slot.past().iter().filter(|h| !h.is(worker, lease)).cloned().collect();
            self.put(g, Slot::Waiting { past });
        }
        holds
    }

    /// Takes a group off those that `of` chooses; tells whether one of them had the lease.
    pub(crate) fn let_go(&mut self, g: u64, of: impl Fn(&Holder) -> bool, lost: bool) -> bool {
        let Some(slot) = self.slots.remove(&g) else { return false };
        self.hands.remove(g, &slot);
        let (slot, held) = match slot {
            Slot::Waiting { mut past } => {
                past.retain(|h| !of(h));
                (Slot::Waiting { past }, false)
            }
            Slot::Leased { holder, mut past } => {
                past.retain(|h| !of(h));
                let held = of(&holder);
                if held {
                    self.released(g, &holder, lost);
                }
                (if held { Slot::Waiting { past } } else { Slot::Leased { holder, past } }, held)
            }
            other => (other, false),
        };
        self.put(g, slot);
        held
    }

    fn released(&mut self, g: u64, holder: &Holder, lost: bool) {
        let (ms, worker, lease) = (self.ms(), holder.worker.clone(), holder.lease.clone());
        self.events.push(Event::Released { ms, worker, lease, group: self.order.group(g), lost });
    }

    /// Returns groups whose leases have run out, whose workers are silent, or that stand still, to the queue; returns how many.
    /// [`Self::lease`] does it too. A worker that was only slow or cut off may still bring its group in, while nobody else has it.
    pub fn expire(&mut self, now: Duration) -> usize {
        self.tick(now);
        let silence = Duration::from_secs_f64(self.settings.silence_s);
        let mut over = Vec::new();
        let mut dead: Vec<(String, Vec<u64>, bool)> = Vec::new();
        for (worker, hand) in &self.hands.0 {
            let silent = self.now.saturating_sub(hand.heard) >= silence;
            for g in &hand.holds {
                let Some(h) = self.slots.get(g).and_then(Slot::holder) else { continue };
                let stalled = self.stalled(h);
                if silent || stalled || self.now >= h.deadline {
                    over.push((*g, silent, stalled));
                }
            }
            if silent && !hand.holds.is_empty() {
                dead.push((worker.clone(), hand.holds.iter().copied().collect(), hand.groups().len() == 1));
            }
        }
        over.sort_unstable();
        for (g, silent, stalled) in &over {
            let Some(slot) = self.slots.remove(g) else { continue };
            self.hands.remove(*g, &slot);
            let slot = match slot {
                Slot::Leased { holder, mut past } => {
                    let (ms, worker, lease) = (self.ms(), holder.worker.clone(), holder.lease.clone());
                    tracing::warn!(worker, lease, silent, stalled, "a lease ran out; its group returns to the queue");
                    let (group, silent, stalled) = (self.order.group(*g), *silent, *stalled);
                    self.events.push(Event::Expired { ms, worker, lease, group, silent, stalled });
                    past.push(holder);
                    Slot::Waiting { past }
                }
                other => other,
            };
            self.put(*g, slot);
        }
        dead.iter().for_each(|(worker, groups, alone)| self.died(worker, groups, *alone, true));
        self.counts.expired += over.len() as u64;
        over.len()
    }

    /// Puts a group where it is now.
    pub(crate) fn put(&mut self, g: u64, slot: Slot<T>) {
        if let Some(before) = self.slots.get(&g) {
            self.hands.remove(g, before);
        }
        self.hands.add(g, &slot);
        self.slots.insert(g, slot);
    }
}
