//! Membership of weight broadcasts: a pure state machine of the subscribed workers and the current broadcast group. A
//! round is a set of workers with their collective group; it is reused for as long as its members stay the same.
//! Workers that caused a failure are excluded for some versions.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use serde::Serialize;
use unveil_collective::CollectiveError;
use unveil_core::WeightVersion;
use unveil_proto::v1;

use super::PRESENCE_TIMEOUT;
use super::buckets::BucketSource;
use super::error::{Result, ServerError};
use super::weights::Published;

/// A completed broadcast.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct BroadcastReport {
    /// Version that was sent.
    pub version: WeightVersion,
    /// Round; it stays the same while the workers do.
    pub round: u64,
    /// Number of workers that took part.
    pub workers: usize,
    /// Bytes of tensors sent.
    pub bytes: u64,
    /// Milliseconds since the version was published.
    pub ms: u64,
}

/// Last request of a worker that can take part in broadcasts.
#[derive(Debug)]
struct Subscriber {
    held: v1::HeldWeights,
    round: u64,
    /// Local address on which this worker reached the server.
    local: IpAddr,
    /// Treated as alive until this time unless it calls again.
    alive_until: Duration,
}

/// Exclusion of a worker that caused a broadcast to fail.
#[derive(Debug)]
struct Penalty {
    /// Failures since the last successful broadcast.
    failures: u64,
    /// First version whose broadcast may include the worker again.
    included_from: WeightVersion,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Phase {
    /// Workers may join.
    Sending,
    /// All workers have received the version: the collective group can be reused.
    Sent,
    Failed,
}

/// The current round, and the version that it is sending or has sent last.
#[derive(Debug)]
struct BroadcastGroup {
    round: u64,
    /// Ranks of the workers.
    members: BTreeMap<String, usize>,
    fingerprint: String,
    /// Rendezvous address, once rank 0 is listening.
    address: Option<SocketAddr>,
    /// Header sent to each worker, apart from its base and rank.
    head: v1::WeightsHead,
    /// Oldest version held by a member.
    since: WeightVersion,
    phase: Phase,
}

/// Response to a worker that requests weights.
pub(super) enum BroadcastOffer {
    /// The worker receives a stream.
    None,
    /// The worker takes part, but rank 0 is not listening yet.
    Pending,
    /// The worker takes part.
    Head(Box<v1::WeightsHead>),
}

/// A version to broadcast.
pub(super) struct BroadcastJob {
    pub round: u64,
    pub workers: usize,
    pub fingerprint: String,
    /// Local address for the rendezvous of a new group; `None`: the current group is reused.
    pub rendezvous_ip: Option<IpAddr>,
    pub version: WeightVersion,
    pub bytes: u64,
    pub source: BucketSource,
    started: Instant,
}

/// Subscribed workers and the current broadcast group.
#[derive(Debug)]
pub(super) struct BroadcastGroups {
    backend: &'static str,
    /// Number of the open subscription of each worker.
    streams: BTreeMap<String, u64>,
    opened_streams: u64,
    subscribers: BTreeMap<String, Subscriber>,
    penalties: BTreeMap<String, Penalty>,
    current: Option<BroadcastGroup>,
    reports: Vec<BroadcastReport>,
}

impl BroadcastGroups {
    /// Creates the state without subscribers; only workers with the same `backend` can take part.
    pub(super) fn new(backend: &'static str) -> Self {
        Self {
            backend,
            streams: BTreeMap::new(),
            opened_streams: 0,
            subscribers: BTreeMap::new(),
            penalties: BTreeMap::new(),
            current: None,
            reports: Vec::new(),
        }
    }

    /// Subscribes a worker; returns the number of its stream.
    pub(super) fn subscribe(&mut self, worker: &str) -> u64 {
        self.opened_streams += 1;
        self.streams.insert(worker.to_owned(), self.opened_streams);
        self.opened_streams
    }

    /// Handles the end of a stream: the worker is lost unless it has opened a newer one.
    pub(super) fn stream_closed(&mut self, worker: &str, stream: u64) {
        if self.streams.get(worker) == Some(&stream) {
            self.worker_lost(worker);
        }
    }

    /// Removes a worker.
    pub(super) fn worker_lost(&mut self, worker: &str) {
        self.streams.remove(worker);
        self.subscribers.remove(worker);
    }

    /// Records the request of a worker that holds `base` and should call again by `until`; `local` is the address on
    /// which it reached the server.
    pub(super) fn record_request(
        &mut self,
        worker: &str,
        capability: Option<&v1::BroadcastCapability>,
        base: Option<v1::HeldWeights>,
        local: Option<IpAddr>,
        until: Duration,
    ) {
        let capability = capability.filter(|c| c.backend == self.backend && self.streams.contains_key(worker));
        match (capability, base, local) {
            (Some(capability), Some(held), Some(local)) => {
                let alive_until = until + PRESENCE_TIMEOUT;
                let subscriber = Subscriber { held, round: capability.round, local, alive_until };
                self.subscribers.insert(worker.to_owned(), subscriber);
            }
            _ => drop(self.subscribers.remove(worker)),
        }
    }

    /// Starts the broadcast of a new version to all workers that are alive; returns `None` if there are none or another
    /// broadcast is in progress.
    pub(super) fn start(&mut self, new: &Published, now: Duration) -> Option<BroadcastJob> {
        if self.current.as_ref().is_some_and(|g| g.phase == Phase::Sending) {
            return None;
        }
        self.subscribers.retain(|_, s| s.alive_until >= now);
        let is_excluded = |worker: &str| self.penalties.get(worker).is_some_and(|p| new.version < p.included_from);
        let chosen: Vec<(&String, &Subscriber)> = self.subscribers.iter().filter(|(w, _)| !is_excluded(w)).collect();
        let since = chosen.iter().map(|(_, s)| s.held.version).min()?;
        // Workers on this machine may use an address that other machines cannot reach.
        let local = chosen.iter().map(|(_, s)| s.local).max_by_key(|ip| !ip.is_loopback())?;
        let (head, tensors) = new.changed_after(since);
        let members: BTreeMap<String, usize> = chosen.iter().map(|(w, _)| (*w).clone()).zip(1..).collect();
        let previous = self.current.take();
        let last_round = previous.as_ref().map_or(0, |g| g.round);
        let is_reusable = |g: &BroadcastGroup| {
            g.phase == Phase::Sent && g.members == members && chosen.iter().all(|(_, s)| s.round == g.round)
        };
        let is_new = !previous.as_ref().is_some_and(is_reusable);
        let group = match previous {
            Some(previous) if !is_new => BroadcastGroup { head, since, phase: Phase::Sending, ..previous },
            _ => {
                let key: u128 = rand::random();
                let round = last_round + 1;
                let fingerprint = format!("unveil {}\nround {round} of {key:032x}", env!("CARGO_PKG_VERSION"));
                BroadcastGroup { round, members, fingerprint, address: None, head, since, phase: Phase::Sending }
            }
        };
        let job = BroadcastJob {
            round: group.round,
            workers: group.members.len(),
            fingerprint: group.fingerprint.clone(),
            rendezvous_ip: is_new.then_some(local),
            version: new.version,
            bytes: tensors.iter().map(|t| t.bytes()).sum(),
            source: BucketSource::Host(tensors),
            started: Instant::now(),
        };
        self.current = Some(group);
        Some(job)
    }

    /// Returns the offer for `worker`, which holds `base`.
    pub(super) fn offer(&mut self, worker: &str, base: Option<v1::HeldWeights>) -> BroadcastOffer {
        let Some(group) = self.current.as_ref().filter(|g| g.phase == Phase::Sending) else {
            return BroadcastOffer::None;
        };
        let is_covered = |base: &v1::HeldWeights| (group.since..group.head.version).contains(&base.version);
        let Some(rank) = group.members.get(worker) else { return BroadcastOffer::None };
        let Some(base) = base.filter(is_covered) else { return BroadcastOffer::None };
        let Some(subscriber) = self.subscribers.get_mut(worker) else { return BroadcastOffer::None };
        let Some(address) = group.address else { return BroadcastOffer::Pending };
        subscriber.round = group.round;
        let broadcast = v1::Broadcast {
            round: group.round,
            world: group.members.len() as u32 + 1,
            rank: *rank as u32,
            address: address.to_string(),
            fingerprint: group.fingerprint.clone(),
        };
        let head = v1::WeightsHead { base: Some(base), broadcast: Some(broadcast), ..group.head.clone() };
        BroadcastOffer::Head(Box::new(head))
    }

    /// Returns the broadcasts that were completed since the last call.
    pub(super) fn drain_reports(&mut self) -> Vec<BroadcastReport> {
        std::mem::take(&mut self.reports)
    }

    /// Records that rank 0 waits for the other ranks at `address`.
    pub(super) fn rendezvous_ready(&mut self, address: SocketAddr) {
        if let Some(group) = &mut self.current {
            group.address = Some(address);
        }
    }

    /// Handles the end of a broadcast. After a failure, its members are not included again before their next request.
    pub(super) fn finished(&mut self, job: &BroadcastJob, result: &Result<()>) {
        let Some(group) = &mut self.current else { return };
        let members = &group.members;
        let Err(e) = result else {
            group.phase = Phase::Sent;
            self.penalties.retain(|worker, _| !members.contains_key(worker));
            self.reports.push(BroadcastReport {
                version: job.version,
                round: job.round,
                workers: job.workers,
                bytes: job.bytes,
                ms: job.started.elapsed().as_millis() as u64,
            });
            return;
        };
        group.phase = Phase::Failed;
        self.subscribers.retain(|worker, _| !members.contains_key(worker));
        let ranks = failed_ranks(e);
        let mut at_fault: BTreeSet<&String> = members
            .iter()
            .filter(|(w, rank)| ranks.contains(*rank) || !self.streams.contains_key(*w))
            .map(|m| m.0)
            .collect();
        if at_fault.is_empty() {
            at_fault = members.keys().collect();
        }
        tracing::warn!(
            version = job.version,
            round = job.round,
            workers = job.workers,
            ?at_fault,
            "broadcast of weights failed, workers fall back to the gRPC stream: {e}"
        );
        for worker in at_fault {
            let penalty = self.penalties.entry(worker.clone()).or_insert(Penalty { failures: 0, included_from: 0 });
            penalty.failures += 1;
            penalty.included_from = job.version + 1 + penalty.failures;
        }
    }
}

/// Returns the ranks that an error names.
fn failed_ranks(e: &ServerError) -> &[usize] {
    match e {
        ServerError::Broadcast(CollectiveError::Fault(fault)) => &fault.ranks,
        ServerError::Broadcast(CollectiveError::Missing { ranks, .. }) => ranks,
        _ => &[],
    }
}

#[cfg(test)]
mod tests;
