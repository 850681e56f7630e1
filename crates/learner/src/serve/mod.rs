//! The host of experience: the gRPC service that rollout workers talk to, around the state machine of the experience room.
//!
//! The training thread and the handlers share the machine behind a lock that is held for moments only; images are prepared on
//! blocking threads before their groups are leased, so no handler holds up the runtime. Must not know: tensors, losses.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::net::SocketAddr;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::runtime::Handle;
use tokio::sync::{Notify, Semaphore};
use tonic::Status;
use unveil_collective::Backend;
use unveil_core::{GroupId, Sampling, WeightVersion};
use unveil_experience::{Event, Experience, ExperienceError, Fate, Snapshot, Stats};
use unveil_proto::v1::experience_server::ExperienceServer;
use unveil_service::{Access, CancellationToken, Guard, Routes, Running, ServeOptions, limited};

use crate::batch::{GroupInput, TrainGroup};
use crate::error::{LearnerError, Result};
use broadcast::Broadcaster;
use clock::Clock;
use handler::Handler;
use rounds::Rounds;
use streams::Streams;
use traces::Traces;
use weights::Published;

mod broadcast;
mod buckets;
mod clock;
mod following;
mod handler;
mod leasing;
mod limits;
mod meter;
mod rounds;
mod streams;
mod traces;
mod weights;
mod workers;

pub use broadcast::Broadcasting;
pub use rounds::Sent;
pub use weights::NewWeights;

/// A worker that was not heard of for so long is not counted on.
const SILENT: Duration = Duration::from_secs(5);
/// A worker that was not heard of for so long is taken for dead: others make its groups. Workers give a sign of life every two seconds.
pub(crate) const DEAD: Duration = Duration::from_secs(8);
/// How long the service and the thread of broadcasts may take to end.
const CLOSING: Duration = Duration::from_secs(2);

/// Calls at once; more are refused before their messages are read.
const MOST_CALLS: usize = 1024;
/// Longest time for a call, or until its stream begins.
const CALL: Duration = Duration::from_secs(120);

/// What goes to a worker with a lease.
#[derive(Debug, Clone)]
pub struct Leased {
    /// Prompt and patches, kept for the update; the record goes to the worker.
    pub input: Arc<GroupInput>,
    /// The encoded image.
    pub image: Bytes,
    /// BLAKE3 of its decoded pixels, hex.
    pub image_hash: String,
}

/// Prepares the image of a group. Called on blocking threads, for several groups at once.
pub trait LeaseSource: Send + Sync + 'static {
    /// Record `index` for this turn of its pass.
    ///
    /// # Errors
    /// The record cannot be used; the run ends with this error.
    fn lease(&self, index: usize, group: &GroupId) -> Result<Leased>;
}

struct State {
    machine: Experience<TrainGroup>,
    /// Groups that are prepared, until they are trained.
    inputs: HashMap<GroupId, Leased>,
    preparing: HashSet<GroupId>,
    /// None before the first version, and while the next one is written.
    weights: Option<Published>,
    /// Checksum of every version that this process published.
    checksums: BTreeMap<WeightVersion, u32>,
    /// Workers that ever leased, and when they were last heard of.
    workers: BTreeMap<String, Duration>,
    /// Process behind a worker's name.
    sessions: HashMap<String, u64>,
    /// The last two versions that this process sent to a worker.
    sent: HashMap<String, [Option<WeightVersion>; 2]>,
    told: BTreeSet<String>,
    /// Submissions that were refused for what they hold, by worker.
    rejected: BTreeMap<String, u64>,
    /// None where weights are not broadcast.
    rounds: Option<Rounds>,
    traces: Traces,
    finished: bool,
    fault: Option<LearnerError>,
    /// Why nothing can be leased any more.
    broken: Option<String>,
}

struct Shared {
    state: Mutex<State>,
    /// A batch may be whole, or something went wrong: for the training thread.
    ready: Condvar,
    /// There may be something to lease: for waiting workers.
    work: Notify,
    /// Weights on their way.
    streams: Streams,
    /// A group is prepared.
    prepared: Notify,
    /// Preparations at once.
    places: Semaphore,
    /// The service is to end.
    ending: CancellationToken,
    clock: Clock,
    source: Arc<dyn LeaseSource>,
    sampling: Sampling,
    stop: Vec<String>,
    vocab: u32,
    fixed: Option<usize>,
    /// Milliseconds within which leases must be renewed.
    renew_ms: u32,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn now(&self) -> Duration {
        self.clock.now()
    }

    fn fail(&self, error: LearnerError) -> Status {
        let status = Status::internal(error.to_string());
        let mut state = self.lock();
        state.broken.get_or_insert_with(|| error.to_string());
        state.fault = state.fault.take().or(Some(error));
        drop(state);
        self.ready.notify_all();
        status
    }
}

/// Looks at the clock of leases, so that it knows a pause, until the host is gone.
async fn tick(shared: Weak<Shared>) {
    while let Some(shared) = shared.upgrade() {
        shared.now();
        drop(shared);
        tokio::time::sleep(clock::TICK).await;
    }
}

/// What the host serves with.
pub struct HostOptions {
    /// Listen address.
    pub listen: String,
    /// How responses are sampled.
    pub sampling: Sampling,
    /// Texts that end a response.
    pub stop: Vec<String>,
    /// Token ids of the model are below this.
    pub vocab: u32,
    /// Groups that every lease has, whoever asks for how many; none = as many as are asked for and there are.
    pub fixed: Option<usize>,
    /// How weights are broadcast to the workers that can take part; none = each fetches them as a stream.
    pub broadcast: Option<Broadcasting>,
}

/// A running host; the training thread's end of it.
pub struct Host {
    shared: Arc<Shared>,
    handle: Handle,
    stop: CancellationToken,
    running: Option<Running>,
    broadcaster: Option<Broadcaster>,
    address: SocketAddr,
}

impl Host {
    /// Starts serving. Nothing is leased before the first [`Host::publish`], and health says that the service is not ready.
    ///
    /// # Errors
    /// The address cannot be listened on.
    pub fn start(
        handle: &Handle,
        options: HostOptions,
        machine: Experience<TrainGroup>,
        source: Arc<dyn LeaseSource>,
    ) -> Result<Self> {
        Self::start_with(handle, options, Access::default(), machine, source)
    }

    /// [`Host::start`] with TLS and a token.
    ///
    /// # Errors
    /// As there; also where the address is reached from elsewhere, and others could listen in or anybody could call.
    pub fn start_with(
        handle: &Handle,
        options: HostOptions,
        access: Access,
        machine: Experience<TrainGroup>,
        source: Arc<dyn LeaseSource>,
    ) -> Result<Self> {
        let renew_ms = (machine.settings().lease_s * 1e3).clamp(1.0, f64::from(u32::MAX)) as u32;
        let state = State {
            machine,
            inputs: HashMap::new(),
            preparing: HashSet::new(),
            weights: None,
            checksums: BTreeMap::new(),
            workers: BTreeMap::new(),
            sessions: HashMap::new(),
            sent: HashMap::new(),
            told: BTreeSet::new(),
            rejected: BTreeMap::new(),
            rounds: options.broadcast.map(|how| Rounds::new(Backend::of(how.device).name())),
            traces: Traces::default(),
            finished: false,
            fault: None,
            broken: None,
        };
        let stop = CancellationToken::new();
        let shared = Arc::new(Shared {
            state: Mutex::new(state),
            ready: Condvar::new(),
            work: Notify::new(),
            streams: Streams::default(),
            prepared: Notify::new(),
            places: Semaphore::new(std::thread::available_parallelism().map_or(1, usize::from)),
            ending: stop.clone(),
            clock: Clock::start(),
            source,
            sampling: options.sampling,
            stop: options.stop,
            vocab: options.vocab,
            fixed: options.fixed,
            renew_ms,
        });
        let service = limited!(ExperienceServer::new(Handler { shared: shared.clone() }));
        let serve = ServeOptions {
            names: vec!["unveil.v1.Experience"],
            drain: Duration::from_secs(1),
            serving: false,
            guard: Guard::new(access.token.as_ref(), MOST_CALLS, Some(CALL), &[]).admitting(access.callers),
            tls: access.tls,
            insecure: access.insecure,
            ..Default::default()
        };
        let routes = Routes::new(service);
        let running = handle.block_on(unveil_service::start(&options.listen, routes, serve, stop.clone()))?;
        let broadcaster =
            options.broadcast.map(|how| Broadcaster::start(shared.clone(), how, access.token)).transpose()?;
        let address = running.address;
        handle.spawn(tick(Arc::downgrade(&shared)));
        Ok(Self { shared, handle: handle.clone(), stop, address, running: Some(running), broadcaster })
    }

    /// Where it listens, with the real port.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Makes weights available and opens the window for the leases that need them. The tensors are copied; they may change once
    /// this returns.
    ///
    /// # Errors
    /// The version is not newer than the present one, or a tensor cannot be copied.
    pub fn publish(&self, new: &NewWeights<'_>) -> Result<()> {
        let version = new.version;
        let before = {
            let mut state = self.shared.lock();
            // The first weights of this process: the machine starts, or was restored, at their version.
            let current = state.machine.version();
            if version < current || (version == current && !state.checksums.is_empty()) {
                return Err(ExperienceError::VersionBack { version, current }.into());
            }
            // Nobody is sent the version before from here on: those who ask wait for this one.
            state.weights.take()
        };
        self.shared.streams.sweep(version);
        let made = Published::make(new, before)?;
        let mut state = self.shared.lock();
        state.machine.published(version)?;
        let first = state.checksums.insert(version, made.checksum).is_none() && state.checksums.len() == 1;
        let now = self.shared.now();
        let job = state.rounds.as_mut().and_then(|rounds| rounds.begin(&made, now));
        state.weights = Some(made);
        drop(state);
        if let Some((job, thread)) = job.zip(self.broadcaster.as_ref())
            && let Err(job) = thread.send(job, new)
            && let Some(rounds) = &mut self.shared.lock().rounds
        {
            rounds.ended(&job, &Err(LearnerError::Lost("the thread of broadcasts")));
        }
        if let Some(running) = self.running.as_ref().filter(|_| first) {
            self.handle.block_on(running.serving());
        }
        self.shared.work.notify_waiters();
        Ok(())
    }

    /// Waits for the next batch; `None` after `most`.
    ///
    /// # Errors
    /// A record could not be prepared meanwhile.
    pub fn next_batch(&self, most: Duration) -> Result<Option<Vec<TrainGroup>>> {
        let until = Instant::now() + most;
        let mut state = self.shared.lock();
        loop {
            if let Some(fault) = state.fault.take() {
                return Err(fault);
            }
            let now = self.shared.now();
            state.machine.expire(now);
            let stale = state.machine.stats().stale;
            let batch = state.machine.next_batch(now);
            if state.machine.stats().stale > stale {
                // Groups that have grown too old can be leased again.
                self.shared.work.notify_waiters();
            }
            if state.machine.barren() {
                return Err(nothing_left(&state.machine.snapshot()));
            }
            if let Some(batch) = batch {
                for (id, _) in &batch {
                    state.inputs.remove(id);
                }
                drop(state);
                // With staleness allowed, what comes next can be leased from here on.
                self.shared.work.notify_waiters();
                return Ok(Some(batch.into_iter().map(|(_, group)| group).collect()));
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(None);
            }
            let slept = self.shared.ready.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner);
            state = slept.0;
        }
    }

    /// Spans of update `step` in the traces of its groups; it lasts until they are dropped.
    pub(crate) fn training(&self, step: u64, batch: &[TrainGroup]) -> Vec<tracing::Span> {
        self.shared.lock().traces.train(step, batch.iter().map(|g| &g.id))
    }

    /// [`Host::settled`] with every group trained.
    ///
    /// # Errors
    /// As there.
    pub fn trained(&self, step: u64, groups: &[GroupId]) -> Result<()> {
        let groups: Vec<_> = groups.iter().map(|g| (g.clone(), Fate::Trained)).collect();
        self.settled(step, &groups)
    }

    /// Counts what update `step` made of its batch.
    ///
    /// # Errors
    /// It is not the batch that was taken.
    pub fn settled(&self, step: u64, groups: &[(GroupId, Fate)]) -> Result<()> {
        let now = self.shared.now();
        let mut state = self.shared.lock();
        state.machine.settled(step, groups, now)?;
        state.traces.end(groups.iter().map(|(id, _)| id));
        Ok(())
    }

    /// Where the run stands in its data.
    pub fn snapshot(&self) -> Snapshot {
        self.shared.lock().machine.snapshot()
    }

    /// Counts of groups.
    pub fn stats(&self) -> Stats {
        self.shared.lock().machine.stats()
    }

    /// What happened to groups since the last call.
    pub fn drain_events(&self) -> Vec<Event> {
        self.shared.lock().machine.drain_events()
    }

    /// Broadcasts that reached their workers since the last call.
    pub fn drain_broadcasts(&self) -> Vec<Sent> {
        self.shared.lock().rounds.as_mut().map_or_else(Vec::new, Rounds::drain)
    }

    /// Tells workers that the run is over, waits up to `most` until each that ever leased has heard it, and stops serving.
    pub fn finish(mut self, most: Duration) {
        let until = Instant::now() + most;
        self.shared.lock().finished = true;
        while Instant::now() < until {
            self.shared.work.notify_waiters();
            let state = self.shared.lock();
            if state.workers.keys().all(|w| state.told.contains(w)) {
                break;
            }
            drop(state);
            std::thread::sleep(Duration::from_millis(10));
        }
        self.close();
    }

    fn close(&mut self) {
        self.stop.cancel();
        self.shared.work.notify_waiters();
        if let Some(broadcaster) = self.broadcaster.take() {
            broadcaster.close(CLOSING);
        }
        if let Some(running) = self.running.take() {
            let ended = self.handle.block_on(async { tokio::time::timeout(CLOSING, running.wait()).await });
            if let Ok(Err(e)) = ended {
                tracing::warn!(error = %e, "the experience service ended with an error");
            }
        }
    }
}

/// Every record is set aside: with the reason of the last one.
fn nothing_left(snapshot: &Snapshot) -> LearnerError {
    let before = snapshot.ledger.set_aside().last().map(|d| d.why.clone());
    let why = snapshot.aside.last().map(|(_, why)| why.clone()).or(before).unwrap_or_default();
    LearnerError::NothingLeft { records: snapshot.records, why }
}

impl Drop for Host {
    fn drop(&mut self) {
        self.close();
    }
}
