//! The worker's loop: lease, weights, prepare, generate; scoring and submitting run beside the next batch's generation.

use std::collections::HashSet;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::task::JoinSet;
use unveil_config::Config;
use unveil_data::prepare::Preparer;
use unveil_proto::v1::LeaseResponse;
use unveil_proto::v1::submit_response::Verdict;
use unveil_service::CancellationToken;

use crate::device::{DeviceSpec, DeviceThread};
use crate::experience::Experience;
use crate::groups::{Leased, Rewards, deliver, prepare};
use crate::{Result, RolloutError};

/// Batches that may be scored and submitted while another is generated.
const BATCHES_BEHIND: usize = 1;

/// Shortest time between two leases that brought nothing.
const IDLE: Duration = Duration::from_millis(20);

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
}

impl WorkerOptions {
    /// Options with the usual patience (60 s) and wait (2 s).
    pub fn new(config: Config, model_dir: PathBuf, experience: String, reward: String, worker: String) -> Self {
        let (patience, wait) = (Duration::from_secs(60), Duration::from_secs(2));
        Self { config, model_dir, experience, reward, worker, patience, wait }
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

#[derive(Default)]
struct Counters {
    accepted: AtomicU64,
    refused: AtomicU64,
    tokens: AtomicU64,
    weights: AtomicU64,
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

/// What the loop and its deliveries share.
struct Shared {
    experience: Experience,
    rewards: Rewards,
    preparer: Arc<Preparer>,
    held: Held,
    counters: Counters,
}

/// Runs a worker until the run is over, `shutdown` is cancelled (leases are handed back, `Ok`), or it cannot go on.
///
/// # Errors
/// The model directory cannot be used; the experience service stayed unreachable (the message names its address) or sent
/// something that does not hold together; weights arrived damaged; a leased record cannot be prepared.
pub async fn run(options: WorkerOptions, shutdown: CancellationToken) -> Result<WorkerReport> {
    let cancel = Arc::new(AtomicBool::new(false));
    let starting = start(&options, &cancel);
    let (shared, device) = tokio::select! {
        started = starting => started?,
        () = shutdown.cancelled() => return Ok(WorkerReport::default()),
    };
    let mut worker = Worker { options, shared: Arc::new(shared), device, version: None, behind: JoinSet::new() };
    let outcome = tokio::select! {
        done = worker.work() => done.map(|()| true),
        () = shutdown.cancelled() => {
            tracing::info!("asked to stop");
            Ok(false)
        }
    };
    cancel.store(true, Ordering::Relaxed);
    worker.behind.shutdown().await;
    let held = worker.shared.held.take();
    if !held.is_empty() {
        tracing::info!("handing {} lease(s) back", held.len());
        worker.shared.experience.release(held).await;
    }
    worker.device.close().await;
    let c = &worker.shared.counters;
    let get = |a: &AtomicU64| a.load(Ordering::Relaxed);
    outcome.map(|finished| WorkerReport {
        accepted: get(&c.accepted),
        refused: get(&c.refused),
        tokens: get(&c.tokens),
        weights: get(&c.weights),
        finished,
    })
}

async fn start(options: &WorkerOptions, cancel: &Arc<AtomicBool>) -> Result<(Shared, DeviceThread)> {
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
    let rewards = Rewards::new(&options.reward, Duration::from_secs_f64(config.reward.deadline_s)).await?;
    let experience = Experience::connect(&options.experience, &options.worker, options.patience).await?;
    tracing::info!("worker {} leases from {}", options.worker, options.experience);
    let shared = Shared {
        experience,
        rewards,
        preparer: Arc::new(preparer),
        held: Held::default(),
        counters: Counters::default(),
    };
    Ok((shared, device))
}

struct Worker {
    options: WorkerOptions,
    shared: Arc<Shared>,
    device: DeviceThread,
    /// Version of the weights on the device; none until the experience service was asked.
    version: Option<u64>,
    behind: JoinSet<Result<()>>,
}

impl Worker {
    async fn work(&mut self) -> Result<()> {
        loop {
            while self.behind.len() > BATCHES_BEHIND {
                self.reap().await?;
            }
            let start = Instant::now();
            let (lease, was_away) = self.lease().await?;
            if was_away {
                // It may be another learner now, whose version of the same number is not ours.
                self.version = None;
            }
            self.shared.held.add(lease.groups.iter().map(|g| g.lease.clone()));
            if lease.groups.is_empty() {
                if lease.finished {
                    break;
                }
                tokio::time::sleep(IDLE.saturating_sub(start.elapsed())).await;
                continue;
            }
            self.refresh(&lease).await?;
            self.generate(lease).await?;
        }
        while !self.behind.is_empty() {
            self.reap().await?;
        }
        tracing::info!("the run is over");
        Ok(())
    }

    /// The next lease, while deliveries go on.
    async fn lease(&mut self) -> Result<(LeaseResponse, bool)> {
        let leasing = self.shared.experience.lease(self.options.config.rollout.groups_per_lease, self.options.wait);
        tokio::pin!(leasing);
        loop {
            tokio::select! {
                leased = &mut leasing => return leased,
                // A failed delivery ends the worker at once. The call goes on otherwise: dropped, its leases would be lost.
                Some(done) = self.behind.join_next() => done.map_err(|_| RolloutError::Died("delivery"))??,
            }
        }
    }

    /// Waits for one batch behind.
    async fn reap(&mut self) -> Result<()> {
        match self.behind.join_next().await {
            Some(done) => done.map_err(|_| RolloutError::Died("delivery"))?,
            None => Ok(()),
        }
    }

    /// Brings the weights to the version that the lease speaks of.
    async fn refresh(&mut self, lease: &LeaseResponse) -> Result<()> {
        let need = lease.groups.iter().map(|g| g.min_version).max().unwrap_or(0).max(lease.version);
        if self.version == Some(need) {
            return Ok(());
        }
        // Newer than the service's newest: made by a learner that has since been resumed from an older state.
        let have = self.version.filter(|v| *v < need);
        let experience = &self.shared.experience;
        let protocol = |what: String| RolloutError::Protocol { address: experience.address.clone(), what };
        match experience.weights(have).await? {
            Some((version, bytes)) => {
                let size = bytes.len();
                if let Err(what) = self.device.load(version, bytes).await? {
                    return Err(RolloutError::Weights { address: experience.address.clone(), what });
                }
                tracing::debug!(version, size, "new weights");
                self.version = Some(version);
                self.shared.counters.weights.fetch_add(1, Ordering::Relaxed);
            }
            // Nothing newer than the model directory, which is version 0.
            None if have.is_none() && need == 0 => self.version = Some(0),
            None => {}
        }
        match self.version {
            Some(v) if v >= need => Ok(()),
            v => Err(protocol(format!("leases groups for weights of version {need} and sends version {v:?}"))),
        }
    }

    /// Generates the leased groups and hands them over to their delivery.
    async fn generate(&mut self, lease: LeaseResponse) -> Result<()> {
        let shared = self.shared.clone();
        let (question, address) = (self.options.config.data.question.clone(), self.options.experience.clone());
        let prepared = tokio::task::spawn_blocking(move || {
            lease
                .groups
                .into_iter()
                .map(|g| prepare(&shared.preparer, g, &question, &address))
                .collect::<Result<Vec<_>>>()
        });
        let prepared = prepared.await.map_err(|_| RolloutError::Died("preparation"))??;
        let (leased, requests): (Vec<Leased>, Vec<_>) = prepared.into_iter().unzip();
        debug_assert!(leased.iter().all(|l| Some(l.min_version) <= self.version));
        let made = self.device.generate(requests).await?;
        // A batch is generated as one; each group bears its share.
        let each_ms = made.ms / leased.len().max(1) as f64;
        let shared = self.shared.clone();
        self.behind.spawn(async move {
            let mut deliveries = JoinSet::new();
            for (leased, output) in leased.into_iter().zip(made.outputs) {
                deliveries.spawn(one_delivery(shared.clone(), leased, output, each_ms));
            }
            while let Some(done) = deliveries.join_next().await {
                done.map_err(|_| RolloutError::Died("delivery"))??;
            }
            Ok(())
        });
        Ok(())
    }
}

async fn one_delivery(shared: Arc<Shared>, leased: Leased, output: unveil_engine::GroupOutput, ms: f64) -> Result<()> {
    let done = deliver(&shared.experience, &shared.rewards, &shared.preparer, &leased, output, ms).await?;
    let Some(done) = done else { return Ok(()) };
    shared.held.remove(&leased.lease);
    let c = &shared.counters;
    c.tokens.fetch_add(done.tokens, Ordering::Relaxed);
    if done.verdict == Verdict::Accepted {
        c.accepted.fetch_add(1, Ordering::Relaxed);
    } else {
        c.refused.fetch_add(1, Ordering::Relaxed);
        tracing::warn!(lease = leased.lease, "a group was not counted: {}", done.verdict.as_str_name());
    }
    Ok(())
}
