//! The reward service as a worker sees it: connected to when it is first needed, and waited for while it is away. Groups that it could
//! not be had for are given back, never scored as nothing; meanwhile the worker leases none and is not ready.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rand::Rng;
use tokio::sync::OnceCell;
use unveil_config::{Config, schema};
use unveil_core::Breakdown;
use unveil_proto::v1;
use unveil_reward::{RewardClient, RewardError, Unscored, out_of_reach};
use unveil_service::{ClientOptions, connect_with};

use crate::meter::Meter;
use crate::ready::Ready;
use crate::{Result, RolloutError};

/// First and longest wait before an absent service is asked again.
const WAITS: [Duration; 2] = [Duration::from_millis(500), Duration::from_secs(30)];
/// How long one question whether it is back may take.
const PROBE: Duration = Duration::from_secs(5);

/// The reward service.
pub(crate) struct Rewards {
    address: String,
    options: ClientOptions,
    deadline: Duration,
    client: OnceCell<RewardClient>,
    reward: schema::Reward,
    away: Mutex<Away>,
    ready: Ready,
    meter: Meter,
}

/// The present absence.
#[derive(Debug, Default)]
struct Away {
    /// Times in a row that it was found away.
    times: u32,
    /// None while it answers.
    why: Option<String>,
}

impl Rewards {
    /// Errors when the address can never be one, or a certificate is not there.
    pub async fn new(
        address: &str,
        options: ClientOptions,
        config: &Config,
        (ready, meter): (Ready, Meter),
    ) -> Result<Self> {
        let deadline = Duration::from_secs_f64(config.reward.deadline_s);
        if let Err(e) = connect_with(address, &options, Duration::ZERO).await
            && e.is_permanent()
        {
            return Err(RolloutError::Service { role: "reward", address: address.to_owned(), source: Box::new(e) });
        }
        let (address, reward, away) = (address.to_owned(), config.reward.clone(), Mutex::default());
        Ok(Self { address, options, deadline, client: OnceCell::new(), reward, away, ready, meter })
    }

    /// Bytes of the largest message that the service takes.
    pub fn most_bytes(&self) -> usize {
        self.reward.service.max_message_mib << 20
    }

    /// One breakdown per response.
    ///
    /// # Errors
    /// There are none, and whose fault it is. Where it is the service's, it counts as away from here on.
    pub async fn score(&self, request: v1::ScoreRequest) -> Result<Vec<Breakdown>, Unscored> {
        let start = Instant::now();
        let answered = match self.client(self.deadline).await {
            Ok(client) => client.try_score(request, self.deadline.saturating_sub(start.elapsed())).await,
            Err(away) => Err(away),
        };
        // It may have answered that all who could say something are away themselves.
        let scored = answered.and_then(|breakdowns| match out_of_reach(&breakdowns, &self.reward) {
            Some(why) => Err(Unscored::Away(why)),
            None => Ok(breakdowns),
        });
        match &scored {
            Ok(_) => self.answered(),
            Err(Unscored::Away(why)) => self.missed(why, false),
            Err(Unscored::Refused(_)) => {}
        }
        scored
    }

    /// Every group waits for the connection at the same time, none behind another.
    async fn client(&self, within: Duration) -> Result<&RewardClient, Unscored> {
        let connecting = self.client.get_or_try_init(async || {
            let client = RewardClient::connect_with(&self.address, &self.options, within).await?;
            Ok::<_, RewardError>(client.at_most(self.most_bytes()))
        });
        match tokio::time::timeout(within, connecting).await {
            Ok(Ok(client)) => Ok(client),
            Ok(Err(e)) => Err(Unscored::Away(e.to_string())),
            Err(_) => {
                let what = format!("no connection to {} within {:.1} s", self.address, within.as_secs_f64());
                Err(Unscored::Away(what))
            }
        }
    }

    /// How long to leave an absent service alone, with some chance so that workers do not come in step; none where it is not away.
    pub fn pause(&self) -> Option<Duration> {
        let away = self.lock();
        let why = away.why.clone()?;
        let [first, most] = WAITS;
        let full = first.saturating_mul(1 << away.times.saturating_sub(1).min(16)).min(most);
        drop(away);
        let pause = full.mul_f64(rand::rng().random_range(0.5..1.0));
        tracing::warn!(
            "not ready: no rewards can be had from {}: {why}. Groups are given back; it is asked again in {:.1} s",
            self.address,
            pause.as_secs_f64()
        );
        Some(pause)
    }

    /// Asks an absent service whether it is back.
    pub async fn ask(&self) {
        let asked = match self.client(PROBE).await {
            Ok(client) => client.probe(PROBE).await,
            Err(away) => Err(away),
        };
        match asked {
            Ok(()) => {
                tracing::info!("the reward service at {} answers again", self.address);
                self.lock().why = None;
                self.tell(true);
            }
            Err(e) => self.missed(&e.to_string(), true),
        }
    }

    fn answered(&self) {
        let was = std::mem::take(&mut *self.lock());
        if was.why.is_some() {
            self.tell(true);
        }
    }

    /// Groups that were under way together find one absence; a question finds out that it goes on.
    fn missed(&self, why: &str, asked: bool) {
        let mut away = self.lock();
        if away.why.replace(why.to_owned()).is_none() || asked {
            away.times = away.times.saturating_add(1);
        }
        drop(away);
        self.tell(false);
    }

    fn tell(&self, back: bool) {
        self.ready.rewards(back);
        self.meter.rewards(back);
    }

    fn lock(&self) -> MutexGuard<'_, Away> {
        self.away.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
