//! Who takes part in which broadcast: a pure state machine of the workers that follow and the newest round. A round is a set of
//! workers and the world that they meet in; it serves versions as long as the set stays. A worker through which a round failed is
//! left out for a while. Must not know: threads, calls of the service.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use serde::Serialize;
use unveil_collective::CollectiveError;
use unveil_core::WeightVersion;
use unveil_proto::v1;

use super::SILENT;
use super::buckets::Source;
use super::weights::Published;
use crate::error::{LearnerError, Result};

/// A broadcast that reached all of its workers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Sent {
    /// The version that was sent.
    pub version: WeightVersion,
    /// The round; it stays the same while the workers do.
    pub round: u64,
    /// Workers that took part.
    pub workers: usize,
    /// Bytes of tensors.
    pub bytes: u64,
    /// Milliseconds from the publication on.
    pub ms: u64,
}

/// What a worker told last that can take part.
struct Follower {
    held: v1::HeldWeights,
    round: u64,
    /// Our address as it reaches us.
    local: IpAddr,
    /// It is counted on until then, if nothing is heard of it.
    until: Duration,
}

/// Rounds that failed through a worker.
struct Blame {
    /// Since the last one that ended well.
    times: u64,
    /// It is counted on again from this version on.
    from: WeightVersion,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// Workers may join.
    Sending,
    /// All have got it: the world can be used again.
    Sent,
    Failed,
}

/// The newest round, and what it sends or has sent.
struct Round {
    number: u64,
    /// Ranks of workers.
    members: BTreeMap<String, usize>,
    fingerprint: String,
    /// Where the ranks meet, once rank 0 is there.
    address: Option<SocketAddr>,
    /// What goes to a worker, but for its base and its rank.
    head: v1::WeightsHead,
    /// Who takes part holds this version or a newer one.
    since: WeightVersion,
    phase: Phase,
}

/// What a worker that asks for weights is told.
pub(super) enum Ticket {
    /// It takes a stream.
    None,
    /// Rank 0 is on its way.
    Soon,
    /// It takes part.
    Head(Box<v1::WeightsHead>),
}

/// One version to send.
pub(super) struct Job {
    pub round: u64,
    pub workers: usize,
    pub fingerprint: String,
    /// A new world meets at this address of ours; none: the one before is used again.
    pub meet: Option<IpAddr>,
    pub version: WeightVersion,
    pub bytes: u64,
    pub source: Source,
    begun: Instant,
}

/// Who can take part, and the newest round.
pub(super) struct Rounds {
    backend: &'static str,
    /// The open stream of each worker that follows, by number.
    streams: BTreeMap<String, u64>,
    opened: u64,
    followers: BTreeMap<String, Follower>,
    blamed: BTreeMap<String, Blame>,
    round: Option<Round>,
    sent: Vec<Sent>,
}

impl Rounds {
    /// Nobody follows yet; workers take part whose calls go over `backend`.
    pub fn new(backend: &'static str) -> Self {
        let (streams, followers, blamed) = (BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
        Self { backend, streams, opened: 0, followers, blamed, round: None, sent: Vec::new() }
    }

    /// A worker follows from here on; gives the number of its stream.
    pub fn follow(&mut self, worker: &str) -> u64 {
        self.opened += 1;
        self.streams.insert(worker.to_owned(), self.opened);
        self.opened
    }

    /// A stream has ended. The worker is gone, unless it has opened another one.
    pub fn ended_stream(&mut self, worker: &str, stream: u64) {
        if self.streams.get(worker) == Some(&stream) {
            self.lost(worker);
        }
    }

    /// A worker is gone.
    pub fn lost(&mut self, worker: &str) {
        self.streams.remove(worker);
        self.followers.remove(worker);
    }

    /// Notes what a worker tells that holds `base` and is heard of again by `until`; `local` is our address as it reaches us.
    pub fn note(
        &mut self,
        worker: &str,
        joins: Option<&v1::Joins>,
        base: Option<v1::HeldWeights>,
        local: Option<IpAddr>,
        until: Duration,
    ) {
        let joins = joins.filter(|j| j.backend == self.backend && self.streams.contains_key(worker));
        match (joins, base, local) {
            (Some(joins), Some(held), Some(local)) => {
                let follower = Follower { held, round: joins.round, local, until: until + SILENT };
                self.followers.insert(worker.to_owned(), follower);
            }
            _ => drop(self.followers.remove(worker)),
        }
    }

    /// Begins the round of a new version with all that can be counted on; none while one is under way or there is nobody.
    pub fn begin(&mut self, new: &Published, now: Duration) -> Option<Job> {
        if self.round.as_ref().is_some_and(|r| r.phase == Phase::Sending) {
            return None;
        }
        self.followers.retain(|_, f| f.until >= now);
        let left_out = |worker: &str| self.blamed.get(worker).is_some_and(|b| new.version < b.from);
        let chosen: Vec<(&String, &Follower)> = self.followers.iter().filter(|(w, _)| !left_out(w)).collect();
        let since = chosen.iter().map(|(_, f)| f.held.version).min()?;
        // Workers of this host may come by an address that others cannot reach.
        let local = chosen.iter().map(|(_, f)| f.local).max_by_key(|ip| !ip.is_loopback())?;
        let (head, tensors) = new.changed(since);
        let members: BTreeMap<String, usize> = chosen.iter().map(|(w, _)| (*w).clone()).zip(1..).collect();
        let last = self.round.take();
        let number = last.as_ref().map_or(0, |r| r.number);
        let same = |r: &Round| {
            r.phase == Phase::Sent && r.members == members && chosen.iter().all(|(_, f)| f.round == r.number)
        };
        let fresh = !last.as_ref().is_some_and(same);
        let round = match last {
            Some(last) if !fresh => Round { head, since, phase: Phase::Sending, ..last },
            _ => {
                let key: u128 = rand::random();
                let number = number + 1;
                let fingerprint = format!("unveil {}\nround {number} of {key:032x}", env!("CARGO_PKG_VERSION"));
                Round { number, members, fingerprint, address: None, head, since, phase: Phase::Sending }
            }
        };
        let job = Job {
            round: round.number,
            workers: round.members.len(),
            fingerprint: round.fingerprint.clone(),
            meet: fresh.then_some(local),
            version: new.version,
            bytes: tensors.iter().map(|t| t.bytes()).sum(),
            source: Source::Host(tensors),
            begun: Instant::now(),
        };
        self.round = Some(round);
        Some(job)
    }

    /// What `worker` is told that holds `base`.
    pub fn ticket(&mut self, worker: &str, base: Option<v1::HeldWeights>) -> Ticket {
        let Some(round) = self.round.as_ref().filter(|r| r.phase == Phase::Sending) else { return Ticket::None };
        let fits = |base: &v1::HeldWeights| (round.since..round.head.version).contains(&base.version);
        let (Some(rank), Some(base)) = (round.members.get(worker), base.filter(fits)) else { return Ticket::None };
        let Some(follower) = self.followers.get_mut(worker) else { return Ticket::None };
        let Some(address) = round.address else { return Ticket::Soon };
        follower.round = round.number;
        let broadcast = v1::Broadcast {
            round: round.number,
            world: round.members.len() as u32 + 1,
            rank: *rank as u32,
            address: address.to_string(),
            fingerprint: round.fingerprint.clone(),
        };
        let (base, broadcast) = (Some(base), Some(broadcast));
        Ticket::Head(Box::new(v1::WeightsHead { base, broadcast, ..round.head.clone() }))
    }

    /// Broadcasts that ended well since the last call.
    pub fn drain(&mut self) -> Vec<Sent> {
        std::mem::take(&mut self.sent)
    }

    /// Rank 0 of the round under way waits for the others at `address`.
    pub fn met(&mut self, address: SocketAddr) {
        if let Some(round) = &mut self.round {
            round.address = Some(address);
        }
    }

    /// The round under way has ended. After a failure nobody is counted on that does not ask again.
    pub fn ended(&mut self, job: &Job, done: &Result<()>) {
        let Some(round) = &mut self.round else { return };
        let members = &round.members;
        let Err(e) = done else {
            round.phase = Phase::Sent;
            self.blamed.retain(|worker, _| !members.contains_key(worker));
            let (ms, Job { version, round, workers, bytes, .. }) = (job.begun.elapsed().as_millis() as u64, job);
            self.sent.push(Sent { version: *version, round: *round, workers: *workers, bytes: *bytes, ms });
            return;
        };
        round.phase = Phase::Failed;
        self.followers.retain(|worker, _| !members.contains_key(worker));
        let named = named(e);
        let mut through: BTreeSet<&String> = members
            .iter()
            .filter(|(w, rank)| named.contains(*rank) || !self.streams.contains_key(*w))
            .map(|m| m.0)
            .collect();
        if through.is_empty() {
            through = members.keys().collect();
        }
        tracing::warn!(
            version = job.version,
            round = job.round,
            "weights were not broadcast to {} worker(s), through {through:?}: {e}; they take the gRPC stream",
            job.workers
        );
        for worker in through {
            let blame = self.blamed.entry(worker.clone()).or_insert(Blame { times: 0, from: 0 });
            blame.times += 1;
            blame.from = job.version + 1 + blame.times;
        }
    }
}

/// The ranks that a failure names.
fn named(e: &LearnerError) -> &[usize] {
    match e {
        LearnerError::Ranks(CollectiveError::Fault(fault)) => &fault.ranks,
        LearnerError::Ranks(CollectiveError::Missing { ranks, .. }) => ranks,
        _ => &[],
    }
}

#[cfg(test)]
#[path = "rounds_tests.rs"]
mod tests;
