//! Quarantine of workers whose submissions were rejected several times in a row.

use std::collections::HashMap;
use std::time::Duration;

use unveil_core::GroupId;

use crate::event::Event;
use crate::machine::Experience;

/// Number of consecutive rejected submissions after which a worker is quarantined.
const MAX_REJECTIONS: u32 = 3;

/// Workers with rejected submissions since their last accepted one.
#[derive(Debug, Default)]
pub(crate) struct Quarantine(HashMap<String, WorkerRecord>);

#[derive(Debug, Default)]
struct WorkerRecord {
    consecutive_rejections: u32,
    quarantine_reason: Option<String>,
}

impl Quarantine {
    pub(crate) fn reset(&mut self, worker: &str) {
        if self.0.get(worker).is_some_and(|record| record.quarantine_reason.is_none()) {
            self.0.remove(worker);
        }
    }

    pub(crate) fn forget(&mut self, worker: &str) {
        self.0.remove(worker);
    }
}

impl<T> Experience<T> {
    /// Rejects a submission because of its content (`why`): its group returns to the queue and the rejection is counted. After three
    /// consecutive rejections the worker is quarantined and its groups return to the queue. Returns the reason if the worker is quarantined.
    pub fn reject(&mut self, worker: &str, lease: &str, group: &GroupId, why: &str, now: Duration) -> Option<String> {
        self.touch_worker(worker, now);
        let ms = self.now_ms();
        self.counts.rejected += 1;
        self.events.push(Event::Rejected {
            ms,
            worker: worker.to_owned(),
            lease: lease.to_owned(),
            group: group.clone(),
            why: why.to_owned(),
        });
        if let Some(g) = self.order.number(group) {
            if self.take_back(g, worker, lease) {
                self.count_rejection(g, worker, &format!("worker `{worker}` sent an unusable group: {why}"));
            } else {
                self.remove_holders(g, |h| h.is(worker, lease), false);
            }
        }
        let record = self.quarantine.0.entry(worker.to_owned()).or_default();
        record.consecutive_rejections += 1;
        if record.consecutive_rejections < MAX_REJECTIONS || record.quarantine_reason.is_some() {
            return record.quarantine_reason.clone();
        }
        let reason = format!("{MAX_REJECTIONS} submissions in a row were rejected, the last one because {why}");
        record.quarantine_reason = Some(reason.clone());
        tracing::error!(worker, reason, "worker quarantined; check its machine and restart it");
        self.events.push(Event::Quarantined { ms, worker: worker.to_owned(), why: reason.clone() });
        for g in self.lease_index.entry(worker).groups() {
            self.remove_holders(g, |h| h.worker == worker, false);
        }
        Some(reason)
    }

    /// Returns why a worker is quarantined, or `None` if it is not.
    pub fn quarantine_reason(&self, worker: &str) -> Option<&str> {
        self.quarantine.0.get(worker)?.quarantine_reason.as_deref()
    }
}
