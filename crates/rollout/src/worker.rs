//! The worker's loop. Three things go on at once: one batch is scored and submitted, one is generated, the next is leased and
//! prepared; weights come in beside them.

use std::collections::HashSet;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinSet;
use unveil_config::schema::WeightSync;
use unveil_config::{Config, Role};
use unveil_data::prepare::Preparer;
use unveil_proto::v1::LeasedGroup;
use unveil_proto::v1::submit_response::Verdict;
use unveil_reward::Scoring;
use unveil_service::{Access, CancellationToken, Health, client_options};

use crate::device::{DeviceSpec, DeviceThread};
use crate::experience::Experience;
use crate::groups::{Delivery, Leased, Rewards, Step, deliver, prepare};
use crate::keeper::{Weights, keep};
use crate::meter::Meter;
use crate::sync::{Member, WeightReceiver};
use crate::{Result, RolloutError};

/// Batches that are generated or ready to be.
const AHEAD: usize = 2;
/// Batches in hand: these, and one that is scored and submitted.
const IN_HAND: u32 = AHEAD as u32 + 1;

/// Shortest time between two calls that brought nothing.
pub(crate) const IDLE: Duration = Duration::from_millis(20);

/// How often the experience service hears that the worker lives, whatever else it does.
const PULSE: Duration = Duration::from_secs(2);

/// What a worker needs.
#[derive(Debug, Clone)]
pub struct WorkerOptions {
    /// The run's configuration.
    pub config: Config,
    /// Model directory: configuration, processor, tokenizer, and the weights of version 0.
    pub model_dir: PathBuf,
    /// Experience service, `http://host:port`.
    pub experience: String,
    /// Reward service, `http://host:port`.
    pub reward: String,
    /// The worker's name, unique in the run.
    pub worker: String,
    /// How long an unreachable experience service is waited for before the worker gives up.
    pub patience: Duration,
    /// How long the experience service may hold a lease call when there is no work.
    pub wait: Duration,
    /// Hears that the worker has weights and is answered by the experience service, and when it is not answered any more.
    pub health: Health,
}

impl WorkerOptions {
    /// Options with the usual patience (60 s) and wait (2 s).
    pub fn new(config: Config, model_dir: PathBuf, experience: String, reward: String, worker: String) -> Self {
        let (patience, wait) = (Duration::from_secs(60), Duration::from_secs(2));
        Self { config, model_dir, experience, reward, worker, patience, wait, health: Health::default() }
    }
}

/// What a worker did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct WorkerReport {
    /// Groups that were accepted.
    pub accepted: u64,
    /// Groups that were answered otherwise (duplicate, stale, expired).
    pub refused: u64,
    /// Tokens of all submitted groups.
    pub tokens: u64,
    /// Times that weights were taken over.
    pub weights: u64,
    /// The run is over (false: the worker was asked to stop).
    pub finished: bool,
}

/// Leases that are neither submitted nor handed back.
#[derive(Default)]
struct Held(Mutex<HashSet<String>>);

impl Held {
    fn add(&self, leases: impl Iterator<Item = String>) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).extend(leases);
    }

    fn remove(&self, lease: &str) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(lease);
    }

    fn take(&self) -> Vec<String> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).drain().collect()
    }
}

/// What the loop and its batches share.
struct Shared {
    experience: Experience,
    rewards: Rewards,
    preparer: Arc<Preparer>,
    weights: Arc<Weights>,
    held: Held,
    meter: Meter,
    health: Health,
    question: String,
    scoring: Arc<Scoring>,
    /// Batches that are generated at once. Strictly on-policy it is one, so that a batch's composition, and with it every bit of
    /// what it makes, does not depend on time; otherwise the next one fills the places that responses leave.
    turn: Semaphore,
}

/// Runs a worker until the run is over, `shutdown` is cancelled (leases are handed back, `Ok`), or it cannot go on.
///
/// # Errors
/// The model directory cannot be used; the experience service stayed unreachable (the message names its address) or sent
/// something that does not hold together; weights arrived damaged; a leased record cannot be prepared; the page of metrics
/// cannot be served.
pub async fn run(options: WorkerOptions, shutdown: CancellationToken) -> Result<WorkerReport> {
    let cancel = Arc::new(AtomicBool::new(false));
    let meter = Meter::new();
    let access = Access::of(&options.config, Role::Rollout)?;
    meter.serve(&options.config.rollout.metrics_listen, &access, shutdown.clone()).await?;
    let starting = start(&options, &meter, &cancel);
    let (shared, device, receiver, member) = tokio::select! {
        started = starting => started?,
        () = shutdown.cancelled() => return Ok(WorkerReport::default()),
    };
    let (shared, device) = (Arc::new(shared), Arc::new(device));
    let mut worker = Worker { options, shared, device, tasks: JoinSet::new() };
    let outcome = tokio::select! {
        done = worker.work(receiver) => done.map(|()| true),
        () = shutdown.cancelled() => {
            tracing::info!("asked to stop");
            Ok(false)
        }
    };
    cancel.store(true, Ordering::Relaxed);
    worker.tasks.shutdown().await;
    let held = worker.shared.held.take();
    if !held.is_empty() {
        tracing::info!("handing {} lease(s) back", held.len());
        worker.shared.experience.release(held).await;
    }
    if let Some(member) = member.and_then(Arc::into_inner) {
        member.close().await;
    }
    if let Some(device) = Arc::into_inner(worker.device) {
        device.close().await;
    }
    let (accepted, refused, tokens, weights) = meter.totals();
    outcome.map(|finished| WorkerReport { accepted, refused, tokens, weights, finished })
}

type Started = (Shared, DeviceThread, WeightReceiver, Option<Arc<Member>>);

async fn start(options: &WorkerOptions, meter: &Meter, cancel: &Arc<AtomicBool>) -> Result<Started> {
    let config = &options.config;
    let dir = options.model_dir.clone();
    let boxes = config.model.boxes;
    let preparer = tokio::task::spawn_blocking(move || Preparer::load_with(&dir, boxes))
        .await
        .map_err(|_| RolloutError::Died("loader"))??;
    let spec = DeviceSpec {
        model_dir: options.model_dir.clone(),
        config: config.clone(),
        banned: preparer.tokenizer().special().banned.clone(),
    };
    let device = DeviceThread::start(spec, cancel.clone()).await?;
    let access = client_options(config, Role::Rollout)?;
    let member = match config.rollout.weight_sync {
        WeightSync::Grpc => None,
        WeightSync::Broadcast => {
            let device = unveil_model::device(&config.run.device)?;
            Some(Member::start(device, Duration::from_secs_f64(config.rollout.broadcast_s), access.token.clone())?)
        }
    };
    let rewards = Rewards::new(&options.reward, access.clone(), config).await?;
    let (at, worker, patience) = (&options.experience, &options.worker, options.patience);
    let experience = Experience::connect(at, worker, &access, patience).await?;
    let receiver = WeightReceiver::connect_with(at, worker, &access, patience).await?;
    tracing::info!("worker {} leases from {}", options.worker, options.experience);
    let shared = Shared {
        experience,
        rewards,
        preparer: Arc::new(preparer),
        weights: Arc::new(Weights::new(&options.experience, meter.clone())),
        held: Held::default(),
        meter: meter.clone(),
        health: options.health.clone(),
        question: config.data.question.clone(),
        scoring: Arc::new(Scoring::new(config)),
        turn: Semaphore::new(if config.rollout.max_staleness == 0 { 1 } else { AHEAD }),
    };
    Ok((shared, device, receiver.with_broadcast(member.clone()), member))
}

struct Worker {
    options: WorkerOptions,
    shared: Arc<Shared>,
    device: Arc<DeviceThread>,
    /// The keeper of weights, and batches; an error says that the worker cannot go on. A batch's place in hand is free once its
    /// result was looked at.
    tasks: JoinSet<(Result<()>, Option<OwnedSemaphorePermit>)>,
}

impl Worker {
    async fn work(&mut self, receiver: WeightReceiver) -> Result<()> {
        let (shared, wait) = (self.shared.clone(), self.options.wait);
        let living = shared.experience.clone();
        let keeper = keep(shared.weights.clone(), receiver, self.device.clone(), wait);
        self.tasks.spawn(async { (keeper.await, None) });
        self.tasks.spawn(async { (pulse(living).await, None) });
        let (ahead, in_hand) = (Arc::new(Semaphore::new(AHEAD)), Arc::new(Semaphore::new(IN_HAND as usize)));
        let most = self.options.config.rollout.groups_per_lease;
        loop {
            let (place, turn) = self.unless_failed(permits(&in_hand, &ahead)).await?;
            self.unless_failed(shared.weights.at_least(0)).await?;
            let (start, epoch) = (Instant::now(), shared.weights.epoch());
            let leasing = shared.experience.lease(most, wait, shared.weights.present(), &shared.health);
            // The call goes on while batches end: dropped, its leases would be lost.
            let lease = match self.unless_failed(leasing).await? {
                Ok(lease) => lease,
                Err(what) => {
                    shared.weights.distrust(epoch, what)?;
                    continue;
                }
            };
            shared.weights.trusted();
            shared.meter.newest(lease.version);
            shared.meter.leased(lease.groups.len());
            shared.held.add(lease.groups.iter().map(|g| g.lease.clone()));
            if lease.groups.is_empty() {
                if lease.finished {
                    break;
                }
                tokio::time::sleep(IDLE.saturating_sub(start.elapsed())).await;
                continue;
            }
            let batch = one_batch(shared.clone(), self.device.clone(), lease.groups, turn);
            self.tasks.spawn(async { (batch.await, Some(place)) });
        }
        let all = async { in_hand.acquire_many(IN_HAND).await.map_err(|_| RolloutError::Died("batches")) };
        let _all = self.unless_failed(all).await?;
        tracing::info!("the run is over");
        Ok(())
    }

    /// What `work` gives, or the error of a task that fails meanwhile.
    async fn unless_failed<T>(&mut self, work: impl Future<Output = Result<T>>) -> Result<T> {
        tokio::pin!(work);
        loop {
            tokio::select! {
                done = &mut work => return done,
                Some(done) = self.tasks.join_next() => done.map_err(|_| RolloutError::Died("task"))?.0?,
            }
        }
    }
}

/// Tells the experience service that the worker lives, until it is dropped.
async fn pulse(experience: Experience) -> Result<()> {
    loop {
        experience.live(PULSE).await;
        tokio::time::sleep(PULSE).await;
    }
}

/// Room for one more batch, until it is delivered and until it is generated.
async fn permits(
    in_hand: &Arc<Semaphore>,
    ahead: &Arc<Semaphore>,
) -> Result<(OwnedSemaphorePermit, OwnedSemaphorePermit)> {
    let closed = |_| RolloutError::Died("batches");
    let in_hand = in_hand.clone().acquire_owned().await.map_err(closed)?;
    Ok((in_hand, ahead.clone().acquire_owned().await.map_err(closed)?))
}

/// Prepares, generates and delivers the groups of one lease call.
async fn one_batch(
    shared: Arc<Shared>,
    device: Arc<DeviceThread>,
    groups: Vec<LeasedGroup>,
    ahead: OwnedSemaphorePermit,
) -> Result<()> {
    let need = groups.iter().map(|g| g.min_version).max().unwrap_or(0);
    let preparing = shared.clone();
    let prepared = tokio::task::spawn_blocking(move || {
        let s = preparing;
        let one = |g| prepare(&s.preparer, g, &s.question, &s.scoring, &s.experience.address);
        groups.into_iter().map(one).collect::<Result<Vec<_>>>()
    });
    let prepared = prepared.await.map_err(|_| RolloutError::Died("preparation"))??;
    let (leased, requests): (Vec<Leased>, Vec<_>) = prepared.into_iter().unzip();
    // Made by older weights, the groups would be too stale to train.
    shared.weights.at_least(need).await?;
    let turn = shared.turn.acquire().await.map_err(|_| RolloutError::Died("batches"))?;
    let epoch = shared.weights.epoch();
    let spans = leased.iter().map(|l| l.span(Step::Generate)).collect::<Vec<_>>();
    let made = device.generate(requests).await?;
    drop((turn, spans));
    shared.meter.gpu(made.gpu);
    drop(ahead);
    // A batch is generated as one; each group bears its share.
    let each_ms = made.ms / leased.len().max(1) as f64;
    let mut deliveries = JoinSet::new();
    for (leased, output) in leased.into_iter().zip(made.outputs) {
        deliveries.spawn(one_delivery(shared.clone(), leased, output, each_ms, epoch));
    }
    while let Some(done) = deliveries.join_next().await {
        done.map_err(|_| RolloutError::Died("delivery"))??;
    }
    Ok(())
}

/// Scores and submits a group; hands it back when its weights turned out to be wrong meanwhile.
async fn one_delivery(
    shared: Arc<Shared>,
    leased: Leased,
    output: unveil_engine::GroupOutput,
    ms: f64,
    epoch: u64,
) -> Result<()> {
    if shared.weights.epoch() != epoch {
        shared.held.remove(&leased.lease);
        shared.meter.distrusted();
        shared.experience.release(vec![leased.lease]).await;
        return Ok(());
    }
    let versions = output.responses.iter().flat_map(|r| r.versions.iter().copied());
    let told = shared.weights.told(versions);
    let done = deliver(&shared.experience, &shared.rewards, &shared.preparer, &leased, output, ms, told).await?;
    match done {
        Delivery::Cancelled => return Ok(()),
        Delivery::Answered { verdict, tokens, reward_ms } => {
            shared.meter.made(ms, reward_ms);
            shared.meter.answered(verdict, tokens);
            if verdict != Verdict::Accepted {
                tracing::warn!(lease = leased.lease, "a group was not counted: {}", verdict.as_str_name());
            }
        }
        Delivery::Distrusted(what) => {
            shared.meter.distrusted();
            shared.weights.distrust(epoch, what)?;
        }
    }
    shared.held.remove(&leased.lease);
    Ok(())
}
