//! Workers by name: the process that uses a name, the time of its last call, and how many groups it may lease.

use std::time::Duration;

use tonic::Status;

use super::{PRESENCE_TIMEOUT, ServerState};

impl ServerState {
    /// Records a call of a worker; returns whether the worker was known.
    pub(super) fn mark_alive(&mut self, worker: &str, now: Duration) -> bool {
        self.machine.touch_worker(worker, now);
        self.workers.insert(worker.to_owned(), now).is_some()
    }

    /// Records a call of a worker with its session. A new session of a name, or a new incarnation `base#k` of `base`,
    /// means that the process was restarted: leases of its predecessors are freed immediately.
    pub(super) fn record_call(&mut self, worker: &str, session: u64, now: Duration) {
        if session != 0 && self.sessions.insert(worker.to_owned(), session).is_some_and(|previous| previous != session)
        {
            self.release_groups_of(worker, now);
        }
        if self.mark_alive(worker, now) {
            return;
        }
        let Some((base, _)) = worker.rsplit_once('#') else { return };
        let predecessors: Vec<String> = self
            .workers
            .keys()
            .filter(|w| *w != worker && w.rsplit_once('#').is_some_and(|(b, _)| b == base))
            .cloned()
            .collect();
        for name in predecessors {
            self.release_groups_of(&name, now);
            self.workers.remove(&name);
            self.sessions.remove(&name);
            self.sent.remove(&name);
        }
    }

    /// Returns the groups of a worker whose process has ended to the queue.
    pub(super) fn release_groups_of(&mut self, worker: &str, now: Duration) {
        let held = self.machine.worker_lost(worker, now);
        tracing::warn!(worker, held, "worker was restarted, its groups return to the queue");
        if let Some(groups) = &mut self.broadcast_groups {
            groups.worker_lost(worker);
        }
    }

    /// Refuses calls of a process whose name is now used by another one.
    pub(super) fn check_session(&self, worker: &str, session: u64) -> Result<(), Status> {
        if session == 0 || self.sessions.get(worker).is_none_or(|s| *s == session) {
            return Ok(());
        }
        Err(Status::already_exists(format!(
            "another process is using the name `{worker}`: give each worker its own name"
        )))
    }

    /// Returns how many groups `worker` may lease of the `requested` ones. With a fixed lease size, exactly that many,
    /// one lease at a time. Otherwise an idle worker gets all, and one that prefetches leaves the same number to every
    /// idle worker.
    pub(super) fn lease_quota(&self, worker: &str, requested: usize, fixed: Option<usize>, now: Duration) -> usize {
        let is_idle = self.machine.leased_by(worker) == 0;
        if let Some(size) = fixed {
            return if is_idle { size } else { 0 };
        }
        if is_idle {
            return requested;
        }
        let idle_workers = self.workers.iter().filter(|(name, last_call)| {
            *name != worker && now.saturating_sub(**last_call) < PRESENCE_TIMEOUT && self.machine.leased_by(name) == 0
        });
        requested.min(self.machine.leasable().saturating_sub(idle_workers.count().saturating_mul(requested)))
    }

    /// Refuses a quarantined worker. It is removed from the list of workers, so that the end of the run does not wait
    /// for it.
    pub(super) fn check_quarantine(&mut self, worker: &str) -> Result<(), Status> {
        let Some(why) = self.machine.quarantine_reason(worker) else { return Ok(()) };
        let what = format!("worker `{worker}` gets no more groups: {why}. Check its machine and restart it");
        self.workers.remove(worker);
        Err(Status::permission_denied(what))
    }
}
