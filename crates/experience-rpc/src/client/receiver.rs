//! The receiving end of weight sync: fetches weights newer than those it holds, verifies them, and retries if they were damaged. If the
//! service offers a broadcast, the receiver joins it, and falls back to the stream if that fails. A subscription that stays open
//! registers the worker for broadcasts.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tch::Device;
use tonic::{Code, Status, Streaming};
use unveil_proto::v1::{HeldWeights, SubscribeResponse, WeightsChunk};
use unveil_service::{Backoff, ClientOptions};

use super::broadcast::BroadcastMember;
use super::connection::{ExperienceConnection, is_permanent};
use super::error::{ClientError, Result};
use super::held_leases::Progress;
use super::weight_stream::{HeldVersion, TensorPool, WeightAssembler, WeightUpdate};

/// Attempts to fetch weights that arrive damaged.
const MAX_ATTEMPTS: usize = 3;

/// Receives weights over a separate connection, so that no lease waits behind them.
#[derive(Debug)]
pub struct WeightReceiver {
    experience: ExperienceConnection,
    held: Option<HeldVersion>,
    pool: TensorPool,
    patience: Duration,
    membership: Option<BroadcastMembership>,
    progress: Progress,
    /// Number of stream messages received so far.
    arrived: u64,
}

/// The receiver's membership in broadcast groups.
#[derive(Debug)]
struct BroadcastMembership {
    member: Arc<BroadcastMember>,
    /// Round whose broadcast group was joined; 0: none.
    round: u64,
    /// Open call that registers the worker for broadcasts.
    subscription: Option<Streaming<SubscribeResponse>>,
}

/// Reason why weights were not received.
enum ReceiveError {
    /// The broadcast failed; the stream may succeed.
    Broadcast(String),
    /// The stream has invalid content or stalled.
    Invalid(String),
    /// The service dropped the stream: a newer version exists, or it was read too slowly.
    Dropped(String),
    /// The stream was interrupted: the service or the network is temporarily unavailable.
    Interrupted(String),
}

impl WeightReceiver {
    /// Connects to a service without TLS and token; see [`WeightReceiver::connect_with`].
    ///
    /// # Errors
    /// Returns [`ClientError::Service`] if no server answers at the address.
    pub async fn connect(address: &str, worker: &str, patience: Duration) -> Result<Self> {
        Self::connect_with(address, worker, &ClientOptions::default(), patience).await
    }

    /// Connects to the experience service, retrying for `patience`. `patience` also bounds the wait for each message of a stream.
    ///
    /// # Errors
    /// Returns [`ClientError::Service`] if no server answers at the address or a certificate cannot be used.
    pub async fn connect_with(
        address: &str,
        worker: &str,
        options: &ClientOptions,
        patience: Duration,
    ) -> Result<Self> {
        let experience = ExperienceConnection::connect(address, worker, options, patience).await?;
        let progress = Progress::default();
        Ok(Self { experience, held: None, pool: TensorPool::new(), patience, membership: None, progress, arrived: 0 })
    }

    /// Receives broadcasts through `member`; `None` disables them.
    #[must_use]
    pub fn with_broadcast(self, member: Option<Arc<BroadcastMember>>) -> Self {
        Self { membership: member.map(|member| BroadcastMembership { member, round: 0, subscription: None }), ..self }
    }

    /// Counts each received message as a step of `progress`.
    #[must_use]
    pub fn with_progress(self, progress: Progress) -> Self {
        Self { progress, ..self }
    }

    /// Returns the version and checksum of the held weights.
    pub fn held(&self) -> Option<HeldWeights> {
        self.held.as_ref().map(HeldVersion::to_wire)
    }

    /// Forgets the held weights, so that all tensors are fetched next.
    pub fn forget(&mut self) {
        self.held = None;
    }

    /// Waits up to `wait` for weights newer than those held, and receives them; `None` if there are none.
    ///
    /// A stream that the service drops, for a newer version or a slow reader, is requested again; so is an interrupted one, as long as
    /// some of it arrives within the patience.
    ///
    /// # Errors
    /// Returns [`ClientError::Service`] if the service stays unreachable, and [`ClientError::Weights`] if weights arrive damaged several
    /// times or streams stay interrupted; the message names version and checksums.
    pub async fn fetch(&mut self, wait: Duration) -> Result<Option<WeightUpdate>> {
        let mut left = MAX_ATTEMPTS;
        self.subscribe().await?;
        let mut by_broadcast = true;
        let mut backoff = Backoff::default();
        let mut since = Instant::now();
        let mut before = self.arrived;
        loop {
            let membership = self.membership.as_ref().filter(|_| by_broadcast);
            let capability = membership.map(|p| p.member.broadcast_capability(p.round));
            let stream = self.experience.weights(self.held(), wait, capability).await?;
            let what = match self.receive(stream).await {
                Ok(update) => return Ok(update),
                Err(ReceiveError::Broadcast(what)) => {
                    tracing::warn!("falling back to the weight stream of {}: {what}", self.experience.address);
                    by_broadcast = false;
                    continue;
                }
                Err(ReceiveError::Dropped(what)) => {
                    tracing::warn!("requesting weights again: {what}");
                    continue;
                }
                Err(ReceiveError::Interrupted(what)) => {
                    if std::mem::replace(&mut before, self.arrived) < self.arrived {
                        (backoff, since) = (Backoff::default(), Instant::now());
                    }
                    if since.elapsed() >= self.patience {
                        return Err(ClientError::Weights { address: self.experience.address.clone(), what });
                    }
                    tracing::warn!("retrying the weight stream of {}: {what}", self.experience.address);
                    tokio::time::sleep(backoff.next_delay()).await;
                    continue;
                }
                Err(ReceiveError::Invalid(what)) => what,
            };
            left -= 1;
            if left == 0 {
                return Err(ClientError::Weights { address: self.experience.address.clone(), what });
            }
            tracing::warn!("weights from {} refused, fetching them again: {what}", self.experience.address);
            tokio::time::sleep(backoff.next_delay()).await;
        }
    }

    /// Opens the subscription that registers this worker for broadcasts, unless it is open. It ends with the connection.
    async fn subscribe(&mut self) -> Result<()> {
        let Some(membership) = &mut self.membership else { return Ok(()) };
        if let Some(subscription) = &mut membership.subscription {
            // No message is ever sent on it: it is either open or has ended.
            if tokio::time::timeout(Duration::ZERO, subscription.message()).await.is_err() {
                return Ok(());
            }
        }
        membership.subscription = Some(self.experience.subscribe().await?);
        Ok(())
    }

    async fn receive(&mut self, mut stream: Streaming<WeightsChunk>) -> Result<Option<WeightUpdate>, ReceiveError> {
        let Some(first) = self.next(&mut stream).await? else { return Ok(None) };
        let device = self.membership.as_ref().map_or(Device::Cpu, |p| p.member.device());
        let assembler = WeightAssembler::begin(&first, self.held.as_ref(), &mut self.pool, device);
        let mut assembler = assembler.map_err(ReceiveError::Invalid)?;
        let Some(offer) = assembler.broadcast() else {
            while let Some(chunk) = self.next(&mut stream).await? {
                assembler.push(&chunk).map_err(ReceiveError::Invalid)?;
            }
            return assembler.finish().map(Some).map_err(ReceiveError::Invalid);
        };
        let Some(membership) = &mut self.membership else {
            let version = assembler.version();
            return Err(ReceiveError::Invalid(format!(
                "version {version} is sent by a broadcast that was not requested"
            )));
        };
        let round = offer.round;
        // A failed broadcast leaves the worker without a broadcast group.
        membership.round = 0;
        let update = membership.member.receive(offer, assembler).await.map_err(ReceiveError::Broadcast)?;
        membership.round = round;
        Ok(Some(update))
    }

    async fn next(&mut self, stream: &mut Streaming<WeightsChunk>) -> Result<Option<WeightsChunk>, ReceiveError> {
        let classify = |e: Status| match e.code() {
            Code::Aborted => ReceiveError::Dropped(format!("the weight stream was dropped: {}", e.message())),
            code if is_permanent(code) => {
                ReceiveError::Invalid(format!("the weight stream failed: {code:?}: {}", e.message()))
            }
            code => ReceiveError::Interrupted(format!("the weight stream was interrupted: {code:?}: {}", e.message())),
        };
        match tokio::time::timeout(self.patience, stream.message()).await {
            Ok(message) => {
                if matches!(message, Ok(Some(_))) {
                    self.arrived += 1;
                    self.progress.advance();
                }
                message.map_err(classify)
            }
            Err(_) => {
                let what = format!("the weight stream stalled for {:.0} s", self.patience.as_secs_f64());
                Err(ReceiveError::Invalid(what))
            }
        }
    }

    /// Records `update` as the held weights; the next update reuses its memory.
    pub fn adopt(&mut self, update: WeightUpdate) {
        self.held = Some(HeldVersion { version: update.version, sums: update.sums });
        self.pool.extend(update.tensors);
    }
}
