//! Weights to all workers at once, through the collective room: which workers take part in the round of a version, what they are
//! told, and the thread that sends. A round that fails costs nothing but time: its workers fetch the version as a stream. Must not
//! know: calls of the service, losses.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde::Serialize;
use tch::{Device, Kind, Tensor};
use unveil_collective::{Backend, Collective, Group, Setup, Timing, World, open_with};
use unveil_core::WeightVersion;
use unveil_proto::v1;
use unveil_proto::weights::BUCKET;

use super::weights::{Packed, Published};
use super::{SILENT, Shared};
use crate::error::{LearnerError, Result};

/// How the host broadcasts weights.
#[derive(Debug, Clone, Copy)]
pub struct Broadcasting {
    /// The learner's device: NCCL carries the calls where it is a GPU, Gloo on the CPU.
    pub device: Device,
    /// The longest that workers may take to come, and that each call may take; at least one second.
    pub limit: Duration,
}

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

/// Who can take part, and the newest round.
pub(super) struct Rounds {
    backend: &'static str,
    followers: BTreeMap<String, Follower>,
    round: Option<Round>,
    sent: Vec<Sent>,
}

impl Rounds {
    pub fn new(how: Broadcasting) -> Self {
        let backend = Backend::of(how.device).name();
        Self { backend, followers: BTreeMap::new(), round: None, sent: Vec::new() }
    }

    /// Notes what a worker tells that holds `base` and may wait for `wait`; `local` is our address as it reaches us.
    pub fn note(
        &mut self,
        worker: &str,
        joins: Option<&v1::Joins>,
        base: Option<v1::HeldWeights>,
        local: Option<IpAddr>,
        until: Duration,
    ) {
        match (joins.filter(|j| j.backend == self.backend), base, local) {
            (Some(joins), Some(held), Some(local)) => {
                let follower = Follower { held, round: joins.round, local, until: until + SILENT };
                self.followers.insert(worker.to_owned(), follower);
            }
            _ => self.gone(worker),
        }
    }

    /// The worker is not counted on any more.
    pub fn gone(&mut self, worker: &str) {
        self.followers.remove(worker);
    }

    /// Begins the round of a new version with all that follow; none while one is under way or nobody follows.
    pub fn begin(&mut self, new: &Published, now: Duration) -> Option<Job> {
        if self.round.as_ref().is_some_and(|r| r.phase == Phase::Sending) {
            return None;
        }
        self.followers.retain(|_, f| f.until >= now);
        let since = self.followers.values().map(|f| f.held.version).min()?;
        let local = self.followers.values().next()?.local;
        let (head, tensors) = new.changed(since);
        let members: BTreeMap<String, usize> = self.followers.keys().cloned().zip(1..).collect();
        let last = self.round.take();
        let number = last.as_ref().map_or(0, |r| r.number);
        let same = |r: &Round| {
            r.phase == Phase::Sent && r.members == members && self.followers.values().all(|f| f.round == r.number)
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
            tensors,
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

    fn met(&mut self, address: SocketAddr) {
        if let Some(round) = &mut self.round {
            round.address = Some(address);
        }
    }

    /// The round under way has ended. After a failure nobody is counted on that does not ask again.
    pub fn ended(&mut self, job: &Job, done: &Result<()>) {
        let Some(round) = &mut self.round else { return };
        if let Err(e) = done {
            tracing::warn!(
                "version {} was not broadcast to {} worker(s) in round {}: {e}; they take the gRPC stream",
                job.version,
                job.workers,
                job.round
            );
            round.phase = Phase::Failed;
            let members = &round.members;
            self.followers.retain(|worker, _| !members.contains_key(worker));
            return;
        }
        round.phase = Phase::Sent;
        let bytes = job.tensors.iter().map(|t| t.bytes()).sum();
        let ms = job.begun.elapsed().as_millis() as u64;
        self.sent.push(Sent { version: job.version, round: job.round, workers: job.workers, bytes, ms });
    }
}

/// One version for the thread to send.
pub(super) struct Job {
    round: u64,
    workers: usize,
    fingerprint: String,
    /// A new world meets at this address of ours; none: the one before is used again.
    meet: Option<IpAddr>,
    version: WeightVersion,
    tensors: Vec<Arc<Packed>>,
    begun: Instant,
}

/// The thread that sends. It ends, and leaves its world, when this is closed.
pub(super) struct Broadcaster {
    jobs: mpsc::Sender<Job>,
    ended: mpsc::Receiver<()>,
    thread: JoinHandle<()>,
}

impl Broadcaster {
    pub fn start(shared: Arc<Shared>, how: Broadcasting) -> Result<Self> {
        let (jobs, inbox) = mpsc::channel();
        let (running, ended) = mpsc::channel();
        let work = move || {
            Sender { shared, how, world: None }.serve(&inbox);
            drop(running);
        };
        let thread = std::thread::Builder::new().name("unveil-broadcast".into()).spawn(work);
        Ok(Self { jobs, ended, thread: thread.map_err(LearnerError::io("a thread for broadcasts"))? })
    }

    /// Hands a job over, or back where the thread has died.
    pub fn send(&self, job: Job) -> Result<(), Box<Job>> {
        self.jobs.send(job).map_err(|mpsc::SendError(job)| Box::new(job))
    }

    /// Ends the thread, and waits for it up to `most`.
    pub fn close(self, most: Duration) {
        drop(self.jobs);
        match self.ended.recv_timeout(most) {
            Err(mpsc::RecvTimeoutError::Timeout) => tracing::warn!("a broadcast of weights is still under way"),
            _ => drop(self.thread.join()),
        }
    }
}

struct Sender {
    shared: Arc<Shared>,
    how: Broadcasting,
    world: Option<World>,
}

impl Sender {
    fn serve(mut self, inbox: &mpsc::Receiver<Job>) {
        while let Ok(job) = inbox.recv() {
            let done = self.work(&job);
            if let Some(world) = self.world.take_if(|_| done.is_err()) {
                world.part();
            }
            if let Some(rounds) = &mut self.shared.lock().rounds {
                rounds.ended(&job, &done);
            }
            self.shared.work.notify_waiters();
        }
    }

    fn work(&mut self, job: &Job) -> Result<()> {
        if let Some(ip) = job.meet {
            if let Some(old) = self.world.take() {
                old.part();
            }
            let setup = Setup {
                rank: 0,
                world: job.workers + 1,
                address: SocketAddr::new(ip, 0).to_string(),
                local: None,
                backend: Backend::of(self.how.device),
                fingerprint: job.fingerprint.clone(),
                timing: Timing::within(self.how.limit),
            };
            let world = open_with(&setup, |address| {
                if let Some(rounds) = &mut self.shared.lock().rounds {
                    rounds.met(address);
                }
                self.shared.work.notify_waiters();
            })?;
            self.world = Some(world);
        }
        let world = self.world.as_ref().ok_or(LearnerError::Lost("the world of a broadcast"))?;
        broadcast(world.group(), self.how.device, &job.tensors)
    }
}

/// Sends the bytes of tensors from rank 0, and waits until all ranks have them.
fn broadcast(group: &Group, device: Device, tensors: &[Arc<Packed>]) -> Result<()> {
    let mut bucket: Vec<u8> = Vec::with_capacity(BUCKET);
    for mut data in tensors.iter().flat_map(|t| t.data()) {
        while !data.is_empty() {
            let (part, rest) = data.split_at(data.len().min(BUCKET - bucket.len()));
            bucket.extend_from_slice(part);
            data = rest;
            if bucket.len() == BUCKET {
                send(group, device, &mut bucket)?;
            }
        }
    }
    if !bucket.is_empty() {
        send(group, device, &mut bucket)?;
    }
    Ok(group.barrier()?)
}

fn send(group: &Group, device: Device, bucket: &mut Vec<u8>) -> Result<()> {
    bucket.resize(bucket.len().next_multiple_of(8), 0);
    let words = Tensor::f_from_data_size(bucket, &[(bucket.len() / 8) as i64], Kind::Int64)?;
    let _same = group.broadcast(words.f_to_device(device)?, 0)?;
    bucket.clear();
    Ok(())
}
