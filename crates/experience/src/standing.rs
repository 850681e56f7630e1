//! Workers whose work was refused for what it holds: who was, how often in a row, and who gets nothing any more.
//! Must not know: what is wrong with a submission.

use std::collections::HashMap;
use std::time::Duration;

use unveil_core::GroupId;

use crate::event::Event;
use crate::machine::Experience;

/// Submissions refused in a row after which a worker gets nothing any more.
const LIMIT: u32 = 3;

/// How workers stand; who is not named was never refused, or not since its last good work.
#[derive(Debug, Default)]
pub(crate) struct Standings(HashMap<String, Standing>);

#[derive(Debug, Default)]
struct Standing {
    in_a_row: u32,
    quarantined: Option<String>,
}

impl Standings {
    pub(crate) fn did_well(&mut self, worker: &str) {
        if self.0.get(worker).is_some_and(|s| s.quarantined.is_none()) {
            self.0.remove(worker);
        }
    }

    pub(crate) fn forget(&mut self, worker: &str) {
        self.0.remove(worker);
    }
}

impl<T> Experience<T> {
    /// A submission holds what cannot be used (`why`): its group returns to the queue, and the worker is noted. After three in a row
    /// it gets nothing any more; what it holds returns to the queue, too. Returns why, once that is so.
    pub fn rejected(&mut self, worker: &str, lease: &str, group: &GroupId, why: &str, now: Duration) -> Option<String> {
        self.hear(worker, now);
        let ms = self.ms();
        self.counts.rejected += 1;
        let (name, lease_id) = (worker.to_owned(), lease.to_owned());
        self.events.push(Event::Rejected {
            ms,
            worker: name,
            lease: lease_id,
            group: group.clone(),
            why: why.to_owned(),
        });
        if let Some(g) = self.order.number(group) {
            if self.taken_back(g, worker, lease) {
                self.rejected_once(g, worker, &format!("worker `{worker}` sent what cannot be used: {why}"));
            } else {
                self.let_go(g, |h| h.is(worker, lease), false);
            }
        }
        let standing = self.standings.0.entry(worker.to_owned()).or_default();
        standing.in_a_row += 1;
        if standing.in_a_row < LIMIT || standing.quarantined.is_some() {
            return standing.quarantined.clone();
        }
        let what = format!("{LIMIT} submissions in a row were refused, the last one because {why}");
        standing.quarantined = Some(what.clone());
        tracing::error!(worker, "a worker is quarantined: {what}. Look at its machine, and start it again");
        self.events.push(Event::Quarantined { ms, worker: worker.to_owned(), why: what.clone() });
        for g in self.hands.of(worker).groups() {
            self.let_go(g, |h| h.worker == worker, false);
        }
        Some(what)
    }

    /// Why a worker gets nothing any more; none where it does.
    pub fn quarantined(&self, worker: &str) -> Option<&str> {
        self.standings.0.get(worker)?.quarantined.as_deref()
    }
}
