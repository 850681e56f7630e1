//! The worker's loop. Three batches are in flight: one is scored and submitted, one is generated, the next is leased and prepared;
//! weights arrive concurrently.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinSet;
use unveil_config::schema::WeightSync;
use unveil_config::{Config, Role};
use unveil_experience_rpc::{BroadcastMember, ClientError, ExperienceConnection, HeldLeases, WeightReceiver};
use unveil_preprocess::preprocessor::Preprocessor;
use unveil_reward::Scoring;
use unveil_service::{Backoff, CancellationToken, Health, ServiceAccess, client_options};

use crate::batch::{WorkerShared, process_batch};
use crate::device::{DeviceSpec, DeviceThread};
use crate::meter::Meter;
use crate::readiness::Readiness;
use crate::reward_connection::RewardConnection;
use crate::weight_state::{POLL_INTERVAL, WeightState, sync_weights};
use crate::{Result, RolloutError};

/// Batches that are prepared, waiting for the engine, or generated.
const MAX_GENERATING_BATCHES: usize = 2;
/// Batches in flight: these, and one that is scored and submitted.
const MAX_BATCHES_IN_FLIGHT: u32 = MAX_GENERATING_BATCHES as u32 + 1;

/// Timeout of a heartbeat, which is not retried since the next one follows.
const HEARTBEAT_TIMEOUT: Duration = Duration::from_secs(2);
/// Timeout of the last heartbeat.
const LAST_HEARTBEAT_TIMEOUT: Duration = Duration::from_secs(1);

/// Time without an answer after which the learner of a finished run is assumed to have left.
const END_OF_RUN_GRACE: Duration = Duration::from_secs(5);
/// Interval at which a worker that waits for rewards checks whether the run has ended.
const RUN_END_POLL_INTERVAL: Duration = Duration::from_secs(1);

/// Options of a worker.
#[derive(Debug, Clone)]
pub struct WorkerOptions {
    /// The run's configuration.
    pub config: Config,
    /// Model directory: configuration, processor, tokenizer, and the weights of version 0.
    pub model_dir: PathBuf,
    /// Address of the experience service, `http://host:port`.
    pub experience: String,
    /// Address of the reward service, `http://host:port`.
    pub reward: String,
    /// Name of the worker, unique in the run.
    pub worker: String,
    /// Time to wait for an unreachable experience service before the worker gives up.
    pub patience: Duration,
    /// Time that the experience service may hold a lease call without work.
    pub wait: Duration,
    /// Health service that reports the readiness of the worker.
    pub health: Health,
}

impl WorkerOptions {
    /// Creates options with the configured patience and a wait of 2 s.
    pub fn new(config: Config, model_dir: PathBuf, experience: String, reward: String, worker: String) -> Self {
        let patience = Duration::from_secs_f64(config.rollout.patience_s);
        let wait = Duration::from_secs(2);
        Self { config, model_dir, experience, reward, worker, patience, wait, health: Health::default() }
    }
}

/// Summary of a worker's work.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct WorkerReport {
    /// Groups that were accepted.
    pub accepted: u64,
    /// Groups that got another verdict (duplicate, stale, expired, rejected), or were released without a reward.
    pub refused: u64,
    /// Tokens of all submitted groups.
    pub tokens: u64,
    /// Times that new weights were loaded.
    pub weights: u64,
    /// Whether the run has ended (false: the worker was asked to stop).
    pub finished: bool,
}

/// Runs a worker until the run has ended, `shutdown` is cancelled (leases are released, `Ok`), or it cannot continue.
///
/// # Errors
/// Returns [`RolloutError::Experience`] if the experience service stays unreachable (the message names its address), sends inconsistent
/// messages, or sends damaged weights several times; [`RolloutError::Reward`] if the reward service cannot be used;
/// [`RolloutError::Access`] if the metrics page cannot be served; and the errors of loading and running the model.
pub async fn run(options: WorkerOptions, shutdown: CancellationToken) -> Result<WorkerReport> {
    let cancel = Arc::new(AtomicBool::new(false));
    let meter = Meter::new();
    let access = ServiceAccess::of(&options.config, Role::Rollout)?;
    meter.serve(&options.config.rollout.metrics_listen, &access, shutdown.clone()).await?;
    let starting = set_up(&options, &meter, &cancel);
    let (shared, device, receiver, member) = tokio::select! {
        started = starting => started?,
        () = shutdown.cancelled() => return Ok(WorkerReport::default()),
    };
    let shared = Arc::new(shared);
    let device = Arc::new(device);
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
    let held = worker.shared.leases.drain();
    if !held.is_empty() && !matches!(outcome, Ok(true)) {
        tracing::info!(leases = held.len(), "releasing leases");
        worker.shared.experience.release(held).await;
    }
    // The last heartbeat lists no leases, which also frees those of a lease call in flight.
    worker.shared.experience.heartbeat(&worker.shared.leases, LAST_HEARTBEAT_TIMEOUT).await;
    if let Some(member) = member.and_then(Arc::into_inner) {
        member.close().await;
    }
    if let Some(device) = Arc::into_inner(worker.device) {
        device.close().await;
    }
    let (accepted, refused, tokens, weights) = meter.totals();
    outcome.map(|finished| WorkerReport { accepted, refused, tokens, weights, finished })
}

type Started = (WorkerShared, DeviceThread, WeightReceiver, Option<Arc<BroadcastMember>>);

/// Loads the model and connects to the services.
async fn set_up(options: &WorkerOptions, meter: &Meter, cancel: &Arc<AtomicBool>) -> Result<Started> {
    let config = &options.config;
    let dir = options.model_dir.clone();
    let settings = config.input_settings();
    let preprocessor = tokio::task::spawn_blocking(move || Preprocessor::load_with(&dir, &settings))
        .await
        .map_err(|_| RolloutError::Died("loader"))??;
    let leases = Arc::new(HeldLeases::new(Duration::from_secs_f64(config.rollout.lease_s)));
    let spec = DeviceSpec {
        model_dir: options.model_dir.clone(),
        config: config.clone(),
        banned: preprocessor.tokenizer().banned().to_vec(),
        progress: leases.progress.clone(),
    };
    let device = DeviceThread::start(spec, cancel.clone()).await?;
    let access = client_options(config, Role::Rollout)?;
    let member = match config.rollout.weight_sync {
        WeightSync::Grpc => None,
        WeightSync::Broadcast => {
            let device = unveil_model::device(&config.run.device)?;
            Some(BroadcastMember::start(
                device,
                Duration::from_secs_f64(config.rollout.broadcast_s),
                access.token.clone(),
            )?)
        }
    };
    let readiness = Readiness::new(options.health.clone());
    let status = (readiness.clone(), meter.clone());
    let rewards = RewardConnection::new(&options.reward, access.clone(), config, status).await?;
    let address = &options.experience;
    let worker = &options.worker;
    let patience = options.patience;
    let experience = ExperienceConnection::connect(address, worker, &access, patience).await?;
    let receiver =
        WeightReceiver::connect_with(address, worker, &access, patience).await?.with_progress(leases.progress.clone());
    tracing::info!(worker, experience = address, "worker started");
    let shared = WorkerShared {
        experience,
        rewards,
        preprocessor: Arc::new(preprocessor),
        weights: Arc::new(WeightState::new(&options.experience, meter.clone())),
        leases,
        meter: meter.clone(),
        readiness,
        scoring: Arc::new(Scoring::new(config)),
        generation_slots: Semaphore::new(if config.rollout.max_staleness == 0 { 1 } else { MAX_GENERATING_BATCHES }),
    };
    Ok((shared, device, receiver.with_broadcast(member.clone()), member))
}

struct Worker {
    options: WorkerOptions,
    shared: Arc<WorkerShared>,
    device: Arc<DeviceThread>,
    /// Weight sync, heartbeats, and batches; after an error, the worker cannot continue. A batch keeps its permit until its result is
    /// checked.
    tasks: JoinSet<(Result<()>, Option<OwnedSemaphorePermit>)>,
}

impl Worker {
    async fn work(&mut self, receiver: WeightReceiver) -> Result<()> {
        let shared = self.shared.clone();
        let wait = self.options.wait;
        let heartbeats = send_heartbeats(shared.clone());
        let weight_sync = sync_weights(shared.weights.clone(), receiver, self.device.clone(), wait);
        self.tasks.spawn(async { (weight_sync.await, None) });
        self.tasks.spawn(async { (heartbeats.await, None) });
        let generating = Arc::new(Semaphore::new(MAX_GENERATING_BATCHES));
        let in_flight = Arc::new(Semaphore::new(MAX_BATCHES_IN_FLIGHT as usize));
        let max_groups = self.options.config.rollout.groups_per_lease;
        let leases = shared.leases.clone();
        let mut backoff = Backoff::default();
        loop {
            let permits = acquire_batch_permits(&in_flight, &generating);
            let (in_flight_permit, generating_permit) = self.unless_failed(permits).await?;
            self.unless_failed(shared.weights.wait_for_any()).await?;
            // Groups that cannot be scored are not generated.
            self.unless_failed(wait_for_rewards(&shared)).await?;
            let start = Instant::now();
            let generation = shared.weights.generation();
            let era = shared.weights.era();
            let call = leases.begin_call();
            let held = shared.weights.held();
            let on_answer = |answers: bool| shared.readiness.set_learner_answers(answers);
            let leasing = async {
                let lease = shared.experience.lease((&leases, call), max_groups, wait, held, &on_answer);
                lease.await.map_err(RolloutError::from)
            };
            // Batches may end while the call is in flight.
            let lease = match self.unless_failed(leasing).await? {
                Ok(lease) => lease,
                Err(why) => {
                    leases.finish_call(call, std::iter::empty());
                    shared.weights.invalidate(generation, why)?;
                    tokio::time::sleep(backoff.next_delay()).await;
                    continue;
                }
            };
            backoff = Backoff::default();
            leases.finish_call(call, lease.groups.iter().map(|g| g.lease.clone()));
            leases.set_lease_duration(lease.renew_ms);
            shared.weights.confirm();
            shared.meter.set_newest(lease.version);
            shared.meter.count_leased(lease.groups.len());
            if lease.groups.is_empty() {
                if lease.finished {
                    break;
                }
                tokio::time::sleep(POLL_INTERVAL.saturating_sub(start.elapsed())).await;
                continue;
            }
            let batch = process_batch(shared.clone(), self.device.clone(), lease.groups, generating_permit, era);
            self.tasks.spawn(async { (batch.await, Some(in_flight_permit)) });
        }
        // Every group of the run is done, so what is still in flight is not needed, and the learner may have left.
        let all_permits =
            async { in_flight.acquire_many(MAX_BATCHES_IN_FLIGHT).await.map_err(|_| RolloutError::Died("batches")) };
        tokio::select! {
            done = self.unless_failed(all_permits) => match done {
                Ok(_all_permits) => tracing::info!("run finished"),
                Err(RolloutError::Experience(ClientError::Service { .. })) => tracing::info!("run finished, the learner has left"),
                Err(e) => return Err(e),
            },
            () = wait_for_departure(&shared) => tracing::info!("run finished, the learner has left"),
        }
        Ok(())
    }

    /// Returns the result of `work`, or the error of a task that fails in the meantime.
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

/// Waits until rewards are available or the run has ended.
async fn wait_for_rewards(shared: &WorkerShared) -> Result<()> {
    while let Some(pause) = shared.rewards.retry_pause() {
        let until = Instant::now() + pause;
        while let Some(left) = until.checked_duration_since(Instant::now()) {
            let answer = shared.experience.heartbeat(&shared.leases, HEARTBEAT_TIMEOUT).await;
            if answer.is_some_and(|answer| answer.finished) {
                return Ok(());
            }
            tokio::time::sleep(left.min(RUN_END_POLL_INTERVAL)).await;
        }
        shared.rewards.probe().await;
    }
    Ok(())
}

/// Waits until the learner has not answered for [`END_OF_RUN_GRACE`].
async fn wait_for_departure(shared: &WorkerShared) {
    let mut last_answer = Instant::now();
    while last_answer.elapsed() < END_OF_RUN_GRACE {
        tokio::time::sleep(RUN_END_POLL_INTERVAL).await;
        if shared.experience.heartbeat(&shared.leases, HEARTBEAT_TIMEOUT).await.is_some() {
            last_answer = Instant::now();
        }
    }
}

/// Sends heartbeats about the held leases until it is dropped.
async fn send_heartbeats(shared: Arc<WorkerShared>) -> Result<()> {
    loop {
        for lease in shared.experience.heartbeat(&shared.leases, HEARTBEAT_TIMEOUT).await.unwrap_or_default().lost {
            if shared.leases.contains(&lease) {
                tracing::warn!(lease, "lease lost, dropping its group");
                shared.leases.remove(&lease);
            }
        }
        tokio::time::sleep(shared.leases.heartbeat_pause()).await;
    }
}

/// Acquires the permits of one more batch: one held until it is delivered, one until it is generated.
async fn acquire_batch_permits(
    in_flight: &Arc<Semaphore>,
    generating: &Arc<Semaphore>,
) -> Result<(OwnedSemaphorePermit, OwnedSemaphorePermit)> {
    let closed = |_| RolloutError::Died("batches");
    let in_flight_permit = in_flight.clone().acquire_owned().await.map_err(closed)?;
    let generating_permit = generating.clone().acquire_owned().await.map_err(closed)?;
    Ok((in_flight_permit, generating_permit))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_have_the_configured_patience() {
        let mut config = Config::default();
        config.rollout.patience_s = 7.5;
        let options = WorkerOptions::new(config, "m".into(), "http://a".into(), "http://b".into(), "w".into());
        assert_eq!(options.patience, Duration::from_millis(7500));
    }
}
