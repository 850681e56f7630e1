//! Connection of a worker to the reward service, opened on first use. While the service is unavailable, unscored groups are released and
//! never scored as 0, and the worker leases no groups and is not ready.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rand::Rng;
use tokio::sync::OnceCell;
use unveil_config::{Config, schema};
use unveil_core::Breakdown;
use unveil_proto::v1;
use unveil_reward::{RewardClient, RewardError, Unscored, unavailable_reason};
use unveil_service::{ClientOptions, connect_with};

use crate::meter::Meter;
use crate::readiness::Readiness;
use crate::{Result, RolloutError};

/// Wait before the first retry of an unavailable service.
const MIN_RETRY_WAIT: Duration = Duration::from_millis(500);
/// Longest wait between two retries.
const MAX_RETRY_WAIT: Duration = Duration::from_secs(30);
/// Timeout of one probe.
const PROBE_TIMEOUT: Duration = Duration::from_secs(5);

/// Connection to the reward service.
pub(crate) struct RewardConnection {
    address: String,
    options: ClientOptions,
    deadline: Duration,
    client: OnceCell<RewardClient>,
    reward: schema::Reward,
    outage: Mutex<Outage>,
    readiness: Readiness,
    meter: Meter,
}

/// Current outage of the service.
#[derive(Debug, Default)]
struct Outage {
    /// Consecutive failures.
    failures: u32,
    /// Reason of the last failure; `None` while the service answers.
    why: Option<String>,
}

impl RewardConnection {
    /// Creates a connection that is opened on first use.
    ///
    /// # Errors
    /// Returns [`RolloutError::Reward`] if the address is invalid or a certificate cannot be used.
    pub(crate) async fn new(
        address: &str,
        options: ClientOptions,
        config: &Config,
        (readiness, meter): (Readiness, Meter),
    ) -> Result<Self> {
        let deadline = Duration::from_secs_f64(config.reward.deadline_s);
        if let Err(e) = connect_with(address, &options, Duration::ZERO).await
            && e.is_permanent()
        {
            return Err(RolloutError::Reward { address: address.to_owned(), source: Box::new(e) });
        }
        let address = address.to_owned();
        let reward = config.reward.clone();
        let outage = Mutex::default();
        Ok(Self { address, options, deadline, client: OnceCell::new(), reward, outage, readiness, meter })
    }

    /// Returns the size limit of messages to the service, in bytes.
    pub(crate) fn max_message_bytes(&self) -> usize {
        self.reward.service.max_message_mib << 20
    }

    /// Scores a group; returns one breakdown per response.
    ///
    /// # Errors
    /// Returns [`Unscored::Unavailable`] if the service or one of its scorers is unavailable, which starts an outage, and
    /// [`Unscored::Refused`] if the group cannot be scored.
    pub(crate) async fn score(&self, request: v1::ScoreRequest) -> Result<Vec<Breakdown>, Unscored> {
        let start = Instant::now();
        let answered = match self.client(self.deadline).await {
            Ok(client) => client.try_score(request, self.deadline.saturating_sub(start.elapsed())).await,
            Err(unavailable) => Err(unavailable),
        };
        // The service may answer while the scorers behind it are unavailable.
        let scored = answered.and_then(|breakdowns| match unavailable_reason(&breakdowns, &self.reward) {
            Some(why) => Err(Unscored::Unavailable(why)),
            None => Ok(breakdowns),
        });
        match &scored {
            Ok(_) => self.record_success(),
            Err(Unscored::Unavailable(why)) => self.record_failure(why, false),
            Err(Unscored::Refused(_)) => {}
        }
        scored
    }

    /// Returns the client; concurrent groups share one attempt to connect.
    async fn client(&self, within: Duration) -> Result<&RewardClient, Unscored> {
        let connecting = self.client.get_or_try_init(async || {
            let client = RewardClient::connect_with(&self.address, &self.options, within).await?;
            Ok::<_, RewardError>(client.with_message_limit(self.max_message_bytes()))
        });
        match tokio::time::timeout(within, connecting).await {
            Ok(Ok(client)) => Ok(client),
            Ok(Err(e)) => Err(Unscored::Unavailable(e.to_string())),
            Err(_) => {
                let what = format!("no connection to {} within {:.1} s", self.address, within.as_secs_f64());
                Err(Unscored::Unavailable(what))
            }
        }
    }

    /// Returns the time until the next probe of an unavailable service, with jitter so that workers do not probe simultaneously; `None`
    /// if it is available.
    pub(crate) fn retry_pause(&self) -> Option<Duration> {
        let outage = self.lock();
        let why = outage.why.clone()?;
        let full = MIN_RETRY_WAIT.saturating_mul(1 << outage.failures.saturating_sub(1).min(16)).min(MAX_RETRY_WAIT);
        drop(outage);
        let pause = full.mul_f64(rand::rng().random_range(0.5..1.0));
        tracing::warn!(
            "rewards from {} unavailable, releasing groups and retrying in {:.1} s: {why}",
            self.address,
            pause.as_secs_f64()
        );
        Some(pause)
    }

    /// Probes an unavailable service.
    pub(crate) async fn probe(&self) {
        let probed = match self.client(PROBE_TIMEOUT).await {
            Ok(client) => client.probe(PROBE_TIMEOUT).await,
            Err(unavailable) => Err(unavailable),
        };
        match probed {
            Ok(()) => {
                tracing::info!("reward service at {} available again", self.address);
                self.lock().why = None;
                self.publish(true);
            }
            Err(e) => self.record_failure(&e.to_string(), true),
        }
    }

    fn record_success(&self) {
        let ended = std::mem::take(&mut *self.lock());
        if ended.why.is_some() {
            self.publish(true);
        }
    }

    /// Records a failure. Failures of concurrent groups count once per outage; every failed probe counts.
    fn record_failure(&self, why: &str, by_probe: bool) {
        let mut outage = self.lock();
        if outage.why.replace(why.to_owned()).is_none() || by_probe {
            outage.failures = outage.failures.saturating_add(1);
        }
        drop(outage);
        self.publish(false);
    }

    fn publish(&self, available: bool) {
        self.readiness.set_rewards_available(available);
        self.meter.set_rewards_available(available);
    }

    fn lock(&self) -> MutexGuard<'_, Outage> {
        self.outage.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
