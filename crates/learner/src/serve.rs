//! The host of experience: the gRPC service that rollout workers talk to, around the state machine of the experience room.
//!
//! The training thread and the handlers share the machine behind a lock that is held for moments only; images are prepared on
//! blocking threads, so no handler holds up the runtime. Must not know: tensors, losses.

use std::collections::{BTreeSet, HashMap};
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::runtime::Handle;
use tokio::sync::Notify;
use tokio_stream::Stream;
use tonic::{Request, Response as Answer, Status};
use unveil_core::{GroupId, Logprobs, Sampling, WeightVersion};
use unveil_experience::{Event, Experience, Lease, Snapshot, Submission, Verdict, VersionSpan};
use unveil_proto::v1::experience_server::{Experience as Service, ExperienceServer};
use unveil_proto::{breakdown_from_wire, group_from_wire, group_to_wire, response_from_wire, v1};
use unveil_service::{CancellationToken, Routes, Running, ServeOptions, limited};

use crate::batch::{GroupInput, TrainGroup};
use crate::error::{LearnerError, Result};

/// Bytes of weights per message.
const CHUNK: usize = 1 << 20;
/// Longest time that one lease call waits for work.
const LONGEST_WAIT: Duration = Duration::from_secs(30);
/// How often a waiting lease call looks for leases that ran out.
const LOOK: Duration = Duration::from_millis(500);

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

/// Prepares the image of a group. Called on blocking threads.
pub trait LeaseSource: Send + Sync + 'static {
    /// Record `index` for this turn of its pass.
    ///
    /// # Errors
    /// The record cannot be used; the run ends with this error.
    fn lease(&self, index: usize, group: &GroupId) -> Result<Leased>;
}

/// Weights that workers can fetch.
struct Published {
    version: WeightVersion,
    bytes: Bytes,
}

struct State {
    machine: Experience<TrainGroup>,
    inputs: HashMap<GroupId, Arc<GroupInput>>,
    weights: Option<Arc<Published>>,
    workers: BTreeSet<String>,
    told: BTreeSet<String>,
    finished: bool,
    fault: Option<LearnerError>,
}

impl State {
    /// Notes a worker. A name `base#k` stands for a process that was started again: what other incarnations of `base` hold
    /// is free at once.
    fn welcome(&mut self, worker: &str, now: Duration) {
        if !self.workers.insert(worker.to_owned()) {
            return;
        }
        let Some((base, _)) = worker.rsplit_once('#') else { return };
        let gone: Vec<String> = self
            .workers
            .iter()
            .filter(|w| *w != worker && w.rsplit_once('#').is_some_and(|(b, _)| b == base))
            .cloned()
            .collect();
        for name in gone {
            let held = self.machine.worker_lost(&name, now);
            tracing::warn!(worker = name, held, "the worker was started again: its groups return to the queue");
            self.workers.remove(&name);
        }
    }
}

struct Shared {
    state: Mutex<State>,
    /// A batch may be whole, or something went wrong: for the training thread.
    ready: Condvar,
    /// There may be something to lease: for waiting workers.
    work: Notify,
    started: Instant,
    source: Arc<dyn LeaseSource>,
    sampling: Sampling,
    stop: Vec<String>,
    vocab: u32,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn now(&self) -> Duration {
        self.started.elapsed()
    }

    fn fail(&self, error: LearnerError) -> Status {
        let status = Status::internal(error.to_string());
        let mut state = self.lock();
        state.fault = state.fault.take().or(Some(error));
        drop(state);
        self.ready.notify_all();
        status
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
}

/// A running host; the training thread's end of it.
pub struct Host {
    shared: Arc<Shared>,
    handle: Handle,
    stop: CancellationToken,
    running: Option<Running>,
    address: SocketAddr,
}

impl Host {
    /// Starts serving. Nothing is leased before the first [`Host::publish`].
    ///
    /// # Errors
    /// The address cannot be listened on.
    pub fn start(
        handle: &Handle,
        options: HostOptions,
        machine: Experience<TrainGroup>,
        source: Arc<dyn LeaseSource>,
    ) -> Result<Self> {
        let state = State {
            machine,
            inputs: HashMap::new(),
            weights: None,
            workers: BTreeSet::new(),
            told: BTreeSet::new(),
            finished: false,
            fault: None,
        };
        let shared = Arc::new(Shared {
            state: Mutex::new(state),
            ready: Condvar::new(),
            work: Notify::new(),
            started: Instant::now(),
            source,
            sampling: options.sampling,
            stop: options.stop,
            vocab: options.vocab,
        });
        let stop = CancellationToken::new();
        let service = limited!(ExperienceServer::new(Handler { shared: shared.clone() }));
        let serve = ServeOptions { names: vec!["unveil.v1.Experience"], drain: Duration::from_secs(1) };
        let routes = Routes::new(service);
        let running = handle.block_on(unveil_service::start(&options.listen, routes, serve, stop.clone()))?;
        Ok(Self { shared, handle: handle.clone(), stop, address: running.address, running: Some(running) })
    }

    /// Where it listens, with the real port.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Makes weights available as `version` and opens the window for the leases that need them.
    ///
    /// # Errors
    /// The version is not newer than the present one.
    pub fn publish(&self, version: WeightVersion, weights: Vec<u8>) -> Result<()> {
        let mut state = self.shared.lock();
        if state.weights.is_none() && state.machine.version() == version {
            // The first weights of this process: the machine starts, or was restored, at their version.
        } else {
            state.machine.published(version)?;
        }
        state.weights = Some(Arc::new(Published { version, bytes: weights.into() }));
        drop(state);
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
            if let Some(batch) = state.machine.next_batch(now) {
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

    /// Counts a batch as trained by update `step`.
    ///
    /// # Errors
    /// It is not the batch that was taken.
    pub fn trained(&self, step: u64, groups: &[GroupId]) -> Result<()> {
        let now = self.shared.now();
        Ok(self.shared.lock().machine.trained(step, groups, now)?)
    }

    /// Where the run stands in its data.
    pub fn snapshot(&self) -> Snapshot {
        self.shared.lock().machine.snapshot()
    }

    /// What happened to groups since the last call.
    pub fn drain_events(&self) -> Vec<Event> {
        self.shared.lock().machine.drain_events()
    }

    /// Tells workers that the run is over, waits up to `most` until each that ever leased has heard it, and stops serving.
    pub fn finish(mut self, most: Duration) {
        let until = Instant::now() + most;
        self.shared.lock().finished = true;
        while Instant::now() < until {
            self.shared.work.notify_waiters();
            let state = self.shared.lock();
            if state.workers.is_subset(&state.told) {
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
        if let Some(running) = self.running.take() {
            let ended =
                self.handle.block_on(async { tokio::time::timeout(Duration::from_secs(2), running.wait()).await });
            if let Ok(Err(e)) = ended {
                tracing::warn!(error = %e, "the experience service ended with an error");
            }
        }
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        self.close();
    }
}

struct Handler {
    shared: Arc<Shared>,
}

impl Handler {
    /// Takes leases, waiting until `until` for some.
    async fn take(&self, worker: &str, most: usize, until: Instant) -> (Vec<(Lease, usize)>, WeightVersion, bool) {
        let shared = &self.shared;
        loop {
            let told = shared.work.notified();
            tokio::pin!(told);
            told.as_mut().enable();
            {
                let mut state = shared.lock();
                let now = shared.now();
                state.welcome(worker, now);
                let version = state.machine.version();
                if state.finished || state.machine.finished() {
                    state.told.insert(worker.to_owned());
                    return (Vec::new(), version, true);
                }
                let leases = if state.weights.is_some() { state.machine.lease(worker, most, now) } else { Vec::new() };
                if !leases.is_empty() || Instant::now() >= until {
                    let with_index = |l: Lease| state.machine.index_of(&l.group).map(|i| (l, i));
                    return (leases.into_iter().filter_map(with_index).collect(), version, false);
                }
            }
            let wait = until.saturating_duration_since(Instant::now()).min(LOOK);
            let _ = tokio::time::timeout(wait, told).await;
        }
    }

    async fn prepare(&self, leases: Vec<(Lease, usize)>) -> Result<Vec<(Lease, Leased)>, Status> {
        let shared = self.shared.clone();
        let work = move || {
            let ready =
                |(lease, index): (Lease, usize)| shared.source.lease(index, &lease.group).map(|made| (lease, made));
            leases.into_iter().map(ready).collect::<Result<Vec<_>>>()
        };
        match tokio::task::spawn_blocking(work).await {
            Ok(Ok(ready)) => Ok(ready),
            Ok(Err(error)) => Err(self.shared.fail(error)),
            Err(_) => Err(self.shared.fail(LearnerError::Lost("the preparation of an image"))),
        }
    }

    fn group(&self, request: v1::SubmitRequest, id: GroupId, input: Arc<GroupInput>) -> Result<TrainGroup, Status> {
        let bad = |what: String| Status::invalid_argument(format!("group {} of pass {}: {what}", id.record, id.pass));
        let n = self.shared.sampling.n;
        let (responses, breakdowns) = (request.responses.len(), request.breakdowns.len());
        if responses != n || breakdowns != n {
            return Err(bad(format!("{responses} responses and {breakdowns} breakdowns where {n} of each are needed")));
        }
        let (mut out, mut spans) = (Vec::with_capacity(n), Vec::with_capacity(n));
        for (at, r) in request.responses.into_iter().enumerate() {
            if r.index as usize != at || request.breakdowns[at].index as usize != at {
                return Err(bad(format!("response or breakdown {at} carries another index")));
            }
            let own: Vec<(usize, usize)> = r.spans.iter().map(|s| (s.begin as usize, s.end as usize)).collect();
            let length = r.tokens.len();
            if !own.is_empty() && own.len() != length {
                return Err(bad(format!("response {at} has {} spans for {length} tokens", own.len())));
            }
            if length > self.shared.sampling.max_new_tokens {
                return Err(bad(format!("response {at} has {length} tokens, more than it may")));
            }
            if let Some(t) = r.tokens.iter().find(|t| **t >= self.shared.vocab) {
                return Err(bad(format!(
                    "response {at} has token {t}, outside the vocabulary of {}",
                    self.shared.vocab
                )));
            }
            spans.push(own);
            out.push(response_from_wire(r).map_err(|e| bad(e.to_string()))?);
        }
        let breakdowns = request.breakdowns.into_iter().map(|b| breakdown_from_wire(&id.record, b)).collect();
        let (generate_ms, reward_ms) = (request.generate_ms, request.reward_ms);
        Ok(TrainGroup { id, input, responses: out, spans, breakdowns, generate_ms, reward_ms })
    }
}

#[tonic::async_trait]
impl Service for Handler {
    async fn lease(&self, request: Request<v1::LeaseRequest>) -> Result<Answer<v1::LeaseResponse>, Status> {
        let r = request.into_inner();
        if r.worker.is_empty() {
            return Err(Status::invalid_argument("`worker` is empty: give each worker a name of its own"));
        }
        let wait = Duration::from_millis(u64::from(r.wait_ms)).min(LONGEST_WAIT);
        let (leases, version, finished) = self.take(&r.worker, r.max_groups as usize, Instant::now() + wait).await;
        let ready = self.prepare(leases).await?;
        let mut groups = Vec::with_capacity(ready.len());
        let mut state = self.shared.lock();
        for (lease, made) in ready {
            let record_json = serde_json::to_string(&made.input.record).map_err(|e| Status::internal(e.to_string()))?;
            let s = &self.shared.sampling;
            groups.push(v1::LeasedGroup {
                lease: lease.id,
                group: Some(group_to_wire(&lease.group)),
                record_json,
                image: made.image,
                image_hash: made.image_hash,
                min_version: lease.min_version,
                n: s.n as u32,
                temperature: s.temperature,
                max_new_tokens: s.max_new_tokens as u32,
                seed: s.seed,
                top_k: s.top_k as u32,
                top_p: s.top_p,
                min_p: s.min_p,
                untempered: s.logprobs == Logprobs::Untempered,
                stop: self.shared.stop.clone(),
            });
            state.inputs.insert(lease.group, made.input);
        }
        Ok(Answer::new(v1::LeaseResponse { groups, version, finished }))
    }

    async fn submit(&self, request: Request<v1::SubmitRequest>) -> Result<Answer<v1::SubmitResponse>, Status> {
        let mut r = request.into_inner();
        let id = group_from_wire(r.group.take()).map_err(|e| Status::invalid_argument(e.to_string()))?;
        let (worker, lease) = (std::mem::take(&mut r.worker), std::mem::take(&mut r.lease));
        let known = self.shared.lock().inputs.get(&id).cloned();
        // A group that is not under way here was trained already, or leased by a learner that is gone: the machine says which.
        let nothing = || {
            let record = serde_json::from_value(serde_json::json!({"id": id.record}))
                .map_err(|e| Status::internal(e.to_string()));
            record.map(|record| GroupInput {
                record,
                image_size: (0, 0),
                prompt: unveil_model::Prompt::default(),
                patches: Vec::new(),
                merged: unveil_core::Grid { rows: 0, cols: 0 },
            })
        };
        let orphan = known.is_none();
        let input = match known {
            Some(input) => input,
            None => Arc::new(nothing()?),
        };
        let group = self.group(r, id.clone(), input)?;
        let versions = VersionSpan::of(&group.responses)
            .ok_or_else(|| Status::invalid_argument(format!("group {} has not one token", id.record)))?;
        let verdict = {
            let mut state = self.shared.lock();
            let now = self.shared.now();
            let submission = Submission { worker: &worker, lease: &lease, group: &id, versions };
            if orphan && state.machine.index_of(&id).is_none() {
                Verdict::Expired
            } else {
                state.machine.submit(&submission, group, now)
            }
        };
        match verdict {
            Verdict::Accepted => self.shared.ready.notify_all(),
            Verdict::Stale => self.shared.work.notify_waiters(),
            Verdict::Duplicate | Verdict::Expired => {}
        }
        let verdict = match verdict {
            Verdict::Accepted => v1::submit_response::Verdict::Accepted,
            Verdict::Duplicate => v1::submit_response::Verdict::Duplicate,
            Verdict::Stale => v1::submit_response::Verdict::Stale,
            Verdict::Expired => v1::submit_response::Verdict::Expired,
        };
        Ok(Answer::new(v1::SubmitResponse { verdict: verdict.into() }))
    }

    async fn release(&self, request: Request<v1::ReleaseRequest>) -> Result<Answer<v1::ReleaseResponse>, Status> {
        let r = request.into_inner();
        let now = self.shared.now();
        let released = self.shared.lock().machine.release(&r.worker, &r.leases, now);
        if released > 0 {
            self.shared.work.notify_waiters();
        }
        Ok(Answer::new(v1::ReleaseResponse {}))
    }

    type WeightsStream = Pin<Box<dyn Stream<Item = Result<v1::WeightsChunk, Status>> + Send>>;

    /// All parameters of the newest version as one safetensors file, in chunks; nothing when the worker has that version.
    async fn weights(&self, request: Request<v1::WeightsRequest>) -> Result<Answer<Self::WeightsStream>, Status> {
        let r = request.into_inner();
        let Some(weights) = self.shared.lock().weights.clone() else {
            return Err(Status::unavailable("no weights are published yet"));
        };
        let have = r.have_version == Some(weights.version);
        let total = if have { 0 } else { weights.bytes.len() };
        let chunks = (0..total).step_by(CHUNK).map(move |at| {
            let data = weights.bytes.slice(at..(at + CHUNK).min(total));
            let crc32c = crc32c::crc32c(&data);
            Ok(v1::WeightsChunk { version: weights.version, total_bytes: total as u64, data, crc32c })
        });
        Ok(Answer::new(Box::pin(tokio_stream::iter(chunks))))
    }
}
