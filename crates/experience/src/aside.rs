//! Groups that cannot be made: which workers died with a group in hand, or gave it up, and when its record is set aside so that one
//! record cannot end a run.
//!
//! A worker that dies takes many groups with it, and one of them at most is to blame. So a group that was in the hands of all but one
//! of the deaths that set it aside is leased alone from then on, to a worker that has nothing else, and only a loss of which it
//! is certainly the cause sets it aside. Must not know: what a group is made of.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::Duration;

use unveil_core::GroupId;

use crate::event::Event;
use crate::hands::{Hand, Holder, Slot};
use crate::machine::Experience;

/// What went wrong with groups and has not come right since.
#[derive(Debug, Default)]
pub(crate) struct Faults {
    /// Losses that set a group aside; 0 = none ever is.
    limit: u32,
    /// By group.
    groups: BTreeMap<u64, Fault>,
    /// Groups that a worker fell silent with: no fault of theirs if it is heard again.
    silent: HashMap<String, Vec<u64>>,
    /// Rows of the data set whose groups are not handed out any more, and why.
    rows: BTreeMap<usize, String>,
    /// Groups that a checkpoint says are set aside, beyond those that were handed out.
    ahead: BTreeMap<u64, String>,
    /// Groups set aside that are behind the frontier and were not when the present version was published.
    passed: u64,
}

#[derive(Debug, Default)]
struct Fault {
    count: u32,
    /// Workers whose work on it was rejected: each counts once.
    rejected: BTreeSet<String>,
}

/// Groups that came back unfinished, with why.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Return {
    /// The worker stops, or does not trust its weights.
    Handed,
    /// No reward could be had.
    Unscored,
    /// The group itself could not be made.
    Failed,
}

impl<T> Experience<T> {
    /// Sets a group aside once so many workers have lost it: it is never trained then, and counted as dropped. 0 = none ever is.
    pub fn set_aside_after(mut self, losses: u32) -> Self {
        self.faults.limit = losses;
        self
    }

    /// Gives leases back unfinished for a reason; returns how many held.
    pub fn give_back_for(&mut self, worker: &str, leases: &[String], cause: Return, why: &str, now: Duration) -> usize {
        if cause == Return::Handed {
            return self.release(worker, leases, now);
        }
        self.hear(worker, now);
        let (mut found, mut late) = (Vec::new(), Vec::new());
        for g in self.hands.of(worker).groups() {
            let of = |h: &&Holder| h.worker == worker && leases.contains(&h.lease);
            let Some(slot) = self.slots.get(&g) else { continue };
            found.extend(slot.holder().filter(of).map(|h| (g, h.lease.clone())));
            late.extend(slot.past().iter().filter(of).map(|h| (g, h.lease.clone())));
        }
        // Whose lease ran out has it no more in hand.
        for (g, lease) in &late {
            self.let_go(*g, |h| h.is(worker, lease), false);
        }
        // One that failed alone is to blame; of several, one is, and nobody knows which.
        let certain = found.len() == 1;
        for (g, lease) in &found {
            self.taken_back(*g, worker, lease);
            let (ms, worker, lease, why) = (self.ms(), worker.to_owned(), lease.clone(), why.to_owned());
            let group = self.order.group(*g);
            if cause == Return::Unscored {
                self.counts.unscored += 1;
                self.events.push(Event::Unscored { ms, worker, lease, group, why });
            } else {
                self.counts.failed += 1;
                self.events.push(Event::Failed { ms, worker, lease, group, why: why.clone() });
                self.fault(*g, certain, &why);
            }
        }
        found.len()
    }

    /// A worker was lost with leases of these groups, and with nothing else in hand where it had one `alone`; `silent` when it may
    /// still be heard again.
    pub(crate) fn died(&mut self, worker: &str, groups: &[u64], alone: bool, silent: bool) {
        if self.faults.limit == 0 || groups.is_empty() {
            return;
        }
        if silent {
            self.faults.silent.entry(worker.to_owned()).or_default().extend(groups);
        }
        let why = format!("worker `{worker}` {}", if silent { "fell silent with it" } else { "ended with it" });
        for g in groups {
            self.fault(*g, alone, &why);
        }
    }

    /// A worker that fell silent is heard: what it held is not to blame.
    pub(crate) fn alive(&mut self, worker: &str) {
        for g in self.faults.silent.remove(worker).unwrap_or_default() {
            if let Some(fault) = self.faults.groups.get_mut(&g) {
                fault.count = fault.count.saturating_sub(1);
            }
        }
    }

    /// A worker that fell silent is gone for good: what counts against its groups stays.
    pub(crate) fn gone(&mut self, worker: &str) {
        self.faults.silent.remove(worker);
    }

    /// A group came in whole.
    pub(crate) fn came_right(&mut self, g: u64) {
        self.faults.groups.remove(&g);
    }

    /// Work on a group was rejected for what it holds. Each worker counts once: one that is broken makes no group bad.
    pub(crate) fn rejected_once(&mut self, g: u64, worker: &str, why: &str) {
        if self.faults.limit > 0 && self.faults.groups.entry(g).or_default().rejected.insert(worker.to_owned()) {
            self.fault(g, true, why);
        }
    }

    fn fault(&mut self, g: u64, certain: bool, why: &str) {
        if self.faults.limit == 0 {
            return;
        }
        let fault = self.faults.groups.entry(g).or_default();
        fault.count += 1;
        let count = fault.count;
        // Another worker may be about to bring it in.
        let waits = matches!(self.slots.get(&g), Some(Slot::Waiting { .. }));
        if count < self.faults.limit || !certain || !waits {
            return;
        }
        let group = self.order.group(g);
        let why = format!("lost {count} times; the last time {why}");
        tracing::error!(
            record = group.record,
            pass = group.pass,
            "a record is set aside and not trained, so that the run goes on: {why}"
        );
        if let Some(row) = self.order.row(&group) {
            self.faults.rows.insert(row, why.clone());
        }
        self.faults.groups.remove(&g);
        self.put_aside(g, why);
    }

    fn put_aside(&mut self, g: u64, why: String) {
        let group = self.order.group(g);
        self.events.push(Event::Dropped { ms: self.ms(), group, why: why.clone() });
        self.faults.ahead.remove(&g);
        self.put(g, Slot::Aside { why });
    }

    /// Whether a group is leased alone: one more loss may set it aside.
    fn suspect(&self, g: u64) -> bool {
        let from = self.faults.limit.saturating_sub(1).max(1);
        self.faults.limit > 0 && self.faults.groups.get(&g).is_some_and(|f| f.count >= from)
    }

    /// Up to `max` groups that `worker` may have: those that came back first, then new ones in order; none that it still has in hand,
    /// and none at all for one that is quarantined. A group under suspicion goes alone to a worker that has nothing in hand.
    pub(crate) fn chosen(&mut self, worker: &str, max: usize) -> Vec<u64> {
        let held = self.hands.0.get(worker).map(Hand::groups).unwrap_or_default();
        if max == 0 || self.quarantined(worker).is_some() || held.iter().any(|g| self.suspect(*g)) {
            return Vec::new();
        }
        let waiting: Vec<u64> = self.slots.iter().filter(|(_, s)| s.is_free_for(worker)).map(|(g, _)| *g).collect();
        let alone = waiting.iter().copied().find(|g| self.suspect(*g));
        if let Some(g) = alone.filter(|_| held.is_empty()) {
            return vec![g];
        }
        let mut out: Vec<u64> = waiting.into_iter().filter(|g| !self.suspect(*g)).take(max).collect();
        let mut next = self.cursor;
        while out.len() < max && next < self.end() {
            match self.barred(next) {
                None => out.push(next),
                // What is set aside makes room for as many more.
                Some(why) if next == self.cursor => {
                    self.cursor += 1;
                    self.put_aside(next, why);
                }
                Some(_) => break,
            }
            next += 1;
        }
        out
    }

    /// Why a group that was never handed out is not to be; none where it may be, or where nothing else is left.
    fn barred(&mut self, g: u64) -> Option<String> {
        if self.barren() {
            return None;
        }
        if let Some(why) = self.faults.ahead.get(&g) {
            return Some(why.clone());
        }
        if self.faults.rows.is_empty() {
            return None;
        }
        let group = self.order.group(g);
        let row = self.order.row(&group)?;
        self.faults.rows.get(&row).cloned()
    }

    /// Every record is set aside: nothing can be trained any more.
    pub fn barren(&self) -> bool {
        self.faults.rows.len() as u64 >= self.order.records()
    }

    /// Groups set aside among `range`.
    pub(crate) fn aside_in(&self, range: std::ops::Range<u64>) -> u64 {
        if range.is_empty() {
            return 0;
        }
        self.slots.range(range).filter(|(_, s)| matches!(s, Slot::Aside { .. })).count() as u64
    }

    /// Groups of the whole run: those that are set aside are made up for.
    pub(crate) fn total(&self) -> Option<u64> {
        let made_up = self.ledger.dropped() + self.aside_in(0..u64::MAX);
        self.settings.total_groups.map(|n| n.saturating_add(made_up))
    }

    /// Past the last group of the window that the published version opens.
    pub(crate) fn window_end(&self) -> u64 {
        let window = (self.settings.max_staleness + 1).saturating_mul(self.settings.groups_per_step as u64);
        let aside = self.faults.passed + self.aside_in(self.frontier..u64::MAX);
        self.published_at.saturating_add(window).saturating_add(aside)
    }

    /// Groups from the window's start up to `g` that updates take.
    pub(crate) fn ahead_of(&self, g: u64) -> u64 {
        let aside = self.faults.passed + self.aside_in(self.frontier..g.max(self.frontier));
        g.saturating_sub(self.published_at).saturating_sub(aside)
    }

    /// The groups that the next batch spans, those that are set aside among them; none where too few were handed out.
    pub(crate) fn next_range(&self) -> Option<std::ops::Range<u64>> {
        let end = self.total().unwrap_or(u64::MAX);
        let (mut at, mut size) = (self.frontier, 0);
        while at < end && size < self.settings.groups_per_step {
            match self.slots.get(&at) {
                None => return None,
                Some(Slot::Aside { .. }) => {}
                Some(_) => size += 1,
            }
            at += 1;
        }
        (size > 0).then_some(self.frontier..at)
    }

    /// Counts the groups set aside in `range`, which the frontier passes, as dropped.
    pub(crate) fn pass_over(&mut self, range: std::ops::Range<u64>) {
        let aside: Vec<(u64, String)> = self
            .slots
            .range(range)
            .filter_map(|(g, slot)| match slot {
                Slot::Aside { why } => Some((*g, why.clone())),
                _ => None,
            })
            .collect();
        for (g, why) in aside {
            let group = self.order.group(g);
            self.faults.passed += 1;
            if let Some(row) = self.order.row(&group) {
                self.ledger.drop_group(&group, row, self.order.records(), why);
            }
        }
        let frontier = self.frontier;
        self.faults.groups.retain(|g, _| *g >= frontier);
        self.faults.silent.retain(|_, groups| groups.iter().any(|g| *g >= frontier));
    }

    /// A version was published: the window begins anew.
    pub(crate) fn window_opens(&mut self) {
        self.faults.passed = 0;
    }

    /// Groups that are set aside and that the frontier has not passed, with why.
    pub(crate) fn pending_aside(&self) -> Vec<(GroupId, String)> {
        let of = |(g, slot): (&u64, &Slot<T>)| match slot {
            Slot::Aside { why } => Some((self.order.known(*g)?, why.clone())),
            _ => None,
        };
        self.slots.iter().filter_map(of).collect()
    }

    /// Takes over what a checkpoint says is set aside.
    pub(crate) fn take_aside(&mut self, aside: &[(GroupId, String)]) {
        let records = self.order.records();
        self.faults.ahead = aside
            .iter()
            .map(|(g, why)| (g.pass.saturating_mul(records).saturating_add(g.position), why.clone()))
            .collect();
    }
}
