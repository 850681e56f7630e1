//! The receiving end of weight sync: asks for what is newer than the weights it holds, checks it, asks again when it was damaged.
//! Where the service offers a broadcast, it takes part; when that fails, it asks for the stream. A call that stays open tells the
//! service that it can be counted on.
//! Must not know: the engine.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tch::Device;
use tonic::{Code, Status, Streaming};
use unveil_proto::v1::{FollowResponse, HeldWeights, WeightsChunk};
use unveil_service::{Backoff, ClientOptions};

use crate::experience::{Experience, permanent};
use crate::hand::Progress;
use crate::weights::{Assembly, Known, Pool};
use crate::{Result, RolloutError};

pub use crate::broadcast::Member;
pub use crate::weights::Update;

/// How often weights that arrived damaged are asked for again.
const TRIES: usize = 3;

/// Receives weights over a connection of its own, so that no lease waits behind them.
pub struct WeightReceiver {
    experience: Experience,
    known: Option<Known>,
    pool: Pool,
    patience: Duration,
    place: Option<Place>,
    progress: Progress,
    /// Messages of streams that came.
    arrived: u64,
}

/// Its place in broadcasts.
struct Place {
    member: Arc<Member>,
    /// The round whose world it is in; 0 = none.
    round: u64,
    /// The call that tells that it takes part.
    following: Option<Streaming<FollowResponse>>,
}

/// Why nothing arrived.
enum Fault {
    /// By broadcast; the stream may do better.
    Broadcast(String),
    Stream(String),
    /// The service dropped the stream: there is a newer version, or it was read too slowly.
    Dropped(String),
    /// The stream broke off: the service, or the way to it, is gone for a while.
    Broken(String),
}

impl WeightReceiver {
    /// [`WeightReceiver::connect_with`] to a service without TLS and token.
    ///
    /// # Errors
    /// As there.
    pub async fn connect(address: &str, worker: &str, patience: Duration) -> Result<Self> {
        Self::connect_with(address, worker, &ClientOptions::default(), patience).await
    }

    /// Connects to the experience service, trying until `patience` is over. No message of a stream may take longer either.
    ///
    /// # Errors
    /// Nobody answers at the address, or a certificate cannot be used.
    pub async fn connect_with(
        address: &str,
        worker: &str,
        options: &ClientOptions,
        patience: Duration,
    ) -> Result<Self> {
        let experience = Experience::connect(address, worker, options, patience).await?;
        let progress = Progress::default();
        Ok(Self { experience, known: None, pool: Pool::new(), patience, place: None, progress, arrived: 0 })
    }

    /// Takes part in broadcasts through `member`, or not any more.
    #[must_use]
    pub fn with_broadcast(self, member: Option<Arc<Member>>) -> Self {
        Self { place: member.map(|member| Place { member, round: 0, following: None }), ..self }
    }

    /// Tells `progress` of each message that arrives.
    #[must_use]
    pub(crate) fn with_progress(self, progress: Progress) -> Self {
        Self { progress, ..self }
    }

    /// What is held.
    pub fn held(&self) -> Option<HeldWeights> {
        self.known.as_ref().map(Known::held)
    }

    /// Forgets what is held: all tensors are fetched next.
    pub fn forget(&mut self) {
        self.known = None;
    }

    /// Waits up to `wait` for weights newer than those held, and receives them. None when there are none.
    ///
    /// # Errors
    /// The service stayed unreachable, or weights arrived damaged several times; the message names version and checksums. A stream that
    /// the service drops, for a newer version or a slow reader, is asked for again; so is one that breaks off, while some of it arrives
    /// within the patience.
    pub async fn fetch(&mut self, wait: Duration) -> Result<Option<Update>> {
        let mut left = TRIES;
        self.follow().await?;
        let mut by_broadcast = true;
        let (mut backoff, mut since, mut before) = (Backoff::default(), Instant::now(), self.arrived);
        loop {
            let place = self.place.as_ref().filter(|_| by_broadcast);
            let joins = place.map(|p| p.member.joins(p.round));
            let stream = self.experience.weights(self.held(), wait, joins).await?;
            let what = match self.receive(stream).await {
                Ok(found) => return Ok(found),
                Err(Fault::Broadcast(what)) => {
                    tracing::warn!("{what}; the weights are fetched from {} instead", self.experience.address);
                    by_broadcast = false;
                    continue;
                }
                Err(Fault::Dropped(what)) => {
                    tracing::warn!("{what}");
                    continue;
                }
                Err(Fault::Broken(what)) => {
                    if std::mem::replace(&mut before, self.arrived) < self.arrived {
                        (backoff, since) = (Backoff::default(), Instant::now());
                    }
                    if since.elapsed() >= self.patience {
                        return Err(RolloutError::Weights { address: self.experience.address.clone(), what });
                    }
                    tracing::warn!("weights from {} are asked for again: {what}", self.experience.address);
                    tokio::time::sleep(backoff.draw()).await;
                    continue;
                }
                Err(Fault::Stream(what)) => what,
            };
            left -= 1;
            if left == 0 {
                return Err(RolloutError::Weights { address: self.experience.address.clone(), what });
            }
            tracing::warn!("weights from {} are refused and asked for again: {what}", self.experience.address);
            tokio::time::sleep(backoff.draw()).await;
        }
    }

    /// Has the call open by which the service counts on this worker; it ends with the connection.
    async fn follow(&mut self) -> Result<()> {
        let Some(place) = &mut self.place else { return Ok(()) };
        if let Some(following) = &mut place.following {
            // Nothing ever comes by it: it stands, or it has ended.
            if tokio::time::timeout(Duration::ZERO, following.message()).await.is_err() {
                return Ok(());
            }
        }
        place.following = Some(self.experience.follow().await?);
        Ok(())
    }

    async fn receive(&mut self, mut stream: Streaming<WeightsChunk>) -> Result<Option<Update>, Fault> {
        let Some(first) = self.next(&mut stream).await? else { return Ok(None) };
        let device = self.place.as_ref().map_or(Device::Cpu, |p| p.member.device());
        let begun = Assembly::begin(&first, self.known.as_ref(), &mut self.pool, device);
        let mut assembly = begun.map_err(Fault::Stream)?;
        let Some(ticket) = assembly.broadcast() else {
            while let Some(chunk) = self.next(&mut stream).await? {
                assembly.push(&chunk).map_err(Fault::Stream)?;
            }
            return assembly.finish().map(Some).map_err(Fault::Stream);
        };
        let Some(place) = &mut self.place else {
            let version = assembly.version();
            return Err(Fault::Stream(format!("version {version} came by a broadcast that was not asked for")));
        };
        let round = ticket.round;
        // In no world, if nothing comes of it.
        place.round = 0;
        let update = place.member.receive(ticket, assembly).await.map_err(Fault::Broadcast)?;
        place.round = round;
        Ok(Some(update))
    }

    async fn next(&mut self, stream: &mut Streaming<WeightsChunk>) -> Result<Option<WeightsChunk>, Fault> {
        let broken = |e: Status| match e.code() {
            Code::Aborted => Fault::Dropped(format!("the stream of weights was dropped: {}", e.message())),
            code if permanent(code) => Fault::Stream(format!("the stream broke off: {code:?}: {}", e.message())),
            code => Fault::Broken(format!("the stream broke off: {code:?}: {}", e.message())),
        };
        match tokio::time::timeout(self.patience, stream.message()).await {
            Ok(message) => {
                if matches!(message, Ok(Some(_))) {
                    self.arrived += 1;
                    self.progress.step();
                }
                message.map_err(broken)
            }
            Err(_) => Err(Fault::Stream(format!("the stream stood still for {:.0} s", self.patience.as_secs_f64()))),
        }
    }

    /// The update is what is held from here on; its memory is used for the next one.
    pub fn taken(&mut self, update: Update) {
        self.known = Some(Known { version: update.version, sums: update.sums });
        self.pool.extend(update.tensors);
    }
}
