//! Workers by name: which process a name stands for, who was heard of, and how much each may take. Must not know: what travels.

use std::time::Duration;

use tonic::Status;

use super::{SILENT, State};

impl State {
    /// Notes a sign of life; tells whether the worker was known.
    pub(super) fn hear(&mut self, worker: &str, now: Duration) -> bool {
        self.machine.hear(worker, now);
        self.workers.insert(worker.to_owned(), now).is_some()
    }

    /// Notes a worker. Another session, or a name `base#k`, stands for a process that was started again: what the one before, or
    /// other incarnations of `base`, hold is free at once.
    pub(super) fn welcome(&mut self, worker: &str, session: u64, now: Duration) {
        if session != 0 && self.sessions.insert(worker.to_owned(), session).is_some_and(|before| before != session) {
            self.gone(worker, now);
        }
        if self.hear(worker, now) {
            return;
        }
        let Some((base, _)) = worker.rsplit_once('#') else { return };
        let gone: Vec<String> = self
            .workers
            .keys()
            .filter(|w| *w != worker && w.rsplit_once('#').is_some_and(|(b, _)| b == base))
            .cloned()
            .collect();
        for name in gone {
            self.gone(&name, now);
            self.workers.remove(&name);
            self.sessions.remove(&name);
            self.sent.remove(&name);
        }
    }

    /// The process behind a name has ended.
    pub(super) fn gone(&mut self, worker: &str, now: Duration) {
        let held = self.machine.worker_lost(worker, now);
        tracing::warn!(worker, held, "the worker was started again: its groups return to the queue");
        if let Some(rounds) = &mut self.rounds {
            rounds.lost(worker);
        }
    }

    /// Refuses a process whose name another one has taken over.
    pub(super) fn is_one(&self, worker: &str, session: u64) -> Result<(), Status> {
        if session == 0 || self.sessions.get(worker).is_none_or(|s| *s == session) {
            return Ok(());
        }
        Err(Status::already_exists(format!(
            "another process has taken over the name `{worker}`: give each worker a name of its own"
        )))
    }

    /// Groups that `worker` may take of `most` that it asks for. Where leases have a fixed size, that many, one lease at a time. Else
    /// one that has nothing in hand gets all; one that looks ahead
    /// leaves a share of the same size to each that has nothing.
    pub(super) fn share(&self, worker: &str, most: usize, fixed: Option<usize>, now: Duration) -> usize {
        let free = self.machine.leased_by(worker) == 0;
        if let Some(size) = fixed {
            return if free { size } else { 0 };
        }
        if free {
            return most;
        }
        let idle = self.workers.iter().filter(|(name, heard)| {
            *name != worker && now.saturating_sub(**heard) < SILENT && self.machine.leased_by(name) == 0
        });
        most.min(self.machine.leasable().saturating_sub(idle.count().saturating_mul(most)))
    }

    /// Refuses a worker that is quarantined. Without its name in the list of workers nobody waits for it at the end.
    pub(super) fn admit(&mut self, worker: &str) -> Result<(), Status> {
        let Some(why) = self.machine.quarantined(worker) else { return Ok(()) };
        let what = format!("worker `{worker}` gets no more groups: {why}. Look at its machine, and start it again");
        self.workers.remove(worker);
        Err(Status::permission_denied(what))
    }
}
