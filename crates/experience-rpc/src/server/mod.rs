//! The experience server: the gRPC service for rollout workers around the state machine of the experience crate.
//!
//! The training thread and the handlers share the state machine behind a lock that is held only briefly. Images are
//! prepared on blocking threads before their groups are leased, so that no handler blocks the runtime.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::net::SocketAddr;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use bytes::Bytes;
use tch::Tensor;
use tokio::runtime::Handle;
use tokio::sync::{Notify, Semaphore};
use tonic::Status;
use unveil_collective::Backend;
use unveil_core::{GroupId, GroupInput, Sampling, TrainGroup, WeightVersion};
use unveil_experience::{Event, Experience, ExperienceError, ExperienceSnapshot, GroupOutcome, Stats};
use unveil_proto::v1::experience_server::ExperienceServer as GrpcService;
use unveil_service::{CancellationToken, Guard, Routes, RunningServer, ServeOptions, ServiceAccess, limited};

use broadcast::Broadcaster;
use broadcast_groups::BroadcastGroups;
use clock::Clock;
use error::Result;
use handler::Handler;
use streams::Streams;
use traces::Traces;
use weights::{Packing, Published};

mod broadcast;
mod broadcast_groups;
mod buckets;
mod clock;
mod error;
mod handler;
mod leasing;
mod limits;
mod metrics;
mod streams;
mod subscription;
mod traces;
mod weights;
mod workers;

pub use broadcast::BroadcastOptions;
pub use broadcast_groups::BroadcastReport;
pub use error::{RecordFailure, ServerError};
pub use weights::NewWeights;

/// A worker that has been silent for this long is not counted as present.
const PRESENCE_TIMEOUT: Duration = Duration::from_secs(5);
/// A worker that has been silent for this long is considered dead, and its groups return to the queue. Workers send a
/// heartbeat every two seconds.
pub const WORKER_TIMEOUT: Duration = Duration::from_secs(8);
/// Time for the service and the broadcast thread to shut down.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(2);

/// Maximum number of concurrent calls; more are refused before their messages are read.
const MAX_CALLS: usize = 1024;
/// Timeout of a call, or of the start of its stream.
const CALL_TIMEOUT: Duration = Duration::from_secs(120);

/// A group prepared for leasing.
#[derive(Debug, Clone)]
pub struct PreparedGroup {
    /// Prompt and patches, kept for the update, and the record, which is sent to the worker.
    pub input: Arc<GroupInput>,
    /// Encoded image.
    pub image: Bytes,
    /// BLAKE3 of the decoded pixels, in hexadecimal.
    pub image_hash: String,
}

/// Prepares groups. Called on blocking threads, for several groups concurrently.
pub trait GroupSource: Send + Sync + 'static {
    /// Prepares record `index` for `group`.
    ///
    /// # Errors
    /// Returns an error if the record cannot be used; the run ends with it.
    fn prepare(&self, index: usize, group: &GroupId) -> Result<PreparedGroup, RecordFailure>;
}

/// State shared by the training thread and the handlers.
#[derive(Debug)]
struct ServerState {
    machine: Experience<TrainGroup>,
    /// Prepared groups, kept until they are trained.
    inputs: HashMap<GroupId, PreparedGroup>,
    preparing: HashSet<GroupId>,
    /// Published weights; `None` before the first version and while the next one is being written.
    weights: Option<Published>,
    /// Checksum of every version published by this process.
    checksums: BTreeMap<WeightVersion, u32>,
    /// Time of the last call of every worker.
    workers: BTreeMap<String, Duration>,
    /// Session of the process that uses a worker name.
    sessions: HashMap<String, u64>,
    /// Last two versions that this process has sent to each worker.
    sent: HashMap<String, [Option<WeightVersion>; 2]>,
    /// Workers that have been notified of the end of the run.
    notified_of_end: BTreeSet<String>,
    /// Number of submissions rejected for invalid content, by worker.
    rejected: BTreeMap<String, u64>,
    /// Broadcast groups; `None` if weights are not broadcast.
    broadcast_groups: Option<BroadcastGroups>,
    traces: Traces,
    finished: bool,
    /// Error for the training thread.
    error: Option<ServerError>,
    /// Reason why leases are refused after an error.
    refusal: Option<String>,
}

struct Shared {
    state: Mutex<ServerState>,
    /// Wakes the training thread: a batch may be complete, or an error has occurred.
    ready: Condvar,
    /// Wakes waiting workers: there may be something to lease or new weights.
    work: Notify,
    /// Weight streams in progress.
    streams: Streams,
    /// Signals that a group has been prepared.
    prepared: Notify,
    /// Limits concurrent preparations.
    preparation_slots: Semaphore,
    /// Cancelled when the service shuts down.
    shutdown: CancellationToken,
    clock: Clock,
    source: Arc<dyn GroupSource>,
    sampling: Sampling,
    stop: Vec<String>,
    vocab: u32,
    fixed_lease_size: Option<usize>,
    /// Interval within which leases must be renewed, in milliseconds.
    renew_ms: u32,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, ServerState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn now(&self) -> Duration {
        self.clock.now()
    }

    /// Records an error that ends the run; returns the status for the current call.
    fn fail(&self, error: ServerError) -> Status {
        let status = Status::internal(error.to_string());
        let mut state = self.lock();
        state.refusal.get_or_insert_with(|| error.to_string());
        state.error = state.error.take().or(Some(error));
        drop(state);
        self.ready.notify_all();
        status
    }
}

/// Reads the lease clock regularly, so that it detects pauses of the process, until the server is dropped.
async fn tick(shared: Weak<Shared>) {
    while let Some(shared) = shared.upgrade() {
        shared.now();
        drop(shared);
        tokio::time::sleep(clock::TICK).await;
    }
}

/// Options of the experience server.
#[derive(Debug)]
pub struct ExperienceServerOptions {
    /// Listen address.
    pub listen: String,
    /// Sampling parameters of responses.
    pub sampling: Sampling,
    /// Strings that end a response.
    pub stop: Vec<String>,
    /// Vocabulary size of the model.
    pub vocab: u32,
    /// Number of groups per lease call, whatever the worker asks for; `None`: as many as requested and available.
    pub fixed_lease_size: Option<usize>,
    /// Options for broadcasting weights; `None`: every worker fetches them as a stream.
    pub broadcast: Option<BroadcastOptions>,
}

/// Handle of a running experience server, used by the training thread.
pub struct ExperienceServer {
    shared: Arc<Shared>,
    handle: Handle,
    stop: CancellationToken,
    running: Option<RunningServer>,
    broadcaster: Option<Broadcaster>,
    address: SocketAddr,
}

impl std::fmt::Debug for ExperienceServer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ExperienceServer").field("address", &self.address).finish_non_exhaustive()
    }
}

impl ExperienceServer {
    /// Starts serving without TLS and token. Until the first [`ExperienceServer::publish`], nothing is leased and the
    /// health service reports that the server is not ready.
    ///
    /// # Errors
    /// Returns [`ServerError::Service`] if the address cannot be bound.
    pub fn start(
        handle: &Handle,
        options: ExperienceServerOptions,
        machine: Experience<TrainGroup>,
        source: Arc<dyn GroupSource>,
    ) -> Result<Self> {
        Self::start_with_access(handle, options, ServiceAccess::default(), machine, source)
    }

    /// Starts serving with TLS and a token; see [`ExperienceServer::start`].
    ///
    /// # Errors
    /// Returns [`ServerError::Service`] if the address cannot be bound, or is reachable from other machines without
    /// TLS or authentication.
    pub fn start_with_access(
        handle: &Handle,
        options: ExperienceServerOptions,
        access: ServiceAccess,
        machine: Experience<TrainGroup>,
        source: Arc<dyn GroupSource>,
    ) -> Result<Self> {
        let renew_ms = (machine.settings().lease_s * 1e3).clamp(1.0, f64::from(u32::MAX)) as u32;
        let state = ServerState {
            machine,
            inputs: HashMap::new(),
            preparing: HashSet::new(),
            weights: None,
            checksums: BTreeMap::new(),
            workers: BTreeMap::new(),
            sessions: HashMap::new(),
            sent: HashMap::new(),
            notified_of_end: BTreeSet::new(),
            rejected: BTreeMap::new(),
            broadcast_groups: options
                .broadcast
                .map(|options| BroadcastGroups::new(Backend::for_device(options.device).name())),
            traces: Traces::default(),
            finished: false,
            error: None,
            refusal: None,
        };
        let stop = CancellationToken::new();
        let shared = Arc::new(Shared {
            state: Mutex::new(state),
            ready: Condvar::new(),
            work: Notify::new(),
            streams: Streams::default(),
            prepared: Notify::new(),
            preparation_slots: Semaphore::new(std::thread::available_parallelism().map_or(1, usize::from)),
            shutdown: stop.clone(),
            clock: Clock::start(),
            source,
            sampling: options.sampling,
            stop: options.stop,
            vocab: options.vocab,
            fixed_lease_size: options.fixed_lease_size,
            renew_ms,
        });
        let service = limited!(GrpcService::new(Handler { shared: shared.clone() }));
        let serve = ServeOptions {
            health_names: vec!["unveil.v1.Experience"],
            drain_timeout: Duration::from_secs(1),
            initially_serving: false,
            guard: Guard::new(access.token.as_ref(), MAX_CALLS, Some(CALL_TIMEOUT), &[]).with_callers(access.callers),
            tls: access.tls,
            insecure: access.insecure,
            ..Default::default()
        };
        let routes = Routes::new(service);
        let running = handle.block_on(unveil_service::start(&options.listen, routes, serve, stop.clone()))?;
        let broadcaster =
            options.broadcast.map(|options| Broadcaster::start(shared.clone(), options, access.token)).transpose()?;
        let address = running.address;
        handle.spawn(tick(Arc::downgrade(&shared)));
        Ok(Self { shared, handle: handle.clone(), stop, address, running: Some(running), broadcaster })
    }

    /// Returns the listen address with the actual port.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Publishes a version of the weights and allows the leases that need it. The tensors are copied and may change
    /// once this returns.
    ///
    /// # Errors
    /// Returns [`ServerError::Experience`] if the version is not newer than the current one, and
    /// [`ServerError::Torch`] if a tensor cannot be copied.
    pub fn publish(&self, new: &NewWeights<'_>) -> Result<()> {
        self.publish_from(new, true, |pack| pack(new.named))
    }

    /// Publishes a version like [`ExperienceServer::publish`], but reads the tensors of `new` only while `visit` passes them: in any number
    /// of parts, each of which may be freed once it has been passed. Adapters that are not passed are read at the end. Broadcasts take
    /// the weights from host memory.
    ///
    /// # Errors
    /// Returns the error of `visit`, and those of [`ExperienceServer::publish`].
    pub fn publish_in_parts<E: From<ServerError>>(
        &self,
        new: &NewWeights<'_>,
        visit: impl FnOnce(&mut dyn FnMut(&[(String, Tensor)]) -> Result<()>) -> Result<(), E>,
    ) -> Result<(), E> {
        self.publish_from(new, false, visit)
    }

    /// Publishes the tensors that `visit` passes; `kept`: those of `new` can be read afterwards.
    fn publish_from<E: From<ServerError>>(
        &self,
        new: &NewWeights<'_>,
        kept: bool,
        visit: impl FnOnce(&mut dyn FnMut(&[(String, Tensor)]) -> Result<()>) -> Result<(), E>,
    ) -> Result<(), E> {
        let version = new.version;
        let previous = {
            let mut state = self.shared.lock();
            // The state machine starts, or is restored, at the version of this process's first weights.
            let current = state.machine.version();
            if version < current || (version == current && !state.checksums.is_empty()) {
                return Err(ServerError::from(ExperienceError::VersionRegression { version, current }).into());
            }
            // From here on the previous version is not sent; requests wait for this one.
            state.weights.take()
        };
        self.shared.streams.sweep(version);
        let mut packing = Packing::new(new, previous);
        visit(&mut |named: &[(String, Tensor)]| packing.add(named))?;
        let published = packing.finish()?;
        let mut state = self.shared.lock();
        state.machine.publish(version).map_err(ServerError::from)?;
        let is_first = state.checksums.insert(version, published.checksum).is_none() && state.checksums.len() == 1;
        let now = self.shared.now();
        let job = state.broadcast_groups.as_mut().and_then(|groups| groups.start(&published, now));
        state.weights = Some(published);
        drop(state);
        if let Some((job, thread)) = job.zip(self.broadcaster.as_ref())
            && let Err(job) = thread.send(job, Some(new).filter(|_| kept))
            && let Some(groups) = &mut self.shared.lock().broadcast_groups
        {
            groups.finished(&job, &Err(ServerError::ThreadEnded("the broadcast thread")));
        }
        if let Some(running) = self.running.as_ref().filter(|_| is_first) {
            self.handle.block_on(running.set_serving());
        }
        self.shared.work.notify_waiters();
        Ok(())
    }

    /// Waits for the next batch; returns `None` after `timeout`.
    ///
    /// # Errors
    /// Returns the error of a record that could not be prepared, or [`ServerError::AllRecordsDropped`] if all records
    /// have been set aside.
    pub fn next_batch(&self, timeout: Duration) -> Result<Option<Vec<TrainGroup>>> {
        let deadline = Instant::now() + timeout;
        let mut state = self.shared.lock();
        loop {
            if let Some(error) = state.error.take() {
                return Err(error);
            }
            let now = self.shared.now();
            state.machine.expire(now);
            let stale = state.machine.stats().stale;
            let batch = state.machine.next_batch(now);
            if state.machine.stats().stale > stale {
                // Stale groups can be leased again.
                self.shared.work.notify_waiters();
            }
            if state.machine.all_set_aside() {
                return Err(nothing_left(&state.machine.snapshot()));
            }
            if let Some(batch) = batch {
                let replaced = state.machine.replaced_in_training();
                for id in batch.iter().map(|(id, _)| id).chain(&replaced) {
                    state.inputs.remove(id);
                }
                state.traces.end(replaced.iter());
                drop(state);
                // If staleness is allowed, the next batch can be leased from here on.
                self.shared.work.notify_waiters();
                return Ok(Some(batch.into_iter().map(|(_, group)| group).collect()));
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(None);
            }
            (state, _) = self.shared.ready.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Returns the groups that were looked at and replaced in the batch that was taken, in order.
    pub fn replaced(&self) -> Vec<GroupId> {
        self.shared.lock().machine.replaced_in_training()
    }

    /// Opens a span for update `step` in the trace of each of its groups; the spans end when they are dropped.
    pub fn training_spans(&self, step: u64, batch: &[TrainGroup]) -> Vec<tracing::Span> {
        self.shared.lock().traces.train(step, batch.iter().map(|g| &g.id))
    }

    /// Records that update `step` has trained all groups; see [`ExperienceServer::settle`].
    ///
    /// # Errors
    /// Returns [`ServerError::Experience`] if `groups` is not the batch that was taken.
    pub fn mark_trained(&self, step: u64, groups: &[GroupId]) -> Result<()> {
        let groups: Vec<_> = groups.iter().map(|g| (g.clone(), GroupOutcome::Trained)).collect();
        self.settle(step, &groups)
    }

    /// Records the fate of each group in the batch of update `step`.
    ///
    /// # Errors
    /// Returns [`ServerError::Experience`] if `groups` is not the batch that was taken.
    pub fn settle(&self, step: u64, groups: &[(GroupId, GroupOutcome)]) -> Result<()> {
        let now = self.shared.now();
        let mut state = self.shared.lock();
        state.machine.record_outcomes(step, groups, now)?;
        state.traces.end(groups.iter().map(|(id, _)| id));
        Ok(())
    }

    /// Returns the position of the run in its data, for a checkpoint.
    pub fn snapshot(&self) -> ExperienceSnapshot {
        self.shared.lock().machine.snapshot()
    }

    /// Returns the counts of groups.
    pub fn stats(&self) -> Stats {
        self.shared.lock().machine.stats()
    }

    /// Returns the events of groups since the last call.
    pub fn drain_events(&self) -> Vec<Event> {
        self.shared.lock().machine.drain_events()
    }

    /// Returns the broadcasts that were completed since the last call.
    pub fn drain_broadcasts(&self) -> Vec<BroadcastReport> {
        self.shared.lock().broadcast_groups.as_mut().map_or_else(Vec::new, BroadcastGroups::drain_reports)
    }

    /// Notifies workers of the end of the run, waits up to `timeout` until each has been notified, and stops serving.
    pub fn finish(mut self, timeout: Duration) {
        let deadline = Instant::now() + timeout;
        self.shared.lock().finished = true;
        while Instant::now() < deadline {
            self.shared.work.notify_waiters();
            let state = self.shared.lock();
            if state.workers.keys().all(|w| state.notified_of_end.contains(w)) {
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
            broadcaster.close(SHUTDOWN_TIMEOUT);
        }
        if let Some(running) = self.running.take() {
            let result = self.handle.block_on(async { tokio::time::timeout(SHUTDOWN_TIMEOUT, running.wait()).await });
            if let Ok(Err(e)) = result {
                tracing::warn!(error = %e, "experience service stopped with an error");
            }
        }
    }
}

/// Creates the error for a run whose records have all been set aside, with the reason of the last one.
fn nothing_left(snapshot: &ExperienceSnapshot) -> ServerError {
    let earlier = snapshot.ledger.set_aside().last().map(|d| d.why.clone());
    let why = snapshot.aside.last().map(|(_, why)| why.clone()).or(earlier).unwrap_or_default();
    ServerError::AllRecordsDropped { records: snapshot.records, why }
}

impl Drop for ExperienceServer {
    fn drop(&mut self) {
        self.close();
    }
}
