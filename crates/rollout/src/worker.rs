//! The worker's loop. Three things go on at once: one batch is scored and submitted, one is generated, the next is leased and
//! prepared; weights come in beside them.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinSet;
use unveil_config::schema::WeightSync;
use unveil_config::{Config, Role};
use unveil_data::prepare::Preparer;
use unveil_engine::GroupRequest;
use unveil_proto::v1::LeasedGroup;
use unveil_proto::v1::release_request::Cause;
use unveil_proto::v1::submit_response::Verdict;
use unveil_reward::Scoring;
use unveil_service::{Access, Backoff, CancellationToken, Health, client_options};

use crate::device::{DeviceSpec, DeviceThread};
use crate::experience::Experience;
use crate::groups::{Delivery, Leased, Step, deliver, prepare};
use crate::hand::Hand;
use crate::keeper::{Weights, keep};
use crate::meter::Meter;
use crate::ready::Ready;
use crate::rewards::Rewards;
use crate::sync::{Member, WeightReceiver};
use crate::{Result, RolloutError};

/// Batches that are generated or ready to be.
const AHEAD: usize = 2;
/// Batches in hand: these, and one that is scored and submitted.
const IN_HAND: u32 = AHEAD as u32 + 1;

/// Shortest time between two calls that brought nothing.
pub(crate) const IDLE: Duration = Duration::from_millis(20);

/// How long a heartbeat may take; the next one follows.
const BEAT: Duration = Duration::from_secs(2);
/// How long handing back may take at the end.
const LEAVING: Duration = Duration::from_secs(1);

/// How often a worker that leases nothing asks whether the run is over.
const ASKED: Duration = Duration::from_secs(1);

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
    /// Options with the configured patience and the usual wait (2 s).
    pub fn new(config: Config, model_dir: PathBuf, experience: String, reward: String, worker: String) -> Self {
        let (patience, wait) = (Duration::from_secs_f64(config.rollout.patience_s), Duration::from_secs(2));
        Self { config, model_dir, experience, reward, worker, patience, wait, health: Health::default() }
    }
}

/// What a worker did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct WorkerReport {
    /// Groups that were accepted.
    pub accepted: u64,
    /// Groups that were answered otherwise (duplicate, stale, expired, rejected), or given back without a reward.
    pub refused: u64,
    /// Tokens of all submitted groups.
    pub tokens: u64,
    /// Times that weights were taken over.
    pub weights: u64,
    /// The run is over (false: the worker was asked to stop).
    pub finished: bool,
}

/// What the loop and its batches share.
struct Shared {
    experience: Experience,
    rewards: Rewards,
    preparer: Arc<Preparer>,
    weights: Arc<Weights>,
    hand: Arc<Hand>,
    meter: Meter,
    ready: Ready,
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
    let held = worker.shared.hand.take();
    if !held.is_empty() {
        tracing::info!("handing {} lease(s) back", held.len());
        worker.shared.experience.release(held).await;
    }
    // Also what a call brings that was under way.
    worker.shared.experience.heartbeat(&worker.shared.hand, LEAVING).await;
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
    let hand = Arc::new(Hand::new(Duration::from_secs_f64(config.rollout.lease_s)));
    let spec = DeviceSpec {
        model_dir: options.model_dir.clone(),
        config: config.clone(),
        banned: preparer.tokenizer().special().banned.clone(),
        progress: hand.progress.clone(),
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
    let ready = Ready::new(options.health.clone());
    let told = (ready.clone(), meter.clone());
    let rewards = Rewards::new(&options.reward, access.clone(), config, told).await?;
    let (at, worker, patience) = (&options.experience, &options.worker, options.patience);
    let experience = Experience::connect(at, worker, &access, patience).await?;
    let receiver =
        WeightReceiver::connect_with(at, worker, &access, patience).await?.with_progress(hand.progress.clone());
    tracing::info!("worker {} leases from {}", options.worker, options.experience);
    let shared = Shared {
        experience,
        rewards,
        preparer: Arc::new(preparer),
        weights: Arc::new(Weights::new(&options.experience, meter.clone())),
        hand,
        meter: meter.clone(),
        ready,
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
        let living = shared.clone();
        let keeper = keep(shared.weights.clone(), receiver, self.device.clone(), wait);
        self.tasks.spawn(async { (keeper.await, None) });
        self.tasks.spawn(async { (pulse(living).await, None) });
        let (ahead, in_hand) = (Arc::new(Semaphore::new(AHEAD)), Arc::new(Semaphore::new(IN_HAND as usize)));
        let most = self.options.config.rollout.groups_per_lease;
        let (hand, mut backoff) = (shared.hand.clone(), Backoff::default());
        loop {
            let (place, turn) = self.unless_failed(permits(&in_hand, &ahead)).await?;
            self.unless_failed(shared.weights.any()).await?;
            // What cannot be scored is not generated.
            self.unless_failed(rewards_back(&shared)).await?;
            let (start, epoch, era) = (Instant::now(), shared.weights.epoch(), shared.weights.era());
            let call = hand.call();
            let leasing = shared.experience.lease((&hand, call), most, wait, shared.weights.present(), &shared.ready);
            // The call goes on while batches end.
            let lease = match self.unless_failed(leasing).await? {
                Ok(lease) => lease,
                Err(why) => {
                    hand.took(call, std::iter::empty());
                    shared.weights.distrust(epoch, why)?;
                    tokio::time::sleep(backoff.draw()).await;
                    continue;
                }
            };
            backoff = Backoff::default();
            hand.took(call, lease.groups.iter().map(|g| g.lease.clone()));
            hand.renewed_within(lease.renew_ms);
            shared.weights.trusted();
            shared.meter.newest(lease.version);
            shared.meter.leased(lease.groups.len());
            if lease.groups.is_empty() {
                if lease.finished {
                    break;
                }
                tokio::time::sleep(IDLE.saturating_sub(start.elapsed())).await;
                continue;
            }
            let batch = one_batch(shared.clone(), self.device.clone(), lease.groups, turn, era);
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

/// Waits until rewards can be had, or the run is over.
async fn rewards_back(shared: &Shared) -> Result<()> {
    while let Some(pause) = shared.rewards.pause() {
        let until = Instant::now() + pause;
        while let Some(left) = until.checked_duration_since(Instant::now()) {
            if shared.experience.heartbeat(&shared.hand, BEAT).await.is_some_and(|told| told.finished) {
                return Ok(());
            }
            tokio::time::sleep(left.min(ASKED)).await;
        }
        shared.rewards.ask().await;
    }
    Ok(())
}

/// Tells the experience service what the worker has in hand, until it is dropped.
async fn pulse(shared: Arc<Shared>) -> Result<()> {
    loop {
        for lease in shared.experience.heartbeat(&shared.hand, BEAT).await.unwrap_or_default().lost {
            if shared.hand.has(&lease) {
                tracing::warn!(lease, "the lease is not this worker's any more: its group is dropped");
                shared.hand.remove(&lease);
            }
        }
        tokio::time::sleep(shared.hand.pause()).await;
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

/// Prepares, generates and delivers the groups of one lease call, as far as their leases hold.
async fn one_batch(
    shared: Arc<Shared>,
    device: Arc<DeviceThread>,
    groups: Vec<LeasedGroup>,
    ahead: OwnedSemaphorePermit,
    era: u64,
) -> Result<()> {
    let need = groups.iter().map(|g| g.min_version).max().unwrap_or(0);
    let mut prepared = Vec::with_capacity(groups.len());
    for group in groups {
        prepared.extend(one_preparation(&shared, group).await?);
    }
    if prepared.is_empty() {
        return Ok(());
    }
    // Made by older weights, the groups would be too stale to train.
    if !shared.weights.at_least(need, era).await? {
        let leases: Vec<String> = prepared.into_iter().map(|(leased, _)| leased.lease).collect();
        tracing::warn!("{} group(s) of a learner that is gone are dropped", leases.len());
        give_back(&shared, leases, Cause::Unspecified, String::new()).await;
        return Ok(());
    }
    let turn = shared.turn.acquire().await.map_err(|_| RolloutError::Died("batches"))?;
    prepared.retain(|(leased, _)| shared.has(leased));
    if prepared.is_empty() {
        return Ok(());
    }
    let (leased, requests): (Vec<Leased>, Vec<_>) = prepared.into_iter().unzip();
    let epoch = shared.weights.epoch();
    let spans = leased.iter().map(|l| l.span(Step::Generate)).collect::<Vec<_>>();
    let made = match device.generate(requests).await {
        Ok(made) => made,
        Err(e) => {
            // The worker ends. One of these groups may be what it dies of.
            let leases = leased.iter().map(|l| l.lease.clone());
            give_back(&shared, leases.collect(), Cause::Failed, e.to_string()).await;
            return Err(e);
        }
    };
    drop((turn, spans));
    shared.meter.gpu(made.gpu);
    drop(ahead);
    // A batch is generated as one; each group bears its share.
    let each_ms = made.ms / leased.len().max(1) as f64;
    let mut deliveries = JoinSet::new();
    for (leased, output) in leased.into_iter().zip(made.outputs) {
        shared.hand.step(&leased.lease);
        deliveries.spawn(one_delivery(shared.clone(), leased, output, each_ms, epoch));
    }
    while let Some(done) = deliveries.join_next().await {
        done.map_err(|_| RolloutError::Died("delivery"))??;
    }
    Ok(())
}

/// Turns a leased group into model input, with its image where that did not come with it; none when the lease is lost, or the group
/// cannot be made and is given back with the reason: that is no reason for the worker to end.
async fn one_preparation(shared: &Arc<Shared>, mut group: LeasedGroup) -> Result<Option<(Leased, GroupRequest)>> {
    let lease = group.lease.clone();
    if group.image_bytes > 0 {
        let Some(image) = shared.experience.image(&lease, group.image_bytes, &shared.hand.progress).await? else {
            tracing::warn!(lease, "the lease was lost before its image came");
            shared.hand.remove(&lease);
            shared.meter.lost();
            return Ok(None);
        };
        group.image = image;
    }
    let s = shared.clone();
    let work = move || prepare(&s.preparer, group, &s.question, &s.scoring, &s.experience.address);
    let prepared = tokio::task::spawn_blocking(work).await.map_err(|_| RolloutError::Died("preparation"))?;
    shared.hand.progress.step();
    match prepared {
        Ok(prepared) => Ok(Some(prepared)),
        Err(e @ RolloutError::Prepare { .. }) => {
            tracing::warn!(lease, "a group cannot be made and is given back: {e}");
            give_back(shared, vec![lease], Cause::Failed, e.to_string()).await;
            Ok(None)
        }
        Err(e) => Err(e),
    }
}

/// Hands leases back that are still held, with what became of them.
async fn give_back(shared: &Shared, mut leases: Vec<String>, cause: Cause, why: String) {
    leases.retain(|lease| shared.hand.has(lease));
    if leases.is_empty() {
        return;
    }
    for lease in &leases {
        shared.hand.remove(lease);
        if cause != Cause::Unspecified {
            shared.meter.given_back(cause);
        }
    }
    shared.experience.give_back(leases, cause, why).await;
}

impl Shared {
    /// Whether the work on a group still counts.
    fn has(&self, leased: &Leased) -> bool {
        let has = self.hand.has(&leased.lease);
        if !has {
            self.meter.lost();
        }
        has
    }
}

/// Scores and submits a group; hands it back when its weights turned out to be wrong meanwhile.
async fn one_delivery(
    shared: Arc<Shared>,
    leased: Leased,
    output: unveil_engine::GroupOutput,
    ms: f64,
    epoch: u64,
) -> Result<()> {
    if !shared.has(&leased) {
        return Ok(());
    }
    let versions = output.responses.iter().flat_map(|r| r.versions.iter().copied());
    let Some(told) = shared.weights.told(epoch, versions) else {
        shared.meter.distrusted();
        give_back(&shared, vec![leased.lease], Cause::Unspecified, String::new()).await;
        return Ok(());
    };
    let done = deliver(&shared.experience, &shared.rewards, &shared.preparer, &leased, output, ms, told).await?;
    match done {
        Delivery::Cancelled => return Ok(()),
        Delivery::Unscored { cause, why } => {
            tracing::warn!(lease = leased.lease, "a group is given back without scores: {why}");
            give_back(&shared, vec![leased.lease], cause, why).await;
            return Ok(());
        }
        Delivery::Answered { verdict, why, tokens, reward_ms } => {
            shared.meter.made(ms, reward_ms);
            shared.meter.answered(verdict, tokens);
            if verdict != Verdict::Accepted {
                tracing::warn!(lease = leased.lease, why, "a group was not counted: {}", verdict.as_str_name());
            }
        }
        Delivery::Distrusted(why) => {
            shared.meter.distrusted();
            shared.weights.distrust(epoch, why)?;
        }
    }
    shared.hand.remove(&leased.lease);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_worker_has_the_configured_patience() {
        let mut config = Config::default();
        config.rollout.patience_s = 7.5;
        let options = WorkerOptions::new(config, "m".into(), "http://a".into(), "http://b".into(), "w".into());
        assert_eq!(options.patience, Duration::from_millis(7500));
    }
}
